"""The paper's tables and figures, ours beside theirs.

    python -m vae_ood.reproduce table1 --budget 45 --data-root DIR    in about 45 minutes, whatever the machine
    python -m vae_ood.reproduce table2 --recipe paper                 the paper's protocol; its cost is printed first

Every number comes from run.py, run as a command that the JSON file names; a run that is there already, under --runs, is
used, and one that was interrupted goes on. --budget sets the training steps, the same for every column, from the
measured speed of the machine, and leaves out the largest columns where they would have fewer than 1,500 steps; with
--iters the steps are given, and the budget leaves out what it does not reach. --budget 0 trains nothing.

Written to --out: NAME.md, NAME.json and NAME.png. bpd is that of 8-bit data, 3.9944 more than in the paper's
convention. Claims are judged by the code below: held, not held, or not reached where the training that they need was
not run.
"""

import argparse
import csv
import ctypes
import functools
import json
import math
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vae_ood import UserError, checkpoint, plots
from vae_ood.cli import Parser, duration, make_folder, one_line_errors, positive_int
from vae_ood.data import PAIRS, load
from vae_ood.likelihood import bits_per_dim
from vae_ood.metrics import ACTIVE_NATS
from vae_ood.model import VAE

OFFSET = math.log2(255) - 4  # bits per dimension of 8-bit data above the paper's convention
KAPPAS, ALPHAS = (16, 32, 64, 128, 256, 512), (0.25, 0.5, 1, 2, 3, 4)
PAPER = {  # tables 1 and 2 in the paper's convention: {column: {set: bpd}, "gamma"}; and the supplement's table
    "homotopy": {"learn": {"error": 352.8, "mmd": 93.3}, "fixed": {"error": 349.9, "mmd": 291.8}},
    "table1": dict(zip(KAPPAS, [dict(zip(("train", "test", "mnist", "gamma"), column, strict=True)) for column in (
        (2.375, 2.805, 9.598, 0.0055), (2.208, 2.690, 8.618, 0.0040), (2.084, 2.562, 6.294, 0.0030),
        (2.009, 2.424, 4.958, 0.0024), (2.054, 2.397, 4.578, 0.0023), (2.020, 2.301, 4.351, 0.0024))], strict=True)),
    "table2": dict(zip(ALPHAS, [dict(zip(
        ("train", "test", "svhn", "celeba", "gamma"), column, strict=True)) for column in (
        (2.828, 2.824, 2.404, 2.844, 0.0110), (2.766, 2.761, 2.394, 2.882, 0.0101),
        (2.602, 2.598, 2.406, 3.106, 0.0082), (2.275, 2.272, 2.579, 3.965, 0.0051),
        (1.981, 1.978, 2.890, 5.053, 0.0035), (1.728, 1.726, 3.367, 6.424, 0.0024))], strict=True)),
}
SHAPES = {"sprites": (1, 32, 32), "fashionmnist": (1, 28, 28), "cifar10": (3, 32, 32), "celeba": (3, 32, 32)}
STEPS = {"paper": 200_000, "fast": 10_000}  # of a column, where neither --iters nor --budget says
COMPUTE_STEPS = {"paper": (2_500, 10_000, 40_000, 200_000), "fast": (2_500, 10_000, 40_000)}
ARMS = {"paper": (1, ("learn", "fixed")), "fast": (0.25, ("learn", "fixed", "optimal", "homotopy"))}  # alpha, gammas
LEAST_STEPS = 1500  # of a column under a budget
STARTUP = 12  # seconds of a command beside training and evaluation: imports, images, figures
IMAGES, IW_SAMPLES = 10_000, 4  # of each set that are evaluated, at most; for the importance-weighted NLL
DECODE_SHARE = 0.25  # of a training step's time for an image, to decode one code; measured: 0.22 at alpha = 1
INTERVAL = "95% interval by Student's t, over seeds, where there are at least three; else the mean"
STUDENT_T = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by the number of seeds
HELD = {True: "held", False: "NOT held", None: "not reached"}
LEAST_CUT_OFF = 2  # a smaller ratio of neighbours in the sorted KLs is none to speak of
GAP_Z = 3.09  # one-sided 0.1%: the gap between training and test NLL that `select` calls significant


@dataclass(frozen=True)
class Run:
    """A training run and its evaluation, as one command. `gamma` overrides the recipe's: a mode, or "fixed" at
    `gamma_star`."""

    data: str
    alpha: float
    kappa: int
    seed: int = 0
    recipe: str = "fast"
    iters: int = 0
    gamma: str = ""
    gamma_star: float = 0.0

    @property
    def folder(self):
        """The run's folder under --runs."""
        gamma = f"_{self.gamma}" if self.gamma else ""
        return f"{self.data}_a{self.alpha:g}_k{self.kappa}_{self.recipe}{gamma}_i{self.iters}_s{self.seed}"

    def command(self, runs):
        """The arguments of python, without --data-root."""
        gamma = ["--gamma", f"{self.gamma_star:.6g}" if self.gamma == "fixed" else self.gamma] if self.gamma else []
        return ["run.py", "--data", self.data, "--alpha", f"{self.alpha:g}", "--kappa", str(self.kappa), "--recipe",
                self.recipe, *gamma, "--iters", str(self.iters), "--seed", str(self.seed), "--iw-samples",
                str(IW_SAMPLES), "--max-images", str(IMAGES), "--scores", "nll", "--outliers", *PAIRS[self.data],
                "--resume", "--out", str(Path(runs, self.folder))]


