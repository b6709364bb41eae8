"""Metrics against scikit-learn, brute force and their own guarantees."""

from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from vae_ood.metrics import (
    binomial_tail,
    confident_rank,
    conformal_p_values,
    cross_bound,
    detection,
    distances,
    energy_distances,
    false_alarm_range,
    latent_spectrum,
    mmd,
    set_p_value,
)


@pytest.mark.parametrize("decimals", [1, 12])  # 1: many ties
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 3), (500, 200), (200, 900)])
def test_detection_matches_scikit_learn(n, m, decimals):
    rng = np.random.default_rng(n + m)
    inliers, outliers = rng.standard_normal(n).round(decimals), (rng.standard_normal(m) + 0.7).round(decimals)
    result = detection(inliers, outliers, resamples=20)
    labels, scores = np.r_[np.zeros(n), np.ones(m)], np.r_[inliers, outliers]
    assert result["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert result["aupr"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    threshold = min(t for t in inliers if (inliers <= t).mean() >= 0.95)
    assert result["fpr95"] == (outliers <= threshold).mean()
    assert (result["n_in"], result["n_out"]) == (n, m)
    for name in ("auroc", "aupr", "fpr95"):
        low, high = result[f"{name}_ci95"]
        assert 0 <= low <= high <= 1


def test_outliers_are_the_positive_class():
    perfect = detection([0.0, 1.0, 2.0], [3.0])
    assert (perfect["auroc"], perfect["aupr"], perfect["fpr95"]) == (1, 1, 0)
    inverted = detection([3.0], [0.0, 1.0, 2.0])
    assert (inverted["auroc"], inverted["fpr95"]) == (0, 1)
    uninformative = detection(np.zeros(30), np.zeros(10))
    assert (uninformative["auroc"], uninformative["aupr"], uninformative["fpr95"]) == (0.5, 0.25, 1)


def test_bootstrap_interval_agrees_with_delong():
    rng = np.random.default_rng(0)
    inliers, outliers = rng.standard_normal(400), rng.standard_normal(300) + 1
    result = detection(inliers, outliers, resamples=2000)
    placements = (outliers[:, None] > inliers).astype(float)  # the variance of DeLong et al. (1988)
    variance = placements.mean(1).var(ddof=1) / 300 + placements.mean(0).var(ddof=1) / 400
    low, high = result["auroc_ci95"]
    assert low < result["auroc"] < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.1)


def test_pairs_are_drawn_together():
    """An outlier that is its inlier, a little higher: the AUROC hardly varies where pairs are drawn together."""
    inliers = np.random.default_rng(0).standard_normal(300)
    width = {paired: np.ptp(detection(inliers, inliers + 0.5, paired=paired)["auroc_ci95"]) for paired in (True, False)}
    assert width[True] < 0.5 * width[False]
    same = detection(inliers, inliers, paired=True)
    assert same["auroc_ci95"] == [0.5, 0.5]


def test_interval_covers_the_truth():
    from math import erf
    truth, covered, rng = 0.5 * (1 + erf(1 / 2)), 0, np.random.default_rng(1)  # P(N(1, 1) > N(0, 1))
    for seed in range(200):
        low, high = detection(rng.standard_normal(150), rng.standard_normal(150) + 1, 200, seed)["auroc_ci95"]
        covered += low <= truth <= high
    assert covered >= 178  # 95% of 200, less four standard errors; too wide would fail the test above


def p_values(calibration, scores, groups=None):
    return conformal_p_values((calibration, np.arange(len(calibration)) if groups is None else groups, scores))


def test_conformal_p_values_by_the_formula_with_ties():
    calibration, scores = np.array([1.0, 2.0, 2.0, 5.0]), np.array([0.0, 2.0, 5.0, 6.0])
    expected = [(1 + (calibration >= s).sum()) / 5 for s in scores]
    np.testing.assert_array_equal(p_values(calibration, scores), expected)


