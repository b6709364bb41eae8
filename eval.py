"""Evaluate a checkpoint of run.py on known outlier sets, or score your own images.

    python eval.py --ckpt runs/.../ckpt.pt --outliers svhn celeba      likelihoods, AUROC, AUPR, FPR95, figures
    python eval.py --ckpt runs/.../ckpt.pt --score PATH --fpr 0.05     flag the outliers among your own images
    python eval.py --detector detector.pt --score PATH                 the same, with that file alone

The first writes metrics.json, scores.csv, nll_histogram.png and mutual_information.png to --out (default: beside the
checkpoint). The others write scores.csv with a p-value for each image, outliers.png, the 18 most and the 18 least
outlying, and report.html, the 200 most outlying to sort in a browser (default --out: score-<name> beside the
checkpoint, or here); with --maps also where each picture is odd.
"""

import argparse

from vae_ood.cli import NAMED, Parser, add_evaluation_arguments, one_line_errors, rate


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", metavar="PATH", help="the folder of a run, or one of its checkpoints (for ckpt.pt, "
                        "best.pt where there is one)")
    parser.add_argument("--detector", metavar="FILE", help="the detector.pt of a run, which is all that --score needs")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: beside the checkpoint)")
    group = parser.add_argument_group("own images")
    group.add_argument("--score", metavar="PATH", help="a folder of pictures, a .npy or a .npz to score")
    group.add_argument("--fit", action="store_true", help="fit the detector of --ckpt anew, and write its detector.pt")
    group.add_argument("--data", metavar="PATH", help="where the model's own training images are now, if not where "
                       "they were")
    group.add_argument("--fpr", type=rate, default=0.05, help="false-alarm rate at which to flag (default 0.05), on "
                       "average over the images that calibrate")
    group.add_argument("--confidence", type=rate, metavar="C", help="keep the false-alarm rate at most --fpr for "
                       "a share C of what the images that calibrate could have been, not on average")
    group.add_argument("--fdr", type=rate, metavar="Q", help="flag so that of the flagged at most the share Q is "
                       "ordinary, on average, in place of a false-alarm rate (Benjamini and Hochberg; proven for "
                       "pictures that are each a thing of their own)")
    group.add_argument("--maps", metavar="DIR", help="write there where each picture is odd, at its own size")
    group.add_argument("--maps-format", choices=("png", "npy"), default="png", help="pictures, of one scale of colours "
                       "(default), or arrays of standard deviations")
    group.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be decoded")
    add_evaluation_arguments(parser)
    args = parser.parse_args()
    if bool(args.ckpt) == bool(args.detector):
        parser.error("give --ckpt, or --detector, which --score alone takes")
    if args.maps and not args.score:
        parser.error("--maps: give --score PATH, whose pictures are mapped")
    if args.fdr and args.confidence:
        parser.error("--confidence is of the false-alarm rate: give it or --fdr")
    if args.detector and (args.fit or not args.score):
        parser.error("--detector: give --score PATH; to fit one, give --ckpt and --fit")
    return args


if __name__ == "__main__":
    with one_line_errors():
        ARGS = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

from pathlib import Path

from vae_ood import UserError, checkpoint
from vae_ood.cli import RANK, make_folder, pick_device
from vae_ood.detector import Detector
from vae_ood.member import Member
from vae_ood.evaluation import FIT_IMAGES, evaluate, limit_images, load_inliers, load_outliers, scores_of
from vae_ood.features import DECODED_OFTEN
from vae_ood.parallel import agree, from_first, workers
from vae_ood.scores import SCORES
from vae_ood.scoring import score_images


def fitted(members, args):
    """The detector of `members`, (model, config, split), one or a run's folds, fitted to their training images."""
    found = []
    for model, config, split in members:
        sets = load_inliers(config, args, split)
        agree(sets, [args.iw_samples, args.scores])
        print(f"fitting {args.scores[0]} to {len(sets['train'].pixels):,} training images, calibrating on "
              f"{len(sets['test'].pixels):,} others", flush=True)
        found.append(Member.fit(model, config, sets, args.scores, args))
    return Detector.of(members[0][1], found, args)


