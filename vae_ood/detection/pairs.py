"""Which inliers are set against which outliers, and what every score measures of them.

`args` are the command's: `runs`, the folder of the runs, and `data_root`. What is measured is a dict: data, seed,
commands, sets {name: {n, notes}}, scores {score: {outliers: `detection`}}, and flagged {outliers: [the share of the
inliers, of the outliers, that `default` flags at a false-alarm rate of RATE]}; of one run also frontier
(vae_ood/detection/frontier.py). Of PyOD: data, pyod (its version), fit_images, scores.
"""

import csv
import gzip
import json
import shlex
import statistics
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError, pictures
from vae_ood.data import PAIRS, default_root, load
from vae_ood.data.official import celeba_pictures, cifar10_records
from vae_ood.data.own import to_pixels
from vae_ood.data.synthetic import CORRUPTIONS, corrupt
from vae_ood.detection import contenders, frontier
from vae_ood.detector import Detector
from vae_ood.metrics import conformal_p_values, detection
from vae_ood.reproduce.runs import BATCH, IW_SAMPLES, Run, execute, measured

SEEDS, RATE = 3, 0.05
RUNS = {"sprites": Run("sprites", 0.25, 16, iters=3_000), "fashionmnist": Run("fashionmnist", 1, 32, iters=5_000),
        "cifar10": Run("cifar10", 1, 32, iters=10_000)}
LANCZOS = "celeba_lanczos"
OUTLIERS = {"sprites": (*PAIRS["sprites"], *CORRUPTIONS),
            "fashionmnist": ("mnist", "cifar10", "svhn", "noise", "constant", *CORRUPTIONS),
            "cifar10": ("svhn", "celeba", LANCZOS, "mnist", "fashionmnist", "noise", "constant", *CORRUPTIONS)}
REGRET_OUTLIERS = {"sprites": PAIRS["sprites"][:3], "fashionmnist": ("mnist",), "cifar10": ("svhn", "celeba", LANCZOS)}
REGRET_IMAGES = 1_000
TILES, TILE_OUTLIERS = "magnetic_tile", ("blowholes_breaks", "other_defects")
CLASSES = {"fashionmnist": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                            "ankle boot"),
           "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")}
CLASS_OUTLIERS = "left_out"
CLASS_STEPS = 2_500
CLASS_FLAGS = ("--group-by", "none", "--alpha", "0.25", "--kappa", "32", "--recipe", "fast", "--iters",
               str(CLASS_STEPS), "--no-eval")


def kept():
    """{the name of each file in results/detection/: the function of `args` that measures what is in it}."""
    found = {f"{run.folder}": partial(named, run) for column in RUNS.values() for seed in range(SEEDS)
             for run in [replace(column, seed=seed)]}
    found |= {f"{TILES}_s{seed}": partial(tiles, seed) for seed in range(SEEDS)}
    found |= {f"{data}_without_{one}": partial(without, data, one) for data in CLASSES for one in range(10)}
    return found | {f"pyod_{data}": partial(pyod, data) for data in (*OUTLIERS, TILES)}


def root(args):
    """The folder of official files."""
    return Path(args.data_root) if args.data_root else default_root()


# ---- named sets, by eval.py

def evaluation(run, runs, outliers, *scores):
    """(the folder of an evaluation, the arguments of python that write it there)."""
    folder = Path(runs, run.folder)
    out = folder / "-".join(["detection", *scores])
    sets = [str(Path(runs, f"{LANCZOS}.npy")) if one == LANCZOS else one for one in outliers]
    return out, ["eval.py", "--ckpt", str(folder / "ckpt.pt"), "--outliers", *sets, "--iw-samples", str(IW_SAMPLES),
                 *(["--max-images", str(REGRET_IMAGES)] if scores else []), "--scores", *(scores or ["all"]), "--out",
                 str(out)]


