"""One picture, as a viewer shows it: all that reads pictures by Pillow. Nothing is unpickled."""

import io
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.data.arrays import to_levels
from vae_ood.data.images import convert, inside

GROUND = 128  # the gray under what is transparent
STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # formats that Pillow knows and does not decode itself
SOFTWARE = "vae-ood"  # names the figures that this program writes, which are never read as data
GRAY = ("1", "L", "LA", "La")  # Pillow's modes
ORIENTATION = 0x0112  # the EXIF tag; from 5 on, height and width change places
SMALL = 64  # pixels: of a picture that is as small on both sides, the orientation is worth decoding
DRAFT = 2  # times the size that is needed are decoded at least: then a gray level's difference is all there is


class Undecodable(UserError):
    """A picture that cannot be decoded."""


def pillow():
    """The module Image. Raises UserError where there is no Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("reading pictures needs Pillow: pip install Pillow") from None
    return Image


def version():
    """Pillow's version, on which the pixels may depend; empty where there is none."""
    try:
        return pillow().__version__
    except UserError:
        return ""


def formats():
    """The extensions, in small letters, of the pictures that the installed Pillow decodes."""
    image = pillow()
    known = image.registered_extensions()  # this imports its plugins
    return {extension for extension, name in known.items() if name in image.OPEN and name not in STUBS}


@dataclass
class Picture:
    """uint8 pixels [1 or 3, h, w], or None of a figure of ours; the frames of the file; whether something in it is
    transparent; the largest level of 16-bit pixels; the size, [C, H, W], before conversion."""

    pixels: torch.Tensor | None
    frames: int = 1
    transparent: bool = False
    highest: int | None = None
    size: tuple | None = None


def upright(picture, exif):
    """(height, width) of an opened picture as it is shown."""
    width, height = picture.size
    return (width, height) if exif.get(ORIENTATION) in (5, 6, 7, 8) else (height, width)


def header(source):
    """(channels, height, width) of a path or a Pillow picture, without decoding it; None of a figure of ours, and of
    what is no picture."""
    image = pillow()
    try:
        with nullcontext(source) if isinstance(source, image.Image) else image.open(source) as picture:
            if picture.info.get("Software") == SOFTWARE:
                return None
            small = picture.width != picture.height and max(picture.size) <= SMALL
            exif = picture.getexif() if small else image.Image.getexif(picture)  # a PNG's own decodes: it may be last
            return 1 if picture.mode in GRAY or picture.mode[0] in "IF" else 3, *upright(picture, exif)
    except Exception:  # as in `decode`, which says what is wrong
        return None


def decode(source, name, levels=None, shape=None, crop=None):
    """The Picture of a path, of bytes or of a Pillow picture, as a viewer shows its first frame: 16 bits and floats in
    [0, 1] scaled, upright by its EXIF data, transparent parts over GROUND; by `convert` where a shape is given, a large
    JPEG then decoded at a fraction of its size. Undecodable names it where it cannot be decoded, and says what it holds
    where that has no agreed black and white and `levels` gives none."""
    image = pillow()
    try:
        with source.copy() if isinstance(source, image.Image) else image.open(
                io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if picture.info.get("Software") == SOFTWARE:
                return Picture(None)
            size = _drafted(picture, shape, crop) if shape and picture.format in ("JPEG", "MPO") else None
            one, pixels = _shown(picture, name, levels)
    except Undecodable:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise Undecodable(f"cannot decode the picture {name} ({type(error).__name__}): replace or remove it") from None
    one.size = (len(pixels), *(size or pixels.shape[1:]))
    one.pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    if shape:
        one.pixels = convert(one.pixels[None], shape, crop, size)[0]
    return one


def _drafted(picture, shape, crop):
    """Have an opened JPEG decoded at 1/2, 1/4 or 1/8 of its size where DRAFT times what `convert` needs is still there;
    gives (height, width) before that."""
    h, w = upright(picture, picture.getexif())
    rows, columns = inside(h, w, *shape[1:]) if crop == "pad" else shape[1:]
    wanted = (columns, rows) if (w, h) == picture.size else (rows, columns)
    picture.draft(None, (DRAFT * wanted[0], DRAFT * wanted[1]))
    return h, w


def _shown(picture, name, levels):
    """(the Picture, still without pixels; its uint8 pixels [1 or 3, h, w]) of an opened one."""
    from PIL import ImageOps
    image, frames, tags = pillow(), getattr(picture, "n_frames", 1), getattr(picture, "tag_v2", {})
    signed, inverted = tags.get(339) == (2,), tags.get(262) == 0  # TIFF's SampleFormat and WhiteIsZero
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF" or signed:
        pixels = np.asarray(picture)
        if picture.mode in ("I", "L") and tags:  # Pillow takes uint32 for int32, int8 for uint8
            pixels = pixels.astype({"I": np.int32, "L": np.int8}[picture.mode] if signed else np.uint32)
        sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and not tags)  # PNG and PGM
        pixels, highest = _deep(pixels, name, sixteen, levels)
        return Picture(None, frames, highest=highest), 255 - pixels if inverted else pixels  # in 8 bits Pillow does so
    transparent, gray = False, picture.mode in GRAY
    if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        layers = picture.convert("RGBA")
        transparent = layers.getextrema()[3][0] < 255
        ground = image.new("RGBA", layers.size, (GROUND, GROUND, GROUND, 255))
        picture = image.alpha_composite(ground, layers)
    pixels = np.array(picture.convert("L" if gray else "RGB"))
    pixels = pixels[None] if gray else pixels.transpose(2, 0, 1)
    return Picture(None, frames, transparent), pixels if levels is None else to_levels(pixels, levels)


def _deep(pixels, name, sixteen, levels):
    """(uint8 [1, h, w], the highest level of 16 bits or None) of one channel [h, w] of more than 8 bits."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise Undecodable(f"the picture {name} holds NaN or infinite pixels: clean it first")
    low, high, highest = pixels.min(), pixels.max(), None
    if levels is None and sixteen and low >= 0 and high <= 65535:
        levels, highest = (0, 65535), int(high)
    elif levels is None and pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        levels = (0, 1)
    if levels is None:
        raise Undecodable(f"the picture {name} holds {pixels.dtype} from {low:,} to {high:,}: say with --range LOW "
                          "HIGH what is black and what is white")
    return to_levels(pixels, levels)[None], highest
