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
import math
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vae_ood import UserError, checkpoint, plots
from vae_ood.cli import RANK, make_folder, pick_device
from vae_ood.data import PAIRS, load
from vae_ood.data.images import PRIOR, generator
from vae_ood.data.synthetic import CORRUPTIONS, corrupt
from vae_ood.detector import TRAIN_IMAGES, Calibration, finite, largest_rank, measure
from vae_ood.data.groups import parts
from vae_ood.likelihood import bits_per_dim
from vae_ood.data.likeness import set_digest
from vae_ood.metrics import cross_bound, detection, false_alarm_range, latent_spectrum, mmd
from vae_ood.model import VAE
from vae_ood.parallel import agree, from_first, workers
from vae_ood.features import DECODED_OFTEN
from vae_ood.scores import SCORES

NO_CODE = "\N{EN DASH}"  # in place of bits per dimension
FIT_IMAGES = 30_000  # of the training set: scores are fitted to so many, where --max-images does not say
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


def load_inliers(config, args, split=None):
    """The "train" and the "test" part of the data that the model is for, as many as are used: own images by the
    checkpoint's `split`. UserError where these are not what the model was trained on."""
    data = config["data"]
    if data in NAMED:
        sets = {part: load(data, part, args.data_root, None, config["sprite_factors"]) for part in ("train", "test")}
        sets["train"] = trained_on(config, sets["train"])
    else:
        if not Path(data).exists():
            raise UserError(f"the images that the model was trained on are not at {data} any more: say with --data "
                            "where they are")
        images = load(data, "all", skip_bad=config["skip_bad"] or args.skip_bad, levels=config.get("range"))
        sets = parts(images, split)
        sets.pop("validation", None)
        if zlib.crc32(sets["train"].pixels.numpy()) != config.get("images_crc32"):
            raise UserError(f"the images in {data} are not those that the model was trained on (another checksum): "
                            "give them back, or train anew")
    for part, images in sets.items():
        if list(images.pixels.shape[1:]) != config["shape"]:
            raise UserError(f"the {part} images of {data} are {list(images.pixels.shape[1:])}, the model is for "
                            f"{config['shape']}: make them equal")
    return limited(sets, args)


def trained_on(config, images):
    """Of an official set's training images, those that the model was trained on: all, in any order, or the first files
    where there were no others; else all, with a note."""
    wanted = config.get("images_crc32")
    if wanted in (None, zlib.crc32(images.pixels.numpy())) or config.get("images_digest") == set_digest(images.pixels):
        return images
    for n in range(10_000, len(images.pixels), 10_000):  # CIFAR-10's files
        if zlib.crc32(images.pixels[:n].numpy()) == wanted:
            part = images.first(n)
            return replace(part, notes=[f"the first {n:,} of {len(images.pixels):,}, on which the model was trained"])
    images.notes.append("not the images that the model was trained on (another checksum)")
    return images


def limited(sets, args):
    """The first images of the "train" and the "test" part, as many as scores are fitted to and calibrated with."""
    sets = {"train": sets["train"].first(args.max_images or FIT_IMAGES), "test": sets["test"].first(args.max_images)}
    if len(sets["train"].pixels) < 2:
        raise UserError("scores are fitted to two training images at least: give more, or a larger --max-images")
    return sets


def load_others(config, data, args):
    """Images of `data`, a name or a path, converted to the shape of the inliers."""
    return load(data, "all", args.data_root, config["shape"], config["sprite_factors"],
                config["skip_bad"] or args.skip_bad, config.get("range"))


def load_outliers(config, args, test):
    """The outlier sets by name: those of --outliers, some the inliers' `test` images corrupted, else the paper's for
    the data set, as far as they can be had."""
    if clash := {"train", "test"} & set(args.outliers or ()):
        raise UserError(f"--outliers {clash.pop()}: the inliers' own parts are evaluated anyway; name another set")
    sets = {}
    for name in args.outliers or PAIRS.get(config["data"], ["noise", "constant"]):
        try:
            images = corrupt(test, name) if name in CORRUPTIONS else load_others(config, name, args)
            sets[name] = images.first(args.max_images)
        except UserError as error:
            if args.outliers:
                raise
            print(f"without the outliers {name}: {error}")
    return sets


