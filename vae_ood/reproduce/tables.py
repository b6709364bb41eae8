"""Tables 1 and 2, with the histograms of figures 2 and 3: bpd of inliers and outliers by kappa, and by alpha.

A table is [(a column's run, [what each seed measured])]. A check is (claim, held, figures): held is None, not reached,
where the training that it needs was not run.
"""

import csv
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np

from vae_ood import plots
from vae_ood.likelihood import bits_per_dim
from vae_ood.plots import markdown
from vae_ood.reproduce import pages, runs
from vae_ood.reproduce.pages import INTERVAL, cell, name_axis
from vae_ood.reproduce.paper import ABOVE, ALPHAS, BELOW, KAPPAS, OFFSET, PAPER
from vae_ood.reproduce.runs import SHAPES, STEPS, Run

PRINTED = 1e-4  # the last digit of the paper's gammas


def table1(args):
    """FashionMNIST against MNIST, alpha = 1, by kappa."""
    table = runs.run_columns([Run("fashionmnist", 1, kappa, recipe=args.recipe) for kappa in KAPPAS], args)
    write("table1", "Table 1: FashionMNIST (inliers) and MNIST, alpha = 1, by kappa", "kappa", table,
          [above({run.kappa: results for run, results in table}, "mnist"), falls(table)], args)
    draw("table1", "FashionMNIST", "kappa", table, args)


def table2(args):
    """CIFAR-10 against SVHN and CelebA, kappa = 32, by alpha."""
    table = runs.run_columns([Run("cifar10", alpha, 32, recipe=args.recipe) for alpha in ALPHAS], args)
    write("table2", "Table 2: CIFAR-10 (inliers), SVHN and CelebA, kappa = 32, by alpha", "alpha", table,
          [falls(table), *capacity({run.alpha: results for run, results in table})], args)
    draw("table2", "CIFAR-10", "alpha", table, args)


def sets_of(name):
    """The sets of one of the paper's tables: train, test, then the outliers."""
    return [key for key in next(iter(PAPER[name].values())) if key != "gamma"]


def write(name, head, by, table, claims, args):
    """NAME.md and NAME.json: a column for each kappa or alpha, whichever it is `by`, ours beside the paper's."""
    rows, sets = [], sets_of(name)

    def add(title, value, theirs=None):
        rows.append([title, *(value(results) if results else "not run" for _, results in table)])
        if theirs:
            rows.append([f"{title}, the paper", *map(theirs, PAPER[name].values())])

    for one in sets:
        add(f"{one} bpd", lambda r, one=one: cell([m["sets"][one]["bpd"] for m in r], 3),
            lambda column, one=one: f"{column[one] + OFFSET:.3f}")
    add("gamma", lambda r: cell([m["gamma"] for m in r], 5), lambda column: f"{column['gamma']:.4f}")
    for one in sets[2:]:
        add(f"{one} AUROC of the NLL", lambda r, one=one: cell([m["detection"][one]["auroc"] for m in r], 4))
        add(f"{one} FPR95", lambda r, one=one: cell([m["detection"][one]["fpr95"] for m in r], 4))
    add("active dimensions", lambda r: ", ".join(str(m["active_dims"]) for m in r))
    add("training steps", lambda r: f"{r[0]['iters']:,}")
    add("training (minutes, at the median speed)", lambda r: cell([m["seconds_at_median_speed"] / 60 for m in r], 1))
    add("seeds", lambda r: str(len(r)))
    labels = [getattr(run, by) for run, _ in table]
    lines = ["bpd: bits per dimension of 8-bit data, from the negative ELBO; the paper's figures are its own plus "
             f"3.9944. Outliers are the positive class. ±: {INTERVAL}.", "",
             *markdown(["", *(f"{label:g}" for label in labels)], rows)]
    columns = [{"label": label, "runs": results} for label, (_, results) in zip(labels, table, strict=True)]
    pages.save(name, head, {"columns": columns, "paper_as_printed": PAPER[name]}, lines, claims,
               [m for _, results in table for m in results], args)


def draw(name, inliers, by, table, args):
    """NAME.png: bpd by column, ours (solid) and the paper's (dashed), and gamma; and the histograms."""
    table = [(run, results) for run, results in table if results]
    x, paper = [getattr(run, by) for run, _ in table], PAPER[name]

    def curves(axes):
        (bits, gamma), = axes
        for i, one in enumerate(sets_of(name)):
            bits.plot(x, [statistics.mean(m["sets"][one]["bpd"] for m in r) for _, r in table], "o-", color=f"C{i}",
                      label=one)
            bits.plot(list(paper), [column[one] + OFFSET for column in paper.values()], "--", color=f"C{i}", alpha=0.6)
        bits.plot([], [], "k--", alpha=0.6, label="the paper, plus 3.9944")
        bits.set(ylabel="bits per dimension (8 bits)")
        gamma.plot(x, [statistics.mean(m["gamma"] for m in r) for _, r in table], "ko-", label="ours")
        gamma.plot(list(paper), [column["gamma"] for column in paper.values()], "k--", alpha=0.6, label="the paper")
        gamma.set(ylabel=r"$\gamma$", ylim=(0, None))
        for one in (bits, gamma):
            name_axis(one, f"$\\{by}$", paper)

    if table:
        pages.figure(name, args, 1, 2, curves)
    histograms(name, inliers, by, [run for run, _ in table], args)