def folder_of_run(args):
    """The folder that --ckpt names or lies in; this one without it."""
    path = Path(args.ckpt or ".")
    return path if path.is_dir() else path.parent


def find_detector(args, device):
    """The detector of --detector, or of the run that --ckpt names, fitted where there is none or --fit asks for it."""
    if args.detector:
        detector = Detector.load(args.detector, device)
        args.scores = scores_of(args.scores, detector.config.get("tile"), [])
        if missing := [name for name in args.scores if name not in detector.scores]:
            raise UserError(f"{args.detector} is fitted with {', '.join(detector.scores)}: fit {missing[0]} with "
                            f"eval.py --ckpt RUN --fit --scores {missing[0]}")
        return detector
    kept = folder_of_run(args) / "detector.pt"
    whole = Path(args.ckpt).is_dir() or Path(args.ckpt).name in ("ckpt.pt", "best.pt")  # not one of --keep-at
    if whole and not args.fit and from_first(kept.exists):
        detector = Detector.load(kept, device)
        args.scores = scores_of(args.scores, detector.config.get("tile"), [])
        if detector.serves(args):
            return detector
    _, members = load_members(args, device)
    _, config, _ = members[0]
    args.scores = scores_of(args.scores, config.get("tile"), ["default"])
    reads = {feature for name in args.scores for feature in SCORES[name].reads}
    limit_images(args, config["shape"], config["alpha"], config["kappa"], device,
                 *(() if reads & set(DECODED_OFTEN) else (FIT_IMAGES, 1)))
    detector = fitted(members, args)
    if args.fit and RANK == 0:
        kept = kept if whole else kept.with_name(f"detector-{Path(args.ckpt).stem}.pt")
        detector.save(kept)
        print(f"written to {kept}")
    return detector


def load_members(args, device):
    """([path], [(model, config, split)]) of the checkpoints that --ckpt names: one, or those of a run's folds."""
    paths = [Path(path) for path in from_first(lambda: [str(path) for path in checkpoint.to_evaluate(args.ckpt)])]
    members = [checkpoint.load_model(path, device) for path in paths]
    config = members[0][1]
    if args.data:
        if config["data"] in NAMED:
            raise UserError(f"--data: the model is for {config['data']}, whose files are in --data-root")
        data = str(Path(args.data).resolve())
        members = [(model, config | {"data": data}, split) for model, config, split in members]
    for path in paths:
        if path.name == "best.pt":
            print(f"evaluating {path}, whose step was the best on validation images")
    if len(members) != config.get("folds", 1) and (args.score or args.fit or len(members) > 1):
        raise UserError(f"{args.ckpt} holds {len(members)} of {config.get('folds', 1)} folds: give the folder of "
                        "all of them, or go on with that run with --resume")
    return paths, members


def main(args):
    scores_of(args.scores, None)  # refused before anything is read
    device = pick_device(args.device)
    with workers(device, args.timeout):
        if args.score or args.fit:
            detector = find_detector(args, device)
            if not args.score:
                return
            own = Path(args.score).resolve()
            out = args.out or folder_of_run(args) / f"score-{own.name if own.is_dir() else own.stem}"
            score_images(detector, args, Path(out))
            return
        paths, members = load_members(args, device)
        if len(members) > 1:
            raise UserError(f"{args.ckpt} holds {len(members)} folds: outlier sets are evaluated for one model; give "
                            f"one of them, {paths[0].parent}")
        (model, config, split), = members
        args.scores = scores_of(args.scores, config.get("tile"))
        limit_images(args, config["shape"], config["alpha"], config["kappa"], device)
        out = Path(args.out or paths[0].parent)
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
