"""A model, what was fitted to its training images and how that is calibrated, in one file: fit, save, load, score.

    detector = Detector.load("runs/photos/detector.pt")
    detector.p_value(images)                # [N], how often an ordinary new picture scores at least as high
    detector.predict(images, fpr=0.05)      # [N], True where it is flagged
"""

import functools
import io
import math
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from vae_ood import UserError, checkpoint
from vae_ood.cli import Progress, complete, pick_device
from vae_ood.data.groups import group, parts, split_of
from vae_ood.data.images import Images
from vae_ood.data.likeness import Nearest, digests, farther, near, numbered
from vae_ood.data.own import AUTO, sized, to_pixels
from vae_ood.features import DECODED_OFTEN, Features, Part, decoded_means
from vae_ood.likelihood import evaluate
from vae_ood.metrics import benjamini_hochberg, conformal_p_values, set_p_value
from vae_ood.parallel import from_first
from vae_ood.scores import SCORES
from vae_ood.training import train

FORMAT = 2  # 1 had no `view`
FIT_IMAGES = 30_000  # of the training set: scores are fitted to so many, where --max-images does not say
TRAIN_IMAGES = 10_000  # of the training set are evaluated, where --max-images does not say
COMPARED = 2_000  # images that calibrate, and new ones, by how near they lie to the training images
WORDS = {"residual_spectrum": "fine texture", "residual_regions": "texture of a region",
         "likelihood_path": "how well it is reconstructed", "latents": "layout, as the latents see it",
         "joint": "an unusual combination"}  # what a component of `default` speaks of


def measure(model, config, images, args, label=None, first=0):
    """The `Features` of `images`, whose likelihoods, of training images for the first ones alone where --max-images
    does not say, show their progress by the label when they are asked for; `first` is the number of the first image's
    noise."""
    evaluated = (images.first(args.max_images or TRAIN_IMAGES) if label == "train" else images).pixels

    def likelihoods():
        if label is None:
            return evaluate(model, evaluated, args.iw_samples, config["seed"], config["dequantize"], first)
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


class Member:
    """A model, its scores fitted to its training images, and what they say of inliers that it has not seen."""

    def __init__(self, model, scores, said, groups, nearest, held_out, seen, view=None):
        """`said` {name: [n]}: the scores of the images that calibrate, of `groups` [n]; `held_out`: distance and local
        scale [m] of the first of these to the training images `nearest`; `view` [m, D]: what sets are compared by, of
        the same images, None without `default`; `seen`: how many images have had noise."""
        self.model, self.scores, self.said, self.groups = model, scores, said, np.asarray(groups, np.int64)
        self.nearest, self.held_out, self.seen, self.view = nearest, held_out, seen, view

    @classmethod
    def fit(cls, model, config, inliers, scores, args, fitted=None):
        """Fit `scores`, names, to inliers["train"], whose features may be there already, and calibrate on
        inliers["test"]."""
        train, test = inliers["train"], inliers["test"]
        n, groups = len(train.pixels), np.arange(len(test.pixels)) if test.groups is None else test.groups
        fitted = fitted or measure(model, config, train, args, "train")
        scores = {name: SCORES[name].fit(fitted) for name in scores}
        nearest = Nearest.of(train.pixels)
        member = cls(model, scores, {}, groups, nearest, nearest.distance(test.pixels[:COMPARED]), n)
        features = measure(model, config, test, args, "calibration", n)
        member.said, member.view = member.say(features), member.viewed(Part(features, slice(COMPARED)))
        member.seen = n + len(test.pixels)
        return member

    def say(self, features):
        """{name: scores [N]} of images' features."""
        return {name: finite(name, values) for score, fitted in self.scores.items()
                for name, values in fitted.said(score, features).items()}

    def viewed(self, features):
        """What sets of images are compared by [N, D], of their features; None without `default`."""
        return self.scores["default"].whitened(features) if "default" in self.scores else None

    def whole(self):
        """Of the images that `view` has, those [m] whose things it has whole, or all where it has none whole."""
        cut = np.isin(self.groups[:COMPARED], self.groups[COMPARED:])
        return ~cut if not cut.all() else cut

    def state(self):
        """Tensors and plain values, which `restore` takes."""
        return {"model": self.model.state_dict(), "groups": torch.from_numpy(self.groups),
                "scores": {name: fitted.state_dict() for name, fitted in self.scores.items()},
                "said": {name: torch.from_numpy(values) for name, values in self.said.items()},
                "nearest": self.nearest.state_dict(), "held_out": [torch.from_numpy(v) for v in self.held_out],
                "seen": self.seen, "view": None if self.view is None else torch.from_numpy(self.view)}

    @classmethod
    def restore(cls, path, config, state, device):
        """The member that gave the state, which was read from `path`."""
        checkpoint.check_weights(path, state["model"])
        model = checkpoint.rebuilt(path, config, state, device)
        scores = {name: SCORES[name].restore(values) for name, values in state["scores"].items()}
        said = {name: finite(name, values.numpy()) for name, values in state["said"].items()}
        groups, view = state["groups"].numpy(), state["view"]
        if {groups.shape} != {values.shape for values in said.values()}:
            raise ValueError("scores and groups")
        return cls(model, scores, said, groups, Nearest(**state["nearest"]),
                   tuple(v.numpy() for v in state["held_out"]), int(state["seen"]),
                   None if view is None else finite("view", view.numpy()))


