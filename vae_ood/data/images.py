"""Images in memory, the streams of random numbers, and which images a training step takes."""

import functools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

# streams of random numbers
SHUFFLE, TRAINING, EVALUATION, RENDERING, PRIOR, REGRET, CORRUPTION, DEQUANTISATION, TILING, FILTERING = range(10)


@dataclass
class Images:
    """uint8 pixels [N, C, H, W]; `notes` says what was left out or converted; `files` names own pictures, else None;
    `groups` [N] are equal where images show one thing, None where each is a thing of its own; `given` is how many of
    the first are for training, where the file says so; `sizes` [N, 2] are the heights and widths of what was read,
    before conversion, where they are known."""

    name: str
    pixels: "torch.Tensor | Rows"
    notes: list[str] = field(default_factory=list)
    files: list[str] | None = None
    groups: np.ndarray | None = None
    given: int | None = None
    sizes: np.ndarray | None = None

    def first(self, n):
        """The first n of the images."""
        return self.take(slice(n))

    def take(self, rows):
        """Some of the images, by a slice or an array of indices."""
        files = self.files and (self.files[rows] if isinstance(rows, slice) else [self.files[i] for i in rows])
        if isinstance(self.pixels, Rows):
            pixels = self.pixels.take(np.arange(len(self.pixels))[rows])
        else:
            pixels = self.pixels[rows if isinstance(rows, slice) else torch.from_numpy(rows)]
        groups, sizes = (None if values is None else values[rows] for values in (self.groups, self.sizes))
        return replace(self, pixels=pixels, files=files, groups=groups, sizes=sizes, given=None)


class Rows:
    """Some images of a tensor [N, C, H, W] that is mapped from a file, maybe larger than the memory, in any order.
    Indexed, it gives the tensor that a tensor of these images would, read then and there."""

    def __init__(self, whole, index=None):
        """index [n]: which ones (default: all)."""
        self.whole, self.index = whole, torch.arange(len(whole)) if index is None else index
        self.shape, self.device = torch.Size((len(self.index), *whole.shape[1:])), whole.device

    def __len__(self):
        return len(self.index)

    def __getitem__(self, rows):
        return self.whole[self.index[rows]]

    def to(self, device):
        """Themselves: they stay where they are, and travel when they are read."""
        return self

    def split(self, size):
        """Tensors of `size` images each."""
        return (self[start:start + size] for start in range(0, len(self), size))

    def take(self, rows):
        """Some of them, by an array of indices, not read yet."""
        return Rows(self.whole, self.index[torch.from_numpy(rows)])


def share(pixels, part):
    """The slice `part` of pixels; themselves, not read yet, where that is all of them."""
    return pixels if part == slice(0, len(pixels)) else pixels[part]


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


def inside(h, w, height, width):
    """(rows, columns) of a picture [h, w] that is scaled to fit into [height, width]."""
    if h * width > w * height:
        return height, max(1, round(w * height / h))
    return max(1, round(h * width / w)), width


def at_most(pixels, side):
    """Pictures [N, C, H, W] scaled down to `side` pixels on the longer side, if they are larger."""
    h, w = pixels.shape[2:]
    return convert(pixels, (None, *inside(h, w, side, side)), "stretch") if max(h, w) > side else pixels


def kept(h, w, height, width, crop=None):
    """(top, left, rows, columns) of a picture [h, w] that `convert` keeps for an image [height, width]: all of it, or
    the middle, of the image's aspect ratio."""
    if crop in ("pad", "stretch"):
        return 0, 0, h, w
    rows, columns = (max(1, w * height // width), w) if h * width > w * height else (h, max(1, h * width // height))
    return (h - rows) // 2, (w - columns) // 2, rows, columns


def placed_back(values, h, w, crop=None):
    """float32 values [height, width] of an image that `convert` made of a picture [h, w], at the picture's own places
    [h, w], bilinearly scaled; NaN where the image leaves the picture out."""
    height, width = values.shape
    if crop == "pad":
        rows, columns = inside(h, w, height, width)
        top, left = (height - rows) // 2, (width - columns) // 2
        values = values[top:top + rows, left:left + columns]
    top, left, rows, columns = kept(h, w, height, width, crop)
    if values.shape != (rows, columns):
        values = F.interpolate(values[None, None], (rows, columns), mode="bilinear", antialias=True)[0, 0]
    return F.pad(values, (left, w - columns - left, top, h - rows - top), value=math.nan)


def convert(pixels, shape, crop=None, of=None):
    """uint8 [N, c, h, w] -> [N, *shape], or with the own c where `shape` begins with None: gray to RGB by repetition,
    RGB to gray by luma, antialiased bilinear scaling. `crop`: "centre" (and None) scales to cover and keeps the centre,
    "pad" scales to fit and repeats the edge, "stretch" takes the whole whatever its aspect ratio. `of`: (h, w) of the
    picture that was decoded at a fraction of its size, which has its aspect ratio up to a pixel only."""
    channels, height, width = shape[0] or pixels.shape[1], *shape[1:]
    if tuple(pixels.shape[1:]) == (channels, height, width):
        return pixels
    h, w = pixels.shape[2:]
    rows, columns = inside(*of or (h, w), height, width) if crop == "pad" else (height, width)
    first, before, tall, wide = kept(h, w, height, width, crop)
    pixels = pixels[:, :, first:first + tall, before:before + wide]
    top, left = (height - rows) // 2, (width - columns) // 2
    out = []
    for part in pixels.split(max(1, 2**25 // pixels[0].numel())):  # bounded float copies
        part = part.float()
        if part.shape[1] == 3 and channels == 1:
            part = (part * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        if part.shape[2:] != (rows, columns):
            part = F.interpolate(part, (rows, columns), mode="bilinear", antialias=True)
        if (rows, columns) != (height, width):
            part = F.pad(part, (left, width - columns - left, top, height - rows - top), mode="replicate")
        out.append(part.round().clamp(0, 255).byte().expand(-1, channels, -1, -1))
    return torch.cat(out)
