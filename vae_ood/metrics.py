"""Metrics of outlier detection. Scores: larger = more outlying. Outliers are the positive class throughout."""

import numpy as np

ACTIVE_NATS = 0.05  # a latent dimension with a larger mean KL is active


def _ranks(inliers, outliers):
    """Both sets of scores as ranks 0, 1, ... among their distinct values, and how many values there are."""
    inliers, outliers = np.asarray(inliers), np.asarray(outliers)
    values, ranks = np.unique(np.concatenate([inliers, outliers]), return_inverse=True)
    return ranks[:len(inliers)], ranks[len(inliers):], len(values)


def _from_counts(n_in, n_out):
    """(auroc, aupr, fpr95) from the numbers of inliers and outliers at each distinct score, ascending."""
    n, m = n_in.sum(), n_out.sum()
    below = np.cumsum(n_in)
    auroc = float(n_out @ (below - 0.5 * n_in) / (n * m))
    found, flagged = (np.cumsum(c[::-1]) for c in (n_out, n_in + n_out))  # at thresholds from the top down
    precision = found / np.maximum(flagged, 1)
    aupr = float(precision @ n_out[::-1] / m)
    threshold = np.searchsorted(below, np.ceil(0.95 * n))  # the lowest that accepts 95% of the inliers
    fpr95 = float(n_out[:threshold + 1].sum() / m)
    return auroc, aupr, fpr95


def detection(inliers, outliers, resamples=500, seed=0, paired=False):
    """AUROC, AUPR and FPR95 of scores [n] and [m], each in [0, 1], with 95% confidence intervals.

    auroc: the chance that an outlier scores above an inlier, ties counting half. aupr: average precision with the
    outliers as positives; it depends on m / (n + m). fpr95: the share of outliers accepted at the threshold that
    accepts 95% of the inliers (arXiv 1706.02690). Intervals: percentiles of a bootstrap within each set, or where
    outlier i is inlier i spoilt (`paired`) over the pairs; they say nothing of another training run.
    """
    a, b, size = _ranks(inliers, outliers)
    names = ("auroc", "aupr", "fpr95")
    result = dict(zip(names, _from_counts(np.bincount(a, minlength=size), np.bincount(b, minlength=size)), strict=True))
    rng = np.random.default_rng(seed)

    def resampled():
        rows = rng.integers(len(a), size=len(a))
        others = rows if paired else rng.integers(len(b), size=len(b))
        return _from_counts(np.bincount(a[rows], minlength=size), np.bincount(b[others], minlength=size))
    draws = np.array([resampled() for _ in range(resamples)])
    for name, low, high in zip(names, *np.percentile(draws, (2.5, 97.5), axis=0), strict=True):
        result[f"{name}_ci95"] = [float(low), float(high)]
    return result | {"n_in": len(a), "n_out": len(b)}


def conformal_p_values(*folds):
    """P-values [m] of new images, in [1 / (G + 1), 1], from `folds` (inlier scores [n] that the model never saw, their
    groups [n], the new images' scores [m]): one, or one of each model that was trained without a part of the groups.

    p = (1 + the sum over the G groups of the share of a group's images that score at least as high) / (G + 1), for an
    image of a new group. With one model, where groups are exchangeable, P(p <= a) <= a for every a (two-layer conformal
    prediction, arXiv 1809.07441, 2306.06342); of K folds (cross-conformal, arXiv 1208.0806) see `cross_bound`.
    """
    exceeding, things = 0, 0
    for calibration, groups, scores in folds:
        _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
        order = np.argsort(calibration, kind="stable")
        share = np.append(np.cumsum(1 / size[group[order]][::-1])[::-1], 0).round(9)  # whole groups: whole numbers
        exceeding = exceeding + share[np.searchsorted(np.asarray(calibration)[order], scores, side="left")]
        things += len(size)
    return (1 + exceeding) / (things + 1)


