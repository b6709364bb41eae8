"""Train a VAE, then evaluate it as an outlier detector.

    python run.py                                                      the embedded sprites, about a minute
    python run.py --data fashionmnist --recipe fast --data-root DIR    real images, 8 to 20 minutes on two cores
    python run.py --data cifar10 --alpha 4 --kappa 32                  the paper's protocol, for a GPU
    python run.py --data my_photos/ --recipe fast --out runs/mine      your own images (a folder, .npy or .npz)

Writes config.json, log.jsonl, ckpt.pt and what eval.py writes to --out. The same command with --resume goes on where
it stopped and ends in the same parameters, bit for bit. Under torchrun, its workers share each step's batch.
"""

import argparse
import math

from vae_ood.cli import (
    NAMED, RECIPES, Parser, add_evaluation_arguments, complete, one_line_errors, positive_float, positive_int, rate)


def add_data_arguments(parser):
    """What is trained on."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="sprites", metavar="NAME|PATH", help="sprites (default), fashionmnist, mnist, "
                       "cifar10, svhn, celeba, or a folder of pictures, a .npy or a .npz")
    group.add_argument("--sprite-factors", type=int, default=4, choices=range(2, 6), metavar="R",
                       help="intrinsic dimension of the sprites, 2 to 5 (default 4)")
    group.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be decoded")
    group.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="what is black and what is white "
                       "in own pictures and arrays of any kind (default: 0 and the most that the kind can hold, of "
                       "floats 0 and 1)")
    group.add_argument("--size", type=sides, metavar="N|HxW", help="scale own pictures to NxN or HxW pixels (default: "
                       "64x64 for a folder, unless all its pictures have one smaller size; arrays stay as they are)")
    group.add_argument("--crop", choices=("centre", "pad", "stretch"), help="scale to cover --size and keep the centre "
                       "(the default), to fit inside and repeat the edge, or the whole whatever its shape")
    group.add_argument("--tile", type=positive_int, metavar="N", help="cut own pictures, of --size or of one size, "
                       "into square tiles of N pixels, which the model learns; whole pictures are scored and flagged")
    group.add_argument("--cache", metavar="DIR", help="keep the decoded own pictures in a file in this folder, not in "
                       "memory (default: only if they would take more than half of it, in the folder cache beside "
                       "--out)")
    group.add_argument("--dequantize", action="store_true", help="train and evaluate on (pixel + U[0, 1)) / 256")
    group = parser.add_argument_group("own pictures: which show one thing, and what is held out to calibrate")
    group.add_argument("--group-by", metavar="near|folder|REGEX|FILE.csv|none", help="pictures of one thing are those "
                       "that are alike (near, the default), lie in one folder, have the same match of an expression in "
                       "their path (its first group, if it has one), or the same group in a table with the columns "
                       "file (or index) and group; none: each is a thing of its own")
    group.add_argument("--fpr", type=rate, default=0.05, help="the smallest false-alarm rate that will be asked of the "
                       "detector: 1/FPR - 1 things are held out at least (default 0.05: 19)")
    group.add_argument("--folds", type=positive_int, default=1, metavar="K", help="train K models, each without a K-th "
                       "of the things, so that all calibrate: where there are few")


def add_training_arguments(parser):
    """The model, and how it is trained."""
    group = parser.add_argument_group("model")
    group.add_argument("--alpha", type=positive_float, help="multiplies the channels 64, 128, 256 (default 1; sprites "
                       "0.25)")
    group.add_argument("--kappa", type=positive_int, help="latent dimensions (default 32; sprites 4R)")
    group.add_argument("--gamma", metavar="learn|optimal|homotopy|FLOAT", help="the decoder's variance: a trained "
                       "parameter, in closed form, in closed form along a path from 1 down to e^-7, or fixed")
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=RECIPES, help="sets gamma, lr, its schedule and iters; those flags override "
                       "it (default: fast for sprites, with 3,000 steps, and paper otherwise)")
    group.add_argument("--iters", type=positive_int, help="training steps")
    group.add_argument("--batch-size", type=positive_int, default=64, help="images a step (default 64)")
    group.add_argument("--lr", type=positive_float, help="Adam's (peak) learning rate")
    group.add_argument("--seed", type=int, default=0, help="of initialisation, batches and noise (default 0)")
    group.add_argument("--out", metavar="DIR", help="default runs/<data>_a<alpha>_k<kappa>_s<seed>")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    group.add_argument("--checkpoint-seconds", type=float, default=60, metavar="S", help="between two checkpoints "
                       "(default 60)")
    group.add_argument("--keep", type=positive_int, default=2, metavar="N", help="checkpoints, the newest as ckpt.pt "
                       "(default 2)")
    group.add_argument("--keep-at", type=positive_int, nargs="+", default=[], metavar="STEP", help="keep the weights "
                       "of these steps for good, each as step-<STEP>.pt, which eval.py takes")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the loss (default: on "
                       "CUDA; on a CPU it gained nothing)")
    group.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), help="of the network's products in "
                       "training: float32, tf32 on CUDA, or bfloat16 autocast (default: float32; with --recipe fast "
                       "from --alpha 1 on bfloat16 on a CPU that has it; with --resume that of the run)")
    group.add_argument("--no-eval", action="store_true", help="train only")


def sides(text):
    """argparse type: [H, W] of 'N' or 'HxW'."""
    found = [positive_int(side) for side in text.lower().split("x")]
    if len(found) > 2:
        raise argparse.ArgumentTypeError(f"{text} is neither N nor HxW")
    return [found[0], found[-1]]


def parse_args():
    """The arguments, complete: what the recipe says where a flag does not."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_evaluation_arguments(parser)
    args = parser.parse_args()
    complete(args)
    if args.gamma not in ("learn", "optimal", "homotopy"):
        try:
            args.gamma = positive_float(args.gamma)
        except (ValueError, argparse.ArgumentTypeError):
            parser.error(f"--gamma {args.gamma}: give learn, optimal, homotopy or a variance above 0")
    own = args.data not in NAMED
    flags = {"--group-by": args.group_by, "--folds": args.folds > 1, "--size": args.size, "--crop": args.crop,
             "--tile": args.tile, "--cache": args.cache}
    if not own and (given := [flag for flag, value in flags.items() if value]):
        parser.error(f"{given[0]}: {args.data} has a test part and a size of its own; this is for own pictures")
    args.group_by = (args.group_by or "near") if own else None
    if args.range and (not own or not -math.inf < args.range[0] < args.range[1] < math.inf):
        parser.error("--range: give own pictures' LOW and HIGH, the smaller one first")
    if args.keep_at and max(args.keep_at) > args.iters:
        parser.error(f"--keep-at {max(args.keep_at)}: the last step is {args.iters}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: give a whole number from 0 to 2^32 - 1")
    return args


