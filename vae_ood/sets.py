"""results/sets.md: how often a set of pictures is seen to be unlike the training data, by its number of pictures.

    python -m vae_ood.sets --data-root DIR

Takes the kept CIFAR-10 model of alpha = 1/4, fits the scores and draws sets at random. The figures are kept in
results/sets.json; where that is there, the page alone is written.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vae_ood import checkpoint
from vae_ood.cli import Parser, Progress, one_line_errors, pick_device
from vae_ood.data import load
from vae_ood.data.synthetic import CORRUPTIONS, corrupt
from vae_ood.member import COMPARED, FIT_IMAGES, Member, measure
from vae_ood.metrics import set_p_value
from vae_ood.plots import markdown

RESULTS = Path(__file__).resolve().parent.parent / "results"
MODEL = "runs/cifar10_a0.25_k32_fast_i10000_s0"
OUTLIERS = ("celeba", "svhn", "faded", "patched")
SIZES = (5, 10, 20, 50, 100)
ORDINARY, UNLIKE = 400, 100  # sets that are drawn of a size
LEVELS = (0.05, 0.01)


def views(args):
    """{set: what sets are compared by [N, D]}: CIFAR-10's test images, and outliers, some made of these."""
    model, config, _ = checkpoint.load_model(RESULTS / MODEL / "ckpt.pt", pick_device("auto"))
    settings = SimpleNamespace(max_images=None, iw_samples=1)
    train, test = (load("cifar10", part, args.data_root) for part in ("train", "test"))
    member = Member.fit(model, config, {"train": train.first(FIT_IMAGES), "test": test}, ["default"], settings)
    new = {"test": test} | {name: corrupt(test, name) if name in CORRUPTIONS else
                            load(name, "test", args.data_root, config["shape"]) for name in OUTLIERS}
    return {name: member.viewed(measure(model, config, images, settings)) for name, images in new.items()}


def draw(views, sizes=SIZES, ordinary=ORDINARY, unlike=UNLIKE, calibrating=COMPARED):
    """{set: {size: p-values}} of sets of single pictures at random, each against test images drawn anew."""
    found, bar, done = {}, Progress(len(sizes) * (ordinary + unlike * (len(views) - 1)), label="set"), 0
    for name, rows in views.items():
        found[name] = {size: [] for size in sizes}
        for size in sizes:
            for i in range(ordinary if name == "test" else unlike):
                rng = np.random.default_rng([size, i])
                known, rest = np.split(rng.permutation(len(views["test"])), [calibrating])
                new = (rest if name == "test" or name in CORRUPTIONS else rng.permutation(len(rows)))[:size]
                found[name][size].append(set_p_value(
                    np.arange(size), (views["test"][known], np.arange(calibrating), rows[new])))
                bar.update(done := done + 1)
    bar.close()
    return found


def page(numbers):
    """The text of results/sets.md."""
    sizes = list(numbers["p"]["test"])

    def share(values):
        return " / ".join(f"{100 * np.mean(np.array(values) <= level + 1e-9):.1f}" for level in LEVELS)
    names = {"test": "ordinary: CIFAR-10 test"}
    return "\n".join([
        "# Is a set of pictures like the training data?", "",
        "Written by `python -m vae_ood.sets` from [sets.json](sets.json). A model of CIFAR-10 (alpha = 1/4, 10,000 "
        f"steps, one seed). Each figure is the share of sets, in %, that the permutation test of `eval.py --score` "
        f"calls unlike {COMPARED:,} calibrating test images at p ≤ 5% / p ≤ 1%. For every set those are drawn anew. "
        f"Ordinary sets come from the other test images ({numbers['ordinary']} sets of a size: these are false "
        f"alarms), {numbers['unlike']} sets of a size from each outlier set. Faded and patched images are spoilt test "
        "images that do not calibrate.", "",
        *markdown(["set", *(f"{size} pictures" for size in sizes)],
                  [[names.get(name, name), *(share(of[size]) for size in sizes)] for name, of in numbers["p"].items()]),
        ""])


def main():
    """The command."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", metavar="DIR", help="that of run.py")
    args, path = parser.parse_args(), RESULTS / "sets.json"
    if not path.exists():
        p = draw(views(args))
        checkpoint.write_atomic(path, (json.dumps({"ordinary": ORDINARY, "unlike": UNLIKE, "p": p}) + "\n").encode())
    checkpoint.write_atomic(RESULTS / "sets.md", page(json.loads(path.read_text())).encode())
    print(f"written to {RESULTS / 'sets.md'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
