"""CIFAR-10's outliers beside images that were trained on: the bpd of SVHN by that of the training images.

The paper's test images take as many bits as its training images at every capacity. Here the two are told apart.
"""

import json
import re
from pathlib import Path

import numpy as np

from vae_ood.plots import markdown
from vae_ood.reproduce import pages, runs
from vae_ood.reproduce.compute import frame
from vae_ood.reproduce.early import cut, fully, measured_at
from vae_ood.reproduce.paper import OFFSET, PAPER
from vae_ood.reproduce.tables import gap, judged

FEW, ITERS = 10_000, 40_000  # a training set that is small enough to be learned by heart, and its steps
KEPT = tuple(range(5_000, ITERS + 1, 5_000))
READ = "compute", "path", "early"  # the targets whose JSON files are read
SETTLED = 7.0  # bpd of training images, above which gamma is still on its way down
NEAR = 0.03  # bpd
OUTLIERS = {"svhn": "SVHN", "celeba": "CelebA"}
WHOLE = 50_000  # the paper's training images; 45,000, without those that validate, count as as many


def seen(args):
    """Is it our test images, or our training images, that do as the paper's test images?"""
    run = Path(args.runs, f"seen_cifar10_{FEW}_a1_k32_s0")
    with cut(args, FEW, args.budget != 0 and not fully(run, KEPT)) as root:
        if root:
            runs.execute(["run.py", "--data", "cifar10", "--recipe", "fast", "--precision", "bfloat16", "--iters",
                          str(ITERS), "--keep-at", *map(str, KEPT), "--no-eval", "--resume", "--out", str(run)], root)
        few = measured_at("seen", run, KEPT, {"alpha": 1, "kappa": 32, "seed": 0, "iters": ITERS}, args, root)
    found = list(few)
    for name in READ:
        file = Path(args.out, f"{name}.json")
        if file.exists():
            found += json.loads(file.read_text())["runs"]
        else:
            print(f"without {file}: python -m vae_ood.reproduce {name} writes it")
    every = sorted((m for m in found if m["sets"]["train"]["bpd"] < SETTLED),
                   key=lambda m: m["sets"]["train"]["bpd"])
    sizes = {}
    for m in every:
        sizes.setdefault(trained_on(m), []).append(m)
    sizes = dict(sorted(sizes.items(), reverse=True))
    columns = {alpha: {one: column[one] + OFFSET for one in ("train", "test", *OUTLIERS)}
               for alpha, column in PAPER["table2"].items()}
    ours = {one: {alpha: {size: at(of_size, column["train"], one) for size, of_size in sizes.items()}
                  for alpha, column in columns.items()} for one in OUTLIERS}
    lowest = {alpha: min((m["sets"]["test"]["bpd"] for m in every if m["alpha"] == alpha), default=None)
              for alpha in columns}
    rows = [[f"{alpha:g}", told(column["train"]), told(column["test"]), *(
        told(value) for one in OUTLIERS for value in (column[one], *ours[one][alpha].values())), told(lowest[alpha])]
        for alpha, column in columns.items()]
    heads = [f"ours, {words(size)} images" for size in sizes]
    pages.save(
        "seen", "Outliers beside images that were trained on: CIFAR-10, kappa = 32",
        {"few": few, "at_the_papers_training_bpd": ours, "lowest_test_bpd": lowest, "compared": len(every)},
        ["A row is a column of the paper's Table 2. Ours, of SVHN and CelebA: the bpd where our training images take "
         "as many bits as the paper's, between the two nearest measurements with so many training images, whatever "
         "their alpha and their steps. Our lowest test: of all measurements at that alpha. Measurements: those of "
         f"{', '.join(READ)} where gamma has come down (training bpd below {SETTLED:g}), and some along a training at "
         f"alpha = 1 on the first {FEW:,} images alone. bpd: of 8-bit data, from the negative ELBO.", "",
         *markdown(["alpha", "the paper's train", "test", *(
             head for name in OUTLIERS.values() for head in (name, *heads)), "our lowest test"], rows)],
        checks(columns, ours, lowest), every, args)
    if every:
        pages.figure("seen", args, 1, 2, lambda axes: draw(axes[0], sizes, columns))