def test_grouped_p_values_by_the_formula_with_ties():
    rng = np.random.default_rng(0)
    calibration, groups, scores = rng.integers(0, 6, 40), rng.integers(0, 7, 40), rng.integers(-1, 7, 30)
    shares = [[(calibration[groups == g] >= s).mean() for g in np.unique(groups)] for s in scores]
    np.testing.assert_allclose(p_values(calibration, scores, groups), (1 + np.sum(shares, 1)) / 8, rtol=1e-8)
    thirds = p_values(np.repeat([1.0, 2], 3), [1.0], np.repeat([0, 1], 3))
    assert thirds[0] == 1.0  # a whole group counts exactly one
    folds = conformal_p_values((calibration, groups, scores), (calibration, np.arange(40), scores - 1))
    shares = np.sum(shares, 1) + [(calibration >= s - 1).sum() for s in scores]
    np.testing.assert_allclose(folds, (1 + shares) / 48, rtol=1e-8)


def test_the_bound_of_folds_is_the_theorem_s():
    assert cross_bound(0.05, 5, 60) == pytest.approx(0.1 + min(2 * 0.8 / 13, (1 - 5 / 60) / 6))
    assert cross_bound(0.9, 3, 12) == 1


def test_what_a_calibration_can_promise_matches_scipy():
    from scipy.stats import beta, binom
    for k, n in ((1, 19), (3, 60), (500, 9999)):
        assert false_alarm_range(k, n) == pytest.approx(beta.ppf([0.05, 0.95], k, n + 1 - k), rel=1e-9)
        assert binomial_tail(k, n, 0.05) == pytest.approx(binom.sf(k - 1, n, 0.05), rel=1e-9)
    assert confident_rank(58, 0.05, 0.95) == 0 and confident_rank(59, 0.05, 0.95) == 1
    for n in (100, 1000, 9999):
        k = confident_rank(n, 0.05, 0.9)
        assert beta.sf(0.05, k, n + 1 - k) <= 0.1 < beta.sf(0.05, k + 1, n - k)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_conformal_false_alarm_rate_is_the_asked_one(rate):
    rng, n, repeats = np.random.default_rng(2), 499, 400
    flagged = [(p_values(s[:n], s[n:]) <= rate).mean()
               for s in rng.standard_exponential((repeats, n + 500))]
    # rate * (n + 1) is whole, so the rate is exact; over calibrations it is Beta-distributed with this deviation
    deviation = np.sqrt(rate * (1 - rate) * (1 / (n + 2) + 1 / 500) / repeats)
    assert abs(np.mean(flagged) - rate) < 4 * deviation


def test_latent_spectrum_finds_the_cut():
    kl, active, cut, ratio = latent_spectrum(np.array([0.01, 3.0, 0.02, 5.0, 4.0]))
    assert (kl.tolist(), active, cut) == ([5.0, 4.0, 3.0, 0.02, 0.01], 3, 3)
    assert ratio == pytest.approx(150)
    assert latent_spectrum(np.array([2.0]))[1:] == (1, 1, None)
    assert latent_spectrum(np.full(16, 1e-3))[1:] == (0, 0, None)  # collapsed
    assert latent_spectrum(np.array([1.0, 0.0]))[2] == 1


