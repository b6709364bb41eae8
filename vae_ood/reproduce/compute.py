"""CIFAR-10 over alpha and training steps: the figures against training compute, and alpha chosen without outliers."""

import math
import statistics
from itertools import pairwise, takewhile

from vae_ood.data import PAIRS
from vae_ood.plots import markdown
from vae_ood.reproduce import pages, runs
from vae_ood.reproduce.pages import INTERVAL, cell, name_axis
from vae_ood.reproduce.paper import ALPHAS, OFFSET, PAPER
from vae_ood.reproduce.runs import STEPS, Run, training_flops
from vae_ood.reproduce.tables import capacity, gap, judged

TRAINED = {"paper": (200_000,), "fast": (2_500, 10_000)}  # steps, without --iters
GAP_Z = 3.09  # one-sided 0.1%: the gap between training and test NLL that `select` calls significant
SVHN, CELEBA = "SVHN minus test (bpd)", "CelebA minus test (bpd)"
QUANTITIES = {  # of a run of CIFAR-10's
    "test bpd": lambda m: m["sets"]["test"]["bpd"], "test minus train (bpd)": lambda m: gap(m, "test", "train"),
    "gamma": lambda m: m["gamma"], SVHN: lambda m: gap(m, "svhn"), CELEBA: lambda m: gap(m, "celeba"),
    "SVHN AUROC": lambda m: m["detection"]["svhn"]["auroc"],
    "CelebA AUROC": lambda m: m["detection"]["celeba"]["auroc"]}
ORDERS = {SVHN: (1, "rises"), "gamma": (-1, "falls"), "test bpd": (-1, "falls")}  # as alpha grows
THEIRS = {  # the same of a column of the paper's table 2
    "test bpd": lambda column: column["test"] + OFFSET, "gamma": lambda column: column["gamma"],
    "test minus train (bpd)": lambda column: column["test"] - column["train"],
    SVHN: lambda column: column["svhn"] - column["test"], CELEBA: lambda column: column["celeba"] - column["test"]}


def by_compute(args):
    """CIFAR-10's columns over alpha and training steps, the cheapest first."""
    return sorted((Run("cifar10", alpha, 32, recipe=args.recipe, iters=iters) for alpha in ALPHAS
                   for iters in ([args.iters] if args.iters else TRAINED[args.recipe])), key=training_flops)


def not_run(table):
    """The columns of alpha and steps that were not run: [[alpha, steps]], and the line that names them."""
    columns = [[run.alpha, run.iters] for run, results in table if not results]
    return columns, "Not run: " + (", ".join(f"alpha {a:g} at {n:,} steps" for a, n in columns) or "none") + "."


def compute(args):
    """The central question: bpd, gamma and AUROC of CIFAR-10, SVHN and CelebA against training compute, by alpha."""
    table = runs.run_columns(by_compute(args), args)
    reached = sorted((results for _, results in table if results), key=lambda r: (r[0]["alpha"], r[0]["iters"]))
    curves = {name: {alpha: [(r[0]["flops"], mean(name, r)) for r in reached if r[0]["alpha"] == alpha]
                     for alpha in ALPHAS} for name in QUANTITIES}
    whole = {alpha: training_flops(Run("cifar10", alpha, 32, iters=STEPS["paper"])) for alpha in ALPHAS}
    claims = [(f"{claim}, at each alpha's longest run", held, figures)
              for claim, held, figures in capacity({r[0]["alpha"]: r for r in reached})]  # sorted: the longest is last
    columns, missing = not_run(table)
    every = [m for r in reached for m in r]
    rows = [[f"{r[0]['alpha']:g}", f"{r[0]['iters']:,}", f"{r[0]['flops']:.2e}",
             *(cell([value(m) for m in r], 5 if name == "gamma" else 3) for name, value in QUANTITIES.items()),
             str(len(r))] for r in reached]
    pages.save(
        "compute", "BPD, gamma and AUROC against training compute: CIFAR-10, kappa = 32",
        {"runs": every, "not_run": columns},
        ["FLOPs: of the whole training, twice the multiplications, the backward counted as two forward passes; the "
         f"paper's 200,000 steps at alpha = 4 are {whole[4]:.2e}, with the batch of 64 and the layers of this "
         "repository. bpd: of 8-bit data, from the negative ELBO. SVHN below the inliers before the paper's 200,000 "
         "steps, where it has SVHN above, is not reached; an order that fails is judged at the steps it is of. "
         f"Outliers are the positive class. ±: {INTERVAL}.", "",
         *markdown(["alpha", "steps", "FLOPs", *QUANTITIES, "seeds"], rows), "", missing],
        [*claims, *orders(reached)], every, args)
    if reached:
        pages.figure("compute", args, 2, 3, lambda axes: draw_compute(axes, curves, whole))