def named(run, args):
    """What the scores measure on a run's checkpoint, training it if need be."""
    training = measured(run, args)
    numbers = {"data": run.data, "alpha": run.alpha, "kappa": run.kappa, "seed": run.seed, "iters": run.iters,
               "commands": [training["command"]], "minutes": training["seconds_at_median_speed"] / 60,
               "test_bpd": training["sets"]["test"]["bpd"], "test_nll": training["sets"]["test"]["nll"], "sets": {},
               "scores": {}}
    if LANCZOS in OUTLIERS[run.data]:
        faces(args)
    for parts in ((OUTLIERS[run.data],), (REGRET_OUTLIERS[run.data], "regret")):
        out, arguments = evaluation(run, args.runs, *parts)
        if not (out / "metrics.json").exists():
            execute(arguments, args.data_root)
        metrics = json.loads((out / "metrics.json").read_text())
        numbers["commands"].append(f"python {' '.join(evaluation(run, 'runs', *parts)[1])}")
        numbers["sets"] |= {Path(name).stem: {key: row[key] for key in ("n", "notes")}
                            for name, row in metrics["sets"].items() if Path(name).stem not in numbers["sets"]}
        numbers["scores"] |= {score: {Path(name).stem: row for name, row in rows.items()}
                              for score, rows in metrics["scores"].items()}
        numbers.setdefault("fit_images", metrics["fit_images"])
    calibrate, count = halves(evaluation(run, args.runs, ())[0] / "scores.csv")
    numbers["flagged"] = flagged(calibrate, count)
    return numbers | ({"frontier": frontier.measured(calibrate, count)} if run == RUNS["cifar10"] else {})


def halves(path):
    """A table of scores as {score: [n]} of every other test image, which calibrate, and {set: {score: [m]}} of the
    other test images and of the outliers, which are counted."""
    columns = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            of = columns.setdefault(Path(row["set"]).stem, {})
            for score in row.keys() - {"set", "index"}:
                of.setdefault(score, []).append(float(row[score]))
    of = {name: {score: np.array(values) for score, values in scores.items()} for name, scores in columns.items()
          if name != "train"}
    return ({score: values[::2] for score, values in of["test"].items()},
            of | {"test": {score: values[1::2] for score, values in of["test"].items()}})


def flagged(calibrate, count):
    """What `default` flags of the inliers, and of the outliers of each set."""
    inliers = calibrate["default"], np.arange(len(calibrate["default"]))
    share = {name: float((conformal_p_values((*inliers, scores["default"])) <= RATE + 1e-9).mean())
             for name, scores in count.items()}
    return {name: [share["test"], one] for name, one in share.items() if name != "test"}


def faces(args):
    """Write CelebA's test pictures to the folder of the runs, cropped as `load` does and scaled by Lanczos' filter."""
    from PIL import Image
    folder, scaled = root(args) / "celeba", []
    for path in celeba_pictures(folder, "test")[0].values():
        if isinstance(path, bytes):
            raise UserError(f"unpack img_align_celeba.zip in {folder}")
        whole = Image.open(path).convert("RGB")
        whole = whole.crop((15, 35, 163, 183)) if whole.size == (178, 218) else whole
        scaled.append(np.asarray(whole.resize((32, 32), Image.Resampling.LANCZOS)))
    np.save(Path(args.runs, f"{LANCZOS}.npy"), np.stack(scaled))


# ---- own pictures, by their detector

def judged(path, against):
    """What the scores of a detector measure of `against`, {outliers: (inliers, outliers)}, each images or paths."""
    detector, numbers = Detector.load(path), {"sets": {}, "scores": {}, "flagged": {}}
    for name, parts in against.items():
        said = [detector.say(detector.images(part)) for part in parts]
        numbers["flagged"][name] = [float((detector.p_values("default", of) <= RATE + 1e-9).mean()) for of in said]
        for score in detector.scores:
            numbers["scores"].setdefault(score, {})[name] = detection(*(detector.mean(score, of) for of in said))
        numbers["sets"][name] = {"n": len(parts[1]), "notes": [f"against {len(parts[0]):,} inliers"]}
    return numbers


