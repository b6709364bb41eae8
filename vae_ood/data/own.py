"""Own images: folders of pictures, single pictures, arrays. Nothing is unpickled."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.data.arrays import Arrays, laid_out, to_levels, to_uint8
from vae_ood.data.images import Images, convert

GROUND = 128  # the gray under what is transparent
NOBODYS = {".ds_store", "thumbs.db", "desktop.ini"}  # the operating system's
STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # formats that Pillow knows and does not decode itself
SOFTWARE = "vae-ood"  # names the figures that this program writes, which are never read as data


class Undecodable(UserError):
    """A picture that cannot be decoded."""


def _pillow():
    try:
        from PIL import Image
    except ImportError:
        raise UserError("reading pictures needs Pillow: pip install Pillow") from None
    return Image


def _formats():
    """The extensions, in small letters, of the pictures that the installed Pillow decodes."""
    image = _pillow()
    known = image.registered_extensions()  # this imports its plugins
    return {extension for extension, name in known.items() if name in image.OPEN and name not in STUBS}


@dataclass
class Picture:
    """uint8 pixels [1 or 3, h, w], or None of a figure of ours; the frames of the file; whether something in it is
    transparent; the largest level of 16-bit pixels; the size, [C, H, W], before conversion."""

    pixels: np.ndarray | None
    frames: int = 1
    transparent: bool = False
    highest: int | None = None
    size: tuple | None = None


def decode(source, name, levels=None):
    """The Picture of a path or of bytes, as a viewer shows its first frame: 16 bits and floats in [0, 1] scaled,
    upright by its EXIF data, transparent parts over GROUND. Undecodable names it where it cannot be decoded, and says
    what it holds where that has no agreed black and white and `levels` gives none."""
    image = _pillow()
    from PIL import ImageOps
    try:
        with source.copy() if isinstance(source, image.Image) else image.open(
                io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if picture.info.get("Software") == SOFTWARE:
                return Picture(None)
            frames, tags = getattr(picture, "n_frames", 1), getattr(picture, "tag_v2", {})
            signed, inverted = tags.get(339) == (2,), tags.get(262) == 0  # TIFF's SampleFormat and WhiteIsZero
            picture = ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF" or signed:
                pixels = np.asarray(picture)
                if picture.mode in ("I", "L") and tags:  # Pillow takes uint32 for int32, int8 for uint8
                    pixels = pixels.astype({"I": np.int32, "L": np.int8}[picture.mode] if signed else np.uint32)
                sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and not tags)  # PNG and PGM
                one = _deep(pixels, name, frames, sixteen, levels)
                if inverted:  # in 8 bits Pillow does so itself
                    one.pixels = 255 - one.pixels
                return one
            transparent = False
            gray = picture.mode in ("1", "L", "LA", "La")
            if "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
                layers = picture.convert("RGBA")
                transparent = layers.getextrema()[3][0] < 255
                ground = image.new("RGBA", layers.size, (GROUND, GROUND, GROUND, 255))
                picture = image.alpha_composite(ground, layers)
            pixels = np.array(picture.convert("L" if gray else "RGB"))
    except Undecodable:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise Undecodable(f"cannot decode the picture {name} ({type(error).__name__}): replace or remove it") from None
    pixels = pixels[None] if gray else pixels.transpose(2, 0, 1)
    return Picture(pixels if levels is None else to_levels(pixels, levels), frames, transparent)


def _deep(pixels, name, frames, sixteen, levels):
    """The Picture of one channel [h, w] of more than 8 bits."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise Undecodable(f"the picture {name} holds NaN or infinite pixels: clean it first")
    low, high = pixels.min(), pixels.max()
    if levels is not None:
        return Picture(to_levels(pixels, levels)[None], frames)
    if sixteen and low >= 0 and high <= 65535:
        return Picture(to_levels(pixels, (0, 65535))[None], frames, highest=int(high))
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        return Picture(to_levels(pixels, (0, 1))[None], frames)
    raise Undecodable(f"the picture {name} holds {pixels.dtype} from {low:,} to {high:,}: say with --range LOW HIGH "
                       "what is black and what is white")


