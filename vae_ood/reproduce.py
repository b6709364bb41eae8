"""The paper's tables and figures, ours beside theirs.

    python -m vae_ood.reproduce table1 --budget 45 --data-root DIR    in about 45 minutes, whatever the machine
    python -m vae_ood.reproduce table2 --recipe paper                 the paper's protocol; its cost is printed first

Every number comes from run.py, run as a command that the JSON file names; a run that is there already, under --runs, is
used, and one that was interrupted goes on. --budget sets the training steps, the same for every column, from the
measured speed of the machine, and leaves out the largest columns where they would have fewer than 1,500 steps.

Written to --out: NAME.md, NAME.json and NAME.png. bpd is that of 8-bit data, 4 more than in the paper's convention.
Claims are marked held or not held by the code below, of the columns that were run.
"""

import csv
import json
import math
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vae_ood import UserError, checkpoint, plots
from vae_ood.cli import Parser, duration, make_folder, one_line_errors, positive_float, positive_int
from vae_ood.likelihood import bits_per_dim
from vae_ood.metrics import ACTIVE_NATS
from vae_ood.model import VAE

KAPPAS, ALPHAS = (16, 32, 64, 128, 256, 512), (0.25, 0.5, 1, 2, 3, 4)
OUTLIERS = {"fashionmnist": ("mnist",), "cifar10": ("svhn", "celeba")}
PAPER = {  # tables 1 and 2 in the paper's convention: {column: {set: bpd}, "gamma"}
    "table1": dict(zip(KAPPAS, [dict(zip(("train", "test", "mnist", "gamma"), column, strict=True)) for column in (
        (2.375, 2.805, 9.598, 0.0055), (2.208, 2.690, 8.618, 0.0040), (2.084, 2.562, 6.294, 0.0030),
        (2.009, 2.424, 4.958, 0.0024), (2.054, 2.397, 4.578, 0.0023), (2.020, 2.301, 4.351, 0.0024))], strict=True)),
    "table2": dict(zip(ALPHAS, [dict(zip(
        ("train", "test", "svhn", "celeba", "gamma"), column, strict=True)) for column in (
        (2.828, 2.824, 2.404, 2.844, 0.0110), (2.766, 2.761, 2.394, 2.882, 0.0101),
        (2.602, 2.598, 2.406, 3.106, 0.0082), (2.275, 2.272, 2.579, 3.965, 0.0051),
        (1.981, 1.978, 2.890, 5.053, 0.0035), (1.728, 1.726, 3.367, 6.424, 0.0024))], strict=True)),
}
SHAPES = {"fashionmnist": (1, 28, 28), "cifar10": (3, 32, 32)}
LEAST_STEPS = 1500  # of a column under a budget
STARTUP = 12  # seconds of a command beside training and evaluation: imports, images, figures
IMAGES = 10_000  # of each set that are evaluated, at most
DECODE_SHARE = 0.25  # of a training step's time for an image, to decode one code; measured: 0.22 at alpha = 1
GAP_Z = 3.09  # one-sided 0.1%: the gap between training and test NLL that `select` calls significant


@dataclass(frozen=True)
class Run:
    """A training run and its evaluation, as one command."""

    data: str
    alpha: float
    kappa: int
    seed: int = 0
    recipe: str = "fast"
    iters: int = 0
    iw_samples: int = 16

    @property
    def folder(self):
        """The run's folder under --runs."""
        return f"{self.data}_a{self.alpha:g}_k{self.kappa}_{self.recipe}_i{self.iters}_iw{self.iw_samples}_s{self.seed}"

    def command(self, runs):
        """The arguments of python, without --data-root."""
        slower = ["--lr", "1e-3"] if self.recipe == "fast" and self.data != "fashionmnist" else []  # 2e-3 diverges
        return ["run.py", "--data", self.data, "--alpha", f"{self.alpha:g}", "--kappa", str(self.kappa), "--recipe",
                self.recipe, *slower, "--iters", str(self.iters), "--seed", str(self.seed), "--iw-samples",
                str(self.iw_samples), "--max-images", str(IMAGES), "--outliers", *OUTLIERS[self.data], "--resume",
                "--out", str(Path(runs, self.folder))]