def end_with_parent():
    """In a child process, on Linux: SIGTERM when the parent is killed, so that no orphan trains on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def execute(arguments, data_root):
    """Run a command of this project, its output shown; UserError if it fails, KeyboardInterrupt if interrupted."""
    print(f"$ python {shlex.join(arguments)}", flush=True)
    if data_root:
        arguments = [*arguments, "--data-root", data_root]
    with subprocess.Popen([sys.executable, *arguments], preexec_fn=end_with_parent) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()  # until it has saved its state
            code = 130
    if code == 130:
        raise KeyboardInterrupt("the same command goes on where this one stopped")
    if code:
        raise UserError(f"the command above failed (exit code {code}): mend it, and run this one again; it goes on")


@functools.cache
def seconds_a_step(run, data_root):
    """The measured time of a training step, over 20 steps."""
    with tempfile.TemporaryDirectory() as folder:
        execute([*run.command(folder), "--no-eval", "--lr", "1e-6"], data_root)  # 20 steps have no warm-up
        log = Path(folder, run.folder, "log.jsonl").read_text().splitlines()
    return json.loads(log[-1])["seconds"] / run.iters


def cost(run, args, speed=None):
    """The expected seconds of a run: start-up, its steps and its evaluation; 0 if it is done."""
    if done(run, args):
        return 0
    speed = speed or seconds_a_step(replace(run, iters=20, seed=0, gamma=""), args.data_root)
    decodes = IMAGES * (1 + (1 + IW_SAMPLES) * (2 + len(PAIRS[run.data])))  # the first: gamma, after training
    return STARTUP + run.iters * speed + decodes * DECODE_SHARE * speed / 64


@functools.cache
def forward_flops(shape, alpha, kappa):
    """Floating-point operations of the forward pass of a batch of 64."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = VAE(shape, alpha, kappa)
        mu, _ = model.encode(torch.empty(64, *shape))
        model.decode(mu)
    return counter.get_total_flops()


def training_flops(run):
    """Floating-point operations of the whole training: three forward passes a step (two are the backward)."""
    return 3 * forward_flops(SHAPES[run.data], run.alpha, run.kappa) * run.iters


def plan(columns, args):
    """[[a run for each seed]] of the columns, their steps set, as far as the budget reaches.

    A budget without --iters sets the steps; its plan is kept under --runs, so that the same command makes the same
    runs again. Else a budget is spent on what is not done yet, again at each call: every column's first seed, then
    the second...
    """
    if args.budget and not args.iters and not columns[0].iters:
        n, iters = steps_within(columns, args)
        planned = [[replace(run, iters=iters, seed=seed) for seed in range(args.seeds)] for run in columns[:n]]
        planned += [[]] * (len(columns) - n)
    else:
        columns = [replace(run, iters=run.iters or args.iters or STEPS[args.recipe]) for run in columns]
        planned, left, costs = [[] for _ in columns], math.inf if args.budget is None else args.budget * 60, []
        refused = math.inf if left else 0  # the flops of the least run that is too long; a larger one is not timed
        for seed in range(args.seeds):
            for seeds, run in zip(planned, columns, strict=True):
                one, flops = replace(run, seed=seed), training_flops(run)
                seconds = cost(one, args) if done(one, args) or flops < refused else math.inf
                if seconds <= left:
                    seeds.append(one)
                    costs.append(seconds)
                    left -= seconds
                else:
                    refused = min(refused, flops)
        if any(costs):
            print(f"{sum(value > 0 for value in costs)} runs are left to train and evaluate: about "
                  f"{duration(sum(costs))} on this machine", flush=True)
    for run, seeds in zip(columns, planned, strict=True):
        if not seeds:
            print(f"NOT RUN, the budget does not reach it: alpha {run.alpha:g}, kappa {run.kappa}"
                  + (f", gamma {run.gamma}" if run.gamma else "") + (f", {run.iters:,} steps" if run.iters else ""))
    return planned


def steps_within(columns, args):
    """(how many of the columns, from the first on, the budget reaches; the training steps of each)."""
    kind = "-".join(dict.fromkeys(f"{run.data}{run.gamma}" for run in columns))
    path = Path(args.runs, f"plan_{kind}_{len(columns)}_{args.recipe}_b{args.budget:g}_s{args.seeds}.json")
    if path.exists():
        saved = json.loads(path.read_text())
    else:
        started, speeds = time.monotonic(), []
        for run in columns:
            speeds.append(seconds_a_step(replace(run, iters=20, gamma=""), args.data_root))
            if sum(speeds) * LEAST_STEPS * args.seeds > args.budget * 60:
                break
        left = (args.budget * 60 - (time.monotonic() - started)) / args.seeds
        for n in range(len(speeds), 0, -1):
            fixed = sum(cost(run, args, speed) for run, speed in zip(columns, speeds[:n], strict=False))
            steps = int((left - fixed) / sum(speeds[:n])) // 100 * 100
            if steps >= LEAST_STEPS or n == 1:
                break
        saved = {"columns": n, "iters": max(100, steps), "seconds_a_step": speeds}
        checkpoint.write_atomic(path, json.dumps(saved).encode())
    print(f"budget {args.budget:g} minutes: {saved['iters']:,} steps a run (the paper: 200,000), {args.seeds} seed(s)",
          flush=True)
    return saved["columns"], saved["iters"]


def done(run, args):
    """Whether the run's evaluation is there, whose last file is metrics.json."""
    return Path(args.runs, run.folder, "metrics.json").exists()


def read_log(run, args):
    """The lines of the run's log.jsonl."""
    return [json.loads(line) for line in Path(args.runs, run.folder, "log.jsonl").read_text().splitlines()]


