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


def detection(inliers, outliers, resamples=500, seed=0):
    """AUROC, AUPR and FPR95 of scores [n] and [m], each in [0, 1], with 95% confidence intervals.

    auroc: the chance that an outlier scores above an inlier, ties counting half. aupr: average precision with the
    outliers as positives; it depends on m / (n + m). fpr95: the share of outliers accepted at the threshold that
    accepts 95% of the inliers (arXiv 1706.02690). Intervals: percentiles of a bootstrap within each set; they say
    nothing of another training run.
    """
    a, b, size = _ranks(inliers, outliers)
    names = ("auroc", "aupr", "fpr95")
    result = dict(zip(names, _from_counts(np.bincount(a, minlength=size), np.bincount(b, minlength=size)), strict=True))
    rng = np.random.default_rng(seed)
    draws = np.array([_from_counts(*(np.bincount(r[rng.integers(len(r), size=len(r))], minlength=size) for r in (a, b)))
                      for _ in range(resamples)])
    for name, low, high in zip(names, *np.percentile(draws, (2.5, 97.5), axis=0), strict=True):
        result[f"{name}_ci95"] = [float(low), float(high)]
    return result | {"n_in": len(a), "n_out": len(b)}


def conformal_p_values(calibration, scores):
    """P-values (1 + #{calibration >= score}) / (n + 1) of scores [m] from inlier scores [n] the model never saw.

    If a scored image is exchangeable with the calibration images, P(p <= a) <= a for every a.
    """
    calibration = np.sort(calibration)
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return (1 + at_least) / (len(calibration) + 1)


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
