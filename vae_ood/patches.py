"""Where a picture's fine structure is not what its other places lead one to expect: whitened patches, without a VAE.

A patch of the log picture is whitened by what the training pictures' patches have in common, which their strongest
structure has most of; its mean square says how much of what is rare is there. The picture's cells, log mean squares by
place, are one Gaussian: a cell is surprising given all others, so that the light on a picture does not count.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood.data.images import share
from vae_ood.densities import Gaussian, Tail, under
from vae_ood.features import of_pictures
from vae_ood.likelihood import exact_convolutions
from vae_ood.parallel import from_first, spread

SIDE = 64  # pixels: larger pictures are scaled down to it, as patches cost the fourth power of their side
PICTURES, PATCHES = 10_000, 150_000  # at most, that are fitted to
PIXELS = 2**28  # bytes of them, at most
AT_ONCE = 32  # pictures that are filtered at once
BLACK = 0.02  # is added to pixels in [0, 1] before the log: darker ones are equal
FLOOR = 1e-4  # of the mean variance of a patch's principal directions: below it none is told apart
CELL = 4  # pixels of the full scale
LEAST = 20  # pictures by which it is judged whether a scale holds


def log_picture(images, size):
    """uint8 [N, C, H, W] -> the log of their gray levels at the size (h, w) [N, 1, h, w]."""
    out = []
    for part in images.split(AT_ONCE):  # bounded float copies
        x = part.float().mean(1, keepdim=True) / 255
        if tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, tuple(size), mode="bilinear", antialias=True, align_corners=False)
        out.append(x.add(BLACK).log())
    return torch.cat(out)


def whitening(y, p, seed=0):
    """Filters [p p - 1, 1, p, p] that take patches of y [N, 1, h, w], each less its mean, to white ones."""
    rng, width = np.random.default_rng(seed), y.shape[3] - p + 1
    places = (y.shape[2] - p + 1) * width
    count, second = 0, torch.zeros(p * p, p * p, dtype=torch.float64, device=y.device)
    for part in y[:, 0].split(64):
        some = torch.from_numpy(rng.permutation(places)[:max(1, PATCHES // len(y))]).to(y.device)
        patches = part.unfold(1, p, 1).unfold(2, p, 1)[:, some // width, some % width].flatten(2).flatten(0, 1)
        patches = (patches - patches.mean(1, keepdim=True)).double()
        second, count = second + patches.T @ patches, count + len(patches)
    variance, direction = torch.linalg.eigh(second / count)
    variance, direction = variance[1:].clamp(min=0), direction[:, 1:]  # the first is the mean, which has none
    filters = (direction / (variance + FLOOR * variance.mean() + 1e-12).sqrt()).T
    return (filters - filters.mean(1, keepdim=True)).reshape(-1, 1, p, p).float()


def energy(y, filters, stride=1):
    """The mean square over the filters about every `stride`-th place of y [N, 1, h, w]: [N, 1, places down, across]."""
    return torch.cat([F.conv2d(part, filters, stride=stride).square().mean(1, keepdim=True)
                      for part in y.split(AT_ONCE)])


def sample(images):
    """At most PICTURES of the images, a tensor or what gives tensors, and PIXELS bytes of them."""
    most = min(PICTURES, max(1, PIXELS // math.prod(images.shape[1:])))
    return images[torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(images))[:most]))]


class Scale(torch.nn.Module):
    """Pictures at one size: the filters, the Gaussian of the cells, and the tail of its distances to others."""

    def __init__(self, plan, filters, gaussian=None, tail=None, steady=False):
        """plan: height, width, stride of the filters, cells down, cells across. steady: see `holds`."""
        super().__init__()
        self.register_buffer("plan", torch.as_tensor(plan))
        self.register_buffer("filters", filters)
        self.register_buffer("steady", torch.as_tensor(steady))
        self.gaussian, self.tail = gaussian, tail

    @classmethod
    def fit(cls, images, unseen, plan, p):
        """To uint8 images [N, C, H, W], the tail to features of others."""
        scale = cls(plan, whitening(log_picture(images, plan[:2]), p).cpu())
        scale.gaussian = Gaussian.fit(scale.cells(images))
        distances = scale.distances(unseen["images"], images.device)
        # of tiles, as it is: the largest of some spread little anyway
        scale.steady.fill_(bool(len(distances) and distances.std() < distances.mean()))
        scale.tail = Tail.fit(torch.from_numpy(of_pictures(distances, unseen)))
        return scale

    @exact_convolutions
    def energy(self, images):
        """The mean square of the whitened patch about every `stride`-th place [N, 1, places down, across]."""
        *size, stride, _, _ = self.plan.tolist()
        return energy(log_picture(images, size), self.filters.to(images.device), stride)

    def cells(self, images):
        """The log mean squares by cell, float64 [N, cells], on the CPU."""
        pooled = F.adaptive_avg_pool2d(self.energy(images), self.plan[3:].tolist())
        return (pooled + 1e-6).log().flatten(1).cpu().double()

    def distances(self, images, device):
        """The Gaussian's squared Mahalanobis distances [N] of images, a tensor or what gives tensors."""
        return np.concatenate([self.gaussian(self.cells(part.to(device))).numpy() for part in images.split(100)]
                              or [np.zeros(0)])

    @property
    def holds(self):
        """Whether the Gaussian describes pictures that it was not fitted to: their distances spread less than an
        exponential's, whose standard deviation is its mean. Those of pictures that have nothing in common, place by
        place, do not, and then say little."""
        return len(self.tail.inliers) >= LEAST and bool(self.steady)