def histograms(name, inliers, by, reached, args):
    """NAME_histograms.png: the NLLs of the images of each set, of the runs that were `reached`. Where their scores.csv
    were not kept, the picture that is there stays."""
    picture = f"{name}_histograms"
    missing = [run.folder for run in reached if not Path(args.runs, run.folder, "scores.csv").exists()]
    if not reached:
        Path(args.out, f"{picture}.png").unlink(missing_ok=True)
    elif missing:
        print(f"no histograms: {', '.join(missing)} came without scores.csv; evaluate them with eval.py, or train anew")
    else:
        columns = min(3, len(reached))

        def fill(axes):
            for one in axes.flat[len(reached):]:
                one.set_axis_off()
            for one, run in zip(axes.flat, reached, strict=False):
                plots.draw_histogram(one, bpd_of_sets(run, args), "bits",
                                     f"{inliers}, $\\{by}$ = {getattr(run, by):g}")

        pages.figure(picture, args, -(-len(reached) // columns), columns, fill)


def bpd_of_sets(run, args):
    """The negative ELBO in bits per dimension of each image of each set, {set: [N]}, from scores.csv."""
    gamma = json.loads(Path(args.runs, run.folder, "metrics.json").read_text())["gamma"]
    sets = {}
    with open(Path(args.runs, run.folder, "scores.csv"), newline="") as file:
        for row in csv.DictReader(file):
            sets.setdefault(row["set"], []).append(float(row["nll"]))
    return {name: bits_per_dim(np.array(values), math.prod(SHAPES[run.data]), gamma) for name, values in sets.items()}


def gap(m, one, other="test"):
    """By how many bits per dimension the mean NLL of a set is above that of another."""
    return m["sets"][one]["bpd"] - m["sets"][other]["bpd"]


def judged(held, reached, wanted):
    """Whether a check holds of all that it is `wanted` of, from whether it `held` of the `reached` ones: one that fails
    fails it, and one that was not run leaves it not reached."""
    return None if not reached or (held and reached < wanted) else held


def above(columns, outlier):
    """The check that the outliers' mean bpd is above the inlier test bpd in every column {name: [what each seed
    measured]}."""
    gaps = {name: min(gap(m, outlier) for m in results) for name, results in columns.items() if results}
    return (f"{outlier} bpd above the inlier test bpd in every column, in the worst seed",
            judged(all(value > 0 for value in gaps.values()), len(gaps), len(columns)),
            ", ".join(f"{name}: {value:+.3f}" for name, value in gaps.items()))


def falls(table):
    """The check that gamma does not rise from a column to the next beyond the noise: twice the standard deviation of a
    difference of two columns' means, from the deviation between seeds, pooled over the columns; at least the last digit
    that the paper prints, by which its own rises."""
    columns = [[m["gamma"] for m in results] for _, results in table if results]
    means = [statistics.mean(values) for values in columns]
    rises = [b - a for a, b in pairwise(means)]
    spreads = [statistics.variance(values) for values in columns if len(values) > 1]
    noise = max(PRINTED, 2 * math.sqrt(2 * statistics.mean(spreads) / min(map(len, columns))) if spreads else 0)
    what = f"noise {noise:.1e}" + ("" if spreads else ", the last digit that the paper prints: one seed tells no other")
    return ("gamma does not rise from a column to the next, beyond the noise between seeds",
            judged(all(rise - noise < 1e-9 for rise in rises), len(rises), len(table) - 1),
            ", ".join(f"{v:.5f}" for v in means) + f" ({what})")


def capacity(columns):
    """The paper's claims of CIFAR-10's outliers at each alpha, from {alpha: [what each seed measured]}, in the worst
    seed. SVHN below the inliers where the paper has it above is not reached before the paper's 200,000 steps."""
    checks = []
    for one, alphas, sign, word in (("svhn", BELOW, -1, "below"), ("svhn", ABOVE, 1, "above"),
                                    ("celeba", ALPHAS, 1, "above")):
        held, figures = [], []
        for alpha in alphas:
            held.append(None)
            figures.append(f"{alpha:g}: not run")
            if results := columns.get(alpha):
                value = sign * min(sign * gap(m, one) for m in results)
                patient = one == "svhn" and sign > 0 and results[0]["iters"] < STEPS["paper"]
                held[-1] = sign * value > 0 or (None if patient else False)
                figures[-1] = f"{alpha:g}: {value:+.3f}"
        checks.append((f"{one} bpd {word} the inlier test bpd at alpha = {', '.join(f'{a:g}' for a in alphas)}",
                       False if False in held else None if None in held else True, ", ".join(figures)))
    return checks