def benjamini_hochberg(p, fdr):
    """Which of p-values [m] are flagged, bool [m], so that of the flagged at most the share `fdr` are ordinary, on
    average: up to the largest p_(i) <= i fdr / m (Benjamini and Hochberg 1995; for conformal p-values of images that
    are each a thing of their own: arXiv 2104.08279)."""
    p = np.asarray(p)
    order = np.sort(p)
    within = np.flatnonzero(order <= np.arange(1, len(p) + 1) * fdr / len(p) + 1e-12)
    return p <= order[within[-1]] if len(within) else np.zeros(len(p), bool)


def cross_bound(rate, folds, things):
    """The most that P(p <= rate) can be with K folds of as many exchangeable images, by the theorem for CV+ (arXiv
    1905.02928, theorem 4)."""
    return min(1.0, 2 * rate + min(2 * (1 - 1 / folds) / (things / folds + 1), (1 - folds / things) / (folds + 1)))


def binomial_tail(k, n, x):
    """P(B >= k) of B ~ Binomial(n, x), 0 < x < 1: the distribution function of Beta(k, n + 1 - k) at x."""
    j = np.arange(k, n + 1)
    log_factorial = np.concatenate([[0], np.cumsum(np.log(np.arange(1, n + 1)))])
    terms = log_factorial[n] - log_factorial[j] - log_factorial[n - j] + j * np.log(x) + (n - j) * np.log1p(-x)
    return float(np.minimum(np.exp(terms).sum(), 1))


def false_alarm_range(k, n, share=0.9):
    """The rates (low, high) between which a threshold's false-alarm rate lies for this share of the calibrations with n
    exchangeable images, k = the rank of the threshold, 1 to n: quantiles of Beta(k, n + 1 - k) (arXiv 1209.2673). For
    groups of several images the rate varies less."""
    def quantile(level):
        low, high = 0.0, 1.0
        for _ in range(50):
            x = (low + high) / 2
            low, high = (x, high) if binomial_tail(k, n, x) < level else (low, x)
        return low
    return quantile((1 - share) / 2), quantile((1 + share) / 2)


def confident_rank(n, fpr, confidence):
    """The largest rank k at which flagging p <= k / (n + 1) keeps the false-alarm rate at most `fpr` for a share
    `confidence` of the calibrations with n exchangeable images (arXiv 1209.2673); 0 where there is none."""
    return next((k for k in range(int(fpr * (n + 1) + 1e-9), 0, -1) if binomial_tail(k, n, fpr) >= confidence), 0)


