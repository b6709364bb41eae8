"""Evaluate a checkpoint of run.py on known outlier sets, or score your own images.

    python eval.py --ckpt runs/.../ckpt.pt --outliers svhn celeba      likelihoods, AUROC, AUPR, FPR95, figures
    python eval.py --ckpt runs/.../ckpt.pt --score PATH --fpr 0.05     flag the outliers among your own images

The first writes metrics.json, scores.csv, nll_histogram.png and mutual_information.png to --out (default: beside the
checkpoint); the second scores.csv with a p-value for each image and outliers.png, the 16 most and the 16 least outlying
(default --out: score-<name> beside the checkpoint).
"""

import argparse

from vae_ood.cli import NAMED, Parser, add_evaluation_arguments, one_line_errors, printable, rate


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="PATH", help="the folder of a run, or one of its checkpoints "
                        "(for ckpt.pt, best.pt where there is one)")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: beside the checkpoint)")
    group = parser.add_argument_group("own images")
    group.add_argument("--score", metavar="PATH", help="a folder of pictures, a .npy or a .npz to score")
    group.add_argument("--data", metavar="PATH", help="where the model's own training images are now, if not where "
                       "they were")
    group.add_argument("--fpr", type=rate, default=0.05, help="false-alarm rate at which to flag (default 0.05), on "
                       "average over the images that calibrate")
    group.add_argument("--confidence", type=rate, metavar="C", help="keep the false-alarm rate at most --fpr for "
                       "a share C of what the images that calibrate could have been, not on average")
    group.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be decoded")
    add_evaluation_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    with one_line_errors():
        ARGS = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import json
from pathlib import Path

import numpy as np

from vae_ood import UserError, checkpoint, plots
from vae_ood.cli import RANK, make_folder, pick_device
from vae_ood.detector import Calibration, largest_rank
from vae_ood.evaluation import (
    FIT_IMAGES, check_scores, evaluate, limit_images, load_inliers, load_others, load_outliers)
from vae_ood.features import DECODED_OFTEN
from vae_ood.metrics import cross_bound, false_alarm_range
from vae_ood.parallel import agree, from_first, workers
from vae_ood.scores import SCORES


def folder_of_scores(out, args):
    """The folder for the scores of --score, made: `out`, or where that holds the results of other images and --out does
    not name it, the next with a number. UserError where --out does."""
    source, number, folder = str(Path(args.score).resolve()), 1, out

    def of_others():
        record = folder / "score.json"
        return (folder / "scores.csv").exists() and not (
            record.exists() and json.loads(record.read_text()).get("score") == source)
    while of_others():
        if args.out:
            raise UserError(f"{out} holds the results of other images: give another --out")
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    make_folder(folder)
    checkpoint.write_atomic(folder / "score.json", (json.dumps({"score": source}) + "\n").encode())
    return folder


def score_images(members, args, out):
    """Flag the outliers among the images of --score at the false-alarm rate --fpr, by conformal p-values of the first
    score. `members`: (model, config, split), one or a run's folds."""
    _, config, _ = members[0]
    if not Path(args.score).exists():
        raise UserError(f"--score {args.score}: there is no such folder or file")
    own = load_others(config, str(Path(args.score).resolve()), args)
    inliers = [load_inliers(c, args, split) for _, c, split in members]
    tests = [sets["test"] for sets in inliers]
    things = sum(len(np.unique(t.groups)) if t.groups is not None else len(t.pixels) for t in tests)
    rank = largest_rank(args, things, len(members))
    out = Path(from_first(lambda: str(folder_of_scores(out, args))))
    for note in own.notes:
        print(f"{own.name}: {note}")
    if Path(args.score).resolve() == Path(config["data"]):
        print("note: the model was trained on these images; the false-alarm rate holds for new ones only")
    agree({"score": own} | {f"{part}{i}": s[part] for i, s in enumerate(inliers) for part in s},
          [args.iw_samples, args.scores, args.fpr, args.confidence])
    calibration = Calibration(args.scores[0])
    for (model, c, _), sets in zip(members, inliers, strict=True):
        print(f"fitting {args.scores[0]} to {len(sets['train'].pixels):,} training images, calibrating on "
              f"{len(sets['test'].pixels):,} others", flush=True)
        calibration.add(model, c, sets, own, args)
    if RANK == 0:
        report(calibration, own, rank, config.get("group_by"), args, out)


