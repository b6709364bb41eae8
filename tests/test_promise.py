"""The promised false-alarm rate, realised on things of several pictures, and by what it would be broken.

Each check is run for mutants too, and must then fail: a check that no fault fails has not been made.
"""

import functools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from vae_ood import UserError, detector, member, promise, scoring
from vae_ood.data import groups
from vae_ood.data.images import Images
from vae_ood.data.likeness import digests
from vae_ood.likelihood import evaluate
from vae_ood.metrics import confident_rank, conformal_p_values
from vae_ood.model import VAE
from vae_ood.scores import SCORES

DRAWS = 1000
RESULTS = ROOT / "results"


def by_thing(calibration, scores, label):
    return conformal_p_values((calibration, label, scores))


def things(rng, n, decimals=12, sizes=20):
    """The scores of n things of 1 to `sizes` pictures, which share an effect twice as large as a picture's own, and
    their groups."""
    label = np.repeat(np.arange(n), rng.integers(1, sizes + 1, n))
    return (2 * rng.standard_normal(n)[label] + rng.standard_normal(len(label))).round(decimals), label


def realised(things_held_out, rate, p_values=by_thing, **options):
    """The mean share, over DRAWS calibrations, of a new thing's pictures with p <= rate, and its standard error."""
    rng, shares = np.random.default_rng(int(1000 * rate) + things_held_out), []
    for _ in range(DRAWS):
        score, label = things(rng, things_held_out + 1, **options)
        new = label == things_held_out
        shares.append((p_values(score[~new], score[new], label[~new]) <= rate).mean())
    return np.mean(shares), np.std(shares) / math.sqrt(DRAWS)


def never_above(rate, share, error):
    return share <= rate + 2 * error


@pytest.mark.parametrize("options", [{}, {"decimals": 0}, {"decimals": -1}], ids=["distinct", "tied", "mostly tied"])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("held_out", [12, 24, 99])
def test_of_new_things_no_more_than_promised_are_flagged(held_out, rate, options):
    assert never_above(rate, *realised(held_out, rate, **options))


def test_not_much_less_either():
    assert realised(99, 0.05)[0] >= 0.025


@pytest.mark.parametrize(("held_out", "rate"), [(19, 0.05), (30, 0.1), (99, 0.01), (24, 0.05)])
def test_of_single_pictures_exactly_as_many_as_promised_are_flagged(held_out, rate):
    share, error = realised(held_out, rate, sizes=1)
    assert abs(share - math.floor(rate * (held_out + 1) + 1e-9) / (held_out + 1)) <= 2 * error


@pytest.mark.parametrize(("mutant", "held_out", "options"), [
    (lambda calibration, scores, label: by_thing(calibration, scores, np.arange(len(label))), 12, {}),  # pictures count
    (lambda calibration, scores, label: by_thing(calibration, scores + 1e-9, label), 24, {"decimals": -1})])  # > for >=
def test_mutants_flag_more_than_promised(mutant, held_out, options):
    assert not never_above(0.05, *realised(held_out, 0.05, mutant, **options))


@pytest.mark.parametrize("sizes", [1, 20])
def test_with_confidence_the_rate_is_exceeded_as_seldom_as_asked(sizes):
    rng, exceeded, held_out = np.random.default_rng(3), [], 59
    rank = confident_rank(held_out, 0.05, 0.95)
    population, _ = things(rng, 4000, sizes=1)
    for _ in range(DRAWS):
        score, label = things(rng, held_out, sizes=sizes)
        rate = (by_thing(score, population, label) <= rank / (held_out + 1) + 1e-12).mean()
        exceeded.append(rate > 0.05)
    assert np.mean(exceeded) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / DRAWS)


# ---- the page of what was measured

def test_the_page_says_what_the_json_files_say():
    assert (RESULTS / "promise.md").read_text() == promise.page(RESULTS), "run python -m vae_ood.promise"
    assert {path.stem for path in (RESULTS / "promise").glob("*.json")} == {
        *promise.cases(), "same_parts", "near_copies"}


def test_the_readme_quotes_the_page():
    def flagged(pattern):
        runs = [json.loads(path.read_text()) for path in (RESULTS / "promise").glob(f"{pattern}.json")]
        return [100 * run["flagged"] / run["n"] for run in runs]
    section = (ROOT / "README.md").read_text().split("## Your own images")[1].split("\n## ")[0]
    for pattern, words in (("tiles_given_folders_none_s?", "flagged {:.0f} to {:.0f}% of the ordinary"),
                           ("tiles_*_folders_s?", "it flags {:.1f} to {:.1f}%")):
        rates = flagged(pattern)
        assert words.format(min(rates), max(rates)) in " ".join(section.split())


def test_a_changed_number_changes_the_page(tmp_path):
    shutil.copytree(RESULTS / "promise", tmp_path / "promise")
    path = tmp_path / "promise" / "tiles_given_folders_s0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flagged": 200}))
    assert "1 above it" in promise.page(tmp_path) and "79.7%" in promise.page(tmp_path)


# ---- a score that has learnt its training pictures by heart, on the real split

