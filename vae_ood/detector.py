"""A model, what was fitted to its training images and how that is calibrated, in one file: fit, save, load, score.

    detector = Detector.load("runs/photos/detector.pt")
    detector.p_value(images)                # [N], how often an ordinary new picture scores at least as high
    detector.predict(images, fpr=0.05)      # [N], True where it is flagged
"""

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
from vae_ood.cli import complete, pick_device
from vae_ood.data.groups import group, parts, smallest_rate, split_of, things_needed
from vae_ood.data.images import Images
from vae_ood.data.likeness import digests, farther, near, numbered
from vae_ood.data.own import AUTO, WHOLE, sized, to_pixels
from vae_ood.data.tiles import Tiles, picture_shape, put_together, tiled
from vae_ood.features import DECODED_OFTEN, decoded_means
from vae_ood.member import COMPARED, FIT_IMAGES, Member, measure
from vae_ood.metrics import benjamini_hochberg, conformal_p_values, set_p_value
from vae_ood.parallel import from_first
from vae_ood.scores import SCORES
from vae_ood.training import train

FORMAT = 5  # 1 had no `view`, 2 neither maps nor patches, 3 and 4 other components
LEAST_THINGS = 5  # of which is said whether as a set they are like the training data
WORDS = {"layout": "what lies where", "joint": "an unusual combination", "image_cells": "fine structure by place",
         "texture": "fine texture", "noise": "noise of a region", "edges": "straight edges", "contrast": "contrast",
         "image_patches": "fine structure at a place"}  # what a component of `default` speaks of


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
            size=AUTO, crop=None, tile=None):
        """Train a VAE on images of ordinary things and fit the detector, as `run.py --data images` does.

        `images` are as those that it scores. groups [N]: equal for images of one thing; by default what is alike is
        one. fpr: the smallest false-alarm rate that will be asked for, which decides how many things are held out to
        calibrate. size, N or (H, W), and crop, "centre", "pad" or "stretch": how images are scaled; by default a list
        to 64x64, unless all have one smaller size, and an array not at all. tile: the side in pixels of the square
        tiles that the pictures are cut into, so that they keep their size. From alpha = 1 on, the fast recipe trains in
        bfloat16 on a CPU that has it. Raises UserError for too few images.
        """
        args = SimpleNamespace(
            data="images", sprite_factors=4, skip_bad=False, dequantize=False, alpha=alpha, kappa=kappa, gamma=None,
            schedule=None, iters=iters, batch_size=64, lr=None, seed=seed, precision=None, recipe=recipe,
            compile=None, checkpoint_seconds=math.inf, keep=1, keep_at=[], folds=1, range=None, cache=None,
            max_images=None, tile=tile, group_by="near" if groups is None else "labels", iw_samples=16)
        complete(args)
        pixels, args.size, args.crop = sized(
            images, [size, size] if isinstance(size, int) else WHOLE if tile and size == AUTO else size, crop)
        own = Images("images", pixels)
        if groups is not None and len(groups) != len(own.pixels):
            raise UserError(f"{len(groups):,} groups for {len(own.pixels):,} images: give one of each")
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            names, labels = digests(own.pixels), near(own.pixels, quiet=True) if groups is None else numbered(groups)
            split = split_of(own, names, labels, fpr)
            sets = parts(own, split)
            validation = sets.get("validation")
            model, config = train(args, tiled(sets["train"].pixels, tile), Path(folder), pick_device(device), split,
                                  validation and tiled(validation.pixels, tile))
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
            one = Images("one", torch.zeros(1, *picture_shape(config), dtype=torch.uint8))  # to see that all of it fits
            found.look(one)
            for member in found.members:
                member.map(one.pixels)
            return found
        except Exception as error:  # anything that a damaged or tampered file may hold
            raise UserError(f"{path} is damaged: its content does not fit ({type(error).__name__})") from None

    def images(self, images):
        """`Images` of the model's shape."""
        return Images("images", to_pixels(images, picture_shape(self.config), self.config.get("range"),
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
        parts = [name for name in said[0] if name.startswith(f"{score}.") and all(name in of for of in said)]
        components = {name.split(".")[1]: self.p_values(name, said) for name in parts}
        speaks = [score] * len(images.pixels)
        if components:  # the smallest p-value speaks; of equal ones, beyond all that calibrate, the largest surprise
            p = np.stack(list(components.values()))
            surprises = [member.scores[score].surprises({name.split(".")[1]: of[name] for name in parts})
                         for member, of in zip(self.members, said, strict=True)]
            surprise = np.mean([torch.stack(list(of.values())).numpy() for of in surprises], 0)
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
        by Benjamini and Hochberg: of the flagged, at most that share are ordinary, on average (arXiv 2104.08279).
        Raises UserError for a rate that so few things cannot promise."""
        if fdr is None and fpr * (self.things + 1) < 1 - 1e-9:
            raise UserError(f"fpr={fpr:g} needs {things_needed(fpr):,} things to calibrate with, and there are "
                            f"{self.things:,}: give {smallest_rate(self.things):g} or more")
        p = self.p_value(images)
        return p <= fpr + 1e-9 if fdr is None else benjamini_hochberg(p, fdr)

    def map(self, images):
        """Where each image is odd, float32 [N, H, W] of the model's size: by how many standard deviations it differs
        there from the training images, by the first of the folds."""
        return self.members[0].map(self.images(images).pixels).numpy()

    def map_threshold(self, fpr=0.05):
        """The value that of new things' maps at most a share `fpr` exceed at any pixel; infinite where fewer than
        1 / fpr - 1 things calibrate (of folds, the first one's)."""
        return self.members[0].map_threshold(fpr)

    def explain(self, images):
        """For each image a dict: score, p_value, components {name: p-value} where the score is `default`, component
        (the one of the smallest p-value, or the score), speaks (of what it speaks), image and reconstruction (uint8
        [H, W, C]), map (as `map` gives it), likeness to the nearest training image, known (whether it shows what a
        training image shows)."""
        own = self.images(images)
        return self.reconstructed(self.rows(own, self.look(own), range(len(own.pixels))))

    def rows(self, images, seen, which, score=None):
        """What `explain` gives of some of `Images`, without the reconstructions and maps."""
        score = score or self.score
        return [{"score": float(seen.scores[score][i]), "p_value": float(seen.p_value[i]),
                 "components": {name: float(p[i]) for name, p in seen.components.items()},
                 "component": seen.component[i], "speaks": WORDS.get(seen.component[i], seen.component[i]),
                 "image": images.pixels[i].permute(1, 2, 0).numpy().copy(), "likeness": float(1 - seen.distance[i]),
                 "known": bool(seen.known[i])} for i in which]

    def reconstructed(self, rows):
        """The rows, with their reconstructions and maps."""
        if not rows:
            return rows
        images = torch.from_numpy(np.stack([row["image"] for row in rows])).permute(0, 3, 1, 2)
        member, tile = self.members[0], self.config.get("tile")
        means = decoded_means(member.model, images) if not tile else (put_together(decoded_means(
            member.model, Tiles.covering(image[None], tile)), image.shape, tile).round().astype(np.uint8)
            for image in images)
        for row, mean, where in zip(rows, means, member.map(images).numpy(), strict=True):
            row |= {"reconstruction": mean, "map": where}
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
        """Labels [N] of `Images` by the rule that grouped those that calibrate; by likeness where that was a table or
        the caller's own labels, or where it finds one thing alone, as that of folders does in a single one."""
        how = self.config.get("group_by") or "none"
        try:
            labels = group(images, "near" if how == "labels" or how.lower().endswith(".csv") else how, quiet=True)
        except UserError:
            return near(images.pixels, quiet=True)
        return labels if labels.any() or how == "near" else near(images.pixels, quiet=True)

    def set_p_value(self, images, groups=None):
        """The p-value, in [0.001, 1], of the hypothesis that all the images, of `groups` [N] (by default the detector's
        rule says what shows one thing), are like the training data, as a set (`metrics.set_p_value`): it sees drift
        that no single image shows. At most 2,000 of them, drawn at random, are compared. Copies of training images
        have no place among them. Raises UserError for a detector without `default`, and for too few things."""
        if self.members[0].view is None:
            raise UserError("sets are compared by what `default` reads: fit the detector with it")
        own = self.images(images)
        chosen = np.sort(np.random.default_rng(0).permutation(len(own.pixels))[:COMPARED])
        own, share = own.take(chosen), len(chosen) / len(own.pixels)
        groups, seen = self.groups(own) if groups is None else numbered(groups)[chosen], self.look(own)
        new = ~seen.copies
        p, things = self.p_of_set(groups[new], [view[new] for view in seen.views], share)
        if p is None:
            raise UserError(f"{things} things are too few to compare as a set: give {LEAST_THINGS} or more")
        return p

    def p_of_set(self, groups, views, share=1.0):
        """(the p-value of `set_p_value`, None where there are too few things; the number of things), from new images'
        groups [N] and each member's view of them [N, D], which are a random share of all."""
        things, folds = len(np.unique(groups)), []
        for member, view in zip(self.members, views, strict=True):
            known = member.whole()
            if len(np.unique(member.groups)) < len(member.groups):  # else a share of the things is like all of them
                known = known & (np.random.default_rng(1).random(len(known)) < share)
            folds.append((member.view[known], member.groups[:COMPARED][known], view))
        if min(things, *(len(np.unique(known)) for _, known, _ in folds)) < LEAST_THINGS:
            return None, things
        return set_p_value(groups, *folds), things

    def farther(self, groups, distance):
        """The p-value of the test that new images of `groups` [N], at this mean distance from the training images [N],
        lie farther from these than those that calibrate, one image of each thing."""
        known = np.concatenate([member.held_out[0] for member in self.members])
        folds = np.concatenate([member.groups[:COMPARED] + i * 2**32 for i, member in enumerate(self.members)])
        return farther(distance, groups, known, folds)
