"""CIFAR-10's outliers beside images that were trained on: bpd of SVHN and of the test images by the training bpd.

The paper's test images take as many bits as its training images at every capacity. Here the two are told apart.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from vae_ood.plots import markdown
from vae_ood.reproduce import pages, runs
from vae_ood.reproduce.compute import frame
from vae_ood.reproduce.early import cut
from vae_ood.reproduce.paper import OFFSET, PAPER
from vae_ood.reproduce.path import at_step
from vae_ood.reproduce.tables import gap, judged

FEW, ITERS = 10_000, 40_000  # a training set that is small enough to be learned by heart, and its steps
KEPT = tuple(range(5_000, ITERS + 1, 5_000))
SETTLED = 7.0  # bpd of training images, above which gamma is still on its way
NEAR = 0.03  # bpd


def seen(args):
    """Is it the test images, or the training images, of ours that do as the paper's test images?"""
    root, run = Path(args.runs, "seen_data"), Path(args.runs, f"seen_cifar10_{FEW}_a1_k32_s0")
    if args.budget != 0 and not (run / f"at-{ITERS}" / "metrics.json").exists():
        shutil.rmtree(root, ignore_errors=True)  # of a command that was interrupted
        cut(args.data_root, root, FEW)
        runs.execute(["run.py", "--data", "cifar10", "--recipe", "fast", "--precision", "bfloat16", "--iters",
                      str(ITERS), "--keep-at", *map(str, KEPT), "--no-eval", "--resume", "--out", str(run)], str(root))
    settings = {"alpha": 1, "kappa": 32, "seed": 0, "iters": ITERS}
    few = [m for step in KEPT if (run / f"at-{step}").exists() or (run / f"step-{step}.pt").exists()
           if (m := at_step(run, step, settings, args, data_root=str(root)))]
    shutil.rmtree(root, ignore_errors=True)
    found = {"10,000 images, along the steps": few}
    for name in ("compute", "table2", "path", "early"):
        file = Path(args.out, f"{name}.json")
        numbers = json.loads(file.read_text()) if file.exists() else {"runs": []}
        found[name] = numbers.get("runs", [m for column in numbers.get("columns", ()) for m in column["runs"]])
    found = {name: [m for m in every if m["sets"]["train"]["bpd"] < SETTLED] for name, every in found.items()}
    every = sorted((m for of in found.values() for m in of), key=lambda m: m["sets"]["train"]["bpd"])
    columns = {alpha: {one: column[one] + OFFSET for one in ("train", "test", "svhn")}
               for alpha, column in PAPER["table2"].items()}
    ours = {alpha: {one: at(every, column["train"], one) for one in ("svhn", "test")}
            for alpha, column in columns.items()}
    rows = [[f"{alpha:g}", *(f"{column[one]:.3f}" for one in column), *(
        "not reached" if ours[alpha][one] is None else f"{ours[alpha][one]:.3f}" for one in ("test", "svhn"))]
        for alpha, column in columns.items()]
    pages.save(
        "seen", "The paper's test images and ours that were trained on: CIFAR-10, kappa = 32",
        {"few": few, "ours_at_the_papers_training_bpd": ours, "compared": len(every)},
        ["A row is a column of the paper's Table 2, and what our runs measure where their training images take as many "
         "bits: between the two runs nearest to it. Runs: those of `compute`, `table2`, `path` and `early`, and one at "
         f"alpha = 1 of the first {FEW:,} images alone, which it learns by heart. bpd: of 8-bit data, from the "
         "negative ELBO.", "",
         *markdown(["alpha", "the paper's train", "test", "SVHN", "our test", "our SVHN"], rows)],
        checks(columns, ours, every), every, args)
    if every:
        pages.figure("seen", args, 1, 2, lambda axes: draw(axes[0], found, columns))


def at(every, train, one):
    """The bpd of a set where the training images take `train`, between the two nearest of the runs, sorted by it; None
    beyond them."""
    x = [m["sets"]["train"]["bpd"] for m in every]
    return float(np.interp(train, x, [m["sets"][one]["bpd"] for m in every])) if x and x[0] <= train <= x[-1] else None


def checks(columns, ours, every):
    """[(claim, whether it held, figures)] of the paper's columns {alpha: {set: bpd}}, `ours` at the same training bpd,
    and all runs, sorted by training bpd."""
    reached, found = {alpha: one for alpha, one in ours.items() if one["svhn"] is not None}, []
    for one in ("svhn", "test"):
        off = {alpha: of[one] - columns[alpha][one] for alpha, of in reached.items()}
        found.append((f"at the paper's training bpd our {one} bpd is within {NEAR} of its",
                      judged(all(abs(value) <= NEAR for value in off.values()), len(off), len(columns)),
                      ", ".join(f"{alpha:g}: {value:+.3f}" for alpha, value in off.items())))
    above = {alpha: of["svhn"] - columns[alpha]["train"] for alpha, of in reached.items()}
    found.append(("SVHN minus train (bpd) rises where the paper has a larger alpha",
                  judged(all(b > a for a, b in pairwise(above.values())), len(above) if len(above) > 1 else 0,
                         len(columns)), ", ".join(f"{alpha:g}: {value:+.3f}" for alpha, value in above.items())))
    highest = max(every, key=lambda m: gap(m, "svhn", "train"), default=None)
    if highest:
        train, test = gap(highest, "svhn", "train"), gap(highest, "svhn")
        found.append(("SVHN minus train (bpd) rises above 0", train > 0 or None,
                      f"{train:+.3f} at a training bpd of {highest['sets']['train']['bpd']:.3f}, where SVHN minus test "
                      f"is {test:+.3f}"))
    return found


def draw(axes, found, columns):
    """bpd of SVHN and of the test images, and SVHN's less the training images', by the training bpd: a dot a run, a
    cross a column of the paper's."""
    left, right = axes
    for one, color in (("svhn", "C0"), ("test", "C1")):
        for (name, every), marker in zip(found.items(), "Dosv^", strict=True):
            x = [m["sets"]["train"]["bpd"] for m in every]
            left.plot(x, [m["sets"][one]["bpd"] for m in every], marker, color=color, markersize=4, alpha=0.7)
            if one == "svhn":
                right.plot(x, [gap(m, "svhn", "train") for m in every], marker, color="C0", markersize=4, alpha=0.7,
                           label=name)
                right.plot(x, [gap(m, "svhn") for m in every], marker, color="C1", markersize=4, alpha=0.7)
        left.plot([], [], "o", color=color, label=f"{one}, ours")
        left.plot([column["train"] for column in columns.values()], [column[one] for column in columns.values()], "x",
                  color=color, markersize=9, label=f"{one}, the paper")
    x = [column["train"] for column in columns.values()]
    right.plot(x, [column["svhn"] - column["train"] for column in columns.values()], "kx", markersize=9,
               label="the paper, less train or test")
    left.axline((6.5, 6.5), slope=1, color="gray", linestyle=":", label="train")
    frame(right, "minus", xlabel="training bpd", ylabel="SVHN minus train (blue), minus test (orange)", xscale="linear")
    left.set(xlabel="training bpd", ylabel="bpd")
    for one in axes:
        one.invert_xaxis()
        one.legend(frameon=False)
