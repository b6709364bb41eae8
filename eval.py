"""Evaluate a checkpoint of run.py on known outlier sets, or score your own images.

    python eval.py --ckpt runs/.../ckpt.pt --outliers svhn celeba      likelihoods, AUROC, AUPR, FPR95, figures
    python eval.py --ckpt runs/.../ckpt.pt --score PATH --fpr 0.05     flag the outliers among your own images

The first writes metrics.json, scores.csv, nll_histogram.png and mutual_information.png to --out (default: beside the
checkpoint); the second scores.csv with a p-value for each image and outliers.png, the 16 most and the 16 least outlying
(default --out: score-<name> beside the checkpoint).
"""

import argparse

from vae_ood.cli import Parser, add_evaluation_arguments, one_line_errors


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="the ckpt.pt that run.py wrote")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: beside the checkpoint)")
    group = parser.add_argument_group("own images")
    group.add_argument("--score", metavar="PATH", help="a folder of pictures, a .npy or a .npz to score")
    group.add_argument("--fpr", type=float, default=0.05, help="false-alarm rate at which to flag (default 0.05)")
    group.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be decoded")
    add_evaluation_arguments(parser)
    args = parser.parse_args()
    if not 0 < args.fpr < 1:
        parser.error(f"--fpr is {args.fpr}: it must lie between 0 and 1")
    return args


if __name__ == "__main__":
    with one_line_errors():
        ARGS = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import csv
import functools
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vae_ood import UserError, checkpoint, plots
from vae_ood.cli import RANK, Progress, make_folder, pick_device
from vae_ood.data import CORRUPTIONS, PAIRS, PRIOR, corrupt, generator, load
from vae_ood.likelihood import bits_per_dim, evaluate
from vae_ood.metrics import conformal_p_values, detection, latent_spectrum, mmd
from vae_ood.model import VAE
from vae_ood.parallel import agree, from_first, workers
from vae_ood.scores import CONTROLS, DECODED_OFTEN, SCORES, Features

TRAIN_IMAGES = 10_000  # of the training set are evaluated, where --max-images does not say
FIT_IMAGES = 30_000  # and scores are fitted to so many
MMD_IMAGES = 5_000  # of the training set, at most, against as many samples of the prior
CPU_FLOPS = 1e13  # the most that decoding a set may take on a CPU (some two minutes on two cores)


def check_scores(args):
    """Where --scores does not say, all but `regret`, which takes minutes; UserError unless every name is a score."""
    args.scores = args.scores or [name for name in SCORES if name != "regret"]
    for name in args.scores:
        if name not in SCORES:
            raise UserError(f"unknown score '{name}': choose from {', '.join(SCORES)}")