def trained_on(m):
    """How many images a run was trained on; WHOLE stands for 45,000 too."""
    found = re.search(r"([\d,]+) of 50,000 images", " ".join(m["sets"]["train"]["notes"]))
    size = int(found[1].replace(",", "")) if found else WHOLE
    return WHOLE if size == 45_000 else size


def words(size):
    """A number of images, as `trained_on` gives it, in words."""
    return "45,000 or 50,000" if size == WHOLE else f"{size:,}"


def told(value):
    """A cell of the table."""
    return "not reached" if value is None else f"{value:.3f}"


def at(every, train, one):
    """The bpd of one of the OUTLIERS where the training images take `train`, between the two nearest of the runs, which
    are sorted by it; None beyond them."""
    x = [m["sets"]["train"]["bpd"] for m in every]
    return float(np.interp(train, x, [m["sets"][one]["bpd"] for m in every])) if x[0] <= train <= x[-1] else None


def checks(columns, ours, lowest):
    """[(claim, whether it held, figures)] of the paper's columns {alpha: {set: bpd}}, the bpd at the same training bpd
    {set: {alpha: {size: bpd}}}, of which the paper's size is judged, and the lowest test bpd {alpha: bpd}."""
    found = []
    for what, one, values in (
            *((f"{OUTLIERS[one]}'s bpd at the paper's training bpd, with {words(WHOLE)} images, is", one,
               {alpha: sizes.get(WHOLE) for alpha, sizes in of.items()}) for one, of in ours.items()),
            ("our lowest test bpd at each alpha is", "test", lowest)):
        off = {alpha: value - columns[alpha][one] for alpha, value in values.items() if value is not None}
        found.append((f"{what} within {NEAR} of the paper's",
                      judged(all(abs(value) <= NEAR for value in off.values()), len(off), len(columns)),
                      ", ".join(f"{alpha:g}: {value:+.3f}" for alpha, value in off.items())))
    return found


def draw(axes, sizes, columns):
    """bpd of SVHN and of the test images, and SVHN's less that of the training images or of the test images, by the
    training bpd: a dot a run, a cross a column of the paper's."""
    left, right = axes
    for (size, every), marker in zip(sizes.items(), "osD", strict=False):
        x = [m["sets"]["train"]["bpd"] for m in every]
        for one, color in (("svhn", "C0"), ("test", "C1")):
            left.plot(x, [m["sets"][one]["bpd"] for m in every], marker, color=color, markersize=4, alpha=0.7)
        right.plot(x, [gap(m, "svhn", "train") for m in every], marker, color="C2", markersize=4, alpha=0.7)
        right.plot(x, [gap(m, "svhn") for m in every], marker, color="C3", markersize=4, alpha=0.7)
        left.plot([], [], marker, color="gray", label=f"ours, {words(size)} images")
    x = [column["train"] for column in columns.values()]
    for one, name, color in (("svhn", "SVHN", "C0"), ("test", "test", "C1")):
        left.plot(x, [column[one] for column in columns.values()], "x", color=color, markersize=9,
                  label=f"{name}, the paper")
    for one, color in (("train", "C2"), ("test", "C3")):
        right.plot(x, [column["svhn"] - column[one] for column in columns.values()], "x" if one == "train" else "+",
                   color=color, markersize=9, label=f"SVHN minus {one}, the paper")
        right.plot([], [], "o", color=color, label=f"SVHN minus {one}, ours")
    left.axline((6.5, 6.5), slope=1, color="gray", linestyle=":", label="train")
    left.set(xlabel="training bpd", ylabel="bpd")
    frame(right, "minus", xlabel="training bpd", ylabel="bpd", xscale="linear")
    for one in axes:
        one.invert_xaxis()
        one.legend(frameon=False)