def evaluate_outliers(model, config, sets, args, out):
    """Evaluate `sets` ({'train', 'test', outliers...: Images}), print the tables and write the files to `out`. Scores
    are fitted to all of 'train', of which TRAIN_IMAGES are evaluated where --max-images does not say."""
    d = math.prod(config["shape"])
    fitted = measure(model, config, sets["train"], args, "train")
    sets = sets | {"train": sets["train"].first(args.max_images or TRAIN_IMAGES)}
    features = {name: measure(model, config, images, args, name) for name, images in sets.items()}
    features["train"].likelihoods = fitted.likelihoods
    measured = {name: f.likelihoods() for name, f in features.items()}
    kl, active, cut, ratio = latent_spectrum(measured["train"]["kl_per_dim"].mean(0, dtype=np.float64))
    z = measured["train"]["z"][:MMD_IMAGES]
    prior = generator(config["seed"], PRIOR).standard_normal(z.shape)
    metrics = {"config": config, "gamma": model.log_gamma.exp().item(), "active_dims": active, "kappa": config["kappa"],
               "iw_samples": args.iw_samples, "kl_per_dim": kl.tolist(), "spectrum_cut": cut, "spectrum_ratio": ratio,
               "mmd": mmd(z, prior) if len(z) > 1 else None, "mmd_images": len(z),
               "fit_images": len(fitted.images), "sets": {}, "scores": {}}
    bits = partial(bits_per_dim, d=d, gamma=metrics["gamma"], dequantize=config["dequantize"])
    print(f"\n{'set':<14}{'images':>8}{'bpd':>9}{'bpd_iw':>9}{'nll':>11}{'nll_iw':>11}{'mse':>10}{'kl':>9}"
          f"     bpd: bits per dimension, nll and kl: nats, iw: K = {args.iw_samples}")
    for name, likelihoods in measured.items():
        nll, iw, mse, kl_mean = (float(likelihoods[key].mean()) for key in ("nll", "iw_nll", "mse", "kl"))
        row = {"n": len(likelihoods["nll"]), "bpd": bits(nll), "bpd_iw": bits(iw), "nll": nll,
               "nll_std": float(likelihoods["nll"].std()), "nll_iw": iw, "mse": mse, "kl": kl_mean,
               "notes": sets[name].notes}
        metrics["sets"][name] = row
        print(f"{name:<14}{row['n']:>8,}" + "".join(
            f"{NO_CODE:>{width}}" if value is None else f"{value:>{width}.{digits}f}"
            if abs(value) < 10 ** (width - digits - 2) else f"{value:>{width}.1e}"
            for value, width, digits in ((row["bpd"], 9, 3), (row["bpd_iw"], 9, 3), (nll, 11, 1), (iw, 11, 1),
                                         (mse, 10, 6), (kl_mean, 9, 2))) + "  " + "; ".join(sets[name].notes))
    if bits(0.0) is None:
        print(f"bpd {NO_CODE}: gamma is below 1/255^2: narrower than a level of 8 bits, so no code length")
    outliers = [name for name in sets if name not in ("train", "test")]
    print(f"\n{'AUROC, FPR95':<27}" + "".join(f"{name[:15]:>17}" for name in outliers) +
          f"     outliers are the positive class; a larger score is more outlying; fitted to {len(fitted.images):,} "
          "training images")
    scores = {}
    for score in args.scores:
        scorer = SCORES[score].fit(fitted)
        scores[score] = {name: finite(score, scorer(f)) for name, f in features.items()}
        rows = metrics["scores"][score] = {
            name: detection(scores[score]["test"], scores[score][name], paired=name in CORRUPTIONS)
            for name in outliers}
        print(f"{score + ' (control)' * SCORES[score].control:<27}" + "".join(
            f"{row['auroc']:>10.4f}{row['fpr95']:>7.3f}" for row in rows.values()))
    if config["data"] == "sprites":
        print(f"\n{cut} of {config['kappa']} latent dimensions carry the data; the family has "
              f"{config['sprite_factors']}" + (f" (largest drop of the mean KL: {ratio:.1f}-fold)" if ratio else ""))
    else:
        print(f"\n{active} of {config['kappa']} latent dimensions are active (mean KL above 0.05 nats); gamma = "
              f"{metrics['gamma']:.3g}")

    if RANK:
        return
    checkpoint.write_csv(out / "scores.csv", ["set", "index", *args.scores], (
        [name, i, *row] for name in sets
        for i, row in enumerate(zip(*(scores[s][name].tolist() for s in args.scores), strict=True))))
    checkpoint.write_atomic(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    if plots.available():
        title = printable(f"{Path(config['data']).name}, alpha = {config['alpha']:g}, kappa = {config['kappa']}")
        unit, of = ("nats", lambda nll: nll / d) if bits(0.0) is None else ("bits", bits)
        values = {name: of(likelihoods["nll"]) for name, likelihoods in measured.items()}
        plots.drawn(plots.nll_histogram, out / "nll_histogram.png", values, unit, title)
        plots.drawn(plots.mutual_information, out / "mutual_information.png", kl, title)
    else:
        print("no figures: pip install matplotlib")
    print(f"written to {out}")


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
            evaluate_outliers(model, config, sets, args, out)


if __name__ == "__main__":
    with one_line_errors():
        main(ARGS)
