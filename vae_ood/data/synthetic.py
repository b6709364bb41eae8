"""Images made here: sprites, and what the inliers' test images look like spoilt."""

from dataclasses import replace

import numpy as np
import torch

from vae_ood.data.images import CORRUPTION, RENDERING, Images, generator

SPRITES = ("sprites", "two_blobs", "discs", "cut_out")
SYNTHETIC = ("noise", "constant")
CORRUPTIONS = ("blurred", "noisy", "faded", "patched")


def corrupt(images, kind):
    """`images` spoilt in one way: blurred (by a Gaussian of one pixel), noisy (normal noise of 10 gray levels), faded
    (half the contrast around its mean) or patched (a square of half its sides, cut out of the next image at the same
    random place)."""
    n, _, h, w = images.pixels.shape
    rng, x = generator(0, CORRUPTION, CORRUPTIONS.index(kind)), images.pixels[:].float()
    if kind == "blurred":
        for axis, size in ((2, h), (3, w)):  # a matrix along each axis, the outermost pixels repeated
            matrix, weights = torch.zeros(size, size), torch.exp(-0.5 * torch.arange(-3, 4) ** 2)
            for step, weight in zip(range(-3, 4), weights / weights.sum(), strict=True):
                matrix[torch.arange(size), (torch.arange(size) + step).clamp(0, size - 1)] += weight
            x = torch.tensordot(x, matrix, ([axis], [1])).movedim(-1, axis)
    elif kind == "noisy":
        x = x + 10 * torch.from_numpy(rng.standard_normal(x.shape, np.float32))
    elif kind == "faded":
        x = (x + x.mean((1, 2, 3), keepdim=True)) / 2
    else:
        top, left = (torch.from_numpy(rng.integers(0, size - size // 2 + 1, (n, 1))) for size in (h, w))
        rows, columns = (((start <= torch.arange(size)) & (torch.arange(size) < start + size // 2))
                         for start, size in ((top, h), (left, w)))
        x = torch.where((rows[:, :, None] & columns[:, None])[:, None], x.roll(-1, 0), x)
    return replace(images, name=kind, pixels=x.round().clamp(0, 255).byte())


def sprites(split, factors=4, kind="sprites"):
    """32x32 gray images of a soft bright blob on a gray ground: a smooth manifold of `factors` (2 to 5) dimensions.

    The factors, independent and uniform: x, y, size, brightness, level of the ground; those beyond `factors` are
    fixed at their middle. Kinds off the manifold: two_blobs (two on one ground), discs (a hard-edged blob), cut_out
    (a blob with an 8x8 square of ground colour cut into it). 20,000 training and 2,000 test images, always the same.
    """
    n = 20_000 if split == "train" else 2_000
    unit = generator(0, RENDERING, 10 * SPRITES.index(kind) + (split == "train")).random((n, 7))
    unit[:, factors:5] = 0.5
    pixels = np.concatenate([np.rint(255 * render(kind, part)) for part in np.array_split(unit, n // 1000)])
    return Images(kind, torch.from_numpy(pixels.astype(np.uint8)[:, None]))


def render(kind, unit):
    """The images [N, 32, 32] in [0, 1] of factors `unit` [N, 7] in [0, 1): the five above, and two that place what is
    wrong with an outlier."""
    x, y = 10 + 12 * unit[:, 0], 10 + 12 * unit[:, 1]
    size, brightness, ground = 3 + 3 * unit[:, 2], 0.25 + 0.25 * unit[:, 3], 0.3 + 0.2 * unit[:, 4]

    def squares(centre):
        return (np.arange(32) - centre[:, None]) ** 2

    def blob(x, y):
        scale = -0.5 / size[:, None] ** 2
        return np.exp(squares(y) * scale)[:, :, None] * np.exp(squares(x) * scale)[:, None, :]

    if kind == "discs":
        radius = np.sqrt(squares(y)[:, :, None] + squares(x)[:, None, :])
        shape = np.clip(1.5 * size[:, None, None] + 0.5 - radius, 0, 1)
    else:
        shape = blob(x, y)
    if kind == "two_blobs":  # the second one 8 to 12 pixels off, across the centre
        angle, distance = np.arctan2(16 - y, 16 - x), 8 + 4 * unit[:, 5]
        shape = np.maximum(shape, blob(x + distance * np.cos(angle), y + distance * np.sin(angle)))
    if kind == "cut_out":
        rows, columns = (squares(c + 4 * u - 2) < 16 for c, u in ((y, unit[:, 5]), (x, unit[:, 6])))
        shape = np.where(rows[:, :, None] & columns[:, None, :], 0, shape)
    return ground[:, None, None] + brightness[:, None, None] * shape


def made_up(name, shape):
    """2,000 images [N, *shape] of uniform noise ("noise") or of one random level each ("constant")."""
    n, rng = 2_000, generator(0, RENDERING, 100)
    pixels = rng.integers(0, 256, (n, *(shape if name == "noise" else (shape[0], 1, 1))), np.uint8)
    return Images(name, torch.from_numpy(np.broadcast_to(pixels, (n, *shape)).copy()))
