"""results/pictures.md: inspection pictures split by what they show: which are found, and where, over seeds.

    python -m vae_ood.pictures --data-root DIR

Trains on the ordinary pictures of magnetic tiles, scores those of other tiles and those with defects, and holds the
maps against the masks. The figures are kept in results/pictures/; a file that is there is not made again.
results/pictures/padim.json has those of PaDiM on the same pictures, made elsewhere by the protocol that it states.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError, checkpoint
from vae_ood.cli import Parser, make_folder, one_line_errors
from vae_ood.data.images import placed_back
from vae_ood.detector import Detector
from vae_ood.metrics import detection
from vae_ood.plots import markdown
from vae_ood.promise import python

RESULTS = Path(__file__).resolve().parent.parent / "results"
SEEDS, RATE, FALSE = 3, 0.05, 0.3  # FALSE: the share of ordinary pixels up to which the per-region overlap counts
DEVELOPMENT = "Blowhole", "Break"  # the kinds of defects that, with tiles of even number, chose what is to be chosen
FLAGS = ("--group-by", "folder", "--size", "64", "--crop", "stretch", "--alpha", "0.25", "--recipe", "fast",
         "--iters", "3000", "--no-eval")


@dataclass
class Set:
    """Pictures: their paths, kinds (of the ordinary ones "") and whether they belong to the development part."""

    paths: list
    kinds: np.ndarray
    development: np.ndarray


def found(root):
    """{"ordinary", "defect": Set} of the magnetic tiles below the data root. Raises UserError."""
    source = Path(root, "magnetic_tile")
    ordinary, defect = sorted((source / "good/held_out").rglob("*.jpg")), sorted((source / "defect").glob("*.jpg"))
    if not ordinary or not defect:
        raise UserError(f"there are no magnetic tiles in {source}: give a --data-root that has them")
    kinds = np.array([path.name.split("_")[1] for path in defect])
    even = np.array([int(path.parent.name[1:]) % 2 == 0 for path in ordinary])
    return {"ordinary": Set(ordinary, np.full(len(ordinary), ""), even),
            "defect": Set(defect, kinds, np.isin(kinds, DEVELOPMENT))}


def at_own_size(detector, paths):
    """The maps of pictures, each at its own size, in turn."""
    from PIL import Image
    for start in range(0, len(paths), 100):
        some = paths[start:start + 100]
        for path, one in zip(some, detector.map(some), strict=True):
            width, height = Image.open(path).size
            yield placed_back(torch.from_numpy(one), height, width, detector.config["crop"]).numpy()


def pixels(ordinary, maps, masks):
    """How maps tell odd pixels, those of the masks, from all others, of these pictures and of `ordinary` maps' pixels:
    the AUROC, and the mean over the masks' connected regions of the share above a threshold, averaged over the
    thresholds that at most FALSE of the other pixels exceed."""
    from scipy import ndimage
    inside = np.concatenate([one[mask] for one, mask in zip(maps, masks, strict=True)])
    outside = np.sort(np.concatenate([one[~mask] for one, mask in zip(maps, masks, strict=True)]
                                     + [one.ravel() for one in ordinary]))
    below = (np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")) / 2
    limits = outside[np.minimum(np.ceil(len(outside) * (1 - np.linspace(0, FALSE, 61))).astype(int), len(outside) - 1)]
    overlap = []
    for one, mask in zip(maps, masks, strict=True):
        regions, n = ndimage.label(mask, np.ones((3, 3)))
        overlap += [(one[regions == i][:, None] > limits).mean(0) for i in range(1, n + 1)]
    return {"auroc": float(below.mean() / len(outside)), "aupro": float(np.mean(overlap)), "regions": len(overlap)}


def told(ordinary, odd):
    """How scores tell odd pictures from ordinary ones."""
    return {"n": len(odd), "auroc": detection(ordinary, odd, resamples=1)["auroc"],
            "caught": float((odd > np.quantile(ordinary, 1 - RATE)).mean())}


def measure(detector, sets):
    """What the detector says of the pictures, in numbers."""
    from PIL import Image
    ordinary, defect = sets["ordinary"], sets["defect"]
    seen = {name: detector.look(detector.images(one.paths)) for name, one in sets.items()}
    views = {"default": [one.scores["default"] for one in seen.values()]} | {
        name: [-one.components[name] for one in seen.values()] for name in seen["ordinary"].components}
    parts = {"all": (slice(None), slice(None)), "development": (ordinary.development, defect.development),
             "others": (~ordinary.development, ~defect.development)} | {
        kind: (slice(None), defect.kinds == kind) for kind in np.unique(defect.kinds)}
    numbers = {"pictures": {part: told(views["default"][0][a], views["default"][1][b])
                            for part, (a, b) in parts.items()},
               "components": {name: told(*view)["auroc"] for name, view in views.items()},
               "flagged": {name: float((one.p_value <= RATE + 1e-9).mean()) for name, one in seen.items()}}
    maps = {name: list(at_own_size(detector, one.paths)) for name, one in sets.items()}
    mask = [np.asarray(Image.open(path.parents[1] / "mask" / f"{path.stem}.png").convert("L")) > 127
            for path in defect.paths]
    limit = detector.map_threshold(RATE)
    numbers["above"] = {name: float(np.mean([one.max() > limit for one in values])) for name, values in maps.items()}
    marked = np.array([one.any() for one in mask])
    for part in ("all", "development", "others"):
        a, b = (np.flatnonzero((part == "all") | (some.development == (part == "development")))
                for some in (ordinary, defect))
        b = b[marked[b]]
        numbers["pictures"][part]["pixels"] = pixels([maps["ordinary"][i] for i in a], [maps["defect"][i] for i in b],
                                                     [mask[i] for i in b])
    return numbers


def page(folder):
    """The text of results/pictures.md."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*.json"))]
    padim = json.loads((folder / "padim.json").read_text())
    named = {"all": "all defects", "development": f"{' and '.join(DEVELOPMENT)} against even tiles (development)",
             "others": "the other kinds against odd tiles"}
    theirs = {"all": padim["mean"]["pictures"], "development": padim["mean"]["development"]["pictures"]
              } | padim["mean"]["kinds"]
    their_pixels = {"all": padim["mean"]["pixels"], "development": padim["mean"]["development"]["pixels"]}

    def over(*path, digits=3, percent=False):
        values = []
        for run in runs:
            for name in path:
                run = run[name]
            values.append(100 * run if percent else run)
        return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    rows = [[named.get(part, part), str(runs[0]["pictures"][part]["n"]), over("pictures", part, "auroc"),
             over("pictures", part, "caught", digits=1, percent=True),
             *([f"{theirs[part]['auroc']:.3f}", f"{100 * theirs[part]['caught_above_p95']:.1f}"] if part in theirs
               else ["", ""])] for part in runs[0]["pictures"]]
    where = [[named[part], over("pictures", part, "pixels", "auroc"), over("pictures", part, "pixels", "aupro"),
              *([f"{their_pixels[part]['pixel_auroc_defect_and_held_out']:.3f}",
                 f"{their_pixels[part]['aupro30_defect_and_held_out']:.3f}"] if part in their_pixels else ["", ""])]
             for part in named]
    return "\n".join([
        "# Inspection pictures: which are odd, and where", "",
        "Written by `python -m vae_ood.pictures` from the files in [pictures/](pictures). Magnetic tiles, split by "
        f"tile: {runs[0]['ordinary']} ordinary pictures of 41 tiles that no model saw are the inliers, "
        f"{runs[0]['defect']} pictures with defects are the positive class. What there was to choose was chosen on the "
        "development part; the others chose nothing, but were in view, so they are no blind test. "
        f"{len(runs)} seeds: the mean (lowest to highest). Caught: the share of "
        f"defects, in %, above the 95th percentile of the inliers. {over('minutes', digits=1)} minutes a seed on two "
        "cores, training included.", "",
        f"`python run.py --data good/train {' '.join(FLAGS[:-1])}`", "",
        "PaDiM has features of a network that was trained on ImageNet (EfficientNet-lite0, 1.2 million labelled "
        "photographs of other things); `default` has these pictures alone.", "",
        *markdown(["pictures", "n", "`default` AUROC", "caught", "PaDiM AUROC", "caught"], rows), "",
        f"At `--fpr {RATE}`: {over('flagged', 'ordinary', digits=1, percent=True)}% of the ordinary pictures flagged, "
        f"{over('flagged', 'defect', digits=1, percent=True)}% of the defects. Maps above their threshold at any "
        f"pixel: {over('above', 'ordinary', digits=1, percent=True)}% and "
        f"{over('above', 'defect', digits=1, percent=True)}%.",
        "", "## Where", "",
        "Pixels of the masks against all others, of the defects and the ordinary pictures, each at its own size. "
        "AUPRO: the share of a defect's pixels above a threshold, a mean over "
        f"{runs[0]['pictures']['all']['pixels']['regions']} defects and the thresholds that up to {100 * FALSE:.0f}% "
        "of the other pixels exceed.", "",
        *markdown(["pictures", "pixel AUROC", "AUPRO", "PaDiM pixel AUROC", "AUPRO"], where), "",
        "## What each part of `default` sees", "",
        *markdown(["part", "AUROC, all defects"], [[f"`{name}`", over("components", name)]
                                                   for name in runs[0]["components"]]), "",
        f"PaDiM's protocol: {padim['protocol']}", ""])


def main():
    """The command."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are kept (default runs)")
    parser.add_argument("--data-root", metavar="DIR", help="that of run.py")
    args = parser.parse_args()
    folder = RESULTS / "pictures"
    make_folder(folder)
    for seed in range(SEEDS):
        path = folder / f"seed{seed}.json"
        if path.exists():
            continue
        sets, begun = found(args.data_root or "."), time.monotonic()
        run = Path(args.runs, f"magnetic_tile_s{seed}").resolve()
        python("run.py", "--data", Path(args.data_root or ".", "magnetic_tile/good/train").resolve(), *FLAGS, "--seed",
               seed, "--out", run, "--resume")
        python("eval.py", "--ckpt", run, "--fit")
        numbers = measure(Detector.load(run / "detector.pt"), sets)
        numbers |= {name: len(one.paths) for name, one in sets.items()} | {"minutes": (time.monotonic() - begun) / 60}
        checkpoint.write_atomic(path, (json.dumps(numbers, indent=1) + "\n").encode())
    checkpoint.write_atomic(RESULTS / "pictures.md", page(folder).encode())
    print(f"written to {RESULTS / 'pictures.md'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
