"""A model on known outlier sets: what run.py does after training, and eval.py with a checkpoint."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from vae_ood import UserError, checkpoint, plots
from vae_ood.cli import NAMED, RANK, printable
from vae_ood.data import PAIRS, load
from vae_ood.data.cache import read_own
from vae_ood.data.groups import parts
from vae_ood.data.images import PRIOR, generator
from vae_ood.data.likeness import set_digest
from vae_ood.data.synthetic import CORRUPTIONS, corrupt
from vae_ood.data.tiles import picture_shape, sampled
from vae_ood.features import DECODED_OFTEN
from vae_ood.likelihood import bits_per_dim
from vae_ood.member import FIT_IMAGES, TRAIN_IMAGES, finite, measure, unseen_of
from vae_ood.metrics import detection, latent_spectrum, mmd
from vae_ood.model import flops
from vae_ood.parallel import crc32
from vae_ood.scores import SCORES

NO_CODE = "\N{EN DASH}"  # in place of bits per dimension
ALL = [name for name in SCORES if name != "regret"]  # which takes minutes
BRIEF = ["default", "nll", "pca"]  # the last is a control, which sees no model
LIKELIHOOD_TILES = 1_000  # of a set's pictures in tiles, at most
MMD_IMAGES = 5_000  # of the training set, at most, against as many samples of the prior
CPU_FLOPS = 1e13  # the most that decoding a set may take on a CPU (some two minutes on two cores)


def scores_of(named, tile, brief=BRIEF):
    """The scores that --scores names, `brief` where it is not given. `all` stands for ALL; of tiles, which are many,
    that and `brief` are those alone that decode each once. UserError for an unknown one."""
    found = []
    for name in named or brief:
        if name != "all" and name not in SCORES:
            raise UserError(f"unknown score '{name}': choose from {', '.join(SCORES)}, or give all")
        found += [one for one in (ALL if name == "all" else [name])
                  if not tile or (named and name != "all") or not set(SCORES[one].reads) & set(DECODED_OFTEN)]
    return list(dict.fromkeys(found))


def limit_images(args, shape, alpha, kappa, device, images=TRAIN_IMAGES, samples=None):
    """Where --max-images does not say, set it on a CPU for models so large that as many `images` take over CPU_FLOPS,
    by default with --iw-samples samples each."""
    if args.max_images or device.type != "cpu":
        return
    _, decoding = flops(tuple(shape), alpha, kappa)
    affordable = CPU_FLOPS / ((samples or args.iw_samples) * decoding)
    if affordable < images:
        args.max_images = max(100, int(affordable) // 100 * 100)
        print(f"a large model for a CPU: the first {args.max_images:,} images of each set are evaluated (with --score: "
              "fit and calibrate), unless --max-images says otherwise")


def load_inliers(config, args, split=None):
    """The "train" and the "test" part of the data that the model is for, as many as are used: own images by the
    checkpoint's `split`, perhaps with "validation". UserError where these are not what the model was trained on."""
    data = config["data"]
    if data in NAMED:
        sets = {part: load(data, part, args.data_root, None, config["sprite_factors"]) for part in ("train", "test")}
        sets["train"] = trained_on(config, sets["train"])
    else:
        if not Path(data).exists():
            raise UserError(f"the images that the model was trained on are not at {data} any more: say with --data "
                            "where they are")
        images, _, _ = read_own(Path(data), config.get("cache"), False, config.get("size"), config.get("crop"),
                                config["skip_bad"] or args.skip_bad, config.get("range"))
        sets = parts(images, split)
        if crc32(sets["train"].pixels) != config.get("images_crc32"):
            raise UserError(f"the images in {data} are not those that the model was trained on (another checksum): "
                            "give them back, or train anew")
    for part, images in sets.items():
        if list(images.pixels.shape[1:]) != picture_shape(config):
            raise UserError(f"the {part} images of {data} are {list(images.pixels.shape[1:])}, the model is for "
                            f"{picture_shape(config)}: make them equal")
    return limited(sets, args)