def _walk(folder):
    """(the pictures below a folder, as relative paths, {kind: count} of the other files). Links are followed once.
    UserError for a folder that cannot be read."""
    def refuse(error):
        raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}): allow it, or move it away")
    formats, pictures, others, seen = _formats(), [], {}, {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = {os.path.realpath(os.path.join(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for path, name in real.items() if path not in seen)
        seen.update(real)
        for name in files:
            kind = os.path.splitext(name)[1].lower()
            if name.startswith("._") or name.lower() in NOBODYS:
                continue
            if kind in formats and os.path.isfile(os.path.join(place, name)):
                pictures.append(os.path.relpath(os.path.join(place, name), folder))
            else:
                others[kind or "without extension"] = others.get(kind or "without extension", 0) + 1
    return sorted(pictures, key=lambda name: name.split(os.sep)), others


class Pictures:
    """A folder of pictures with all that lies below it, or one picture, to `read` in parts. `name`; `files`: the names
    of what is read. Raises UserError."""

    given = None

    def __init__(self, path, skip_bad=False, levels=None):
        self.name, self.skip_bad, self.levels = str(path), skip_bad, levels
        self.root = path if path.is_dir() else path.parent
        self.files, self.left_out = _walk(path) if path.is_dir() else ([path.name], {})
        if not self.files:
            raise UserError(f"the folder {path} holds no pictures that Pillow decodes"
                            + (f", only {_listed(self.left_out)}" if self.left_out else ""))
        self.sizes, self.many, self.transparent, self.highest = set(), [], 0, None

    def __len__(self):
        return len(self.files)

    def _decode(self, name, shape):
        try:
            one = decode(self.root / name, os.path.join(self.root, name), self.levels)
        except Undecodable as error:
            if self.skip_bad:
                return None
            raise UserError(f"{error}, or leave out all that cannot be decoded with --skip-bad") from None
        if one.pixels is not None:
            one.size = one.pixels.shape
            one.pixels = torch.from_numpy(np.ascontiguousarray(one.pixels))
            if shape:
                one.pixels = convert(one.pixels[None], shape)[0]
        return one

    def read(self, rows, shape=None):
        """`Images` of the slice `rows` of the files, less those that are left out, of one size or converted to `shape`,
        (C, H, W). Raises UserError."""
        names = self.files[rows]
        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(lambda name: self._decode(name, shape), names))
        good = [(name, one) for name, one in zip(names, decoded, strict=True) if one and one.pixels is not None]
        for kind, n in (("undecodable", decoded.count(None)), ("figures of vae-ood", len(names) - len(good)
                                                               - decoded.count(None))):
            if n:
                self.left_out[kind] = self.left_out.get(kind, 0) + n
        self.sizes |= {one.size for _, one in good}
        self.many += [one.frames for _, one in good if one.frames > 1]
        self.transparent += sum(one.transparent for _, one in good)
        self.highest = max((highest for highest in (self.highest, *(one.highest for _, one in good))
                            if highest is not None), default=None)
        if not good:
            return Images(self.name, torch.empty(0, *(shape or (1, 1, 1)), dtype=torch.uint8), [], [])
        (first_name, first), channels = good[0], max(one.pixels.shape[0] for _, one in good)
        for name, one in good:
            if one.pixels.shape[1:] != first.pixels.shape[1:]:
                raise UserError(f"the pictures in {self.name} differ in size ({first_name} is "
                                f"{first.pixels.shape[2]}x{first.pixels.shape[1]}, {name} is "
                                f"{one.pixels.shape[2]}x{one.pixels.shape[1]}): resize them to one size first")
        return Images(self.name, torch.stack([one.pixels.expand(channels, -1, -1) for _, one in good]), [],
                      [name for name, _ in good])

    def notes(self, shape=None):
        """What a reader would not expect of what was read so far, in lines."""
        notes = [f"{sum(self.left_out.values()):,} files left out: {_listed(self.left_out)}"] if self.left_out else []
        if self.many:
            notes.append(f"first frame of {self.many[0] if len(self.many) == 1 else 'several'} in {len(self.many):,} "
                         "files")
        if self.transparent:
            notes.append(f"{self.transparent:,} pictures are transparent in places: shown on mid gray")
        if self.highest is not None and self.highest < 4096:
            notes.append(f"16-bit pictures that use the levels up to {self.highest:,} of 65,535 alone: nearly black; "
                         f"--range 0 {self.highest} makes that white")
        if shape and self.sizes and self.sizes != {tuple(shape)}:
            notes.append("converted from " + ("x".join(map(str, *self.sizes)) if len(self.sizes) == 1 else
                                              "various sizes"))
        return notes


def _listed(counts):
    return ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def to_pixels(images, shape=None, levels=None):
    """uint8 [N, *shape] of images in a program's memory: uint8 or float [0, 1] arrays or tensors, [N, H, W, C],
    [N, C, H, W] or [N, H, W], or a list of paths or of Pillow's pictures; without a shape they have one size. Raises
    UserError."""
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    if isinstance(images, np.ndarray):
        pixels = to_uint8(laid_out(images, "the array"), "the array", levels)
        return convert(pixels, shape or pixels.shape[1:])
    if isinstance(images, (str, Path)):
        raise UserError("give a list of paths, or an array of images")
    decoded = []
    for one in images:
        pixels = decode(one, str(one), levels).pixels
        if pixels is None:
            raise UserError(f"{one} is a figure of vae-ood, not a picture to score: leave it out")
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))[None]
        decoded.append(convert(pixels, shape) if shape else pixels)  # at once: photographs are large
    if not decoded:
        raise UserError("there are no images in the list")
    if not shape and len({one.shape[2:] for one in decoded}) > 1:
        raise UserError("the pictures differ in size: resize them to one size first")
    shape = shape or (max(one.shape[1] for one in decoded), *decoded[0].shape[2:])
    return torch.cat([convert(one, shape) for one in decoded])


def open_own(path, skip_bad=False, levels=None):
    """A folder of pictures (recursively), a picture, a .npy or a .npz, to read in parts: `Pictures` or `Arrays`.
    `levels` (low, high) are mapped to 0 and 255, in pictures and arrays of every kind. Raises UserError."""
    if path.suffix.lower() in (".npy", ".npz") and not path.is_dir():
        return Arrays(path, levels)
    if path.is_dir() or path.suffix.lower() in _formats():
        return Pictures(path, skip_bad, levels)
    raise UserError(f"{path} is neither a folder of pictures, nor a picture, a .npy or a .npz file")


def own_images(path, shape=None, skip_bad=False, levels=None):
    """All images of `open_own`, of one size, or converted to `shape` one by one."""
    source = open_own(path, skip_bad, levels)
    images = source.read(slice(0, len(source)), shape)
    if not len(images.pixels):
        raise UserError(f"not one of the {len(source):,} pictures in {path} can be decoded")
    images.notes += source.notes(shape)
    images.given = source.given
    return images