def mean(name, results):
    """The mean of one of the QUANTITIES over seeds."""
    return statistics.mean(map(QUANTITIES[name], results))


def orders(reached):
    """The checks that a figure rises, or falls, from each alpha to the next at the same steps."""
    checks = []
    for iters in sorted({r[0]["iters"] for r in reached}):
        at = [r for r in reached if r[0]["iters"] == iters]
        if len(at) < 2:
            continue
        checks += [order(name, {r[0]["alpha"]: mean(name, r) for r in at}, f"at {iters:,} steps") for name in ORDERS]
    return checks


def order(name, values, when, alphas=ALPHAS):
    """The check that a quantity goes as ORDERS says from each alpha to the next, of {alpha: value}; it holds where all
    of the `alphas` are there."""
    sign, word = ORDERS[name]
    held = all(sign * (b - a) > 0 for a, b in pairwise(values.values()))
    return (f"{name} {word} from each alpha to the next {when}",
            judged(held, len(values) if len(values) > 1 else 0, len(alphas)),
            ", ".join(f"{alpha:g}: {value:.4g}" for alpha, value in values.items()))


def signed(name, of, alphas, sign, when):
    """The check that a quantity is above 0 (sign 1), or below (-1), at each of the `alphas`, as far as they are in
    {alpha: what its run measured}."""
    values = {alpha: QUANTITIES[name](of[alpha]) for alpha in alphas if alpha in of}
    return (f"{name} is {'above' if sign > 0 else 'below'} 0 {when} alpha = {', '.join(f'{a:g}' for a in alphas)}",
            judged(all(sign * value > 0 for value in values.values()), len(values), len(alphas)),
            ", ".join(f"{alpha:g}: {value:+.3f}" for alpha, value in values.items()))


def shown(m, quantities=QUANTITIES):
    """The cells of a table that tell what one run measured."""
    return [f"{value(m):.{5 if name == 'gamma' else 3}f}" for name, value in quantities.items()]


def frame(axes, name, **settings):
    """The frame of one of the QUANTITIES: a logarithmic x axis, and the level that matters, if it has one."""
    level = 0.5 if "AUROC" in name else 0 if "minus" in name else None
    if level is not None:
        axes.axhline(level, color="gray", linestyle=":")
    axes.set(**({"xscale": "log"} | settings), **({"ylim": (0, 1)} if "AUROC" in name else {}))


def draw_compute(axes, curves, whole):
    """The curves {quantity: {alpha: [(flops, value)]}}, and crosses for the paper's figures at the flops of its `whole`
    training."""
    shown = [name for name in QUANTITIES if name != "test minus train (bpd)"]
    for one, name in zip(axes.flat, shown, strict=True):
        for i, (alpha, curve) in enumerate(curves[name].items()):
            if name in THEIRS:
                one.plot(whole[alpha], THEIRS[name](PAPER["table2"][alpha]), "x", color=f"C{i}")
            one.plot([x for x, _ in curve], [y for _, y in curve], "o-", color=f"C{i}", markersize=4,
                     label=f"$\\alpha$ = {alpha:g}")
        frame(one, name, xlabel="training FLOPs", ylabel=name, xlim=(1e12, 2 * whole[ALPHAS[-1]]))
    axes.flat[0].plot([], [], "kx", label="the paper")
    axes.flat[0].legend(frameon=False)


