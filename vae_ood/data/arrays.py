"""Arrays of images: .npy and .npz files, and those in a program's memory. Nothing is unpickled."""

import math
import zipfile
from contextlib import contextmanager

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.data.images import Images, convert

EXPANSION = 1100  # the most that a compressed file can grow: deflate's limit is 1032-fold
PART = 2**26  # values that are converted at once


def to_levels(values, levels):
    """uint8 of an array of any kind: low becomes 0, high 255, linearly, what lies beyond is cut."""
    low, high = levels
    return np.rint((np.clip(values, low, high).astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)


class Arrays:
    """The images of a .npy or a .npz, to `read` in parts. `name`; `files`: None; `given`: how many of the first are for
    training, where the file says so. Raises UserError."""

    files = None

    def __init__(self, path, levels=None):
        self.path, self.name, self.levels, self.given, self.largest = path, str(path), levels, None, 0
        with refusing(path):
            loaded = np.load(path, allow_pickle=False, mmap_mode="r")  # mmap checks the size that the header claims
            if isinstance(loaded, np.ndarray):
                self.arrays = [laid_out(loaded, path)]
                return
            with loaded:
                self.arrays = [laid_out(loaded[name], path) for name in self._wanted(path, loaded.files)]
            self.given = len(self.arrays[0]) if len(self.arrays) > 1 else None
            if len({array.shape[1:] for array in self.arrays}) > 1:
                raise UserError(f"the training and test images of {path} differ in shape: make them equal")

    def _wanted(self, path, names):
        parts = ["train_images", "test_images"]
        if set(parts) <= set(names):
            wanted = parts
        elif "images" in names or len(names) == 1:
            wanted = ["images" if "images" in names else names[0]]
        else:
            raise UserError(f"{path} holds the arrays {', '.join(names)}: name one of them 'images', or two of them "
                            "'train_images' and 'test_images'")
        _check_sizes(path, wanted)
        return wanted

    def __len__(self):
        return sum(map(len, self.arrays))

    def paths(self):
        """Where the file is."""
        return [self.path]

    def headers(self, bar=None):
        """({(h, w): how many}, the channels)."""
        channels, *size = self.arrays[0].shape[1:]
        return {tuple(size): len(self)}, channels

    def read(self, rows, shape=None, crop=None):
        """`Images` of the slice `rows`, by `convert` where there is a `shape`. Raises UserError."""
        start, stop, _ = rows.indices(len(self))
        pixels, first, size = [], 0, max(1, PART // self.arrays[0][0].size) if shape else stop
        with refusing(self.name):
            for array in self.arrays:
                for at in range(max(start, first), min(stop, first + len(array)), size):
                    part = to_uint8(array[at - first:min(at + size, stop) - first], self.name, self.levels)
                    self.largest = max(self.largest, int(part.max()))
                    pixels.append(convert(part, shape, crop) if shape else part)
                first += len(array)
        pixels = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        return Images(self.name, pixels, sizes=np.tile(self.arrays[0].shape[2:], (len(pixels), 1)))

    def notes(self, shape=None):
        """What a reader would not expect of what was read so far, in lines."""
        dtype, size = self.arrays[0].dtype, self.arrays[0].shape[1:]
        notes = [f"{dtype} up to 1: nearly black; if 1 is white, save it as bool, or add --range 0 1"] if (
            self.levels is None and dtype.kind in "iu" and self.largest == 1) else []
        return notes + ([f"converted from {'x'.join(map(str, size))}"] if shape and size != tuple(shape) else [])


@contextmanager
def refusing(path):
    """UserError for whatever numpy raises on a damaged array file: nearly anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not a readable array file without pickled objects ({reason(error)})") from None


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


def laid_out(array, path):
    """An array of images in one of the accepted layouts and types as [N, C, H, W]."""
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
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path} holds {array.dtype}: save uint8, or floats in [0, 1]")
    return array


def to_uint8(array, path, levels=None):
    """A uint8 tensor of an array of images, of any type. UserError for values that have no agreed black and white."""
    kind, out = array.dtype.kind, np.empty(array.shape, np.uint8)
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
    return torch.from_numpy(out)