def limit_images(args, shape, alpha, kappa, device, images=TRAIN_IMAGES, samples=None):
    """Where --max-images does not say, set it on a CPU for models so large that as many `images` take over CPU_FLOPS,
    by default with --iw-samples samples each."""
    if args.max_images or device.type != "cpu":
        return
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        VAE(shape, alpha, kappa).decode(torch.empty(1, kappa))
    affordable = CPU_FLOPS / ((samples or args.iw_samples) * counter.get_total_flops())
    if affordable < images:
        args.max_images = max(100, int(affordable) // 100 * 100)
        print(f"a large model for a CPU: the first {args.max_images:,} images of each set are evaluated (with --score: "
              "fit and calibrate), unless --max-images says otherwise")


def load_inliers(config, split, args):
    """The "train" or "test" part of the data that the model is for."""
    images = load(config["data"], split, args.data_root, None, config["sprite_factors"],
                  config["skip_bad"] or args.skip_bad)
    if list(images.pixels.shape[1:]) != config["shape"]:
        raise UserError(f"the {split} images of {config['data']} are {list(images.pixels.shape[1:])}, the model is for "
                        f"{config['shape']}: make them equal")
    images = images.first(args.max_images or (FIT_IMAGES if split == "train" else None))
    if split == "train" and len(images.pixels) < 2:
        raise UserError("scores are fitted to two training images at least: give more, or a larger --max-images")
    return images


def load_others(config, data, args):
    """Images of `data`, a name or a path, converted to the shape of the inliers, or their test images corrupted."""
    if data in CORRUPTIONS:
        return corrupt(load_inliers(config, "test", args), data)
    return load(data, "all", args.data_root, config["shape"], config["sprite_factors"],
                config["skip_bad"] or args.skip_bad)


def load_outliers(config, args):
    """The outlier sets by name: those of --outliers, else the paper's for the data set, as far as they can be had."""
    if clash := {"train", "test"} & set(args.outliers or ()):
        raise UserError(f"--outliers {clash.pop()}: the inliers' own parts are evaluated anyway; name another set")
    sets = {}
    for name in args.outliers or PAIRS.get(config["data"], ["noise", "constant"]):
        try:
            sets[name] = load_others(config, name, args).first(args.max_images)
        except UserError as error:
            if args.outliers:
                raise
            print(f"without the outliers {name}: {error}")
    return sets


def measure(model, config, images, args, label, first=0):
    """The `Features` of `images`, whose likelihoods show their progress when they are asked for; `first` is the number
    of the first image's noise."""
    def likelihoods():
        bar = Progress(len(images.pixels), label=label)
        result = evaluate(model, images.pixels, args.iw_samples, config["seed"], config["dequantize"], first,
                          bar.update)
        bar.close()
        return result
    return Features(model, images.pixels, functools.cache(likelihoods))


def write_csv(path, header, rows):
    """Write a table with its floats in full precision, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    checkpoint.write_atomic(path, text.getvalue().encode())


def evaluate_outliers(model, config, sets, args, out):
    """Evaluate `sets` ({'train', 'test', outliers...: Images}), print the tables and write the files to `out`. Scores
    are fitted to all of 'train', of which TRAIN_IMAGES are evaluated where --max-images does not say."""
    d, fitted = math.prod(config["shape"]), sets["train"].pixels
    sets = sets | {"train": sets["train"].first(args.max_images or TRAIN_IMAGES)}
    features = {name: measure(model, config, images, args, name) for name, images in sets.items()}
    measured = {name: f.likelihoods() for name, f in features.items()}
    fitted = Features(model, fitted, features["train"].likelihoods)
    kl, active, cut, ratio = latent_spectrum(measured["train"]["kl_per_dim"].mean(0, dtype=np.float64))
    z = measured["train"]["z"][:MMD_IMAGES]
    prior = generator(config["seed"], PRIOR).standard_normal(z.shape)
    metrics = {"config": config, "gamma": model.log_gamma.exp().item(), "active_dims": active, "kappa": config["kappa"],
               "iw_samples": args.iw_samples, "kl_per_dim": kl.tolist(), "spectrum_cut": cut, "spectrum_ratio": ratio,
               "mmd": mmd(z, prior) if len(z) > 1 else None, "mmd_images": len(z),
               "fit_images": len(fitted.images), "sets": {}, "scores": {}}
    print(f"\n{'set':<14}{'images':>8}{'bpd':>9}{'bpd_iw':>9}{'nll':>11}{'nll_iw':>11}{'mse':>10}{'kl':>9}"
          f"     bpd: bits per dimension, nll and kl: nats, iw: K = {args.iw_samples}")
    for name, likelihoods in measured.items():
        nll, iw, mse, kl_mean = (float(likelihoods[key].mean()) for key in ("nll", "iw_nll", "mse", "kl"))
        row = {"n": len(likelihoods["nll"]), "bpd": bits_per_dim(nll, d), "bpd_iw": bits_per_dim(iw, d), "nll": nll,
               "nll_std": float(likelihoods["nll"].std()), "nll_iw": iw, "mse": mse, "kl": kl_mean,
               "notes": sets[name].notes}
        metrics["sets"][name] = row
        print(f"{name:<14}{row['n']:>8,}" + "".join(
            f"{value:>{width}.{digits}f}" if abs(value) < 10 ** (width - digits - 2) else f"{value:>{width}.1e}"
            for value, width, digits in ((row["bpd"], 9, 3), (row["bpd_iw"], 9, 3), (nll, 11, 1), (iw, 11, 1),
                                         (mse, 10, 6), (kl_mean, 9, 2))) + "  " + "; ".join(sets[name].notes))
    outliers = [name for name in sets if name not in ("train", "test")]
    print(f"\n{'AUROC, FPR95':<27}" + "".join(f"{name[:15]:>17}" for name in outliers) +
          f"     outliers are the positive class; a larger score is more outlying; fitted to {len(fitted.images):,} "
          "training images")
    scores = {}
    for score in args.scores:
        scorer = SCORES[score](fitted)
        scores[score] = {name: scorer(f) for name, f in features.items()}
        rows = metrics["scores"][score] = {
            name: detection(scores[score]["test"], scores[score][name]) for name in outliers}
        print(f"{score + ' (control)' * (SCORES[score] in CONTROLS):<27}" + "".join(
            f"{row['auroc']:>10.4f}{row['fpr95']:>7.3f}" for row in rows.values()))
    if config["data"] == "sprites":
        print(f"\n{cut} of {config['kappa']} latent dimensions carry the data; the family has "
              f"{config['sprite_factors']}" + (f" (largest drop of the mean KL: {ratio:.1f}-fold)" if ratio else ""))
    else:
        print(f"\n{active} of {config['kappa']} latent dimensions are active (mean KL above 0.05 nats); gamma = "
              f"{metrics['gamma']:.3g}")

    if RANK:
        return
    write_csv(out / "scores.csv", ["set", "index", *args.scores],
              ([name, i, *row] for name in sets
               for i, row in enumerate(zip(*(scores[s][name].tolist() for s in args.scores), strict=True))))
    if plots.available():
        title = f"{Path(config['data']).name}, alpha = {config['alpha']:g}, kappa = {config['kappa']}"
        bpd = {name: bits_per_dim(likelihoods["nll"], d) for name, likelihoods in measured.items()}
        plots.nll_histogram(out / "nll_histogram.png", bpd, title)
        plots.mutual_information(out / "mutual_information.png", kl, title)
    else:
        print("no figures: pip install matplotlib")
    checkpoint.write_atomic(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())  # last: all is there
    print(f"written to {out}")


def score_images(model, config, args, out):
    """Flag the outliers among the images of --score at the false-alarm rate --fpr, by conformal p-values of the first
    score, calibrated on the inlier test images."""
    if not Path(args.score).exists():
        raise UserError(f"--score {args.score}: there is no such folder or file")
    own = load_others(config, str(Path(args.score).resolve()), args)
    test = load_inliers(config, "test", args)
    n = len(test.pixels)
    if args.fpr < 1 / (n + 1):
        raise UserError(f"--fpr {args.fpr:g} needs more than {n} test images to calibrate with: give --fpr "
                        f"{math.ceil(1e4 / (n + 1)) / 1e4:g} or more, or "
                        f"{'a larger --max-images' if args.max_images else 'train on more images'}")
    from_first(lambda: make_folder(out))
    for note in own.notes:
        print(f"{own.name}: {note}")
    if Path(args.score).resolve() == Path(config["data"]):
        print("note: the model was trained on these images; the false-alarm rate holds for new ones only")
    fitted = load_inliers(config, "train", args)
    print(f"fitting {args.scores[0]} to {len(fitted.pixels):,} training images, calibrating on {n:,} test images",
          flush=True)
    agree({"train": fitted, "calibration": test, "score": own}, [args.iw_samples, args.scores, args.fpr])
    train = Features(model, fitted.pixels, measure(
        model, config, fitted.first(args.max_images or TRAIN_IMAGES), args, "train").likelihoods)
    calibration = measure(model, config, test, args, "calibration")
    features = measure(model, config, own, args, "score", first=n)  # its own noise: exchangeable with calibration's
    scorers = {name: SCORES[name](train) for name in args.scores}
    scores = {name: scorer(features) for name, scorer in scorers.items()}
    p = conformal_p_values(scorers[args.scores[0]](calibration), scores[args.scores[0]])
    flagged = p <= args.fpr
    if RANK:
        return
    if plots.available():
        plots.outliers(out / "outliers.png", own.pixels.numpy(), p, scores[args.scores[0]],
                       f"{Path(own.name).name}: {args.scores[0]}, calibrated on {n:,} images")
    else:
        print("no figure: pip install matplotlib")
    names = own.files or range(len(p))
    write_csv(out / "scores.csv", ["file" if own.files else "index", *args.scores, "p_value", "outlier"],
              zip(names, *(scores[s].tolist() for s in args.scores), p.tolist(), flagged.astype(int).tolist(),
                  strict=True))
    print(f"\n{'image':<40}{args.scores[0]:>19}{'p-value':>10}")
    for i in np.argsort(-scores[args.scores[0]], kind="stable")[:10]:
        print(f"{str(names[i])[-39:]:<40}{scores[args.scores[0]][i]:>12.1f}{'':7}{p[i]:>10.4f}"
              f"{'  outlier' if flagged[i] else ''}")
    print(f"{flagged.sum():,} of {len(p):,} images flagged at p <= {args.fpr:g}: of images like the training data, "
          f"{args.fpr:g} ± {math.sqrt(args.fpr * (1 - args.fpr) / n):.1g} would be (calibrated on {n:,} of them)\n"
          f"written to {out / 'scores.csv'}")


def main(args):
    args.scores = args.scores or (["default"] if args.score else None)
    check_scores(args)
    device = pick_device(args.device)
    with workers(device, args.timeout):
        model, config = checkpoint.load_model(args.ckpt, device)
        decoded_once = args.score and not {SCORES[name] for name in args.scores} & set(DECODED_OFTEN)
        limit_images(args, config["shape"], config["alpha"], config["kappa"], device,
                     *((FIT_IMAGES, 1) if decoded_once else ()))
        out = Path(args.out or Path(args.ckpt).parent)
        if args.score and not args.out:
            own = Path(args.score).resolve()
            out /= f"score-{own.name if own.is_dir() else own.stem}"
        if args.score:
            score_images(model, config, args, out)
        else:
            sets = {part: load_inliers(config, part, args) for part in ("train", "test")} | load_outliers(config, args)
            agree(sets, [args.iw_samples, args.scores])
            from_first(lambda: make_folder(out))
            evaluate_outliers(model, config, sets, args, out)


if __name__ == "__main__":
    with one_line_errors():
        main(ARGS)
