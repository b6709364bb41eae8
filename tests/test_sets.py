"""The page of sets against the figures that it is written from, and how these come about."""

import json

import numpy as np

from tests.conftest import ROOT
from tests.test_detector import detector, pictures  # noqa: F401 a fixture
from vae_ood import sets
from vae_ood.data.images import Images

RESULTS = ROOT / "results"


def test_the_page_says_what_the_figures_say():
    text = sets.page(json.loads((RESULTS / "sets.json").read_text()))
    assert (RESULTS / "sets.md").read_text() == text, "run python -m vae_ood.sets"
    library = (ROOT / "vae_ood/README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 6 and all(row in library for row in rows)  # quoted as they are


def test_sets_that_are_unlike_are_seen_more_often(detector):  # noqa: F811
    views = {name: detector.look(Images(name, pixels)).views[0] for name, pixels in (
        ("test", pictures(160, 31)), ("shifted", (pictures(60, 32).float() * 0.9 + 12).byte()))}
    found = sets.draw(views, sizes=(5, 20), ordinary=20, unlike=10, calibrating=100)
    assert [len(found[name][size]) for name in found for size in (5, 20)] == [20, 20, 10, 10]
    assert np.mean(np.array(found["test"][20]) <= 0.05) < 0.3 and np.mean(np.array(found["shifted"][20]) <= 0.05) > 0.7
    page = sets.page({"ordinary": 20, "unlike": 10, "p": found})
    assert "| shifted | " in page and "| ordinary: CIFAR-10 test | " in page
