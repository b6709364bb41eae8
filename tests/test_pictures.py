"""The page of inspection pictures against the figures that it is written from, and how these come about."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.conftest import ROOT
from vae_ood import UserError, pictures

RESULTS = ROOT / "results"


def test_the_page_says_what_the_figures_say():
    assert (RESULTS / "pictures.md").read_text() == pictures.page(RESULTS / "pictures"), (
        "run python -m vae_ood.pictures")
    runs = [json.loads(path.read_text()) for path in sorted((RESULTS / "pictures").glob("seed*.json"))]
    assert len(runs) == pictures.SEEDS
    padim = json.loads((RESULTS / "pictures/padim.json").read_text())["mean"]
    auroc, pixel = (np.mean([pick(run["pictures"]["all"]) for run in runs]) for pick in (
        lambda row: row["auroc"], lambda row: row["pixels"]["auroc"]))
    quoted = " ".join((ROOT / "README.md").read_text().split())
    assert (f"an AUROC of {auroc:.2f} (PaDiM, with features from ImageNet: {padim['pictures']['auroc']:.2f}), but maps "
            f"them less exactly ({pixel:.2f}, {padim['pixels']['pixel_auroc_defect_and_held_out']:.2f})") in quoted


def test_pixels_are_judged_as_by_the_definitions():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    ordinary, maps = [rng.standard_normal((9, 7)) for _ in range(3)], [rng.standard_normal((8, 8)) for _ in range(2)]
    masks = [np.zeros((8, 8), bool) for _ in range(2)]
    masks[0][1:3, 1:4] = masks[0][6:, 6:] = masks[1][2:5, 2:5] = True
    for one, mask in zip(maps, masks, strict=True):
        one[mask] += 1
    found = pictures.pixels(ordinary, maps, masks)
    values = np.concatenate([one.ravel() for one in (*ordinary, *maps)])
    odd = np.concatenate([np.zeros(3 * 63, bool), *(mask.ravel() for mask in masks)])
    assert found["auroc"] == pytest.approx(roc_auc_score(odd, values)) and found["regions"] == 3
    regions = [maps[0][1:3, 1:4], maps[0][6:, 6:], maps[1][2:5, 2:5]]
    others = np.sort(values[~odd])[::-1]
    expected = []
    for share in np.linspace(0, 0.3, 61):
        limit = others[max(0, int(np.floor(len(others) * share + 1e-9)) - 1)]  # as many, at most, reach it
        expected.append(np.mean([(region > limit).mean() for region in regions]))
    assert found["aupro"] == pytest.approx(np.mean(expected), abs=0.02)


def test_missing_pictures_are_told_in_a_line(tmp_path):
    with pytest.raises(UserError, match="no magnetic tiles"):
        pictures.found(tmp_path)
