"""What becomes of the latent code: figure 4, the dimensions that are pruned; the supplement's section 2, the homotopy
of a learned gamma."""

import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from vae_ood import UserError
from vae_ood.data import load
from vae_ood.metrics import ACTIVE_NATS
from vae_ood.plots import markdown
from vae_ood.reproduce import pages, runs
from vae_ood.reproduce.pages import INTERVAL, cell
from vae_ood.reproduce.paper import KAPPAS, PAPER
from vae_ood.reproduce.runs import SHAPES, Run
from vae_ood.reproduce.tables import above, gap

CAPACITIES = 0.25, 1, 4  # alphas
SHOWN = 1, 4  # in the paper's figure
LEAST_CUT_OFF = 2  # a smaller ratio of neighbours in the sorted KLs is none to speak of
ARMS = {"paper": (1, ("learn", "fixed")), "fast": (0.25, ("learn", "fixed", "optimal", "homotopy"))}  # alpha, gammas
MOST = 0.9  # of the summed KL, which `holding` counts the dimensions of
MEASURED = {  # of figure 4's table: the digits, and the figure
    f"hold {MOST:.0%} of the KL": (0, lambda m: holding(m["kl_per_dim"])),
    "train bpd": (3, lambda m: m["sets"]["train"]["bpd"]), "test bpd": (3, lambda m: m["sets"]["test"]["bpd"]),
    "MNIST minus test (bpd)": (3, lambda m: gap(m, "mnist")), "gamma": (5, lambda m: m["gamma"]),
    "MNIST AUROC": (4, lambda m: m["detection"]["mnist"]["auroc"])}
COLUMNS = {  # of the homotopy's table: the digits, and the figure
    "value": (5, lambda m: m["gamma"]), "train error": (2, lambda m: m["error"]["train"]),
    "test error": (2, lambda m: m["error"]["test"]), "MMD": (2, lambda m: 1e3 * m["mmd"]),
    "active": (1, lambda m: m["active_dims"]), "test bpd": (3, lambda m: m["sets"]["test"]["bpd"]),
    "first gradient": (1, lambda m: m["gradient"]["first"]), "largest": (1, lambda m: m["gradient"]["largest"]),
    "last": (1, lambda m: m["gradient"]["last"])}


def fig4(args):
    """Sorted KL of each latent dimension, FashionMNIST, for three capacities."""
    table = runs.run_columns([Run("fashionmnist", alpha, kappa, recipe=args.recipe)
                              for alpha in CAPACITIES for kappa in KAPPAS[1:]], args)
    rows, columns = [], {(run.alpha, run.kappa): results for run, results in table if results}
    for run, results in table:
        cells = ["not run", *[""] * (2 + len(MEASURED))]
        if results:
            cells = [", ".join(str(m["active_dims"]) for m in results),
                     ", ".join(f"{cut_off(m):.2f}" if cut_off(m) else "none" for m in results),
                     *(cell([value(m) for m in results], digits) for digits, value in MEASURED.values()),
                     f"{results[0]['iters']:,}"]
        rows.append([f"{run.alpha:g}", str(run.kappa), *cells])
    pages.save(
        "fig4", "Figure 4: the mean KL of each latent dimension, FashionMNIST training images",
        {"columns": [{"alpha": run.alpha, "kappa": run.kappa, "runs": results} for run, results in table]},
        [f"Active: above {ACTIVE_NATS} nats. Cut-off: the ratio of the last active dimension's KL to that of the first "
         "other. bpd: of 8-bit data, from the negative ELBO. AUROC: of the NLL; MNIST is the positive class.", "",
         *markdown(["alpha", "kappa", "active", "cut-off", *MEASURED, "steps"], rows)],
        [*prunings(columns), above({f"{run.alpha:g}, {run.kappa}": results for run, results in table}, "mnist")],
        [m for results in columns.values() for m in results], args)
    if reached := sorted({alpha for alpha, _ in columns}):
        pages.figure("fig4", args, 1, len(reached), lambda axes: draw_fig4(axes[0], reached, columns))


def cut_off(m):
    """The ratio of the mean KLs on the two sides of the threshold of activity; None where there are not both."""
    n = m["active_dims"]
    return m["kl_per_dim"][n - 1] / max(m["kl_per_dim"][n], 1e-12) if 0 < n < m["kappa"] else None