if __name__ == "__main__":
    with one_line_errors():
        ARGS = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import functools
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError, checkpoint, evaluation
from vae_ood.data import groups
from vae_ood.cli import RANK, WORLD, pick_device
from vae_ood.data import load
from vae_ood.data.cache import read_own
from vae_ood.data.own import AUTO, WHOLE
from vae_ood.data.tiles import sampled, tiled
from vae_ood.detector import Detector
from vae_ood.member import FIT_IMAGES, Member, measure
from vae_ood.parallel import agree, from_first, workers
from vae_ood.training import CONFIG, train


def describe(parts, args):
    """Say what the pictures show, what is held out and what can be promised with that."""
    things = {name: len(np.unique(part.groups)) for name, part in parts.items()}
    everything = np.concatenate([part.groups for part in parts.values()])
    calibrating = len(np.unique(everything)) if args.folds > 1 else things["test"]
    print(f"{len(everything):,} pictures show about {len(np.unique(everything)):,} things: {things['test']:,} whole "
          f"things ({len(parts['test'].groups):,} pictures) are held out to calibrate"
          + (f", {things['validation']:,} ({len(parts['validation'].groups):,}) to validate" if "validation" in parts
             else "; too few to validate with, so the last step's weights are kept"))
    if calibrating < groups.things_needed(args.fpr):
        print(f"the smallest false-alarm rate that {calibrating:,} things can promise is "
              f"{groups.smallest_rate(calibrating):.2%}, not {args.fpr:.2%}: add pictures of other things"
              + ("" if args.folds > 1 else ", or calibrate on all of these with --folds"))
    if shared := len(np.intersect1d(parts["train"].groups, parts["test"].groups)):
        print(f"{shared:,} things are among train_images and test_images both: the false-alarm rate holds for new "
              "pictures of known things only")