def measured(run, args):
    """What a run measured, running it if need be."""
    if not done(run, args):
        execute(run.command(args.runs), args.data_root)
    metrics = json.loads(Path(args.runs, run.folder, "metrics.json").read_text())
    speed = statistics.median(line["images_per_second"] for line in read_log(run, args))  # a suspended run has no other
    return {
        "command": f"python {shlex.join(run.command('runs'))}", "alpha": run.alpha, "kappa": run.kappa,
        "seed": run.seed, "iters": run.iters, "flops": training_flops(run),
        "seconds_at_median_speed": run.iters * metrics["config"]["batch_size"] / speed,
        **{key: metrics[key] for key in ("gamma", "active_dims", "kl_per_dim", "mmd", "mmd_images")},
        "sets": {name: {key: row[key] for key in ("n", "bpd", "bpd_iw", "nll", "nll_std", "mse", "kl", "notes")}
                 for name, row in metrics["sets"].items()},
        "detection": {name: {key: row[key] for key in ("auroc", "auroc_ci95", "fpr95")}
                      for name, row in metrics["scores"]["nll"].items()},
    }


def attempt(run, args):
    """`measured`, or None where the run failed, which `main` tells when the others are done."""
    try:
        return measured(run, args)
    except UserError as error:
        print(error)
        args.failed.append(run.folder)
        return None


def run_columns(columns, args):
    """[(the column's first run, or the column where the budget does not reach; [what each seed measured])]."""
    return [(seeds[0] if seeds else run, [m for one in seeds if (m := attempt(one, args))])
            for run, seeds in zip(columns, plan(columns, args), strict=True)]


def cell(values, digits):
    """The mean; with three seeds or more, plus or minus a 95% confidence interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 3:
        return f"{mean:.{digits}f}"
    freedom = len(values) - 1
    t = STUDENT_T.get(len(values), 1.96 + 2.372 / freedom + 2.82 / freedom**2)
    return f"{mean:.{digits}f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def write_table(name, head, label, table, sets, args, claims, paper):
    """NAME.md and NAME.json in --out: a column for each `label` of a run, the sets' bpd, ours beside the paper's."""
    rows = []

    def add(title, value, theirs=None):
        rows.append([title, *(value(results) if results else "not run" for _, results in table)])
        if theirs:
            columns = [paper.get(label(run)) for run, _ in table]
            rows.append([f"{title}, the paper", *(theirs(column) if column else "" for column in columns)])

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
    lines = ["bpd: bits per dimension of 8-bit data, from the negative ELBO; the paper's figures are its own plus "
             f"3.9944. Outliers are the positive class. ±: {INTERVAL}.", "",
             *markdown(["", *(f"{label(run):g}" for run, _ in table)], rows)]
    save(name, head, {"columns": [{"label": label(run), "runs": results} for run, results in table],
                      "paper_as_printed": paper},
         lines, claims, [m for _, results in table for m in results], args)


def images_line(measurements):
    """How many images of each set were evaluated, and what there is to say of the whole sets."""
    sets = {}
    for name, row in (pair for m in measurements for pair in m["sets"].items()):
        sets.setdefault(name, []).append(f"{row['n']:,}" + "".join(f" ({note})" for note in row["notes"]))
    return "Images evaluated: " + (", ".join(
        f"{name} {' or '.join(dict.fromkeys(values))}" for name, values in sets.items()) or "none") + "."


def markdown(head, rows):
    """The lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def save(name, head, numbers, lines, claims, measurements, args):
    """NAME.json, and NAME.md, which is printed; NAME.png is removed. Claims: [(claim, whether it held, figures)], where
    None is "not reached"; they and the numbers follow from the `measurements`."""
    words = ["python", "-m", "vae_ood.reproduce", name]
    for flag, default in (("budget", None), ("iters", None), ("seeds", 1), ("recipe", "fast"), ("runs", "runs")):
        if (value := getattr(args, flag)) != default:
            words += [f"--{flag}", f"{value:g}" if flag == "budget" else str(value)]
    command = shlex.join(words)
    images = images_line(measurements)
    numbers = {"command": command, "images": images} | numbers | {"claims": [
        dict(zip(("claim", "held", "figures"), claim, strict=True)) for claim in claims]}
    lines = [f"# {head}", "", images, "", *lines, "", *markdown(["claim", "verdict", "figures"], [
        [claim, HELD[held], figures] for claim, held, figures in claims]), "",
        f"`{command}`; torch {torch.__version__}.", ""]
    Path(args.out, f"{name}.png").unlink(missing_ok=True)
    checkpoint.write_atomic(Path(args.out, f"{name}.json"), (json.dumps(numbers, indent=1) + "\n").encode())
    checkpoint.write_atomic(Path(args.out, f"{name}.md"), "\n".join(lines).encode())
    print("\n".join(lines))


def above(table, outlier, label):
    """The claim that the outliers' mean bpd is above the inlier test bpd in every column; each must have been run."""
    gaps = [(label(run), min(gap(m, outlier) for m in results)) for run, results in table if results]
    held = all(value > 0 for _, value in gaps)
    return (f"{outlier} bpd above the inlier test bpd in every column, in the worst seed",
            None if not gaps or (held and len(gaps) < len(table)) else held,
            ", ".join(f"{name:g}: {value:+.3f}" for name, value in gaps))


def gap(m, one, other="test"):
    """By how many bits per dimension the mean NLL of a set is above that of another."""
    return m["sets"][one]["bpd"] - m["sets"][other]["bpd"]


def falls(table):
    """The claim that gamma does not rise from a column to the next, each of which must have been run, beyond the noise:
    twice the standard deviation of a difference of two columns' means, from the deviation between seeds, pooled over
    the columns."""
    columns = [[m["gamma"] for m in results] for _, results in table if results]
    means = [statistics.mean(values) for values in columns]
    rises = [b - a for a, b in pairwise(means)]
    spreads = [statistics.variance(values) for values in columns if len(values) > 1]
    noise = 2 * math.sqrt(2 * statistics.mean(spreads) / min(map(len, columns))) if spreads else 0
    what = f"noise {noise:.1e}" if spreads else "one seed: the noise is not known, and taken to be 0"
    held = all(rise <= noise for rise in rises)
    return ("gamma does not rise from a column to the next, beyond the noise between seeds",
            None if not rises or (held and len(columns) < len(table)) else held,
            ", ".join(f"{v:.5f}" for v in means) + f" ({what})")


