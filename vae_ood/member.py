"""A model, the scores that are fitted to its training images, and what these say of images that it has not seen."""

import functools
from dataclasses import replace

import numpy as np
import torch

from vae_ood import UserError, checkpoint
from vae_ood.cli import Progress
from vae_ood.data.likeness import Nearest
from vae_ood.data.tiles import Tiles, at_once, put_together, sampled, tiles_of
from vae_ood.features import Features
from vae_ood.likelihood import evaluate
from vae_ood.maps import CALIBRATED, Maps, threshold
from vae_ood.parallel import from_first, spread
from vae_ood.patches import LEAST
from vae_ood.scores import SCORES

FIT_IMAGES = 30_000  # of the training set: scores are fitted to so many, where --max-images does not say
TRAIN_IMAGES = 10_000  # of the training set are evaluated, where --max-images does not say
UNSEEN = 2_000  # validation images, or tiles, say how surprising a score is
COMPARED = 2_000  # images that calibrate, and new ones, by how near they lie to the training images


def measure(model, config, images, args, label=None, first=0):
    """The `Features` of `images`, whose likelihoods, of training images for the first ones alone where --max-images
    does not say, show their progress by the label when they are asked for; `first` is the number of the first image's
    noise. A model of tiles takes whole pictures in all tiles of their grid."""
    tiles = 1
    if config.get("tile") and list(images.pixels.shape[1:]) != config["shape"]:
        tiles, images = tiles_of(config), replace(images, pixels=Tiles.covering(images.pixels, config["tile"]))
        first *= tiles

    def likelihoods():
        evaluated = (images.first(args.max_images or TRAIN_IMAGES) if label == "train" else images).pixels
        bar = label and Progress(len(evaluated), label=label)
        result = evaluate(model, evaluated, args.iw_samples, config["seed"], config["dequantize"], first,
                          *([bar.update] if bar else []))
        if bar:
            bar.close()
        return result
    return Features(model, images.pixels, functools.cache(likelihoods), images.groups,
                    (config["seed"], first) if config["dequantize"] else None, tiles)


def unseen_of(model, config, inliers, args):
    """The `Features` of the validation images, on which the model was not trained; None where there are none."""
    images, most = inliers.get("validation"), max(LEAST, UNSEEN // tiles_of(config))
    return images and measure(model, config, images.first(min(most, args.max_images or most)), args, "validation")


def finite(name, scores):
    """The scores [N]; UserError unless all of them are finite."""
    if bad := int((~np.isfinite(scores)).sum()):
        raise UserError(f"the score {name} is not finite for {bad:,} of {len(scores):,} images: the model is of no use "
                        "for them; train anew, with a smaller --lr, or leave these images out")
    return scores


class Member:
    """A model, its scores fitted to its training images, and what they say of inliers that it has not seen."""

    def __init__(self, model, scores, said, groups, nearest, held_out, seen, view=None, maps=None, peaks=None):
        """`said` {name: [n]}: the scores of the images that calibrate, of `groups` [n]; `held_out`: distance and local
        scale [m] of the first of these to the training images `nearest`; `view` [m, D]: what sets are compared by, of
        the same images, None without `default`; `seen`: how many images have had noise; `maps` of where an image is
        odd, and the largest value of each of the first images that calibrate, `peaks` [k]."""
        self.model, self.scores, self.said, self.groups = model, scores, said, np.asarray(groups, np.int64)
        self.nearest, self.held_out, self.seen, self.view = nearest, held_out, seen, view
        self.maps, self.peaks = maps, peaks

    @classmethod
    def fit(cls, model, config, inliers, scores, args, fitted=None):
        """Fit `scores`, names, to inliers["train"], whose features may be there already, and perhaps "validation", and
        calibrate on inliers["test"]."""
        train, test = inliers["train"], inliers["test"]
        n, groups = len(train.pixels), np.arange(len(test.pixels)) if test.groups is None else test.groups
        fitted = fitted or measure(model, config, sampled(train, config, args.max_images or FIT_IMAGES), args, "train")
        unseen = unseen_of(model, config, inliers, args)
        scores = {name: SCORES[name].fit(fitted, unseen) for name in scores}
        nearest = Nearest.of(train.pixels)
        member = cls(model, scores, {}, groups, nearest, nearest.distance(test.pixels[:COMPARED]), n)
        member.said, member.view = member.heard(config, test, args)
        member.seen = n + len(test.pixels)
        state = from_first(lambda: Maps.fit(model, fitted.images).cpu().state_dict())
        member.maps = Maps(**state).to(model.log_gamma.device)
        step = at_once(config) if config.get("tile") else 100
        member.peaks = finite("map", spread(lambda part: {"peaks": member.peaks_of(test.pixels, part, step)}, min(
            len(test.pixels), CALIBRATED))["peaks"])
        return member

    def peaks_of(self, pixels, part, step):
        """The largest values of the maps of the slice `part` of pixels, `step` of which are read at once."""
        starts = range(part.start, part.stop, step)
        return np.concatenate([self.map(pixels[start:min(start + step, part.stop)]).amax((1, 2)).numpy()
                               for start in starts] or [np.zeros(0, np.float32)])

    def heard(self, config, images, args):
        """What is said of `Images` that calibrate {name: [n]}, and the view of the first COMPARED; the features of so
        many tiles are not held at once."""
        step, said, views = at_once(config) if config.get("tile") else len(images.pixels), [], []
        for start in range(0, len(images.pixels), step):
            features = measure(self.model, config, images.take(slice(start, start + step)), args, "calibration",
                               self.seen + start)
            said.append(self.say(features))
            views.append(self.viewed(features))
        return ({name: np.concatenate([of[name] for of in said]) for name in said[0]},
                None if views[0] is None else np.concatenate(views)[:COMPARED])

    def map(self, pixels):
        """The maps of uint8 pixels [N, C, H, W], float32 [N, H, W]; of pictures in tiles, the tiles' put together."""
        if tuple(pixels.shape[1:]) == tuple(self.model.shape):
            return self.maps(self.model, pixels)
        tile = self.model.shape[1]
        found = [put_together(self.maps(self.model, Tiles.covering(one[None], tile)).numpy()[..., None], one.shape,
                              tile) for one in pixels]
        return torch.from_numpy(np.stack(found)[..., 0])

    def map_threshold(self, fpr):
        """What a share `fpr` of ordinary pictures' maps, at most, exceed anywhere; infinite for too few things."""
        return threshold(self.peaks, self.groups[:CALIBRATED], fpr)

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
                "seen": self.seen, "view": None if self.view is None else torch.from_numpy(self.view),
                "maps": self.maps.state_dict(), "peaks": torch.from_numpy(self.peaks)}

    @classmethod
    def restore(cls, path, config, state, device):
        """The member that gave the state, which was read from `path`."""
        checkpoint.check_weights(path, state["model"])
        model = checkpoint.rebuilt(path, config, state, device)
        scores = {name: SCORES[name].restore(values) for name, values in state["scores"].items()}
        said = {name: finite(name, values.numpy()) for name, values in state["said"].items()}
        groups, view = state["groups"].numpy(), state["view"]
        peaks = finite("map", state["peaks"].numpy())
        if {groups.shape} != {values.shape for values in said.values()} or len(peaks) != len(groups[:CALIBRATED]):
            raise ValueError("scores and groups")
        return cls(model, scores, said, groups, Nearest(**state["nearest"]),
                   tuple(v.numpy() for v in state["held_out"]), int(state["seen"]),
                   None if view is None else finite("view", view.numpy()),
                   Maps(**state["maps"]).to(model.log_gamma.device), peaks)