def by_detector(commands, args, against):
    """`judged`, of a run that is trained and fitted by `commands`, a function of the folders of the runs and of the
    official files, which gives (the run's folder, the arguments of each command)."""
    run, arguments = commands(args.runs, root(args).resolve())
    for some in arguments:
        execute(some, args.data_root)
    config = json.loads((run / "config.json").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    with open(run / "groups.csv", newline="") as file:
        trained = sum(row["part"] == "train" for row in csv.DictReader(file))
    seconds = config["iters"] * BATCH / statistics.median(line["images_per_second"] for line in lines)
    return {key: config[key] for key in ("alpha", "kappa", "iters", "seed")} | {
        "commands": [f"python {shlex.join(some)}" for some in commands("runs", Path())[1]], "minutes": seconds / 60,
        "train_images": trained} | judged(run / "detector.pt", against)


def fitting(run):
    """The arguments of python that fit every score to a run, but those that take minutes."""
    return ["eval.py", "--ckpt", str(run), "--fit", "--iw-samples", str(IW_SAMPLES), "--scores", "all"]


def tile_parts(args):
    """{outliers: (paths of the inliers, of the outliers)} of the magnetic tiles: the development part and the rest."""
    sets = pictures.found(root(args))
    return {name: [[path for path, one in zip(part.paths, part.development, strict=True) if one == development]
                   for part in (sets["ordinary"], sets["defect"])]
            for name, development in zip(TILE_OUTLIERS, (True, False), strict=True)}


def tiles(seed, args):
    """What the scores measure of magnetic tiles that no model saw, and of those with defects."""
    def commands(runs, data_root):
        run = Path(runs, f"{TILES}_s{seed}")
        return run, [["run.py", "--data", str(data_root / TILES / "good/train"), *pictures.FLAGS, "--seed", str(seed),
                      "--resume", "--out", str(run)], fitting(run)]
    return {"data": TILES} | by_detector(commands, args, tile_parts(args))


def labels(data, split, folder):
    """The classes of a data set's part in `folder`, uint8 [N]."""
    if data == "cifar10":
        return cifar10_records(folder, split)[0][:, 0]
    path = folder / f"{'t10k' if split == 'test' else split}-labels-idx1-ubyte.gz"
    if not path.exists():
        raise UserError(f"the classes of {data} are not there: put its {path.name} in {path.parent}")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=8)


def without(data, one, args):
    """What the scores measure where a model of all classes but `one` is to find that one."""
    folder, parts = Path(args.runs, "classes", f"{data}-{one}"), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        pixels, odd = load(data, split, root(args)).pixels.numpy(), labels(data, split, root(args) / data) == one
        parts |= {split: pixels[~odd], "out": pixels[odd]}  # of the class, the test images remain
    for name, pixels in parts.items():
        np.save(folder / f"{name}.npy", pixels)

    def commands(runs, _):
        place = Path(runs, "classes", folder.name)
        return place / "run", [["run.py", "--data", str(place / "train.npy"), *CLASS_FLAGS, "--seed", "0", "--resume",
                                "--out", str(place / "run")], fitting(place / "run")]
    return {"data": data, "without": one} | by_detector(
        commands, args, {CLASS_OUTLIERS: (parts["test"], parts["out"])})


# ---- the same pixels, by others

def pyod(data, args):
    """What PyOD's detectors measure of the pairs of a data set."""
    if data == TILES:
        def read(paths):
            return torch.as_tensor(to_pixels(paths, (1, 64, 64), None, "stretch"))
        train = read(sorted(Path(root(args), TILES, "good/train").rglob("*.jpg")))
        against = {name: tuple(map(read, parts)) for name, parts in tile_parts(args).items()}
    else:
        train, test = (load(data, split, args.data_root) for split in ("train", "test"))
        train, test, against = train.pixels, test.first(contenders.SCORED), {}
        if LANCZOS in OUTLIERS[data]:
            faces(args)
        for name in OUTLIERS[data]:
            path = str(Path(args.runs, f"{LANCZOS}.npy")) if name == LANCZOS else name
            others = corrupt(test, name) if name in CORRUPTIONS else load(path, "all", args.data_root,
                                                                          test.pixels.shape[1:])
            against[name] = test.pixels, others.pixels
    scores = contenders.compare(train, against)
    return {"data": data, "pyod": version("pyod"), "fit_images": min(len(train), contenders.FIT), "scores": scores}
