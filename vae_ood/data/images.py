"""Images in memory, the streams of random numbers, and which images a training step takes."""

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

# streams of random numbers
SHUFFLE, TRAINING, EVALUATION, RENDERING, PRIOR, REGRET, CORRUPTION, DEQUANTISATION = range(8)


@dataclass
class Images:
    """uint8 pixels [N, C, H, W]; `notes` says what was left out or converted; `files` names own pictures, else None;
    `groups` [N] are equal where images show one thing, None where each is a thing of its own; `given` is how many of
    the first are for training, where the file says so."""

    name: str
    pixels: torch.Tensor
    notes: list[str] = field(default_factory=list)
    files: list[str] | None = None
    groups: np.ndarray | None = None
    given: int | None = None

    def first(self, n):
        """The first n of the images."""
        return self.take(slice(n))

    def take(self, rows):
        """Some of the images, by a slice or an array of indices."""
        files = self.files and (self.files[rows] if isinstance(rows, slice) else [self.files[i] for i in rows])
        pixels = self.pixels[rows if isinstance(rows, slice) else torch.from_numpy(rows)]
        return replace(self, pixels=pixels, files=files, groups=None if self.groups is None else self.groups[rows],
                       given=None)


def generator(seed, stream, index=0):
    """The numpy generator of (seed, stream, index): the counter-based Philox, so all of them are independent."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, index]))


@functools.lru_cache(2)
def permutation(seed, epoch, n):
    """The order of the n images in an epoch."""
    return generator(seed, SHUFFLE, epoch).permutation(n)


def batch_indices(seed, step, batch_size, n):
    """The images of a step: positions step*B ... step*B + B - 1 of an endless sequence of shuffled epochs."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(positions[0] // n, positions[-1] // n + 1)
    return np.concatenate([permutation(seed, e, n)[positions[positions // n == e] % n] for e in epochs])


def to_unit(pixels, uniform=None):
    """uint8 -> float32 in [0, 1]: pixels / 255, or dequantised, (pixels + uniform) / 256 with uniform in [0, 1)."""
    return pixels.float() / 255 if uniform is None else (pixels.float() + uniform) / 256


def convert(pixels, shape):
    """uint8 [N, c, h, w] -> [N, *shape]: gray to RGB by repetition, RGB to gray by luma, centre crop to the aspect
    ratio of `shape`, antialiased bilinear resize."""
    channels, height, width = shape
    if tuple(pixels.shape[1:]) == tuple(shape):
        return pixels
    h, w = pixels.shape[2:]
    if h * width > w * height:
        crop = max(1, w * height // width)
        pixels = pixels[:, :, (h - crop) // 2:(h - crop) // 2 + crop]
    else:
        crop = max(1, h * width // height)
        pixels = pixels[:, :, :, (w - crop) // 2:(w - crop) // 2 + crop]
    out = []
    for part in pixels.split(max(1, 2**25 // pixels[0].numel())):  # bounded float copies
        part = part.float()
        if part.shape[1] == 3 and channels == 1:
            part = (part * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        if part.shape[2:] != (height, width):
            part = F.interpolate(part, (height, width), mode="bilinear", antialias=True)
        out.append(part.round().clamp(0, 255).byte().expand(-1, channels, -1, -1))
    return torch.cat(out)
