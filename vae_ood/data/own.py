"""Own images: folders of pictures, single pictures, arrays. Nothing is unpickled."""

import io
import math
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.data.images import Images, convert

EXPANSION = 1100  # the most that a compressed file can grow: deflate's limit is 1032-fold
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
    transparent; the largest level of 16-bit pixels."""

    pixels: np.ndarray | None
    frames: int = 1
    transparent: bool = False
    highest: int | None = None


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


def to_levels(values, levels):
    """uint8 of an array of any kind: low becomes 0, high 255, linearly, what lies beyond is cut."""
    low, high = levels
    return np.rint((np.clip(values, low, high).astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)


def _walk(folder):
    """(the pictures below a folder, {kind: count} of the other files). Links are followed once. UserError for a folder
    that cannot be read."""
    def refuse(error):
        raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}): allow it, or move it away")
    formats, pictures, others, seen = _formats(), [], {}, {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = {os.path.realpath(os.path.join(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for path, name in real.items() if path not in seen)
        seen.update(real)
        for name in files:
            path = Path(place, name)
            kind = path.suffix.lower()
            if name.startswith("._") or name.lower() in NOBODYS:
                continue
            if kind in formats and path.is_file():
                pictures.append(path)
            else:
                others[kind or "without extension"] = others.get(kind or "without extension", 0) + 1
    return sorted(pictures), others


def _pictures(path, shape, skip_bad, levels):
    files, others = _walk(path) if path.is_dir() else ([path], {})
    if not files:
        raise UserError(f"the folder {path} holds no pictures that Pillow decodes"
                        + (f", only {_listed(others)}" if others else ""))
    root, sizes = path if path.is_dir() else path.parent, set()

    def picture(file):
        try:
            one = decode(file, os.fsdecode(file), levels)
        except Undecodable as error:
            if skip_bad:
                return None
            raise UserError(f"{error}, or leave out all that cannot be decoded with --skip-bad") from None
        if one.pixels is not None:
            sizes.add(one.pixels.shape)
            one.pixels = torch.from_numpy(np.ascontiguousarray(one.pixels))
            if shape:
                one.pixels = convert(one.pixels[None], shape)[0]
        return one

    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(picture, files))
    good = [(os.fsdecode(file.relative_to(root)), one) for file, one in zip(files, decoded, strict=True)
            if one is not None and one.pixels is not None]
    ours = sum(one is not None and one.pixels is None for one in decoded)
    if not good:
        raise UserError(f"not one of the {len(files):,} pictures in {path} can be decoded")
    (first_name, first), channels = good[0], max(one.pixels.shape[0] for _, one in good)
    for name, one in good:
        if one.pixels.shape[1:] != first.pixels.shape[1:]:
            raise UserError(f"the pictures in {path} differ in size ({first_name} is "
                            f"{first.pixels.shape[2]}x{first.pixels.shape[1]}, {name} is "
                            f"{one.pixels.shape[2]}x{one.pixels.shape[1]}): resize them to one size first")
    left_out = others | {kind: n for kind, n in (("undecodable", decoded.count(None)), ("figures of vae-ood", ours))
                         if n}
    notes = [f"{sum(left_out.values()):,} files left out: {_listed(left_out)}"] if left_out else []
    notes += _notes([one for _, one in good])
    if shape and sizes != {tuple(shape)}:
        notes.append(f"converted from {'x'.join(map(str, sizes.pop())) if len(sizes) == 1 else 'various sizes'}")
    return Images(str(path), torch.stack([one.pixels.expand(channels, -1, -1) for _, one in good]), notes,
                  [name for name, _ in good])


def _listed(counts):
    return ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _notes(pictures):
    """What a reader would not expect of decoded pictures, in lines."""
    notes, many = [], [one.frames for one in pictures if one.frames > 1]
    if many:
        notes.append(f"first frame of {many[0] if len(many) == 1 else 'several'} in {len(many):,} files")
    if transparent := sum(one.transparent for one in pictures):
        notes.append(f"{transparent:,} pictures are transparent in places: shown on mid gray")
    deep = [one.highest for one in pictures if one.highest is not None]
    if deep and max(deep) < 4096:
        notes.append(f"16-bit pictures that use the levels up to {max(deep):,} of 65,535 alone: nearly black; "
                     f"--range 0 {max(deep)} makes that white")
    return notes


def _arrays(path, levels):
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")  # mmap checks the size that the header claims
        if isinstance(loaded, np.ndarray):
            pixels, notes = _pixels(loaded, path, levels)
            return Images(str(path), pixels, notes)
        with loaded:
            parts = ["train_images", "test_images"]
            if ready := set(parts) <= set(loaded.files):
                wanted = parts
            elif "images" in loaded.files or len(loaded.files) == 1:
                wanted = ["images" if "images" in loaded.files else loaded.files[0]]
            else:
                raise UserError(f"{path} holds the arrays {', '.join(loaded.files)}: name one of them 'images', or two "
                                "of them 'train_images' and 'test_images'")
            _check_sizes(path, wanted)
            pixels, notes = zip(*(_pixels(loaded[key], path, levels) for key in wanted), strict=True)
            if len({p.shape[1:] for p in pixels}) > 1:
                raise UserError(f"the training and test images of {path} differ in shape: make them equal")
            return Images(str(path), torch.cat(pixels), notes[0], given=len(pixels[0]) if ready else None)
    except UserError:
        raise
    except Exception as error:  # numpy raises nearly anything on a damaged header
        raise UserError(f"{path} is not a readable array file without pickled objects "
                        f"({reason(error)})") from None


def reason(error):
    """What an exception says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_sizes(path, names):
    """ValueError where one of the arrays of an .npz, or the archive, claims to be larger than it can be: numpy would
    allocate first."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        for member in map(archive.getinfo, (f"{name}.npy" for name in names)):
            with archive.open(member) as file:
                shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
            if math.prod(shape) * dtype.itemsize > min(member.file_size, EXPANSION * path.stat().st_size):
                raise ValueError(f"{member.filename} claims the shape {shape}, which the file does not hold")


def _pixels(array, path, levels):
    """(uint8 [N, C, H, W] of an array of images in one of the accepted layouts and types, notes)."""
    if array.ndim == 3 and 3 in (array.shape[0], array.shape[2]):
        raise UserError(f"{path} has the shape {array.shape}, which may be one picture in colour or several in gray: "
                        "save it as NxHxWxC, with an axis for the number or for the channel")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
        raise UserError(f"{path} has the shape {array.shape}: images must be NxHxW, NxHxWxC or NxCxHxW with 1 or 3 "
                        "channels")
    kind = array.dtype.kind
    if kind not in "biuf":
        raise UserError(f"{path} holds {array.dtype}: save uint8, or floats in [0, 1]")
    out, notes = np.empty(array.shape, np.uint8), []
    for start in range(0, len(array), 1000):  # in parts: a float64 copy of the whole would be eight times as large
        part = array[start:start + 1000]
        if kind == "f" and not np.isfinite(part).all():
            raise UserError(f"{path} holds NaN or infinite pixels: clean it first")
        if levels is None and kind != "b" and (part.min() < 0 or part.max() > (1 if kind == "f" else 255)):
            raise UserError(f"{path} holds {array.dtype} from {part.min():g} to {part.max():g}: save uint8, scale "
                            "floats to [0, 1], or say with --range LOW HIGH what is black and what is white")
        if levels is not None or kind in "bf":
            out[start:start + 1000] = to_levels(part, levels or (0, 1))
        else:
            out[start:start + 1000] = part
    if levels is None and kind in "iu" and out.max() == 1:
        notes.append(f"{array.dtype} up to 1: nearly black; if 1 is white, save it as bool, or add --range 0 1")
    return torch.from_numpy(out), notes


def to_pixels(images, shape=None, levels=None):
    """uint8 [N, *shape] of images in a program's memory: uint8 or float [0, 1] arrays or tensors, [N, H, W, C],
    [N, C, H, W] or [N, H, W], or a list of paths or of Pillow's pictures; without a shape they have one size. Raises
    UserError."""
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    if isinstance(images, np.ndarray):
        pixels = _pixels(images, "the array", levels)[0]
        return convert(pixels, shape or pixels.shape[1:])
    if isinstance(images, (str, Path)):
        raise UserError("give a list of paths, or an array of images")
    decoded = [torch.from_numpy(np.ascontiguousarray(decode(one, str(one), levels).pixels))[None] for one in images]
    if not decoded:
        raise UserError("there are no images in the list")
    if not shape and len({one.shape[2:] for one in decoded}) > 1:
        raise UserError("the pictures differ in size: resize them to one size first")
    shape = shape or (max(one.shape[1] for one in decoded), *decoded[0].shape[2:])
    return torch.cat([convert(one, shape) for one in decoded])


def own_images(path, shape=None, skip_bad=False, levels=None):
    """A folder of pictures (recursively), a picture, a .npy or a .npz as `Images`. Pictures of different sizes are
    converted to `shape` one by one where it is given. Of an .npz with arrays train_images and test_images, the first
    `given` are the former. `levels` (low, high) are mapped to 0 and 255, in pictures and arrays of every kind."""
    if path.suffix.lower() in (".npy", ".npz") and not path.is_dir():
        return _arrays(path, levels)
    if path.is_dir() or path.suffix.lower() in _formats():
        return _pictures(path, shape, skip_bad, levels)
    raise UserError(f"{path} is neither a folder of pictures, nor a picture, a .npy or a .npz file")