def main(args):
    args.scores = evaluation.scores_of(args.scores, args.tile)
    device = pick_device(args.device)
    if args.batch_size < WORLD:
        raise UserError(f"--batch-size {args.batch_size}: each of the {WORLD} workers needs an image of a step")
    own = args.data not in NAMED
    if own:
        if not Path(args.data).exists():
            raise UserError(f"unknown data '{args.data}': give a path that exists, or one of {', '.join(NAMED)}")
        args.data = str(Path(args.data).resolve())
        if args.group_by.lower().endswith(".csv"):
            args.group_by = str(Path(args.group_by).resolve())
    name = Path(args.data).stem + (str(args.sprite_factors) if args.sprite_factors != 4 else "")
    out = Path(args.out or f"runs/{name}_a{args.alpha:g}_k{args.kappa}_s{args.seed}")
    with workers(device, args.timeout):
        if not own:
            sets = {part: load(args.data, part, args.data_root, None, args.sprite_factors, args.skip_bad)
                    for part in (("train",) if args.no_eval else ("train", "test"))}
            member, config = train_and_evaluate(args, sets, None, out, device)
            save_detector(config, [member], args, out)
            return
        if (out / "ckpt.pt").exists() if args.folds > 1 else any(out.glob("fold-*/ckpt.pt")):
            raise UserError(f"{out} already holds a run with{'out' * (args.folds > 1)} --folds: give another --out")
        images = read(args, out)
        names = groups.digests(images.pixels)
        labels = functools.cache(lambda: from_first(
            lambda: torch.from_numpy(groups.group(images, args.group_by))).numpy())
        members = []  # of the detector
        for fold in range(args.folds):
            place = out / f"fold-{fold + 1}" if args.folds > 1 else out
            if args.folds > 1:
                print(f"fold {fold + 1} of {args.folds}")
            state, _ = from_first(lambda place=place: checkpoint.load_newest(place / "ckpt.pt")) if args.resume else (
                None, [])
            split = state.get("split") if state else groups.split_of(
                images, names, labels(), args.fpr, args.folds, fold)
            sets = groups.parts(images, split)
            if split:
                describe(sets, args)
            member, config = train_and_evaluate(args, sets, split, place, device, images.files)
            members.append(member)
        save_detector(config, members, args, out)


def read(args, out):
    """`Images` of the own pictures, of the size that --size, a run that goes on, or the default says: --size, --crop
    and --cache become what is so."""
    kept = out / "fold-1" / "ckpt.pt" if args.folds > 1 else out / "ckpt.pt"
    state, _ = from_first(lambda: checkpoint.load_newest(kept)) if args.resume else (None, [])
    size, crop = args.size or (WHOLE if args.tile else AUTO), args.crop
    if state:
        size, crop = (state["config"].get(name) for name in ("size", "crop"))
        if args.size not in (None, size) or (size and args.crop not in (None, crop)):
            of = f"--size {'x'.join(map(str, size))} --crop {crop}" if size else "pictures as they are"
            raise UserError(f"{kept} was trained with {of}: resume with the same flags, or give another --out")
        if args.tile != state["config"].get("tile"):
            raise UserError(f"{kept} was trained with --tile {state['config'].get('tile')}: resume with the same "
                            "flags, or give another --out")
    forced, args.cache = bool(args.cache), str(Path(args.cache or out.parent / "cache").resolve())
    images, args.size, args.crop = read_own(Path(args.data), args.cache, forced, size, crop, args.skip_bad, args.range,
                                            show=True)
    return images


def save_detector(config, members, args, out):
    """Write detector.pt of the members, if they are any."""
    if RANK == 0 and None not in members:
        Detector.of(config, members, args).save(out / "detector.pt")
        print(f"written to {out / 'detector.pt'}, which eval.py --detector takes")


def train_and_evaluate(args, sets, split, out, device, files=None):
    """Train on sets["train"], fit the detector and evaluate; `split` and `files` of own images go to groups.csv. Gives
    the detector's Member, None without an evaluation of `default`, and the config."""
    images = sets["train"]
    for note in images.notes:
        print(f"train: {note}")
    validation, pixels = sets.get("validation"), tiled(images.pixels, args.tile)
    if not args.no_eval:  # before the training, so that a missing file is not found out after it
        config = vars(args) | {"shape": list(pixels.shape[1:]), "picture": list(images.pixels.shape[1:])}
        evaluation.limit_images(args, config["shape"], args.alpha, args.kappa, device)
        sets = evaluation.limited(sets, args)
        sets |= evaluation.load_outliers(config, args, sets["test"])
    agree({"train": images} | sets, [getattr(args, name) for name in (*CONFIG, "iw_samples", "scores")])
    with checkpoint.folder_of_run(out, args.resume):
        if split and RANK == 0:
            checkpoint.write_csv(out / "groups.csv", ["file" if files else "index", "group", "part"], zip(
                files or range(len(split["group"])), split["group"].tolist(), (groups.PARTS[p] for p in split["part"]),
                strict=True))
        (out / "detector.pt").unlink(missing_ok=True)  # of an earlier state
        model, config = train(args, pixels, out, device, split,
                              tiled(validation.pixels, args.tile) if validation else None)
        if args.no_eval:
            return None, config
        fitted = measure(model, config, sampled(sets["train"], config, args.max_images or FIT_IMAGES), args, "train")
        member = Member.fit(model, config, sets, ["default"], args, fitted) if "default" in args.scores else None
        evaluation.evaluate(model, config, sets, args, out, fitted, member and member.scores)
        return member, config


if __name__ == "__main__":
    with one_line_errors():
        main(ARGS)