def memorised(mutant=None, folds=1, draws=60, rate=0.05):
    """The share of new things' pictures that are flagged by their distance to the nearest training picture."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(draws):
        label = np.repeat(np.arange(80), 6)
        pixels = 40 * rng.standard_normal((80, 36))[label] + 5 * rng.standard_normal((480, 36)) + 128
        pixels = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).reshape(-1, 1, 6, 6)
        new, known = pixels[label >= 60], pixels[label < 60]
        of, names = label[label < 60], digests(known)
        of_folds = []
        for fold in range(folds):
            split_by = np.arange(len(of)) if mutant == "a group in both parts" else of
            part = groups.split(split_by, names, rate, folds, fold)
            training = part == groups.TRAIN
            calibrating = training if mutant == "calibrated on training pictures" else part == groups.CALIBRATION
            scores = [torch.cdist(x.flatten(1).double(), known[training].flatten(1).double()).min(1)[0].numpy()
                      for x in (known[calibrating], new)]
            of_folds.append((scores[0], of[calibrating], scores[1]))
        shares.append((conformal_p_values(*of_folds) <= rate).mean())
    return np.mean(shares), np.std(shares) / math.sqrt(draws)


def test_a_score_that_memorises_keeps_the_rate():
    assert never_above(0.05, *memorised())


def test_so_it_does_in_folds():
    share, error = memorised(folds=5)
    assert never_above(0.05, share, error) and share > 0.01


@pytest.mark.parametrize("mutant", ["a group in both parts", "calibrated on training pictures"])
def test_a_score_that_memorises_shows_a_leak(mutant):
    share, error = memorised(mutant)
    assert not never_above(0.05, share, error) and share > 0.5


@pytest.mark.parametrize("things", [19, 20, 38, 39, 99])
def test_the_rank_keeps_the_rate_and_a_rate_that_cannot_be_kept_is_refused(things):
    def rank(fpr, confidence=None):
        args = SimpleNamespace(fpr=fpr, confidence=confidence, max_images=None)
        return scoring.largest_rank(args, things, 1)

    assert rank(0.05) / (things + 1) <= 0.05 < (rank(0.05) + 1) / (things + 1)
    with pytest.raises(UserError, match=f"there are {things}"):
        rank(0.99 / (things + 1))


# ---- the detector's own calibration

CONFIG = {"data": "x", "dequantize": False, "kappa": 2}
ARGS = SimpleNamespace(scores=["nll"], iw_samples=1, max_images=None)
CALIBRATION, NEW = 19, 19


@functools.cache
def model():
    torch.manual_seed(0)
    return VAE((1, 8, 8), 0.1, 2, gamma=0.01).eval().requires_grad_(False)


def fitted(config, folds, score):
    """The detector of `folds`: (training pixels, pixels that calibrate, the groups of both, if any)."""
    members = [member.Member.fit(model(), config, {
        "train": Images("train", train, groups=groups), "test": Images("test", test, groups=groups)}, [score], ARGS)
        for train, test, groups in folds]
    return detector.Detector.of(config, members, ARGS)


def flagged_by_noise_alone(seed):
    """The share of p-values up to 0.05 where all images are the same one, so that only their noise differs."""
    pixels = torch.full((CALIBRATION, 1, 8, 8), 99, dtype=torch.uint8)
    found = fitted(CONFIG | {"seed": seed}, [(pixels, pixels, None)], "nll")
    return (found.p_values("nll", found.say(Images("new", pixels[:NEW]))) <= 0.05).mean()


def test_images_have_noise_of_their_own():
    shares = [flagged_by_noise_alone(seed) for seed in range(150)]
    assert abs(np.mean(shares) - 0.05) <= 2 * np.std(shares) / math.sqrt(150)


def test_noise_that_restarts_is_noticed(monkeypatch):
    monkeypatch.setattr(member, "evaluate", lambda model, images, k, seed, dequantize, first, *progress: evaluate(
        model, images, k, seed, dequantize, 0))
    shares = [flagged_by_noise_alone(seed) for seed in range(20)]
    assert abs(np.mean(shares) - 0.05) > 2 * np.std(shares) / math.sqrt(20)


def test_dequantised_images_are_scored_dequantised_each_with_its_own_noise():
    pixels = torch.full((600, 1, 8, 8), 99, dtype=torch.uint8)
    config = CONFIG | {"dequantize": True, "seed": 3}
    parts = [member.measure(model(), config, Images("x", pixels), ARGS, "x", first)["mu"]
             for first in (0, 300, 600)]
    np.testing.assert_allclose(parts[0][300:], parts[1][:300], atol=1e-6)  # of the same number
    whole = np.concatenate([parts[0], parts[2]])
    assert len(np.unique(whole.round(9), axis=0)) == 1200
    plain = member.measure(model(), CONFIG | {"seed": 3}, Images("x", pixels), ARGS, "x")["mu"]
    assert len(np.unique(plain, axis=0)) == 1


def test_folds_calibrate_on_every_thing():
    """Two folds by hand: each thing's share by its own model, whose score is the distance to a training mean."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (12, 1, 8, 8), np.uint8))
    label = np.array([0, 0, 1, 1, 2, 2])
    new = Images("new", torch.from_numpy(rng.integers(0, 256, (5, 1, 8, 8), np.uint8)))
    config, shares = CONFIG | {"seed": 0}, 0
    folds = [(pixels[6:], pixels[:6], label), (pixels[:6], pixels[6:], label)]
    found = fitted(config, folds, "pixel_moments")
    for train, test, _ in folds:
        features = [member.measure(model(), config, Images("x", x), ARGS, "x") for x in (train, test, new.pixels)]
        scorer = SCORES["pixel_moments"].fit(features[0])
        held_out, scores = scorer(features[1]), scorer(features[2])
        shares = shares + sum((held_out[label == g] >= scores[:, None]).mean(1) for g in range(3))
    np.testing.assert_allclose(found.p_values("pixel_moments", found.say(new)), (1 + shares) / 7)
    assert found.things == 6 and [len(member.groups) for member in found.members] == [6, 6]
    np.testing.assert_allclose(found.say(new)[1]["pixel_moments"], scores)