def holding(kl):
    """The smallest number of dimensions whose mean KLs sum to MOST of all."""
    return int(np.searchsorted(np.cumsum(np.sort(kl)[::-1]), MOST * np.sum(kl))) + 1


def prunings(columns):
    """The checks of {(alpha, kappa): [what each seed measured]}: at the largest kappa there is a cut-off, and it is
    sharper at a larger alpha; of the alphas that the paper shows."""
    checks, drops = [], {}  # {alpha: the mean cut-off at the largest kappa}
    for alpha in SHOWN:
        active = {k: [m["active_dims"] for m in columns[alpha, k]] for k in KAPPAS if (alpha, k) in columns}
        largest = [cut_off(m) or 1 for m in columns.get((alpha, KAPPAS[-1]), ())]
        if largest:
            drops[alpha] = statistics.mean(largest)
        checks.append((f"pruning at alpha = {alpha:g}: kappa = {KAPPAS[-1]} has inactive dimensions behind a cut-off, "
                       f"at least {LEAST_CUT_OFF}-fold, in every seed",
                       min(largest) >= LEAST_CUT_OFF if largest else None,
                       ", ".join(f"{k}: {'/'.join(map(str, v))} active" for k, v in active.items())
                       + (f"; cut-off {drops[alpha]:.2f}-fold" if largest else "")))
    for low, high in pairwise(SHOWN):
        both = {alpha: drops[alpha] for alpha in (low, high) if alpha in drops}
        there = len(both) == 2 and max(both.values()) >= LEAST_CUT_OFF
        checks.append((f"pruning at kappa = {KAPPAS[-1]}: the cut-off is sharper at alpha = {high:g} than at {low:g}",
                       drops[high] > drops[low] if there else None,
                       ", ".join(f"{alpha:g}: {drop:.2f}-fold" for alpha, drop in both.items())
                       + ("; neither is a cut-off to compare" if len(both) == 2 and not there else "")))
    return checks


def draw_fig4(axes, alphas, columns):
    """The sorted KLs, a pair of axes for each alpha."""
    for one, alpha in zip(axes, alphas, strict=True):
        for kappa in KAPPAS:
            if (alpha, kappa) in columns:
                kl = columns[alpha, kappa][0]["kl_per_dim"]
                one.semilogy(np.arange(1, kappa + 1), np.maximum(kl, 1e-6), label=f"$\\kappa$ = {kappa}")
        one.axhline(ACTIVE_NATS, color="gray", linestyle=":")
        one.set(xlabel="latent dimension, sorted", ylabel="mean KL (nats)", title=f"$\\alpha$ = {alpha:g}")
        one.legend(frameon=False)


def homotopy(args):
    """Supplement, section 2: gamma learned, against training from scratch at the gamma* that was learned."""
    alpha, names = ARMS[args.recipe]
    data = data_of(args)
    arms = train_arms(data, args)
    every = [m for seeds in arms.values() for m in seeds.values()]
    rows = [[name, *(cell([value(m) for m in seeds.values()], digits) if seeds else "not run"
                     for digits, value in COLUMNS.values()), str(len(seeds))] for name, seeds in arms.items()]
    trained = f"{every[0]['iters']:,} steps, {every[0]['mmd_images']:,} images for the MMD" if every else "nothing run"
    paper = "; ".join(f"{name}: error {row['error']}, MMD {row['mmd']}" for name, row in PAPER["homotopy"].items())
    pages.save(
        "homotopy", f"The supplement's Table 1 and Fig. 1: learning gamma as a homotopy ({data}, alpha = {alpha:g}, "
        "kappa = 64)",
        {"data": data, "learned": names[0], "arms": {name: list(seeds.values()) for name, seeds in arms.items()}},
        ["optimal: gamma in closed form from the first step; homotopy: with a floor that falls from 1; learn: a "
         f"trained parameter; fixed: at the gamma of the {names[0]} run of the same seed, which is the learned one of "
         f"the claims. {trained}. Error: squared, summed over an image's pixels in [0, 1]. MMD: squared, unbiased, "
         "between training images' z and as many samples of the prior, times 1,000; inverse multiquadratic kernel, "
         "seven scales (arXiv 1711.01558). Gradient: the mean over a batch's images of |dL/dz|, at the first step, at "
         f"most, and over the last five logged steps. ±: {INTERVAL}. The paper (CelebA, in units of its "
         f"own): {paper}.", "", *markdown(["gamma", *COLUMNS, "seeds"], rows)],
        comparisons(arms[names[0]], arms["fixed"]), every, args)
    if every:
        pages.figure("homotopy", args, 1, 2, lambda axes: draw_homotopy(axes[0], arms))


