"""Trainings as commands: what a run is, what it costs, which ones the budget reaches, and what they measured.

`args` are the command's: `runs`, the folder of the runs; `data_root`; `budget` in minutes, None or 0; `iters`, `seeds`
and `recipe`; `failed`, the folders of the runs whose commands failed.
"""

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
from dataclasses import dataclass, replace
from pathlib import Path

from vae_ood import UserError
from vae_ood.cli import duration
from vae_ood.data import PAIRS
from vae_ood.model import flops

SHAPES = {"sprites": (1, 32, 32), "fashionmnist": (1, 28, 28), "cifar10": (3, 32, 32), "celeba": (3, 32, 32)}
STEPS = {"paper": 200_000, "fast": 10_000}  # of a column, where --iters does not say
BATCH = 64
STARTUP = 12  # seconds of a command beside training and evaluation: imports, images, figures
IMAGES, IW_SAMPLES = 10_000, 4  # of each set that are evaluated, at most; for the importance-weighted NLL
DECODE_SHARE = 0.25  # of a training step's time for an image, to decode one code; measured: 0.22 at alpha = 1


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
                self.recipe, *gamma, "--iters", str(self.iters), "--seed", str(self.seed), "--precision", "float32",
                "--iw-samples", str(IW_SAMPLES), "--max-images", str(IMAGES), "--scores", "nll", "--outliers",
                *PAIRS[self.data], "--resume", "--out", str(Path(runs, self.folder))]


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


def cost(run, args):
    """The expected seconds of a run: start-up, its steps and its evaluation; 0 if it is done."""
    if done(run, args):
        return 0
    speed = seconds_a_step(replace(run, iters=20, seed=0, gamma=""), args.data_root)
    decodes = IMAGES * (1 + (1 + IW_SAMPLES) * (2 + len(PAIRS[run.data])))  # the first: gamma, after training
    return STARTUP + run.iters * speed + decodes * DECODE_SHARE * speed / BATCH


def training_flops(run):
    """Floating-point operations of the whole training: three forward passes a step (two are the backward)."""
    return 3 * BATCH * sum(flops(SHAPES[run.data], run.alpha, run.kappa)) * run.iters


def plan(columns, args):
    """[[a run for each seed]] of the columns, their steps set, as far as the budget reaches. It is spent on what is not
    done yet, again at each call: every column's first seed, then the second..."""
    columns = [replace(run, iters=run.iters or args.iters or STEPS[args.recipe]) for run in columns]
    planned, costs = [[] for _ in columns], []
    left = math.inf if args.budget is None else args.budget * 60
    refused = math.inf if left else 0  # the flops of the least run that is too long; a larger one is not timed
    for seed in range(args.seeds):
        for seeds, column in zip(planned, columns, strict=True):
            run = replace(column, seed=seed)
            seconds = cost(run, args) if done(run, args) or training_flops(run) < refused else math.inf
            if seconds <= left:
                seeds.append(run)
                costs.append(seconds)
                left -= seconds
            else:
                refused = min(refused, training_flops(run))
    if any(costs):
        print(f"{sum(value > 0 for value in costs)} runs are left to train and evaluate: about {duration(sum(costs))} "
              "on this machine", flush=True)
    for run, seeds in zip(columns, planned, strict=True):
        if not seeds:
            print(f"NOT RUN, the budget does not reach it: alpha {run.alpha:g}, kappa {run.kappa}"
                  + (f", gamma {run.gamma}" if run.gamma else "") + f", {run.iters:,} steps")
    return planned


def done(run, args):
    """Whether the run's evaluation is there, whose last file is metrics.json."""
    return Path(args.runs, run.folder, "metrics.json").exists()


def read_log(run, args):
    """The lines of the run's log.jsonl."""
    return [json.loads(line) for line in Path(args.runs, run.folder, "log.jsonl").read_text().splitlines()]


def figures(metrics):
    """What the pages tell of a metrics.json: gamma, active dimensions, each set's means, and its detection by `nll`."""
    return {
        **{key: metrics[key] for key in ("gamma", "active_dims")},
        "sets": {name: {key: row[key] for key in ("n", "bpd", "bpd_iw", "nll", "nll_std", "mse", "kl", "notes")}
                 for name, row in metrics["sets"].items()},
        "detection": {name: {key: row[key] for key in ("auroc", "auroc_ci95", "fpr95")}
                      for name, row in metrics["scores"]["nll"].items()},
    }


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
        **{key: metrics[key] for key in ("kl_per_dim", "mmd", "mmd_images")}, **figures(metrics)}


def attempt(run, args):
    """`measured`, or None where the run failed, which the command tells when the others are done."""
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