def test_mmd_matches_the_double_sum():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 3)), 0.5 * rng.standard_normal((5, 3)) + 1

    def k(a, b):
        return sum(2 * 3 * s / (2 * 3 * s + ((a - b)**2).sum()) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    expected = (np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
                + np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
                - 2 * np.mean([k(a, b) for a in x for b in y]))
    for rows in (1, 3, 500):
        assert mmd(x, y, rows) == pytest.approx(expected, rel=1e-12)


def test_mmd_is_zero_in_expectation_between_samples_of_one_distribution_and_not_between_others():
    rng = np.random.default_rng(1)
    draw = lambda scale: mmd(scale * rng.standard_normal((200, 4)), rng.standard_normal((200, 4)))  # noqa: E731
    same = np.array([draw(1) for _ in range(100)])
    assert abs(same.mean()) < 4 * same.std() / 10 and same.min() < 0
    assert min(draw(0.5) for _ in range(5)) > same.max()


def energy(things, new):
    """The energy distance of things, lists of rows, by the double sums; `new` are the numbers of one part."""
    def mean(pairs):
        return np.mean([[np.linalg.norm(a - b) for a in things[i] for b in things[j]] for i, j in pairs])
    old = [i for i in range(len(things)) if i not in new]
    return (2 * mean([(i, j) for i in new for j in old]) - mean(list(combinations(new, 2)))
            - mean(list(combinations(old, 2))))


def test_energy_distances_match_the_double_sums():
    x = np.random.default_rng(0).standard_normal((7, 3)) + 5
    parts = [np.flatnonzero(marks).tolist() for marks in np.ndindex(*[2] * 7) if sum(marks) == 3]
    marked = np.array([[float(i in new) for i in range(7)] for new in parts], np.float32)
    expected = [energy(x[:, None], new) for new in parts]
    np.testing.assert_allclose(energy_distances(distances(x, rows=2), marked), expected, atol=1e-5)


def test_a_set_s_p_value_is_the_share_of_the_permutations_of_whole_groups():
    rng = np.random.default_rng(0)
    things = rng.standard_normal((8, 1, 2)) + 0.5 * rng.standard_normal((8, 3, 2))
    things[5:] += 2
    all_of_them = [energy(things, new) for new in combinations(range(8), 3)]
    expected = np.mean(np.array(all_of_them) >= energy(things, (5, 6, 7)) - 1e-9)
    mixed = rng.permutation(15)
    p = set_p_value(np.repeat([4, 2, 9], 3), (things[:5].reshape(15, 2)[mixed], np.repeat(np.arange(5), 3)[mixed],
                                              things[5:].reshape(9, 2)), permutations=9999)
    assert 0.02 < expected < 0.5 and abs(p - expected) < 4 * np.sqrt(expected / 10_000)


def drawn(rng, things, pictures, alike=0.5, thinned=False):
    """(features [N, 3], groups [N]) of things of so many pictures each, which share a part of their variance."""
    x = np.sqrt(alike) * rng.standard_normal((things, 1, 3)) + np.sqrt(1 - alike) * rng.standard_normal(
        (things, pictures, 3))
    groups = np.repeat(np.arange(things), pictures)
    kept = np.concatenate([i * pictures + rng.permutation(pictures)[:rng.integers(1, pictures + 1) if thinned else None]
                           for i in range(things)])
    return x.reshape(-1, 3)[kept], groups[kept]


@pytest.mark.parametrize(("known", "new", "thinned"), [(1, 1, False), (6, 6, False), (6, 6, True)])
def test_ordinary_sets_are_called_unlike_at_the_rate_asked_for(known, new, thinned):
    rng, repeats, p, ungrouped = np.random.default_rng(0), 3000, [], []
    for seed in range(repeats):
        x, groups = drawn(rng, 30, known)
        y, new_groups = drawn(rng, 8, new, thinned=thinned)
        p.append(set_p_value(new_groups, (x, groups, y), permutations=99, seed=seed))
        if known > 1 and seed < 200:
            ungrouped.append(set_p_value(np.arange(len(y)), (x, np.arange(len(x)), y), permutations=99))
    for rate in (0.01, 0.05, 0.5):
        assert abs(np.mean(np.array(p) <= rate + 1e-9) - rate) < 3 * np.sqrt(rate * (1 - rate) / repeats)
    assert not ungrouped or np.mean(np.array(ungrouped) <= 0.05) > 0.15  # pictures permuted, not groups


def test_a_set_is_seen_that_no_single_picture_shows():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1000, 20)), rng.standard_normal((30, 20)) + 0.3
    assert detection((x**2).sum(1), (y**2).sum(1), 10)["auroc"] < 0.75
    for pictures in (2000, 400):
        assert set_p_value(np.arange(30), (x, np.arange(1000), y), pictures=pictures) == 0.001
    assert set_p_value(np.arange(30), (x, np.arange(1000), y - 0.3)) > 0.05
    assert set_p_value(np.arange(30), (x, np.arange(1000), y), (x, np.arange(1000), y - 10)) == 0.002  # of two folds


def test_sets_of_one_thing_and_of_equal_pictures():
    x = np.random.default_rng(0).standard_normal((99, 4))
    far, ordinary = (set_p_value(np.zeros(3), (x, np.arange(99), np.full((3, 4), at))) for at in (9, 0.1))
    assert far <= 0.02 and ordinary > 0.05
    assert set_p_value([0, 0, 1], (np.full((9, 4), 0.1), np.arange(9), np.full((3, 4), 0.1))) == 1