def execute(arguments, data_root):
    """Run a command of this project, its output shown; UserError if it fails, KeyboardInterrupt if interrupted."""
    print(f"$ python {shlex.join(arguments)}", flush=True)
    if data_root:
        arguments = [*arguments, "--data-root", data_root]
    with subprocess.Popen([sys.executable, *arguments]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            code = process.wait() or 130  # once it has saved its state
    if code == 130:
        raise KeyboardInterrupt("the same command goes on where this one stopped")
    if code:
        raise UserError(f"the command above failed (exit code {code}): mend it, and run this one again; it goes on")


def seconds_a_step(run, args):
    """The measured time of a training step, over 20 steps."""
    with tempfile.TemporaryDirectory() as folder:
        execute([*replace(run, iters=20).command(folder), "--no-eval"], args.data_root)
        log = Path(folder, replace(run, iters=20).folder, "log.jsonl").read_text().splitlines()
    return json.loads(log[-1])["seconds"] / 20


def training_flops(run):
    """Floating-point operations of the whole training: three forward passes a step (two are the backward)."""
    shape = SHAPES[run.data]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = VAE(shape, run.alpha, run.kappa)
        mu, _ = model.encode(torch.empty(64, *shape))
        model.decode(mu)
    return 3 * counter.get_total_flops() * run.iters


def plan(columns, args):
    """The columns with their steps set, as far as the budget goes; None for a column that it does not reach.

    The plan of a budget is kept under --runs, so that the same command makes the same runs again.
    """
    if not args.budget:
        columns = [replace(run, iters=200_000 if args.recipe == "paper" else 10_000) for run in columns]
        left = [sum(not done(replace(run, seed=seed), args) for seed in range(args.seeds)) for run in columns]
        cost = sum(n * seconds_a_step(run, args) * run.iters for n, run in zip(left, columns, strict=True) if n)
        print(f"{sum(left)} runs of {columns[0].iters:,} steps are left to train: about {duration(cost)} on this "
              "machine, and the evaluations", flush=True)
        return columns
    path = Path(args.runs, f"plan_{columns[0].data}_{len(columns)}_{args.recipe}_b{args.budget:g}_s{args.seeds}.json")
    if path.exists():
        saved = json.loads(path.read_text())
    else:
        started, speeds = time.monotonic(), []
        left = args.budget * 60
        for run in columns:
            speeds.append(seconds_a_step(run, args))
            if sum(speeds) * LEAST_STEPS > left:
                break
        left -= time.monotonic() - started
        for n in range(len(speeds), 0, -1):
            decodes = IMAGES * (1 + 4 * (2 + len(OUTLIERS[columns[0].data])))  # gamma at the end of training, and K = 4
            fixed = sum(STARTUP + decodes * DECODE_SHARE * speed / 64 for speed in speeds[:n])
            steps = int((left / args.seeds - fixed) / sum(speeds[:n])) // 100 * 100
            if steps >= LEAST_STEPS or n == 1:
                break
        saved = {"columns": n, "iters": max(100, steps), "seconds_a_step": speeds}
        checkpoint.write_atomic(path, json.dumps(saved).encode())
    planned = [replace(run, iters=saved["iters"], iw_samples=4) for run in columns[:saved["columns"]]]
    print(f"budget {args.budget:g} minutes: {saved['iters']:,} steps a column (the paper: 200,000), {args.seeds} "
          f"seed(s), K = 4 for the importance-weighted NLL", flush=True)
    if skipped := columns[saved["columns"]:]:
        names = ", ".join(f"alpha {run.alpha:g} kappa {run.kappa}" for run in skipped)
        print(f"NOT RUN, the budget does not reach them: {names}")
    return planned + [None] * len(skipped)


def done(run, args):
    """Whether the run's evaluation is there, whose last file is scores.csv."""
    return Path(args.runs, run.folder, "scores.csv").exists()


def measured(run, args):
    """What a run measured, running it if need be."""
    folder = Path(args.runs, run.folder)
    if not done(run, args):
        execute(run.command(args.runs), args.data_root)
    metrics = json.loads((folder / "metrics.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "command": f"python {shlex.join(run.command(args.runs))}", "alpha": run.alpha, "kappa": run.kappa,
        "seed": run.seed, "iters": run.iters, "training_seconds": log[-1]["seconds"], "flops": training_flops(run),
        **{key: metrics[key] for key in ("gamma", "active_dims", "spectrum_cut", "spectrum_ratio")},
        "sets": {name: {key: row[key] for key in ("n", "bpd", "bpd_iw", "nll", "mse", "kl")}
                 for name, row in metrics["sets"].items()},
        "nll": {name: {key: row[key] for key in ("auroc", "auroc_ci95", "fpr95")}
                for name, row in metrics["scores"]["nll"].items()},
    }


def run_columns(columns, args):
    """[(run, [what each seed measured] or None where the budget does not reach)]."""
    table = []
    for run, planned in zip(columns, plan(columns, args), strict=True):
        results = planned and [measured(replace(planned, seed=seed), args) for seed in range(args.seeds)]
        table.append((planned or run, results))
    return table


def cell(values, digits):
    """The mean; with three seeds or more, plus or minus a 95% confidence interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 3:
        return f"{mean:.{digits}f}"
    t = {3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.571)
    return f"{mean:.{digits}f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def write_table(name, head, label, table, sets, args, claims):
    """NAME.md and NAME.json in --out: a column for each `label` of a run, the sets' bpd, ours beside the paper's."""
    paper = PAPER[name]
    rows = []

    def add(title, value, theirs=None):
        rows.append([title, *("not run" if results is None else value(results) for _, results in table)])
        if theirs:
            rows.append([f"{title}, the paper", *(theirs(paper[label(run)]) for run, _ in table)])

    for one in sets:
        add(f"{one} bpd", lambda r, one=one: cell([m["sets"][one]["bpd"] for m in r], 3),
            lambda column, one=one: f"{column[one] + 4:.3f}")
    add("gamma", lambda r: cell([m["gamma"] for m in r], 5), lambda column: f"{column['gamma']:.4f}")
    for one in sets[2:]:
        add(f"{one} AUROC of the NLL", lambda r, one=one: cell([m["nll"][one]["auroc"] for m in r], 4))
        add(f"{one} FPR95", lambda r, one=one: cell([m["nll"][one]["fpr95"] for m in r], 4))
    add("active dimensions", lambda r: ", ".join(str(m["active_dims"]) for m in r))
    add("training steps", lambda r: f"{r[0]['iters']:,}")
    add("training (minutes)", lambda r: cell([m["training_seconds"] / 60 for m in r], 1))
    results = [r for _, r in table if r]
    images = ", ".join(f"{one} {results[0][0]['sets'][one]['n']:,}" for one in sets)
    lines = [f"# {head}", "",
             f"bpd: bits per dimension of 8-bit data, from the negative ELBO; the paper's figures are its own plus 4. "
             f"Outliers are the positive class. Images: {images}. {args.seeds} seed(s)"
             + ("" if args.seeds >= 3 else ": no confidence intervals over seeds") + ".", "",
             "| | " + " | ".join(f"{label(run):g}" for run, _ in table) + " |", "|---" * (len(table) + 1) + "|",
             *("| " + " | ".join(row) + " |" for row in rows), "", "| claim | held | figures |", "|---|---|---|",
             *(f"| {claim} | {'held' if held else 'NOT held'} | {figures} |" for claim, held, figures in claims), "",
             f"`python -m vae_ood.reproduce {shlex.join(sys.argv[1:])}`; table written on {platform.machine()}, "
             f"{torch.get_num_threads()} threads, torch {torch.__version__}.", ""]
    claims = [dict(zip(("claim", "held", "figures"), claim, strict=True)) for claim in claims]
    save(name, {"columns": [{"label": label(run), "runs": results} for run, results in table],
                "paper_bpd_minus_4": paper, "claims": claims}, args, lines)


def save(name, numbers, args, lines):
    """NAME.json, and NAME.md, which is printed."""
    about = {"target": args.target, "recipe": args.recipe, "budget_minutes": args.budget, "seeds": args.seeds}
    checkpoint.write_atomic(Path(args.out, f"{name}.json"), (json.dumps(about | numbers, indent=1) + "\n").encode())
    checkpoint.write_atomic(Path(args.out, f"{name}.md"), "\n".join(lines).encode())
    print("\n".join(lines))


def above(table, outlier, label):
    """The claim that the outliers' mean bpd is above the inlier test bpd in every column that was run."""
    gaps = [(label(run), min(m["sets"][outlier]["bpd"] - m["sets"]["test"]["bpd"] for m in results))
            for run, results in table if results]
    return (f"{outlier} bpd above the inlier test bpd in every column that was run, in the worst seed",
            all(gap > 0 for _, gap in gaps),
            ", ".join(f"{name:g}: {gap:+.3f}" for name, gap in gaps))


def falls(table, label):
    """The claim that gamma does not rise from a column to the next, beyond twice the deviation between seeds."""
    columns = [(label(run), [m["gamma"] for m in results]) for run, results in table if results]
    noise = 2 * max((statistics.stdev(values) for _, values in columns if len(values) > 1), default=0)
    means = [statistics.mean(values) for _, values in columns]
    rises = [b - a for a, b in pairwise(means)]
    what = f"noise {noise:.1e}" if noise else "one seed: the noise is not known, and taken to be 0"
    return ("gamma does not rise from a column to the next, beyond twice the deviation between seeds",
            len(means) > 1 and all(rise <= noise for rise in rises),
            ", ".join(f"{v:.5f}" for v in means) + f" ({what})")


def table1(args):
    """FashionMNIST against MNIST, alpha = 1, over kappa."""
    table = run_columns([Run("fashionmnist", 1, kappa, recipe=args.recipe) for kappa in KAPPAS], args)
    label = lambda run: run.kappa  # noqa: E731
    write_table("table1", "Table 1: FashionMNIST (inliers) and MNIST, alpha = 1, by kappa", label, table,
                ("train", "test", "mnist"), args, [above(table, "mnist", label), falls(table, label)])
    draw_table("table1", "$\\kappa$", label, table, ("train", "test", "mnist"), args)
    return table


def table2(args):
    """CIFAR-10 against SVHN and CelebA, kappa = 32, over alpha."""
    table = run_columns([Run("cifar10", alpha, 32, recipe=args.recipe) for alpha in ALPHAS], args)
    label = lambda run: run.alpha  # noqa: E731
    claims = [falls(table, label)]
    for one, small, large in (("svhn", (0.25, 0.5, 1), (2, 3, 4)), ("celeba", (), ALPHAS)):
        for alphas, sign, word in ((small, -1, "below"), (large, 1, "above")):
            gaps = {run.alpha: sign * min(sign * (m["sets"][one]["bpd"] - m["sets"]["test"]["bpd"]) for m in results)
                    for run, results in table if results and run.alpha in alphas}  # of the worst seed
            if gaps:
                where = ", ".join(f"{alpha:g}" for alpha in gaps)
                claim = f"{one} bpd {word} the inlier test bpd at alpha = {where}, as in the paper"
                claims.append((claim, all(sign * gap > 0 for gap in gaps.values()),
                               ", ".join(f"{alpha:g}: {gap:+.3f}" for alpha, gap in gaps.items())))
    sets = ("train", "test", "svhn", "celeba")
    head = "Table 2: CIFAR-10 (inliers), SVHN and CelebA, kappa = 32, by alpha"
    write_table("table2", head, label, table, sets, args, claims)
    draw_table("table2", "$\\alpha$", label, table, sets, args)
    return table


def figure(name, args, rows, columns, draw):
    """NAME.png in --out, with rows x columns axes that `draw` fills."""
    if not plots.available():
        print("no figure: pip install matplotlib")
        return
    from matplotlib.figure import Figure
    sheet = Figure(figsize=(5.5 * columns, 4 * rows), dpi=110, layout="constrained")
    draw(sheet.subplots(rows, columns, squeeze=False))
    sheet.savefig(Path(args.out, f"{name}.png"))
    print(f"written to {Path(args.out, name)}.*")


def draw_table(name, axis, label, table, sets, args):
    """bpd by column, ours (solid) and the paper's (dashed), and gamma."""
    reached = [(label(run), results) for run, results in table if results]

    def draw(axes):
        for i, one in enumerate(sets):
            axes[0, 0].plot([x for x, _ in reached], [statistics.mean(m["sets"][one]["bpd"] for m in r)
                                                      for _, r in reached], "o-", color=f"C{i}", label=one)
            axes[0, 0].plot(list(PAPER[name]), [column[one] + 4 for column in PAPER[name].values()], "--",
                            color=f"C{i}", alpha=0.6)
        axes[0, 0].plot([], [], "k--", alpha=0.6, label="the paper, plus 4")
        axes[0, 0].set(xscale="log", xlabel=axis, ylabel="bits per dimension (8 bits)")
        axes[0, 1].plot([x for x, _ in reached], [statistics.mean(m["gamma"] for m in r) for _, r in reached], "ko-",
                        label="ours")
        axes[0, 1].plot(list(PAPER[name]), [column["gamma"] for column in PAPER[name].values()], "k--", alpha=0.6,
                        label="the paper")
        axes[0, 1].set(xscale="log", yscale="log", xlabel=axis, ylabel=r"$\gamma$")
        for one in axes.flat:
            one.set_xticks(list(PAPER[name]), [f"{x:g}" for x in PAPER[name]], minor=False)
            one.minorticks_off()
            one.legend(frameon=False)

    figure(name, args, 1, 2, draw)


def nll_of_sets(run, args):
    """The negative ELBO in bits per dimension of each image of each set, {set: [N]}, from scores.csv."""
    sets = {}
    with open(Path(args.runs, run.folder, "scores.csv"), newline="") as file:
        for row in csv.DictReader(file):
            sets.setdefault(row["set"], []).append(float(row["nll"]))
    return {name: bits_per_dim(np.array(values), math.prod(SHAPES[run.data])) for name, values in sets.items()}


def histograms(name, table, title, args):
    """The NLL histograms of the columns that were run, from their first seeds."""
    reached = [run for run, results in table if results]
    columns = min(3, len(reached))
    figure(name, args, -(-len(reached) // columns), columns, lambda axes: [
        plots.draw_histogram(one, nll_of_sets(run, args), title(run))
        for one, run in zip(axes.flat, reached, strict=False)])


def fig2(args):
    """The histograms of table 1's runs."""
    histograms("fig2", table1(args), lambda run: f"FashionMNIST, $\\kappa$ = {run.kappa}", args)


def fig3(args):
    """The histograms of table 2's runs."""
    histograms("fig3", table2(args), lambda run: f"CIFAR-10, $\\alpha$ = {run.alpha:g}", args)


def fig4(args):
    """Sorted KL of each latent dimension, FashionMNIST, for two capacities."""
    columns = [Run("fashionmnist", alpha, kappa, recipe=args.recipe) for alpha in (1, 4) for kappa in KAPPAS[1:]]
    table = run_columns(columns, args)
    lines = ["# Figure 4: the mean KL of each latent dimension, FashionMNIST training images", "",
             f"Active: above {ACTIVE_NATS} nats. Sharpness: the largest drop between neighbours of the sorted KLs, and "
             "after how many dimensions.", "", "| alpha | kappa | active | largest drop | after | steps |",
             "|---|---|---|---|---|---|"]
    for run, results in table:
        lines.append(f"| {run.alpha:g} | {run.kappa} | " + ("not run | | | |" if results is None else
                     f"{results[0]['active_dims']} | {results[0]['spectrum_ratio'] or math.nan:.1f}-fold | "
                     f"{results[0]['spectrum_cut']} | {run.iters:,} |"))
    save("fig4", {"columns": [{"alpha": run.alpha, "kappa": run.kappa, "runs": results} for run, results in table]},
         args, [*lines, ""])

    def draw(axes):
        for one, alpha in zip(axes.flat, (1, 4), strict=True):
            for run, results in table:
                if results and run.alpha == alpha:
                    metrics = json.loads(Path(args.runs, run.folder, "metrics.json").read_text())
                    kl = metrics["kl_per_dim"]  # sorted
                    one.semilogy(np.arange(1, len(kl) + 1), np.maximum(kl, 1e-6), label=f"$\\kappa$ = {run.kappa}")
            one.axhline(ACTIVE_NATS, color="gray", linestyle=":")
            one.set(xlabel="latent dimension, sorted", ylabel="mean KL (nats)", title=f"$\\alpha$ = {alpha}")
            if one.get_legend_handles_labels()[0]:
                one.legend(frameon=False)

    figure("fig4", args, 1, 2, draw)


def select(args):
    """Section 3.2: the largest alpha, from the smallest up, whose train/test NLL gap is not yet significant."""
    table = run_columns([Run("cifar10", alpha, 32, recipe=args.recipe) for alpha in ALPHAS], args)
    rows, chosen, overfits = [], None, False
    for run, results in table:
        if results is None:
            continue
        bpd = nll_of_sets(run, args)
        gap = bpd["test"].mean() - bpd["train"].mean()
        z = gap / math.sqrt(bpd["test"].var() / len(bpd["test"]) + bpd["train"].var() / len(bpd["train"]))
        overfits = overfits or z > GAP_Z
        chosen = chosen if overfits else run.alpha
        rows.append({"alpha": run.alpha, "gap_bpd": float(gap), "z": float(z), "significant": bool(z > GAP_Z),
                     "auroc": {name: row["auroc"] for name, row in results[0]["nll"].items()}})
    names = list(rows[0]["auroc"])
    lines = ["# Choosing the capacity without outliers (section 3.2): CIFAR-10, kappa = 32", "",
             "Raise alpha until the test NLL is significantly above the training NLL: Welch's z above "
             f"{GAP_Z} (one-sided 0.1%). AUROC is looked at afterwards.", "",
             f"alpha chosen: {'none' if chosen is None else f'{chosen:g}'}"
             + ("" if overfits else " (the largest that was run: no gap was significant)"), "",
             "| alpha | gap (bpd) | z | significant | " + " | ".join(f"{name} AUROC" for name in names) + " |",
             "|---" * (4 + len(names)) + "|",
             *(f"| {r['alpha']:g} | {r['gap_bpd']:+.4f} | {r['z']:.1f} | {'yes' if r['significant'] else 'no'} | "
               + " | ".join(f"{r['auroc'][name]:.4f}" for name in names) + " |" for r in rows),
             *(f"| {run.alpha:g} | not run" + " |" * (3 + len(names)) for run, results in table if not results), ""]
    save("select", {"chosen_alpha": chosen, "rows": rows}, args, lines)


TARGETS = {function.__name__: function for function in (table1, table2, fig2, fig3, fig4, select)}


def main():
    """The command."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--budget", type=positive_float, metavar="MINUTES", help="train and evaluate in about this "
                        "time: fewer steps, and the largest columns left out")
    parser.add_argument("--recipe", choices=("paper", "fast"), default="fast", help="that of run.py (default fast)")
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="N", help="seeds 0 to N - 1 (default 1)")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are kept (default runs)")
    parser.add_argument("--out", default="results/reproduce", metavar="DIR", help="default results/reproduce")
    parser.add_argument("--data-root", metavar="DIR", help="that of run.py")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run in progress saves its state
    for folder in (args.out, args.runs):
        make_folder(Path(folder))
    TARGETS[args.target](args)


if __name__ == "__main__":
    with one_line_errors():
        main()