def capacity(columns):
    """The paper's claims of CIFAR-10's outliers at each alpha, from {alpha: [what each seed measured]}, in the worst
    seed. An alpha that was not run is not reached, nor is SVHN below the inliers where the paper has it above, before
    the paper's 200,000 steps."""
    claims = []
    for one, alphas, sign, word in (("svhn", (0.25, 0.5, 1), -1, "below"), ("svhn", (2, 3, 4), 1, "above"),
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
        claims.append((f"{one} bpd {word} the inlier test bpd at alpha = {', '.join(f'{a:g}' for a in alphas)}",
                       False if False in held else None if None in held else True, ", ".join(figures)))
    return claims


def by_kappa(args, name, title):
    """The columns of FashionMNIST against MNIST, alpha = 1, over kappa, and their table under this name."""
    label = attrgetter("kappa")
    table = run_columns([Run("fashionmnist", 1, kappa, recipe=args.recipe) for kappa in KAPPAS], args)
    write_table(name, f"{title}: FashionMNIST (inliers) and MNIST, alpha = 1, by kappa", label, table,
                ("train", "test", "mnist"), args, [above(table, "mnist", label), falls(table)], PAPER["table1"])
    return table


def by_alpha(args, name, title, alphas):
    """The columns of CIFAR-10 against SVHN and CelebA, kappa = 32, over alpha, and their table under this name."""
    table = run_columns([Run("cifar10", alpha, 32, recipe=args.recipe) for alpha in alphas], args)
    write_table(name, f"{title}: CIFAR-10 (inliers), SVHN and CelebA, kappa = 32, by alpha", attrgetter("alpha"), table,
                ("train", "test", "svhn", "celeba"), args,
                [falls(table), *capacity({run.alpha: results for run, results in table})], PAPER["table2"])
    return table


def table1(args):
    """FashionMNIST against MNIST."""
    table = by_kappa(args, "table1", "Table 1")
    draw_table("table1", "$\\kappa$", attrgetter("kappa"), table, ("train", "test", "mnist"), args)


def table2(args):
    """CIFAR-10 against SVHN and CelebA."""
    table = by_alpha(args, "table2", "Table 2", ALPHAS)
    draw_table("table2", "$\\alpha$", attrgetter("alpha"), table, ("train", "test", "svhn", "celeba"), args)


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


def name_axis(axes, label, values):
    """A logarithmic x axis that names these values alone, and the legend."""
    axes.set(xscale="log", xlabel=label)
    axes.set_xticks(list(values), [f"{value:g}" for value in values], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=1 + (len(axes.get_lines()) > 4))


def draw_table(name, axis, label, table, sets, args):
    """bpd by column, ours (solid) and the paper's (dashed), and gamma."""
    reached = [(label(run), results) for run, results in table if results]
    if not reached:
        return

    def draw(axes):
        for i, one in enumerate(sets):
            axes[0, 0].plot([x for x, _ in reached], [statistics.mean(m["sets"][one]["bpd"] for m in r)
                                                      for _, r in reached], "o-", color=f"C{i}", label=one)
            axes[0, 0].plot(list(PAPER[name]), [column[one] + OFFSET for column in PAPER[name].values()], "--",
                            color=f"C{i}", alpha=0.6)
        axes[0, 0].plot([], [], "k--", alpha=0.6, label="the paper, plus 3.9944")
        axes[0, 0].set(ylabel="bits per dimension (8 bits)")
        axes[0, 1].plot([x for x, _ in reached], [statistics.mean(m["gamma"] for m in r) for _, r in reached], "ko-",
                        label="ours")
        axes[0, 1].plot(list(PAPER[name]), [column["gamma"] for column in PAPER[name].values()], "k--", alpha=0.6,
                        label="the paper")
        axes[0, 1].set(ylabel=r"$\gamma$", ylim=(0, None))
        for one in axes.flat:
            name_axis(one, axis, PAPER[name])

    figure(name, args, 1, 2, draw)


def bpd_of_sets(run, args):
    """The negative ELBO in bits per dimension of each image of each set, {set: [N]}, from scores.csv."""
    gamma = json.loads(Path(args.runs, run.folder, "metrics.json").read_text())["gamma"]
    sets = {}
    with open(Path(args.runs, run.folder, "scores.csv"), newline="") as file:
        for row in csv.DictReader(file):
            sets.setdefault(row["set"], []).append(float(row["nll"]))
    return {name: bits_per_dim(np.array(values), math.prod(SHAPES[run.data]), gamma) for name, values in sets.items()}


def histograms(name, table, title, args):
    """The NLL histograms of the columns that were run, from their first seeds."""
    reached = [run for run, results in table if results]
    missing = [run.folder for run in reached if not Path(args.runs, run.folder, "scores.csv").exists()]
    if missing:
        print(f"no histograms: {', '.join(missing)} came without scores.csv; evaluate them with eval.py, or train anew")
    if missing or not reached:
        return
    columns = min(3, len(reached))

    def draw(axes):
        for one in axes.flat[len(reached):]:
            one.set_axis_off()
        for one, run in zip(axes.flat, reached, strict=False):
            plots.draw_histogram(one, bpd_of_sets(run, args), "bits", title(run))

    figure(name, args, -(-len(reached) // columns), columns, draw)


def fig2(args):
    """The histograms of table 1's runs."""
    histograms("fig2", by_kappa(args, "fig2", "Figure 2"), lambda run: f"FashionMNIST, $\\kappa$ = {run.kappa}", args)


def fig3(args):
    """The histograms of table 2's runs, and of alpha = 8, which the paper's figure has, where there is no budget."""
    table = by_alpha(args, "fig3", "Figure 3", ALPHAS if args.budget else (*ALPHAS, 8))
    histograms("fig3", table, lambda run: f"CIFAR-10, $\\alpha$ = {run.alpha:g}", args)


def cut_off(m):
    """The ratio of the mean KLs on the two sides of the threshold of activity; None where there are not both."""
    n = m["active_dims"]
    return m["kl_per_dim"][n - 1] / max(m["kl_per_dim"][n], 1e-12) if 0 < n < m["kappa"] else None


def fig4(args):
    """Sorted KL of each latent dimension, FashionMNIST, for three capacities (the paper: 1 and 4)."""
    alphas = 0.25, 1, 4
    table = run_columns([Run("fashionmnist", alpha, kappa, recipe=args.recipe)
                         for alpha in alphas for kappa in KAPPAS[1:]], args)
    rows, columns = [], {(run.alpha, run.kappa): results for run, results in table if results}
    for run, results in table:
        cells = ["not run", "", ""]
        if results:
            cells = [", ".join(str(m["active_dims"]) for m in results),
                     ", ".join(f"{cut_off(m):.2f}" if cut_off(m) else "none" for m in results),
                     f"{results[0]['iters']:,}"]
        rows.append([f"{run.alpha:g}", str(run.kappa), *cells])
    claims, drops = [], {}  # {alpha: the mean cut-off at the largest kappa}
    for alpha in alphas:
        active = {k: [m["active_dims"] for m in columns[alpha, k]] for k in KAPPAS if (alpha, k) in columns}
        largest = [cut_off(m) or 1 for m in columns.get((alpha, KAPPAS[-1]), ())]
        if largest:
            drops[alpha] = statistics.mean(largest)
        claims.append((f"alpha = {alpha:g}: kappa = {KAPPAS[-1]} has inactive dimensions behind a cut-off, at least "
                       f"{LEAST_CUT_OFF}-fold, in every seed", min(largest) >= LEAST_CUT_OFF if largest else None,
                       ", ".join(f"{k}: {'/'.join(map(str, v))} active" for k, v in active.items())
                       + (f"; cut-off {drops[alpha]:.2f}-fold" if largest else "")))
    for low, high in pairwise(alphas):
        both = low in drops and high in drops and max(drops[low], drops[high]) >= LEAST_CUT_OFF
        claims.append((f"the cut-off at kappa = {KAPPAS[-1]} is sharper at alpha = {high:g} than at {low:g}",
                       drops[high] > drops[low] if both else None,
                       ", ".join(f"{alpha:g}: {drops[alpha]:.2f}-fold" for alpha in (low, high) if alpha in drops)
                       + ("; neither is a cut-off to compare" if not both and len(drops.keys() & {low, high}) == 2
                          else "")))
    save("fig4", "Figure 4: the mean KL of each latent dimension, FashionMNIST training images",
         {"columns": [{"alpha": run.alpha, "kappa": run.kappa, "runs": results} for run, results in table]},
         [f"Active: above {ACTIVE_NATS} nats. Cut-off: the ratio of the last active dimension's KL to the first "
          "inactive one's.", "",
          *markdown(["alpha", "kappa", "active", "cut-off", "steps"], rows)],
         claims, [m for results in columns.values() for m in results], args)
    reached = [alpha for alpha in alphas if any((alpha, k) in columns for k in KAPPAS)]

    def draw(axes):
        for one, alpha in zip(axes.flat, reached, strict=True):
            for kappa in KAPPAS:
                if (alpha, kappa) in columns:
                    kl = columns[alpha, kappa][0]["kl_per_dim"]
                    one.semilogy(np.arange(1, kappa + 1), np.maximum(kl, 1e-6), label=f"$\\kappa$ = {kappa}")
            one.axhline(ACTIVE_NATS, color="gray", linestyle=":")
            one.set(xlabel="latent dimension, sorted", ylabel="mean KL (nats)", title=f"$\\alpha$ = {alpha:g}")
            one.legend(frameon=False)

    if reached:
        figure("fig4", args, 1, len(reached), draw)


def homotopy(args):
    """Supplement, section 2: gamma learned, against training from scratch at the gamma* that was learned."""
    alpha, names = ARMS[args.recipe]
    there = (d for d in ("celeba", "cifar10")
             if any(Path(args.runs).glob(f"{d}_a{alpha:g}_k64_{args.recipe}_{names[0]}_*")))
    if not (data := next(there, None)):
        data = "celeba"
        try:
            load(data, "train", args.data_root)
        except UserError as error:
            data = "cifar10"
            print(f"CIFAR-10 instead of the paper's CelebA: {error}")
    arms = {}  # {name: {seed: what it measured}}
    for name, seeds in zip(names, plan([Run(data, alpha, 64, recipe=args.recipe, gamma=name) for name in names], args),
                           strict=True):
        arms[name] = {}
        for run in seeds:
            if name == "fixed":  # at what the same seed learned
                if run.seed not in arms[names[0]]:
                    continue
                run = replace(run, gamma_star=arms[names[0]][run.seed]["gamma"])
            if not (m := attempt(run, args)):
                continue
            log = read_log(run, args)
            m["error"] = {part: math.prod(SHAPES[data]) * m["sets"][part]["mse"] for part in ("train", "test")}
            m["log"] = {key: [line[key] for line in log] for key in ("step", "grad_z_norm", "mse")}
            m["gradient"] = {"first": log[0]["grad_z_norm"], "largest": max(m["log"]["grad_z_norm"]),
                             "last": statistics.mean(m["log"]["grad_z_norm"][-5:])}
            arms[name][run.seed] = m
    rows = []
    for name, seeds in arms.items():
        values = (5, lambda m: m["gamma"]), (2, lambda m: m["error"]["train"]), (2, lambda m: m["error"]["test"]), (
            2, lambda m: 1e3 * m["mmd"]), (1, lambda m: m["active_dims"]), (3, lambda m: m["sets"]["test"]["bpd"]), *(
            (1, lambda m, when=when: m["gradient"][when]) for when in ("first", "largest", "last"))
        rows.append([name, *(cell([value(m) for m in seeds.values()], digits) if seeds else "not run"
                             for digits, value in values), str(len(seeds))])
    pairs = [(m, arms["fixed"][seed]) for seed, m in arms[names[0]].items() if seed in arms["fixed"]]

    def early(*arms):
        return list(zip(*(m["log"]["grad_z_norm"][:2] for m in arms), strict=True))

    def claim(text, holds, figures):
        return (f"{text}, in every seed", all(holds(*pair) for pair in pairs) if pairs else None,
                ", ".join(figures(*pair) for pair in pairs))

    claims = [
        claim("the training reconstruction errors, learned and fixed, are within 5%",
              lambda a, b: abs(b["error"]["train"] / a["error"]["train"] - 1) < 0.05,
              lambda a, b: f"{a['error']['train']:.2f} and {b['error']['train']:.2f}"),
        claim("the MMD is lower where gamma is learned", lambda a, b: a["mmd"] < b["mmd"],
              lambda a, b: f"{1e3 * a['mmd']:.2f} and {1e3 * b['mmd']:.2f}"),
        claim("the gradient, fixed, is more than twice the learned one's at steps 1 and 50",
              lambda a, b: all(fixed > 2 * learned for learned, fixed in early(a, b)),
              lambda a, b: " then ".join(f"{learned:.1f} and {fixed:.1f}" for learned, fixed in early(a, b))),
        claim("learned, the gradient starts below its last value",
              lambda a, b: a["gradient"]["first"] < a["gradient"]["last"],
              lambda a, b: f"{a['gradient']['first']:.1f} to {a['gradient']['last']:.0f}"),
        claim("the last gradients, learned and fixed, are within 25%",
              lambda a, b: abs(b["gradient"]["last"] / a["gradient"]["last"] - 1) < 0.25,
              lambda a, b: f"{a['gradient']['last']:.0f} and {b['gradient']['last']:.0f}")]
    every = [m for seeds in arms.values() for m in seeds.values()]
    trained = f"{every[0]['iters']:,} steps, {every[0]['mmd_images']:,} images for the MMD" if every else "nothing run"
    save("homotopy", f"The supplement's Table 1 and Fig. 1: learning gamma as a homotopy ({data}, "
         f"alpha = {alpha:g}, kappa = 64)",
         {"data": data, "learned": names[0], "arms": {name: list(seeds.values()) for name, seeds in arms.items()}},
         ["optimal: gamma in closed form from the first step; homotopy: with a floor that falls from 1; learn: a "
          f"trained parameter; fixed: at the gamma of the {names[0]} run of the same seed, which is the learned one of "
          f"the claims. {trained}. Error: squared, summed over an image's pixels in [0, 1]. MMD: squared, unbiased, "
          "between training images' z and as many samples of the prior, times 1,000; inverse multiquadratic kernel, "
          "seven scales (arXiv 1711.01558). Gradient: the mean over a batch's images of |dL/dz|, at the first step, at "
          f"most, and over the last five logged steps. ±: {INTERVAL}. The paper (CelebA, in units of its "
          "own): " + "; ".join(f"{name}: error {row['error']}, MMD {row['mmd']}"
                                   for name, row in PAPER["homotopy"].items()) + ".", "",
          *markdown(["gamma", "value", "train error", "test error", "MMD", "active", "test bpd", "first gradient",
                     "largest", "last", "seeds"], rows)], claims, every, args)

    def draw(axes):
        for i, (name, seeds) in enumerate(arms.items()):
            for j, m in enumerate(seeds.values()):
                for one, key in zip(axes.flat, ("grad_z_norm", "mse"), strict=True):
                    one.loglog(m["log"]["step"], m["log"][key], ".-", color=f"C{i}", markersize=3, linewidth=1,
                               alpha=0.7, label=None if j else name)
        for one, title in zip(axes.flat, (r"mean $\|dL/dz\|$ of a batch (nats)", "MSE of a batch"), strict=True):
            one.set(xlabel="training step", ylabel=title)
            one.legend(frameon=False, title="$\\gamma$")

    if every:
        figure("homotopy", args, 1, 2, draw)


def by_compute(args):
    """CIFAR-10's columns over alpha and training steps, the cheapest first."""
    return sorted((Run("cifar10", alpha, 32, recipe=args.recipe, iters=iters) for alpha in ALPHAS
                   for iters in ([args.iters] if args.iters else COMPUTE_STEPS[args.recipe])), key=training_flops)


def select(args):
    """Section 3.2: the largest alpha, from the smallest up, whose train/test NLL gap is not yet significant; seed 0."""
    args.seeds = 1
    table = run_columns(by_compute(args), args)
    reached = sorted((results[0] for _, results in table if results), key=lambda m: (m["iters"], m["alpha"]))
    names, groups, claims, lines = PAIRS["cifar10"], {}, [], []
    for m in reached:
        test, train = m["sets"]["test"], m["sets"]["train"]
        z = (test["nll"] - train["nll"]) / math.sqrt(sum(s["nll_std"]**2 / s["n"] for s in (test, train)))
        groups.setdefault(m["iters"], []).append({
            "alpha": m["alpha"], "gap_bpd": gap(m, "test", "train"), "z": z, "significant": bool(z > GAP_Z),
            "images": [train["n"], test["n"]], "command": m["command"], "detection": m["detection"]})
    choices = {}
    for iters, rows in groups.items():
        if [row["alpha"] for row in rows] != list(ALPHAS[:len(rows)]):
            lines.append(f"{iters:,} steps: not judged, a smaller alpha was not run.")
            continue
        kept = list(takewhile(lambda row: not row["significant"], rows))
        choices[iters] = chosen = kept[-1]["alpha"] if kept else None
        found = len(kept) < len(rows)
        lines.append(f"{iters:,} steps: alpha chosen: {'none' if chosen is None else f'{chosen:g}'}"
                     + ("" if found else ", the largest that was run: no gap was significant") + ".")
        claims.append((f"at {iters:,} steps the smallest alpha's gap is not significant and a larger one's is",
                       chosen is not None if found else None,
                       ", ".join(f"{row['alpha']:g}: z = {row['z']:.1f}" for row in rows)))
        for name in names:
            auroc = {row["alpha"]: row["detection"][name]["auroc"] for row in rows}
            high, low = ({row["alpha"]: row["detection"][name]["auroc_ci95"][end] for row in rows} for end in (1, 0))
            best = found and chosen is not None and high[chosen] >= max(low.values()) and auroc[chosen] > 0.5
            claims.append((f"at {iters:,} steps the alpha chosen has the highest {name} AUROC that was run, within the "
                           "intervals over images, and one above 0.5", best if found and chosen is not None else None,
                           ", ".join(f"{k:g}: {v:.4f}" for k, v in auroc.items())))
    cells = [[f"{iters:,}", f"{row['alpha']:g}", f"{row['gap_bpd']:+.4f}", f"{row['z']:.1f}",
              "yes" if row["significant"] else "no", *(f"{row['detection'][name]['auroc']:.4f}" for name in names)]
             for iters, rows in groups.items() for row in rows]
    save("select", "Choosing the capacity without outliers (section 3.2): CIFAR-10, kappa = 32",
         {"chosen_alpha": choices, "rows": groups, "not_run": [[run.alpha, run.iters] for run, r in table if not r]},
         ["Raise alpha until the test NLL is significantly above the training NLL, and stop before. Significant is our "
          f"reading: Welch's z above {GAP_Z} (one-sided 0.1%) over images, seed 0. Steps are judged where every alpha "
          "up to the largest that was run for them is there. AUROC, looked at afterwards, is of the NLL; outliers are "
          "the positive class.", "", *lines, "",
          *markdown(["steps", "alpha", "gap (bpd)", "z", "significant", *(f"{name} AUROC" for name in names)], cells),
          "", not_run(table)], claims, reached, args)

    def draw(axes):
        for i, (iters, rows) in enumerate(groups.items()):
            x = [row["alpha"] for row in rows]
            axes[0, 0].plot(x, [row["z"] for row in rows], "o-", color=f"C{i}", label=f"{iters:,} steps")
            for name, style in zip(names, ("o-", "s--"), strict=True):
                axes[0, 1].plot(x, [row["detection"][name]["auroc"] for row in rows], style, color=f"C{i}",
                                label=f"{name}, {iters:,} steps")
        axes[0, 0].axhline(GAP_Z, color="gray", linestyle=":", label=f"significant: {GAP_Z}")
        axes[0, 0].set(ylabel="z of the gap between test and training NLL")
        axes[0, 1].set(ylabel="AUROC of the NLL", ylim=(0, 1))
        for one in axes.flat:
            name_axis(one, "$\\alpha$", ALPHAS)

    if groups:
        figure("select", args, 1, 2, draw)


def not_run(table):
    """The line that names the columns of alpha and steps that were not run."""
    return "Not run: " + (", ".join(f"alpha {run.alpha:g} at {run.iters:,} steps" for run, results in table
                                    if not results) or "none") + "."


def crossings(curve):
    """Where a curve [(flops, value)] rises through 0: linearly between neighbours, in the logarithm of the flops."""
    return [math.exp(math.log(x0) + y0 / (y0 - y1) * (math.log(x1) - math.log(x0)))
            for (x0, y0), (x1, y1) in pairwise(curve) if y0 < 0 <= y1]


QUANTITIES = {  # of a run of CIFAR-10's
    "test bpd": lambda m: m["sets"]["test"]["bpd"], "test minus train (bpd)": lambda m: gap(m, "test", "train"),
    "gamma": lambda m: m["gamma"], "SVHN minus test (bpd)": lambda m: gap(m, "svhn"),
    "CelebA minus test (bpd)": lambda m: gap(m, "celeba"), "SVHN AUROC": lambda m: m["detection"]["svhn"]["auroc"],
    "CelebA AUROC": lambda m: m["detection"]["celeba"]["auroc"]}
THEIRS = {  # the same of a column of the paper's table 2
    "test bpd": lambda column: column["test"] + OFFSET, "gamma": lambda column: column["gamma"],
    "SVHN minus test (bpd)": lambda column: column["svhn"] - column["test"],
    "CelebA minus test (bpd)": lambda column: column["celeba"] - column["test"]}


def compute(args):
    """The central question: bpd, gamma and AUROC of CIFAR-10, SVHN and CelebA against training compute, by alpha."""
    table = run_columns(by_compute(args), args)
    reached = sorted((results for _, results in table if results), key=lambda r: (r[0]["alpha"], r[0]["iters"]))
    mean = lambda results, value: statistics.mean(value(m) for m in results)  # noqa: E731
    curves = {name: {alpha: [(r[0]["flops"], mean(r, value)) for r in reached if r[0]["alpha"] == alpha]
                     for alpha in ALPHAS} for name, value in QUANTITIES.items()}
    rows = [[f"{r[0]['alpha']:g}", f"{r[0]['iters']:,}", f"{r[0]['flops']:.2e}",
             *(cell([value(m) for m in r], 5 if name == "gamma" else 3) for name, value in QUANTITIES.items()),
             str(len(r))] for r in reached]
    claims = [(f"{claim}, at each alpha's longest run", held, figures)
              for claim, held, figures in capacity({r[0]["alpha"]: r for r in reached})]  # sorted: the longest is last
    for iters in sorted({r[0]["iters"] for r in reached}):
        at = [r for r in reached if r[0]["iters"] == iters]
        if len(at) > 1:
            for name, sign, word in (("SVHN minus test (bpd)", 1, "rises"), ("gamma", -1, "falls"),
                                     ("test bpd", -1, "falls")):
                values = [mean(r, QUANTITIES[name]) for r in at]
                held = all(sign * (b - a) > 0 for a, b in pairwise(values))
                claims.append((f"{name} {word} from each alpha to the next at {iters:,} steps",
                               False if not held else True if len(at) == len(ALPHAS) else None,
                               ", ".join(f"{r[0]['alpha']:g}: {value:.4g}"
                                         for r, value in zip(at, values, strict=True))))
    longer = {alpha: [y for _, y in curve]
              for alpha, curve in curves["SVHN minus test (bpd)"].items() if len(curve) > 1}
    claims.append(("the crossing comes nearer: SVHN minus test (bpd) rises with the steps at each alpha",
                   all(low < high for values in longer.values() for low, high in pairwise(values)) if longer else None,
                   "; ".join(f"{alpha:g}: {', '.join(f'{y:.4g}' for y in values)}"
                             for alpha, values in longer.items())))
    found = {name: {alpha: crossings(curve) for alpha, curve in curves[name].items() if crossings(curve)}
             for name in ("SVHN minus test (bpd)", "CelebA minus test (bpd)")}
    whole = {alpha: training_flops(Run("cifar10", alpha, 32, iters=STEPS["paper"])) for alpha in ALPHAS}
    save("compute", "BPD, gamma and AUROC against training compute: CIFAR-10, kappa = 32",
         {"runs": [m for r in reached for m in r], "crossings_flops": found,
          "not_run": [[run.alpha, run.iters] for run, results in table if not results]},
         ["FLOPs: of the whole training, twice the multiplications, the backward counted as two forward passes; the "
          f"paper's 200,000 steps at alpha = 4 are {whole[4]:.2e}, with the batch of 64 and the layers of this "
          "repository. bpd: of 8-bit data, from the negative ELBO. SVHN below the inliers before the paper's 200,000 "
          "steps, where it has SVHN above, is not reached; an order that fails is judged at the steps it is of. "
          f"Outliers are the positive class. ±: {INTERVAL}.", "",
          *markdown(["alpha", "steps", "FLOPs", *QUANTITIES, "seeds"], rows), "",
          not_run(table)], claims, [m for r in reached for m in r], args)

    def draw(axes):
        shown = [name for name in QUANTITIES if name != "test minus train (bpd)"]
        for one, name in zip(axes.flat, shown, strict=True):
            if name in THEIRS:
                for i, (alpha, column) in enumerate(PAPER["table2"].items()):
                    one.plot(whole[alpha], THEIRS[name](column), "x", color=f"C{i}")
            for i, (alpha, curve) in enumerate(curves[name].items()):
                one.plot([x for x, _ in curve], [y for _, y in curve], "o-", color=f"C{i}", markersize=4,
                         label=f"$\\alpha$ = {alpha:g}")
                for x in found.get(name, {}).get(alpha, []):
                    one.plot(x, 0, "*", color=f"C{i}", markersize=14, markeredgecolor="black")
            level = 0.5 if "AUROC" in name else 0 if "minus" in name else None
            if level is not None:
                one.axhline(level, color="gray", linestyle=":")
            one.set(xscale="log", xlabel="training FLOPs", ylabel=name, xlim=(1e12, 2 * whole[ALPHAS[-1]]),
                    **({"ylim": (0, 1)} if "AUROC" in name else {}))
        axes.flat[0].plot([], [], "kx", label="the paper")
        axes.flat[0].legend(frameon=False)

    if reached:
        figure("compute", args, 2, 3, draw)


TARGETS = {function.__name__: function for function in (table1, table2, fig2, fig3, fig4, homotopy, select, compute)}


def minutes(text):
    """argparse type: a finite number of minutes, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return value


def main():
    """The command."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--budget", type=minutes, metavar="MINUTES", help="train and evaluate in about this time: "
                        "fewer steps, and the largest columns left out; 0: only use the runs that are there")
    parser.add_argument("--iters", type=positive_int, metavar="N", help="training steps of every run (default: set by "
                        "--budget, else the recipe's)")
    parser.add_argument("--recipe", choices=STEPS, default="fast", help="that of run.py (default fast)")
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="N", help="seeds 0 to N - 1 (default 1)")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are kept (default runs)")
    parser.add_argument("--out", default="runs/reproduce", metavar="DIR", help="default runs/reproduce")
    parser.add_argument("--data-root", metavar="DIR", help="that of run.py")
    args = parser.parse_args()
    args.failed = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run in progress saves its state
    for folder in (args.out, args.runs):
        make_folder(Path(folder))
    TARGETS[args.target](args)
    if args.failed:
        raise UserError(f"left out, their commands failed (see above): {', '.join(args.failed)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