def trained_on(config, images):
    """Of an official set's training images, those that the model was trained on: all, in any order, or the first files
    where there were no others; else all, with a note."""
    wanted = config.get("images_crc32")
    if wanted in (None, crc32(images.pixels)) or config.get("images_digest") == set_digest(images.pixels):
        return images
    for n in range(10_000, len(images.pixels), 10_000):  # CIFAR-10's files
        if crc32(images.pixels[:n]) == wanted:
            part = images.first(n)
            return replace(part, notes=[f"the first {n:,} of {len(images.pixels):,}, on which the model was trained"])
    images.notes.append("not the images that the model was trained on (another checksum)")
    return images


def limited(sets, args):
    """The first images of the parts, as many as scores are fitted to and calibrated with."""
    most = {"train": args.max_images or FIT_IMAGES, "validation": None, "test": args.max_images}
    sets = {name: images.first(most[name]) for name, images in sets.items()}
    if len(sets["train"].pixels) < 2:
        raise UserError("scores are fitted to two training images at least: give more, or a larger --max-images")
    return sets


def load_others(config, data, args):
    """Images of `data`, a name or a path, converted to the shape of the inliers."""
    return load(data, "all", args.data_root, picture_shape(config), config["sprite_factors"],
                config["skip_bad"] or args.skip_bad, config.get("range"), config.get("crop"))


def load_outliers(config, args, test):
    """The outlier sets by name: those of --outliers, some the inliers' `test` images corrupted, else the paper's for
    the data set, as far as they can be had."""
    if clash := {"train", "test"} & set(args.outliers or ()):
        raise UserError(f"--outliers {clash.pop()}: the inliers' own parts are evaluated anyway; name another set")
    sets = {}
    made_up = ["blurred", "patched"] if config.get("tile") else ["noise", "constant"]  # no more pictures than test has
    for name in args.outliers or PAIRS.get(config["data"], made_up):
        try:
            images = corrupt(test, name) if name in CORRUPTIONS else load_others(config, name, args)
            sets[name] = images.first(args.max_images)
        except UserError as error:
            if args.outliers:
                raise
            print(f"without the outliers {name}: {error}")
    return sets


