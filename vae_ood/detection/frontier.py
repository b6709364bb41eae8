"""How good `default` could be on two sets of outliers at once, were its components' shares of the false alarms others:
the frontier of many combinations, and where `default` lies.

A pair is the AUROC on each of the two sets OUTLIERS, by which the shares are judged: a bound, and no way to choose any.
"""

import itertools
import math

import numpy as np

from vae_ood.detection.dots import label
from vae_ood.metrics import conformal_p_values, detection
from vae_ood.plots import METADATA, figure_and_axes
from vae_ood.scores import COMPONENTS, CONTROLS, SHARES

OUTLIERS, DRAWN = ("svhn", "celeba"), 300  # of CIFAR-10, which no single score tells both well, and shares drawn
LEAST = 0.0001  # the figures' last digit: where an AUROC of 0 is drawn
DIVIDED = (*SHARES, *((name,) for names in SHARES if len(names) > 1 for name in names))  # together, or each alone
TICKS = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


def some_shares():
    """Shares [n, C] of the components in DIVIDED, each row's sum 1: those of `default`, equal ones of any two or more,
    and DRAWN at random, of which half leave most of it to few."""
    equal = np.array([row for row in itertools.product((0.0, 1.0), repeat=len(DIVIDED)) if sum(row) > 1])
    rng = np.random.default_rng(0)
    return np.concatenate([[[SHARES.get(names, 0.0) for names in DIVIDED]], equal / equal.sum(1, keepdims=True),
                           *(rng.dirichlet(np.full(len(DIVIDED), each), DRAWN // 2) for each in (1, 0.1))])


def measured(calibrate, count):
    """{outliers, alone {component: pair}, controls {control: pair}, default: pair, combined [pair]}, of the
    scores that `pairs.halves` gives. Components are combined by the smallest weighted p as in `default`, at many
    shares; p comes from ranks among `calibrate`, also of the sums of those that speak together."""
    def aurocs(scores):
        return [round(detection(scores["test"], scores[one], resamples=1)["auroc"], 4) for one in OUTLIERS]

    def alone(name):
        return aurocs({one: scores[name] for one, scores in count.items()})

    def combined(shares):
        weights = np.array([math.log(share) if share else -math.inf for share in shares])[:, None]
        return aurocs({one: (each + weights).max(0).round(9) for one, each in surprises.items()})  # ties stay ties

    def surprise(inliers, scores):
        return -np.log(conformal_p_values((inliers, np.arange(len(inliers)), scores)))

    def together(names, one):
        return surprise(*(sum(surprise(calibrate[name], of[name]) for name in names).round(9)  # ties stay ties
                          for of in (calibrate, count[one])))
    surprises = {one: np.stack([together(names, one) for names in DIVIDED]) for one in ("test", *OUTLIERS)}
    return {"outliers": list(OUTLIERS), "alone": {name: alone(name) for name in COMPONENTS},
            "controls": {name: alone(name) for name in CONTROLS if name in calibrate and name not in COMPONENTS},
            "default": alone("default"),
            "combined": [combined(shares) for shares in some_shares()]}


def run_of(runs):
    """Of `runs`, {data: [what each run measured]}, the one whose combinations were measured, or None."""
    return next((run for of in runs.values() for run in of if "frontier" in run), None)


def lines(runs):
    """The lines of the page, where combinations were measured: what is drawn, and where `default` lies."""
    if not (run := run_of(runs)):
        return []
    one, n = run["frontier"], {name: row["n"] for name, row in run["sets"].items()}
    (x, y), (across, up), pairs = one["default"], one["outliers"], [*one["combined"], *one["alone"].values()]
    as_good = sum(a >= x and b >= y for a, b in pairs)
    best = [max((pair[1 - axis] for pair in pairs if pair[axis] >= one["default"][axis]), default=None)
            for axis in (0, 1)]
    on_up, on_across = ("none" if value is None else f"{value:.4f}" for value in best)
    return [
        f"![the combinations of components, by AUROC on {across} and on {up}](frontier.png)", "",
        f"A dot is a score of {run['data']}, seed {run['seed']}: across, its AUROC on the {n[across]:,} images of "
        f"{across}, up, on the {n[up]:,} of {up}, both development, against every other test image "
        f"({n['test'] // 2:,}). Gray are {len(one['combined'])} combinations of `default`'s components, the smallest "
        "weighted p-value of each, or of the sum of those that speak together (by ranks among the other test images, "
        "in place of `default`'s fitted tails), at shares that are its own, equal, or drawn at random, and judged on "
        "these very outliers. "
        f"`default` lies at {x:.4f} and {y:.4f}: {as_good or 'none'} of the {len(pairs)} combinations and single "
        f"components {'is' if as_good < 2 else 'are'} as good on both, the best of those that are as good on {across} "
        f"has {on_up} on {up}, and the best of those that are as good on {up} has {on_across} on {across}.", ""]


def envelope(points):
    """Those of `points` (x, y) that no other one beats or equals on both axes, from left to right."""
    best, kept = -np.inf, []
    for x, y in sorted(set(map(tuple, points)), reverse=True):
        if y > best:
            best = y
            kept.append((x, y))
    return kept[::-1]


def draw(path, numbers):
    """Write what `measured` gives: a dot each, and the envelope of what `default` could be as a line. Axes are
    logistic, as most of it lies close to 1. Of the controls, those that no other one beats on both axes."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
    figure, axes = figure_and_axes(8.0, 7.5)
    alone, controls = numbers["alone"], numbers["controls"]
    best = envelope(controls.values())
    controls = {name: pair for name, pair in controls.items() if tuple(pair) in best}
    groups = [("default", "*", "C3", "full", {"default": numbers["default"]}),
              ("a component alone", "o", "C0", "full", alone), ("another control", "s", "C1", "none", controls)]
    axes.set(xscale="logit", yscale="logit")
    for axis, one in zip((axes.xaxis, axes.yaxis), numbers["outliers"], strict=True):
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_label_text(f"AUROC on {one}")

    def plot(pairs, mark, **style):
        axes.plot(*np.clip(pairs, LEAST, 1 - LEAST).T, mark, **style)
    for name, mark, color, fill, pairs in groups:
        plot([*pairs.values()], mark, color=color, fillstyle=fill, markersize=13 if mark == "*" else 6, label=name)
    plot(numbers["combined"], "o", color="0.8", markersize=3, zorder=1,
         label=f"{len(numbers['combined'])} combinations of components")
    plot(envelope([*numbers["combined"], *alone.values()]), "-", color="black", linewidth=0.8, zorder=1,
         drawstyle="steps-pre", label="their frontier")
    axes.legend(frameon=False, loc="best")
    named = [(name, np.clip(pair, LEAST, 1 - LEAST), color)
             for _, _, color, _, pairs in groups for name, pair in pairs.items()]
    label(figure, axes, [(*one, i) for i, one in enumerate(named)], [pair for _, pair, _ in named], 9)
    figure.savefig(path, metadata=METADATA)
