"""Data sets as uint8 tensors N x C x H x W held in memory: a name or a path becomes `Images`."""

import os
from pathlib import Path

import torch.nn.functional as F

from vae_ood import UserError
from vae_ood.data.cache import read_own
from vae_ood.data.images import convert
from vae_ood.data.official import DATASETS, idx
from vae_ood.data.own import open_own
from vae_ood.data.synthetic import CORRUPTIONS, SPRITES, SYNTHETIC, made_up, sprites

PAIRS = {  # the outlier sets of a data set, the paper's where it has some
    "sprites": ("two_blobs", "discs", "cut_out", "noise", "constant"), "fashionmnist": ("mnist",),
    "mnist": ("fashionmnist",), "cifar10": ("svhn", "celeba"), "svhn": ("cifar10",), "celeba": ("cifar10", "svhn")}


def default_root():
    """Where official files lie unless --data-root says otherwise: $VAE_OOD_DATA, else ~/.cache/vae_ood."""
    return Path(os.environ.get("VAE_OOD_DATA") or Path.home() / ".cache" / "vae_ood")


def own_images(path, shape, skip_bad, levels, crop):
    """All images of `open_own`, converted to `shape` one by one, or where there is none by `read_own`."""
    if not shape:
        return read_own(path, crop=crop, skip_bad=skip_bad, levels=levels)[0]
    source = open_own(path, skip_bad, levels)
    images = source.read(slice(0, len(source)), shape, crop)
    if not len(images.pixels):
        raise UserError(f"not one of the {len(source):,} pictures in {path} can be decoded")
    images.notes += source.notes(shape)
    images.given = source.given
    return images


def load(data, split, root=None, shape=None, factors=4, skip_bad=False, levels=None, crop=None):
    """Load `data`, a name in DATASETS, SPRITES or SYNTHETIC or a path to own images, as `Images`; `corrupt` makes
    CORRUPTIONS.

    split: "train", "test", or "all" (of a named set: its test part); own images come whole. shape: (C, H, W) to
    convert to, needed by SYNTHETIC, the sets made up to fit the inliers; smaller images of (Fashion)MNIST are padded
    with their black, others resized. factors: the intrinsic dimension of the sprites. skip_bad: leave undecodable
    pictures out instead of refusing them. levels: (low, high) of own images, which become black and white. crop: how
    images are converted. Raises UserError for whatever cannot be read.
    """
    root = Path(root) if root else default_root()
    names = [*DATASETS, *SPRITES, *SYNTHETIC]
    if data in names and split == "all":
        split = "test"
    if data in DATASETS:
        images = DATASETS[data](root / data, split)
    elif data in SPRITES:
        images = sprites(split, factors, data)
    elif data in SYNTHETIC:
        images = made_up(data, shape)
    elif Path(data).exists():
        images = own_images(Path(data), shape, skip_bad, levels, crop)
    else:
        raise UserError(f"unknown data '{data}': it is neither a path that exists nor one of "
                        f"{', '.join([*names, *(CORRUPTIONS if shape else ())])}")
    if shape and DATASETS.get(data) is idx:
        rows, columns = (max(0, size - own) for size, own in zip(shape[1:], images.pixels.shape[2:], strict=True))
        if rows or columns:
            images.notes.append(f"padded from {'x'.join(map(str, images.pixels.shape[1:]))}")
            images.pixels = F.pad(images.pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    if shape and tuple(images.pixels.shape[1:]) != tuple(shape):
        images.notes.append(f"converted from {'x'.join(map(str, images.pixels.shape[1:]))}")
        images.pixels = convert(images.pixels, shape, crop)
    return images