def select(args):
    """Section 3.2: the largest alpha, from the smallest up, whose train/test NLL gap is not yet significant; seed 0."""
    args.seeds = 1
    table = runs.run_columns(by_compute(args), args)
    reached = sorted((results[0] for _, results in table if results), key=lambda m: (m["iters"], m["alpha"]))
    groups, choices, claims, lines = {}, {}, [], []
    for m in reached:
        groups.setdefault(m["iters"], []).append(gap_of(m))
    for iters, rows in groups.items():
        if [row["alpha"] for row in rows] != list(ALPHAS[:len(rows)]):
            lines.append(f"{iters:,} steps: not judged, a smaller alpha was not run.")
            continue
        choices[iters], end, checks = choose(iters, rows)
        lines.append(f"{iters:,} steps: alpha chosen: {end}.")
        claims += checks
    outliers = PAIRS["cifar10"]
    cells = [[f"{iters:,}", f"{row['alpha']:g}", f"{row['gap_bpd']:+.4f}", f"{row['z']:.1f}",
              "yes" if row["significant"] else "no", *(f"{row['detection'][name]['auroc']:.4f}" for name in outliers)]
             for iters, rows in groups.items() for row in rows]
    columns, missing = not_run(table)
    pages.save(
        "select", "Choosing the capacity without outliers (section 3.2): CIFAR-10, kappa = 32",
        {"chosen_alpha": choices, "rows": groups, "not_run": columns},
        ["Raise alpha until the test NLL is significantly above the training NLL, and stop before. Significant is our "
         f"reading: Welch's z above {GAP_Z} (one-sided 0.1%) over images, seed 0. Steps are judged where every alpha "
         "up to the largest that was run for them is there. AUROC, looked at afterwards, is of the NLL; outliers are "
         "the positive class.", "", *lines, "",
         *markdown(["steps", "alpha", "gap (bpd)", "z", "significant", *(f"{name} AUROC" for name in outliers)], cells),
         "", missing], claims, reached, args)
    if groups:
        pages.figure("select", args, 1, 2, lambda axes: draw_select(axes, groups))


def gap_of(m):
    """The gap between a run's training and test NLL, and Welch's z of it over images."""
    test, train = m["sets"]["test"], m["sets"]["train"]
    z = (test["nll"] - train["nll"]) / math.sqrt(sum(s["nll_std"]**2 / s["n"] for s in (test, train)))
    return {"alpha": m["alpha"], "gap_bpd": gap(m, "test", "train"), "z": z, "significant": bool(z > GAP_Z),
            "images": [train["n"], test["n"]], "command": m["command"], "detection": m["detection"]}


def choose(iters, rows):
    """(the alpha chosen, None where there is none; the same in words; the checks), from the gaps of every alpha."""
    kept = list(takewhile(lambda row: not row["significant"], rows))
    chosen, found = kept[-1]["alpha"] if kept else None, len(kept) < len(rows)
    words = "none" if chosen is None else f"{chosen:g}"
    checks = [(f"at {iters:,} steps the smallest alpha's gap is not significant and a larger one's is",
               chosen is not None if found else None,
               ", ".join(f"{row['alpha']:g}: z = {row['z']:.1f}" for row in rows))]
    for name in PAIRS["cifar10"]:
        of = {row["alpha"]: row["detection"][name] for row in rows}
        best = None
        if found and chosen is not None:
            best = of[chosen]["auroc"] > 0.5 and (
                of[chosen]["auroc_ci95"][1] >= max(one["auroc_ci95"][0] for one in of.values()))
        checks.append((f"at {iters:,} steps the alpha chosen has the highest {name} AUROC that was run, within the "
                       "intervals over images, and one above 0.5", best,
                       ", ".join(f"{alpha:g}: {one['auroc']:.4f}" for alpha, one in of.items())))
    return chosen, words if found else f"{words}, the largest that was run: no gap was significant", checks


def draw_select(axes, groups):
    """The z of the gaps {steps: rows by alpha}, and the AUROC beside it."""
    (gaps, detection), = axes
    for i, (iters, rows) in enumerate(groups.items()):
        x = [row["alpha"] for row in rows]
        gaps.plot(x, [row["z"] for row in rows], "o-", color=f"C{i}", label=f"{iters:,} steps")
        for name, style in zip(PAIRS["cifar10"], ("o-", "s--"), strict=True):
            detection.plot(x, [row["detection"][name]["auroc"] for row in rows], style, color=f"C{i}",
                           label=f"{name}, {iters:,} steps")
    gaps.axhline(GAP_Z, color="gray", linestyle=":", label=f"significant: {GAP_Z}")
    gaps.set(ylabel="z of the gap between test and training NLL")
    detection.set(ylabel="AUROC of the NLL", ylim=(0, 1))
    for one in (gaps, detection):
        name_axis(one, "$\\alpha$", ALPHAS)