@dataclass
class Seen:
    """What a detector says of images [N]: scores {name: [N]}; of its own score the p-value, the components' p-values
    {name: [N]} and the name of the smallest one (or its own); each member's `view`; 1 - likeness to the nearest
    training image, whether that is the same image, or shows the same thing."""

    scores: dict
    p_value: np.ndarray
    components: dict
    component: list
    views: list
    distance: np.ndarray
    copies: np.ndarray
    known: np.ndarray


class Detector:
    """Scores images, and says how often ordinary ones score as high.

    Images are uint8 or float [0, 1] arrays or tensors, [N, H, W, C], [N, C, H, W] or [N, H, W], or lists of paths or of
    Pillow's pictures; all are brought to the model's size. It writes nothing and prints nothing.
    """

    def __init__(self, config, members):
        """`config`: what determines the model and its input; one `Member`, or one of each fold."""
        self.config, self.members = config, members
        self.args = SimpleNamespace(max_images=config["max_images"], iw_samples=config["iw_samples"])
        self.scores = list(members[0].scores)
        self.score = self.scores[0]

    @classmethod
    def of(cls, config, members, args):
        """The detector of members that were fitted with the command's `args`."""
        return cls(config | {"max_images": args.max_images, "iw_samples": args.iw_samples}, members)

    def serves(self, args):
        """Whether it was fitted as the command's `args` ask for."""
        often = {feature for name in self.scores for feature in SCORES[name].reads} & set(DECODED_OFTEN)
        return (set(args.scores) <= set(self.scores)
                and args.max_images in (None, self.config["max_images"])
                and (not often or args.iw_samples == self.config["iw_samples"]))

    @classmethod
    def fit(cls, images, alpha=1.0, kappa=32, recipe="fast", iters=None, groups=None, fpr=0.05, seed=0, device="auto",
            size=AUTO, crop=None):
        """Train a VAE on images of ordinary things and fit the detector, as `run.py --data images` does.

        `images` are as those that it scores. groups [N]: equal for images of one thing; by default what is alike is
        one. fpr: the smallest false-alarm rate that will be asked for, which decides how many things are held out to
        calibrate. size, N or (H, W), and crop, "centre", "pad" or "stretch": how images are scaled; by default a list
        to 64x64, unless all have one smaller size, and an array not at all. Raises UserError for too few images.
        """
        args = SimpleNamespace(
            data="images", sprite_factors=4, skip_bad=False, dequantize=False, alpha=alpha, kappa=kappa, gamma=None,
            schedule=None, iters=iters, batch_size=64, lr=None, seed=seed, amp=False, recipe=recipe, compile=None,
            checkpoint_seconds=math.inf, keep=1, keep_at=[], group_by="near", folds=1, range=None, cache=None,
            max_images=None, iw_samples=16)
        complete(args)
        pixels, args.size, args.crop = sized(images, [size, size] if isinstance(size, int) else size, crop)
        own = Images("images", pixels)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            names, labels = digests(own.pixels), near(own.pixels, quiet=True) if groups is None else numbered(groups)
            split = split_of(own, names, labels, fpr)
            sets = parts(own, split)
            validation = sets.pop("validation", None)
            model, config = train(args, sets["train"].pixels, Path(folder), pick_device(device), split,
                                  validation and validation.pixels)
            sets["train"] = sets["train"].first(FIT_IMAGES)
            return cls.of(config, [Member.fit(model, config, sets, ["default"], args)], args)

    def save(self, path):
        """Write the file, atomically. Raises UserError."""
        checkpoint.write_state(path, {"detector": FORMAT, "config": self.config,
                                      "members": [member.state() for member in self.members]})

    @classmethod
    def load(cls, path, device="cpu"):
        """The detector that `save` wrote. Raises UserError for a file that is missing, foreign, damaged or newer; none
        of its content is run."""
        state = from_first(lambda: checkpoint.read_state(path, "detector"))
        if not isinstance(state, dict) or not isinstance(state.get("detector"), int):
            raise UserError(f"{path} is not a detector: give the detector.pt that run.py wrote")
        checkpoint.check_version(path, state["detector"], FORMAT)
        if state["detector"] < FORMAT:
            raise UserError(f"{path} was written by an older vae-ood: fit it anew with eval.py --ckpt RUN --fit")
        try:
            config = state["config"]
            found = cls(config, [Member.restore(path, config, member, device) for member in state["members"]])
            one = Images("one", torch.zeros(1, *config["shape"], dtype=torch.uint8))  # to see that all of it fits
            found.look(one)
            return found
        except Exception as error:  # anything that a damaged or tampered file may hold
            raise UserError(f"{path} is damaged: its content does not fit ({type(error).__name__})") from None

    def images(self, images):
        """`Images` of the model's shape."""
        return Images("images", to_pixels(images, self.config["shape"], self.config.get("range"),
                                          self.config.get("crop")))

    def features(self, images, first=0):
        """[the `Features` by each member] of `Images`, the first of which is the `first` that is scored: noise, if a
        score takes some, depends on an image's number."""
        return [measure(member.model, self.config, images, self.args, first=member.seen + first)
                for member in self.members]

    def say(self, images):
        """[{name: scores [N]} of each member] of `Images`."""
        return [member.say(of) for member, of in zip(self.members, self.features(images), strict=True)]

    def mean(self, name, said):
        """One of the scores [N], the mean over the folds, from what the members say."""
        return np.mean([of[name] for of in said], 0)

    def look(self, images, first=0, score=None):
        """All that is `Seen` of `Images`, by one of the scores."""
        features, score = self.features(images, first), score or self.score
        said = [member.say(of) for member, of in zip(self.members, features, strict=True)]
        parts = [name for name in said[0] if name.startswith(f"{score}.")]
        components = {name.split(".")[1]: self.p_values(name, said) for name in parts}
        speaks = [score] * len(images.pixels)
        if components:  # the smallest p-value speaks; of equal ones, beyond all that calibrate, the largest surprise
            p = np.stack(list(components.values()))
            surprise = np.mean([member.scores[score].surprises([of[name] for name in parts]).numpy()
                                for member, of in zip(self.members, said, strict=True)], 0)
            speaks = [list(components)[i] for i in np.where(p == p.min(0), surprise, -1).argmax(0)]
        views = [member.viewed(of) for member, of in zip(self.members, features, strict=True)]
        return Seen({name: self.mean(name, said) for name in self.scores}, self.p_values(score, said), components,
                    speaks, views, *self.compare(images.pixels))

    def p_values(self, name, said):
        """The conformal p-values [N] of one of the scores, from what the members say."""
        return conformal_p_values(*((member.said[name], member.groups, of[name])
                                    for member, of in zip(self.members, said, strict=True)))

    def decision_function(self, images):
        """The scores [N], larger = more outlying; the mean over the folds."""
        return self.mean(self.score, self.say(self.images(images)))

    def p_value(self, images):
        """Conformal p-values [N] in (0, 1]: of new things like the training data, at most a share p scores as high."""
        return self.p_values(self.score, self.say(self.images(images)))

    def predict(self, images, fpr=0.05, fdr=None):
        """Which images are outliers [N], bool: at the false-alarm rate `fpr`, or with `fdr` at the false-discovery rate
        by Benjamini and Hochberg: of the flagged, at most that share are ordinary, on average (arXiv 2104.08279)."""
        p = self.p_value(images)
        return p <= fpr + 1e-9 if fdr is None else benjamini_hochberg(p, fdr)

    def explain(self, images):
        """For each image a dict: score, p_value, components {name: p-value} where the score is `default`, component
        (the one of the smallest p-value, or the score), speaks (of what it speaks), image and reconstruction (uint8
        [H, W, C]), likeness to the nearest training image, known (whether it shows what a training image shows)."""
        own = self.images(images)
        return self.reconstructed(self.rows(own, self.look(own), range(len(own.pixels))))

    def rows(self, images, seen, which, score=None):
        """What `explain` gives of some of `Images`, without the reconstructions."""
        score = score or self.score
        return [{"score": float(seen.scores[score][i]), "p_value": float(seen.p_value[i]),
                 "components": {name: float(p[i]) for name, p in seen.components.items()},
                 "component": seen.component[i], "speaks": WORDS.get(seen.component[i], seen.component[i]),
                 "image": images.pixels[i].permute(1, 2, 0).numpy().copy(), "likeness": float(1 - seen.distance[i]),
                 "known": bool(seen.known[i])} for i in which]

    def reconstructed(self, rows):
        """The rows, with their reconstructions."""
        images = torch.from_numpy(np.stack([row["image"] for row in rows])).permute(0, 3, 1, 2)
        for row, mean in zip(rows, decoded_means(self.members[0].model, images), strict=True):
            row["reconstruction"] = mean
        return rows

    def compare(self, pixels):
        """Of uint8 pixels [N, C, H, W]: the distance to the nearest training image, the mean over the folds; whether
        each is a copy of one, and whether it shows what one shows [N]."""
        found = [member.nearest.known(pixels, member.held_out) for member in self.members]
        distance, copies, known = (np.stack(values) for values in zip(*found, strict=True))
        return distance.mean(0), copies.any(0), known.any(0)

    @property
    def things(self):
        """How many things calibrate."""
        return sum(len(np.unique(member.groups)) for member in self.members)

    def groups(self, images):
        """Labels [N] of `Images` by the run's --group-by, or by likeness where that does not fit them."""
        how = self.config.get("group_by")
        try:
            return group(images, "near" if how in (None, "none") or how.lower().endswith(".csv") else how, quiet=True)
        except UserError:
            return near(images.pixels, quiet=True)

    def set_p_value(self, images):
        """The p-value, in [0.001, 1], of the hypothesis that all the images are like the training data, as a set
        (`metrics.set_p_value`): it sees drift that no single image shows. At most 2,000 of them, drawn at random, are
        compared. Raises UserError for a detector without `default`."""
        if self.members[0].view is None:
            raise UserError("sets are compared by what `default` reads: fit the detector with it")
        own = self.images(images)
        own = own.take(np.sort(np.random.default_rng(0).permutation(len(own.pixels))[:COMPARED]))
        return self.p_of_set(self.groups(own), self.look(own).views)

    def p_of_set(self, groups, views):
        """The p-value of `set_p_value`, from new images' groups [N] and each member's view of them [N, D]."""
        return set_p_value(groups, *((member.view[whole := member.whole()], member.groups[:COMPARED][whole], view)
                                     for member, view in zip(self.members, views, strict=True)))

    def farther(self, groups, distance):
        """The p-value of the test that new images of `groups` [N], at this mean distance from the training images [N],
        lie farther from these than those that calibrate, one image of each thing."""
        known = np.concatenate([member.held_out[0] for member in self.members])
        folds = np.concatenate([member.groups[:COMPARED] + i * 2**32 for i, member in enumerate(self.members)])
        return farther(distance, groups, known, folds)