def mmd(x, y, rows=500):
    """Squared maximum mean discrepancy between samples [n, kappa] and [m, kappa], unbiased: it may fall below 0.

    The kernel is that of Wasserstein auto-encoders (arXiv 1711.01558) for a prior N(0, I): the sum over
    s = 0.1, 0.2, 0.5, 1, 2, 5 and 10 of C / (C + |x - y|^2) with C = 2 kappa s. `rows` bound the memory.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    scales = 2 * x.shape[1] * np.array([0.1, 0.2, 0.5, 1, 2, 5, 10])

    def kernel_sum(a, b):
        total = 0.0
        for part in np.split(a, range(rows, len(a), rows)):
            distance = np.maximum((part**2).sum(1)[:, None] + (b**2).sum(1) - 2 * part @ b.T, 0)
            total += sum((c / (c + distance)).sum() for c in scales)
        return total

    n, m, diagonal = len(x), len(y), len(scales)
    return float((kernel_sum(x, x) - n * diagonal) / (n * (n - 1)) + (kernel_sum(y, y) - m * diagonal) / (m * (m - 1))
                 - 2 * kernel_sum(x, y) / (n * m))


def distances(x, rows=500):
    """The Euclidean distances [N, N], float32, between rows x [N, D]; `rows` bound the memory."""
    x = x - x[0]  # equal rows: exactly 0
    squares, out = (x**2).sum(1), np.empty((len(x), len(x)), np.float32)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        out[part] = np.sqrt(np.maximum(squares[part, None] + squares - 2 * x[part] @ x.T, 0))
    return out


def energy_distances(distance, new):
    """The energy distances [B] (Szekely and Rizzo, doi 10.1016/j.jspi.2013.03.018) between two parts of N things, by
    their distances [N, N], whose diagonal is 0; `new` [B, N] marks one part with 1, the other with 0. They are unbiased
    and may fall below 0; within a part of one thing, the mean distance is taken as that of all."""
    things = len(distance)
    m = int(new[0].sum())
    n = things - m
    centred = distance - distance.sum() / (things * (things - 1))  # which changes nothing but the rounding
    np.fill_diagonal(centred, 0)
    within = (new @ centred * new).sum(1, dtype=float)
    of_new, total = new @ centred.sum(1, dtype=float), centred.sum(dtype=float)
    return (2 * (of_new - within) / (n * m) - (total - 2 * of_new + within) / max(n * (n - 1), 1)
            - within / max(m * (m - 1), 1))


def _drawn(groups, each, things, rng):
    """The rows [G each] of so many random pictures of each of at most so many random groups, group by group."""
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    order = rng.permutation(len(group))
    order = order[np.argsort(group[order], kind="stable")]
    starts = rng.permutation(np.cumsum(size) - size)[:things]
    return order[starts[:, None] + np.arange(each)].ravel()


def set_p_value(new_groups, *folds, permutations=999, pictures=2000, seed=0):
    """The p-value, in [1 / (permutations + 1), 1], of new pictures as a set: that they are like those that calibrate.

    new_groups [M]: equal for pictures of one thing. `folds`: (whitened features [N, D] of pictures that the model never
    saw, their groups [N], the new pictures' features [M, D]): one, or one of each model that was trained without a part
    of the groups. p = (1 + the permutations whose energy distance is at least the observed one) / (1 + permutations)
    (arXiv 1603.05766), each of whole groups: where these are exchangeable, P(p <= a) <= a for every a.

    A group counts with as many pictures, drawn at random, as the smallest one has: the mean of many varies less than
    one picture, so that ordinary sets of one picture of each thing would be called unlike sets of six. At most so many
    `pictures` of either side are compared. Of several folds: twice the mean (arXiv 1212.4966), at most 1.
    """
    found = []
    for known, groups, new in folds:
        rng = np.random.default_rng(seed)
        sizes = [np.unique(of, return_counts=True)[1] for of in (groups, new_groups)]
        each = max(1, min(*(size.min() for size in sizes), *(pictures // len(size) for size in sizes)))
        rows, new_rows = (_drawn(of, each, pictures // each, rng) for of in (groups, new_groups))
        x = np.concatenate([np.asarray(known, float)[rows], np.asarray(new, float)[new_rows]])
        things = len(x) // each
        distance = distances(x).reshape(things, each, things, each).mean((1, 3))
        np.fill_diagonal(distance, 0)
        parts = np.zeros((permutations + 1, things), np.float32)
        parts[:, len(rows) // each:] = 1
        parts[1:] = rng.permuted(parts[1:], axis=1)
        energy = energy_distances(distance, parts)
        as_far = energy[1:] >= energy[0] - 1e-7 * distance.mean()  # ties count
        found.append((1 + as_far.sum()) / (1 + permutations))
    return float(found[0] if len(found) == 1 else min(1, 2 * np.mean(found)))


def latent_spectrum(kl_per_dim):
    """The mean KLs [kappa] in nats, sorted descending, with the place and size of their cut-off.

    Returns (sorted, number of active dimensions, cut, ratio): `ratio` is the largest between consecutive values and
    `cut` the number of dimensions before it. Without an active dimension, or with kappa = 1, there is no cut-off:
    `cut` is the number of active dimensions and `ratio` None.
    """
    kl = np.sort(np.maximum(kl_per_dim, 0))[::-1]
    active = int((kl > ACTIVE_NATS).sum())
    if not active or len(kl) == 1:
        return kl, active, active, None
    ratios = kl[:-1] / np.maximum(kl[1:], 1e-12)
    return kl, active, int(ratios.argmax()) + 1, float(ratios.max())