def evaluate(model, config, sets, args, out, fitted=None, scores=None):
    """Evaluate `sets` ({'train', 'test', outliers...: Images}), print the tables and write the files to `out`. Scores
    are fitted to all of 'train', of which TRAIN_IMAGES are evaluated where --max-images does not say, and 'validation';
    `fitted` are the features of 'train', and `scores` {name: fitted}, where they are there already."""
    unseen = unseen_of(model, config, sets, args)
    sets = {name: images for name, images in sets.items() if name != "validation"}
    train = sampled(sets["train"], config, args.max_images or FIT_IMAGES)
    fitted = fitted or measure(model, config, train, args, "train")
    sets = sets | {"train": train.first(args.max_images or TRAIN_IMAGES)}
    features = {name: measure(model, config, images, args, name) for name, images in sets.items()}
    features["train"].likelihoods = fitted.likelihoods
    measured = {name: features[name].likelihoods() if name == "train" or not config.get("tile") else measure(
        model, config, sampled(images, config, LIKELIHOOD_TILES), args, name).likelihoods()
        for name, images in sets.items()}
    kl, active, cut, ratio = latent_spectrum(measured["train"]["kl_per_dim"].mean(0, dtype=np.float64))
    z = measured["train"]["z"][:MMD_IMAGES]
    prior = generator(config["seed"], PRIOR).standard_normal(z.shape)
    gamma = model.log_gamma.exp().item()
    bits = partial(bits_per_dim, d=math.prod(config["shape"]), gamma=gamma, dequantize=config["dequantize"])
    metrics = {"config": config, "gamma": gamma, "active_dims": active, "kappa": config["kappa"],
               "iw_samples": args.iw_samples, "kl_per_dim": kl.tolist(), "spectrum_cut": cut, "spectrum_ratio": ratio,
               "mmd": mmd(z, prior) if len(z) > 1 else None, "mmd_images": len(z), "fit_images": len(fitted.images),
               "sets": likelihood_table(measured, sets, bits, args, bool(config.get("tile")))}
    scores, metrics["scores"] = score_table(fitted, unseen, features, args, scores or {})
    if config["data"] == "sprites":
        print(f"\n{cut} of {config['kappa']} latent dimensions carry the data; the family has "
              f"{config['sprite_factors']}" + (f" (largest drop of the mean KL: {ratio:.1f}-fold)" if ratio else ""))
    else:
        print(f"\n{active} of {config['kappa']} latent dimensions are active (mean KL above 0.05 nats); gamma = "
              f"{gamma:.3g}")
    if RANK:
        return
    checkpoint.write_csv(out / "scores.csv", ["set", "index", *args.scores], (
        [name, i, *row] for name in sets
        for i, row in enumerate(zip(*(scores[s][name].tolist() for s in args.scores), strict=True))))
    checkpoint.write_atomic(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    draw({name: likelihoods["nll"] for name, likelihoods in measured.items()}, kl, bits, config, out)
    print(f"written to {out}")


def likelihood_table(measured, sets, bits, args, tiles=False):
    """Print and return the mean likelihoods of each set, {set: {...}}, of images or of tiles; `bits` turns nats into
    bits per dimension."""
    table, what = {}, "tiles" if tiles else "images"
    print(f"\n{'set':<14}{what:>8}{'bpd':>9}{'bpd_iw':>9}{'nll':>11}{'nll_iw':>11}{'mse':>10}{'kl':>9}"
          f"     bpd: bits per dimension, nll and kl: nats, iw: K = {args.iw_samples}")
    for name, likelihoods in measured.items():
        nll, iw, mse, kl = (float(likelihoods[key].mean()) for key in ("nll", "iw_nll", "mse", "kl"))
        row = table[name] = {
            "n": len(likelihoods["nll"]), "bpd": bits(nll), "bpd_iw": bits(iw), "nll": nll,
            "nll_std": float(likelihoods["nll"].std()), "nll_iw": iw, "mse": mse, "kl": kl, "notes": sets[name].notes}
        print(f"{name:<14}{row['n']:>8,}" + "".join(
            f"{NO_CODE:>{width}}" if value is None else f"{value:>{width}.{digits}f}"
            if abs(value) < 10 ** (width - digits - 2) else f"{value:>{width}.1e}"
            for value, width, digits in ((row["bpd"], 9, 3), (row["bpd_iw"], 9, 3), (nll, 11, 1), (iw, 11, 1),
                                         (mse, 10, 6), (kl, 9, 2))) + "  " + "; ".join(sets[name].notes))
    if bits(0.0) is None:
        print(f"bpd {NO_CODE}: gamma is below 1/255^2: narrower than a level of 8 bits, so no code length")
    return table


def score_table(fitted, unseen, features, args, known):
    """Print how each score, fitted here unless it is `known`, tells each outlier set from 'test'; returns ({score:
    {set: [N]}}, {score: {set: {...}}})."""
    outliers = [name for name in features if name not in ("train", "test")]
    print(f"\n{'AUROC, FPR95':<27}" + "".join(f"{name[:15]:>17}" for name in outliers) +
          f"     outliers are the positive class; a larger score is more outlying; fitted to {len(fitted.images):,} "
          f"training {'tiles; a picture scores as its largest tile' if features['test'].tiles > 1 else 'images'}")
    scores, table = {}, {}
    for score in args.scores:
        scorer = known.get(score) or SCORES[score].fit(fitted, unseen)
        of = scores[score] = {name: finite(score, scorer(f)) for name, f in features.items()}
        table[score] = {name: detection(of["test"], of[name], paired=name in CORRUPTIONS) for name in outliers}
        print(f"{score + ' (control)' * SCORES[score].control:<27}" + "".join(
            f"{row['auroc']:>10.4f}{row['fpr95']:>7.3f}" for row in table[score].values()))
    return scores, table


def draw(nll, kl, bits, config, out):
    """The figures of the sets' NLLs in nats, {set: [N]}, and of the dimensions' mean KL."""
    if not plots.available():
        print("no figures: pip install matplotlib")
        return
    title = printable(f"{Path(config['data']).name}, alpha = {config['alpha']:g}, kappa = {config['kappa']}")
    d = math.prod(config["shape"])
    unit, of = ("nats", lambda values: values / d) if bits(0.0) is None else ("bits", bits)
    plots.drawn(plots.nll_histogram, out / "nll_histogram.png", {name: of(v) for name, v in nll.items()}, unit, title)
    plots.drawn(plots.mutual_information, out / "mutual_information.png", kl, title)