def data_of(args):
    """CelebA, as in the paper, or CIFAR-10 where that was run before, or where there is no CelebA."""
    alpha, names = ARMS[args.recipe]
    for data in ("celeba", "cifar10"):
        if any(Path(args.runs).glob(f"{data}_a{alpha:g}_k64_{args.recipe}_{names[0]}_*")):
            return data
    try:
        load("celeba", "train", args.data_root)
    except UserError as error:
        print(f"CIFAR-10 instead of the paper's CelebA: {error}")
        return "cifar10"
    return "celeba"


def train_arms(data, args):
    """{gamma: {seed: what its run measured, with its errors, its log and its gradients}}; "fixed" is at the gamma that
    the same seed learned in the first."""
    alpha, names = ARMS[args.recipe]
    columns = [Run(data, alpha, 64, recipe=args.recipe, gamma=name) for name in names]
    arms = {name: {} for name in names}
    for name, seeds in zip(names, runs.plan(columns, args), strict=True):
        for run in seeds:
            if name == "fixed":
                if run.seed not in arms[names[0]]:
                    continue
                run = replace(run, gamma_star=arms[names[0]][run.seed]["gamma"])
            if m := runs.attempt(run, args):
                lines = runs.read_log(run, args)
                log = {key: [line[key] for line in lines] for key in ("step", "grad_z_norm", "mse")}
                gradient = log["grad_z_norm"]
                arms[name][run.seed] = m | {
                    "error": {part: math.prod(SHAPES[data]) * m["sets"][part]["mse"] for part in ("train", "test")},
                    "log": log, "gradient": {"first": gradient[0], "largest": max(gradient),
                                             "last": statistics.mean(gradient[-5:])}}
    return arms


def comparisons(learned, fixed):
    """The checks of two arms {seed: what was measured}, in every seed that both have."""
    pairs = [(m, fixed[seed]) for seed, m in learned.items() if seed in fixed]

    def early(*arms):
        return list(zip(*(m["log"]["grad_z_norm"][:2] for m in arms), strict=True))

    def check(text, holds, figures):
        return (f"{text}, in every seed", all(holds(*pair) for pair in pairs) if pairs else None,
                ", ".join(figures(*pair) for pair in pairs))

    return [
        check("the training reconstruction errors, learned and fixed, are within 5%",
              lambda a, b: abs(b["error"]["train"] / a["error"]["train"] - 1) < 0.05,
              lambda a, b: f"{a['error']['train']:.2f} and {b['error']['train']:.2f}"),
        check("the MMD is lower where gamma is learned", lambda a, b: a["mmd"] < b["mmd"],
              lambda a, b: f"{1e3 * a['mmd']:.2f} and {1e3 * b['mmd']:.2f}"),
        check("the gradient, fixed, is more than twice the learned one's at steps 1 and 50",
              lambda a, b: all(two > 2 * one for one, two in early(a, b)),
              lambda a, b: " then ".join(f"{one:.1f} and {two:.1f}" for one, two in early(a, b))),
        check("learned, the gradient starts below its last value",
              lambda a, b: a["gradient"]["first"] < a["gradient"]["last"],
              lambda a, b: f"{a['gradient']['first']:.1f} to {a['gradient']['last']:.0f}"),
        check("the last gradients, learned and fixed, are within 25%",
              lambda a, b: abs(b["gradient"]["last"] / a["gradient"]["last"] - 1) < 0.25,
              lambda a, b: f"{a['gradient']['last']:.0f} and {b['gradient']['last']:.0f}")]


def draw_homotopy(axes, arms):
    """The gradient and the error of each run, by training step."""
    for i, (name, seeds) in enumerate(arms.items()):
        for j, m in enumerate(seeds.values()):
            for one, key in zip(axes, ("grad_z_norm", "mse"), strict=True):
                one.loglog(m["log"]["step"], m["log"][key], ".-", color=f"C{i}", markersize=3, linewidth=1, alpha=0.7,
                           label=None if j else name)
    for one, title in zip(axes, (r"mean $\|dL/dz\|$ of a batch (nats)", "MSE of a batch"), strict=True):
        one.set(xlabel="training step", ylabel=title)
        one.legend(frameon=False, title="$\\gamma$")
