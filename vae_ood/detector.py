"""What a model and its fitted scores say of new images, calibrated on inliers that it has not seen."""

import functools
import math

import numpy as np

from vae_ood import UserError
from vae_ood.cli import Progress
from vae_ood.data.groups import group, things_needed
from vae_ood.data.likeness import Nearest, farther, near
from vae_ood.features import Features
from vae_ood.likelihood import evaluate
from vae_ood.metrics import confident_rank, conformal_p_values
from vae_ood.scores import SCORES

TRAIN_IMAGES = 10_000  # of the training set are evaluated, where --max-images does not say
COMPARED = 2_000  # images that calibrate, and new ones, by how near they lie to the training images


def measure(model, config, images, args, label, first=0):
    """The `Features` of `images`, whose likelihoods, of training images for the first ones alone where --max-images
    does not say, show their progress when they are asked for; `first` is the number of the first image's noise."""
    evaluated = (images.first(args.max_images or TRAIN_IMAGES) if label == "train" else images).pixels

    def likelihoods():
        bar = Progress(len(evaluated), label=label)
        result = evaluate(model, evaluated, args.iw_samples, config["seed"], config["dequantize"], first, bar.update)
        bar.close()
        return result
    return Features(model, images.pixels, functools.cache(likelihoods), images.groups,
                    (config["seed"], first) if config["dequantize"] else None)


def finite(name, scores):
    """The scores [N]; UserError unless all of them are finite."""
    if bad := int((~np.isfinite(scores)).sum()):
        raise UserError(f"the score {name} is not finite for {bad:,} of {len(scores):,} images: the model is of no use "
                        "for them; train anew, with a smaller --lr, or leave these images out")
    return scores


class Calibration:
    """The scores of inliers that no model has seen and of new images, by one model or by each of some folds."""

    def __init__(self, score):
        self.score, self.images, self.folds, self.new = score, 0, [], {}
        self.near, self.copies, self.siblings = [], False, False

    def add(self, model, config, inliers, own, args):
        """Fit the scores to a model's training images, and score its calibration images and the new ones, each with
        noise of its own."""
        train, test = inliers["train"], inliers["test"]
        groups = np.arange(len(test.pixels)) if test.groups is None else test.groups
        n = len(train.pixels)
        fitted = measure(model, config, train, args, "train")
        calibration = measure(model, config, test, args, "calibration", first=n)
        features = measure(model, config, own, args, "score", first=n + len(test.pixels))
        for name in args.scores:
            scorer = SCORES[name].fit(fitted)
            scores = finite(name, scorer(features))
            self.new[name] = self.new.get(name, 0) + scores
            if name == self.score:
                self.folds.append((finite(name, scorer(calibration)), groups, scores))
        self.images += len(test.pixels)
        self.compare(train.pixels, test.pixels[:COMPARED], groups[:COMPARED], own.pixels)

    def compare(self, train, test, groups, own):
        """How near the calibration images and the new ones lie to the training images."""
        nearest = Nearest(train)
        held_out = nearest.distance(test)
        distance, copies, siblings = nearest.known(own, held_out)
        self.near.append((held_out[0], groups, distance))
        self.copies, self.siblings = self.copies | copies, self.siblings | siblings

    def p_values(self):
        """The conformal p-values of the new images [N]."""
        return conformal_p_values(*self.folds)

    @property
    def things(self):
        """How many things calibrate."""
        return sum(len(np.unique(groups)) for _, groups, _ in self.folds)

    @property
    def likeness(self):
        """Of each new image to the nearest training image [N], the mean over the folds."""
        return 1 - sum(distance for _, _, distance in self.near) / len(self.near)

    def farther(self, own, how):
        """The p-value of the test that new `Images` lie farther from the training images than those that calibrate, one
        image of each thing; of the new ones, things by `how`, or by likeness where that does not fit them."""
        chosen = np.random.default_rng(0).permutation(len(own.pixels))[:COMPARED]
        some = own.take(chosen)
        try:
            groups = group(some, "near" if how in (None, "none") or how.lower().endswith(".csv") else how)
        except UserError:
            groups = near(some.pixels)
        known = np.concatenate([distance for distance, _, _ in self.near])
        folds = np.concatenate([numbers.astype(np.int64) + i * 2**32 for i, (_, numbers, _) in enumerate(self.near)])
        return farther(1 - self.likeness[chosen], groups, known, folds)


def largest_rank(args, things, folds):
    """k, so that the false-alarm rate that is asked for is kept where p <= k / (things + 1); UserError where there is
    none."""
    more = "a larger --max-images" if args.max_images else "a run with a smaller --fpr" + (
        "" if folds > 1 else ", or one with --folds, by which all things calibrate")
    if args.confidence is None:
        if k := int(args.fpr * (things + 1) + 1e-9):
            return k
        raise UserError(f"--fpr {args.fpr:g} needs {things_needed(args.fpr):,} things to calibrate with, and there are "
                        f"{things:,}: give --fpr {math.ceil(1e4 / (things + 1)) / 1e4:g} or more, or {more}")
    if k := confident_rank(things, args.fpr, args.confidence):
        return k
    possible = 1 - (1 - args.confidence) ** (1 / things)
    needed = math.ceil(math.log(1 - args.confidence) / math.log1p(-args.fpr))
    raise UserError(f"--fpr {args.fpr:g} with confidence {args.confidence:g} needs {needed:,} things to calibrate "
                    f"with, and there are {things:,}: give --fpr {math.ceil(1e4 * possible) / 1e4:g} or more, or "
                    f"{more}")