def plans(height, width):
    """[(a Scale's plan, the side of its patches)] for pictures of a size: as they are, or scaled down to SIDE, where
    every other place will do, and half as large. None of pictures too small to have patches."""
    shrink, found = min(1, SIDE / max(height, width)), []
    full = [max(1, round(side * shrink)) for side in (height, width)]
    for size, ratio, stride in ((full, 1 / 4, 2), ([side // 2 for side in full], 2 / 5, 1)):
        p = max(3, 2 * int(ratio * min(size) / 2) + 1)
        places = [(side - p) // stride + 1 for side in size]
        if min(places) > 1:
            grid = [max(1, min(side // CELL, here)) for side, here in zip(full, places, strict=True)]
            found.append(([*size, stride, *grid], p))
    return found


class Patches(torch.nn.Module):
    """How unusual the fine structure of a picture's places is, given that of its other places."""

    def __init__(self, scales):
        super().__init__()
        self.scales = torch.nn.ModuleList(scales)

    @classmethod
    def fit(cls, train, unseen):
        """To features of training images, the tails to those of others."""
        def fitted():
            images = sample(train["images"]).to(train.device)
            return cls([Scale.fit(images, unseen, *plan) for plan in plans(*images.shape[2:])]).state_dict()
        return cls.restore(from_first(fitted))

    @classmethod
    def restore(cls, state):
        """What `fit` gave, from its state_dict."""
        scales = [under(state, f"scales.{i}.") for i in range(len({name.split(".")[1] for name in state}))]
        return cls([Scale(one["plan"], one["filters"], Gaussian(**under(one, "gaussian.")), Tail(**under(one, "tail.")),
                          one["steady"]) for one in scales])

    @property
    def holds(self):
        """Whether one of the scales does."""
        return any(scale.holds for scale in self.scales)

    def forward(self, features):
        """The sum of the scales' surprises, of those that hold if one does: float64 [N]; a picture in tiles is as far
        out as the farthest."""
        chosen, images = [scale for scale in self.scales if scale.holds] or self.scales, features["images"]
        found = spread(lambda part: {str(i): scale.distances(share(images, part), features.device)
                                     for i, scale in enumerate(chosen)}, len(images))
        surprise = torch.zeros(len(images) // features.tiles, dtype=torch.float64)
        for i, scale in enumerate(chosen):
            surprise += scale.tail(torch.from_numpy(of_pictures(found[str(i)], features)))
        return surprise.numpy()

    def said(self, name, features):
        """{name: scores [N]}."""
        return {name: self(features)}