def report(calibration, own, rank, how, args, out):
    """Write scores.csv and outliers.png, and print the most outlying images and what the flags are worth."""
    p, things, folds, known = (calibration.p_values(), calibration.things, len(calibration.folds),
                               calibration.siblings)
    limit = args.fpr if args.confidence is None else rank / (things + 1)
    flagged = p <= limit + 1e-9
    scores = {name: values / folds for name, values in calibration.new.items()}
    score = scores[args.scores[0]]
    names = own.files or range(len(p))
    checkpoint.write_csv(
        out / "scores.csv", ["file" if own.files else "index", *scores, "p_value", "outlier", "likeness", "known"],
        zip(names, *(values.tolist() for values in scores.values()), p.tolist(), flagged.astype(int).tolist(),
            calibration.likeness.tolist(), known.astype(int).tolist(), strict=True))
    if plots.available():
        plots.drawn(plots.outliers, out / "outliers.png", own.pixels.numpy(), p, score,
                    printable(f"{Path(own.name).name}: {args.scores[0]}, calibrated on {things:,} things"))
    else:
        print("no figure: pip install matplotlib")
    print(f"\n{'image':<40}{args.scores[0]:>19}{'p-value':>10}")
    for i in np.lexsort((-score, p))[:10]:
        print(f"{printable(names[i])[-39:]:<40}{score[i]:>12.1f}{'':7}{p[i]:>10.4f}{'  outlier' if flagged[i] else ''}")
    if known.any():
        print(f"{known.sum():,} of {len(p):,} images show what training images show ({calibration.copies.sum():,} are "
              f"copies), {flagged[known].sum():,} of them flagged: the rate is that of new things")
    if calibration.farther(own, how) < 0.01:
        print("these images lie farther from the training images than those that calibrate did: unless they are "
              "outliers, they are of another kind, and the false-alarm rate is not assured for them")
    low, high = false_alarm_range(rank, things)
    sure = f" (the rate is at most {args.fpr:g} with confidence {args.confidence:g})" if args.confidence else ""
    print(f"{flagged.sum():,} of {len(p):,} images flagged at p <= {limit:.4g}{sure}\n"
          f"of new things like the training data, at most {limit:.1%} would be on average, between {low:.1%} and "
          f"{high:.1%} for nine calibrations in ten (calibrated on {things:,} things, {calibration.images:,} images)\n"
          f"written to {out / 'scores.csv'}")
    if folds > 1:
        print(f"of {folds} folds that rate is usual; proven, for things of one image, is at most "
              f"{cross_bound(limit, folds, things):.1%} (arXiv 1905.02928)")


def main(args):
    args.scores = args.scores or (["default"] if args.score else None)
    check_scores(args)
    device = pick_device(args.device)
    with workers(device, args.timeout):
        paths = [Path(path) for path in from_first(lambda: [str(path) for path in checkpoint.to_evaluate(args.ckpt)])]
        members = [checkpoint.load_model(path, device) for path in paths]
        if args.data:
            if members[0][1]["data"] in NAMED:
                raise UserError(f"--data: the model is for {members[0][1]['data']}, whose files are in --data-root")
            data = str(Path(args.data).resolve())
            members = [(model, config | {"data": data}, split) for model, config, split in members]
        model, config, split = members[0]
        for path in paths:
            if path.name == "best.pt":
                print(f"evaluating {path}, whose step was the best on validation images")
        if len(members) != config.get("folds", 1) and (args.score or len(members) > 1):
            raise UserError(f"{args.ckpt} holds {len(members)} of {config.get('folds', 1)} folds: give the folder of "
                            "all of them, or go on with that run with --resume")
        reads = {feature for name in args.scores for feature in SCORES[name].reads}
        decoded_once = args.score and not reads & set(DECODED_OFTEN)
        limit_images(args, config["shape"], config["alpha"], config["kappa"], device,
                     *((FIT_IMAGES, 1) if decoded_once else ()))
        out = Path(args.out or (args.ckpt if Path(args.ckpt).is_dir() else Path(args.ckpt).parent))
        if args.score and not args.out:
            own = Path(args.score).resolve()
            out /= f"score-{own.name if own.is_dir() else own.stem}"
        if args.score:
            score_images(members, args, out)
        elif len(members) > 1:
            raise UserError(f"{args.ckpt} holds {len(members)} folds: outlier sets are evaluated for one model; give "
                            f"one of them, {paths[0].parent}")
        else:
            sets = load_inliers(config, args, split)
            sets |= load_outliers(config, args, sets["test"])
            agree(sets, [args.iw_samples, args.scores])
            if (out / "score.json").exists():
                raise UserError(f"{out} holds the scores of other images: give another --out")
            from_first(lambda: make_folder(out))
            evaluate(model, config, sets, args, out)


if __name__ == "__main__":
    with one_line_errors():
        main(ARGS)
