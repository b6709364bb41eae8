"""Data sets as uint8 tensors N x C x H x W held in memory: official formats, downloads, own images, sprites.

Official files lie in `<root>/<name>/`; a missing one is downloaded there and its MD5 checked. Files that are already
there are used as they are. Nothing is unpickled and no path out of an archive is followed.
"""

import functools
import gzip
import hashlib
import http.client
import io
import math
import os
import re
import socket
import struct
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood import UserError
from vae_ood.cli import lock

# streams of random numbers
SHUFFLE, TRAINING, EVALUATION, RENDERING, PRIOR, REGRET, CORRUPTION, DEQUANTISATION = range(8)
PAIRS = {  # the outlier sets of a data set, the paper's where it has some
    "sprites": ("two_blobs", "discs", "cut_out", "noise", "constant"), "fashionmnist": ("mnist",),
    "mnist": ("fashionmnist",), "cifar10": ("svhn", "celeba"), "svhn": ("cifar10",), "celeba": ("cifar10", "svhn")}
EXPANSION = 1100  # the most that a compressed file can grow: deflate's limit is 1032-fold

FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CIFAR = "https://www.cs.toronto.edu/~kriz/"
SVHN = "http://ufldl.stanford.edu/housenumbers/"
DOWNLOADS = {  # (data set, file): (address, MD5)
    ("fashionmnist", "train-images-idx3-ubyte.gz"): (FASHION, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    ("fashionmnist", "t10k-images-idx3-ubyte.gz"): (FASHION, "bef4ecab320f06d8554ea6380940ec79"),
    ("mnist", "train-images-idx3-ubyte.gz"): (MNIST, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    ("mnist", "t10k-images-idx3-ubyte.gz"): (MNIST, "9fb629c4189551a2d022fa330f9573f3"),
    ("cifar10", "cifar-10-binary.tar.gz"): (CIFAR, "c32a1d4ab5d03f1284b67883e8d87530"),
    ("svhn", "train_32x32.mat"): (SVHN, "e26dedcc434d2e4c54c9b2d4a06d8373"),
    ("svhn", "test_32x32.mat"): (SVHN, "eb5a983be6a315427106f1b164d9cef3"),
}


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


def default_root():
    """Where official files lie unless --data-root says otherwise: $VAE_OOD_DATA, else ~/.cache/vae_ood."""
    return Path(os.environ.get("VAE_OOD_DATA") or Path.home() / ".cache" / "vae_ood")


def load(data, split, root=None, shape=None, factors=4, skip_bad=False, levels=None):
    """Load `data`, a name in DATASETS, SPRITES or SYNTHETIC or a path to own images, as `Images`; `corrupt` makes
    CORRUPTIONS.

    split: "train", "test", or "all" (of a named set: its test part); own images come whole. shape: (C, H, W) to
    convert to, needed by SYNTHETIC, the sets made up to fit the inliers; smaller images of (Fashion)MNIST are padded
    with their black, others resized. factors: the intrinsic dimension of the sprites. skip_bad: leave undecodable
    pictures out instead of refusing them. levels: (low, high) of own images, which become black and white. Raises
    UserError for whatever cannot be read.
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
        n, rng = 2_000, generator(0, RENDERING, 100)
        pixels = rng.integers(0, 256, (n, *(shape if data == "noise" else (shape[0], 1, 1))), np.uint8)
        images = Images(data, torch.from_numpy(np.broadcast_to(pixels, (n, *shape)).copy()))
    elif Path(data).exists():
        images = own_images(Path(data), shape, skip_bad, levels)
    else:
        raise UserError(f"unknown data '{data}': it is neither a path that exists nor one of "
                        f"{', '.join([*names, *(CORRUPTIONS if shape else ())])}")
    if shape and DATASETS.get(data) is _idx:
        rows, columns = (max(0, size - own) for size, own in zip(shape[1:], images.pixels.shape[2:], strict=True))
        if rows or columns:
            images.notes.append(f"padded from {'x'.join(map(str, images.pixels.shape[1:]))}")
            images.pixels = F.pad(images.pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    if shape and tuple(images.pixels.shape[1:]) != tuple(shape):
        images.notes.append(f"converted from {'x'.join(map(str, images.pixels.shape[1:]))}")
        images.pixels = convert(images.pixels, shape)
    return images


def convert(pixels, shape):
    """uint8 [N, c, h, w] -> [N, *shape]: gray to RGB by repetition, RGB to gray by luma, centre crop to the aspect
    ratio of `shape`, antialiased bilinear resize."""
    channels, height, width = shape
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


# ---- official files ----------------------------------------------------------------------------------------------

def fetch(folder, filename):
    """The path of an official file, downloaded and verified if it is not there. Atomic: what is cut off leaves no
    file behind."""
    path = folder / filename
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --data-root") from None
    with lock(folder, wait=True):  # until another process has downloaded it
        return path if path.exists() else _download(folder, filename)


def _download(folder, filename):
    path = folder / filename
    address, md5 = DOWNLOADS[folder.name, filename]
    part = path.with_name(filename + ".part")
    hint = f"download {address}{filename} by hand and put it in {folder}"
    timeout = socket.getdefaulttimeout()
    print(f"downloading {address}{filename} to {folder}", flush=True)
    try:
        socket.setdefaulttimeout(30)
        torch.hub.download_url_to_file(address + filename, str(part), progress=False)
        with part.open("rb") as file:
            digest = hashlib.md5()
            while block := file.read(2**20):
                digest.update(block)
        if digest.hexdigest() != md5:
            raise UserError(f"{filename} arrived damaged or cut off (MD5 {digest.hexdigest()}, expected {md5}): "
                            f"try again, or {hint}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise UserError(f"{path} is missing and could not be downloaded ({error}): {hint}") from None
    finally:
        socket.setdefaulttimeout(timeout)
        if part.exists():
            part.unlink()
    return path


def _idx(folder, split):
    stem = {"train": "train", "test": "t10k"}[split] + "-images-idx3-ubyte"
    path = folder / stem if (folder / stem).exists() else fetch(folder, stem + ".gz")
    size = path.stat().st_size
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(16)
            if len(header) < 16 or header[:4] != b"\0\0\x08\x03":
                raise UserError(f"{path} is not an IDX file of images (wrong magic number): delete it or replace it")
            shape = [int.from_bytes(header[i:i + 4], "big") for i in (4, 8, 12)]
            wanted = shape[0] * shape[1] * shape[2]
            if wanted > EXPANSION * size:
                raise UserError(f"{path} is damaged: its header claims {wanted:,} bytes of images")
            body = file.read(wanted + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): delete it or replace it") from None
    if len(body) != wanted or not wanted:
        raise UserError(f"{path} is truncated or damaged ({wanted:,} bytes of images announced, "
                        f"{'fewer' if len(body) < wanted else 'more'} found): delete it or replace it")
    return Images(folder.name, torch.from_numpy(np.frombuffer(bytearray(body), np.uint8).reshape(-1, 1, *shape[1:])))


CIFAR_BATCH = 10_000 * 3073  # bytes


def _cifar10(folder, split):
    pattern = r"data_batch_[1-5]\.bin" if split == "train" else r"test_batch\.bin"
    parts = {p.name: p.read_bytes() for place in (folder, folder / "cifar-10-batches-bin") if place.is_dir()
             for p in sorted(place.iterdir()) if re.fullmatch(pattern, p.name)}
    if not parts:
        path = fetch(folder, "cifar-10-binary.tar.gz")
        try:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    if member.isfile() and re.fullmatch(pattern, os.path.basename(member.name)):
                        parts[os.path.basename(member.name)] = archive.extractfile(member).read(CIFAR_BATCH + 1)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise UserError(f"{path} is truncated or damaged ({error}): delete it or replace it") from None
        if not parts:
            raise UserError(f"{path} holds no CIFAR-10 batches: delete it or replace it")
    for name, data in parts.items():
        records = np.frombuffer(data, np.uint8)
        if not 0 < len(data) <= CIFAR_BATCH or len(data) % 3073 or records[::3073].max() > 9:
            raise UserError(f"{folder / name} is not a CIFAR-10 batch of the binary version (3,073 bytes a record): "
                            "delete it or replace it")
    records = np.concatenate([np.frombuffer(parts[name], np.uint8).reshape(-1, 3073) for name in sorted(parts)])
    images = Images(folder.name, torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()))
    if split == "train" and len(parts) < 5:
        images.notes.append(f"{len(parts)} of 5 training files found: {len(records):,} of 50,000 images")
    return images


def _svhn(folder, split):
    path = fetch(folder, f"{split}_32x32.mat")
    try:
        pixels = _matlab_array(path.read_bytes(), b"X")
        if pixels.shape[:3] != (32, 32, 3) or pixels.ndim != 4 or not pixels.size:
            raise ValueError(f"X has the shape {pixels.shape}, not 32x32x3xN")
    except (ValueError, TypeError, StopIteration, struct.error, zlib.error) as error:
        raise UserError(f"{path} is not an SVHN file or is damaged ({error}): delete it or replace it") from None
    return Images(folder.name, torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))))


def _matlab_array(data, name):
    """The uint8 array `name` of the bytes of a little-endian MATLAB 5 file; scipy's reader crashes on damaged ones.

    The format: MathWorks, "MAT-File Format", chapter 1. Raises ValueError, TypeError, StopIteration, struct.error
    or zlib.error.
    """
    compressed, matrix, uint8, uint8_class = 15, 14, 2, 9

    def elements(data):
        place = 0
        while place < len(data):
            kind, size = struct.unpack_from("<II", data, place)
            start, length = place + 8, size if kind == compressed else (size + 7) // 8 * 8
            if kind >> 16:  # a small one: both numbers in four bytes, then the content in four
                kind, size, start, length = kind & 0xFFFF, kind >> 16, place + 4, 4
            if start + size > len(data):
                raise ValueError("it is cut off")
            yield kind, data[start:start + size]
            place = start + length

    if data[124:128] != b"\0\1IM":
        raise ValueError("its header is not MATLAB 5's")
    for kind, content in elements(memoryview(data)[128:]):
        if kind == compressed:
            kind, content = next(elements(memoryview(zlib.decompress(content))))
        if kind != matrix:
            continue
        (_, flags), (_, shape), (_, label), (stored, values) = islice(elements(content), 4)
        if bytes(label) == name:
            if stored != uint8 or bytes(flags[:1]) != bytes([uint8_class]):
                raise ValueError(f"{name.decode()} is not uint8")
            return np.frombuffer(values, np.uint8).reshape(np.frombuffer(shape, "<i4"), order="F")
    raise ValueError(f"it holds no array {name.decode()}")


@contextmanager
def _opened(archive):
    """The ZipFile; UserError for whatever goes wrong with it: zipfile raises nearly anything on a damaged header."""
    try:
        with zipfile.ZipFile(archive) as file:
            yield file
    except Exception as error:
        raise UserError(f"{archive} is truncated or damaged ({_reason(error)}): delete it or replace it") from None


def _celeba(folder, split):
    pictures, archive = {}, folder / "img_align_celeba.zip"
    if (folder / "img_align_celeba").is_dir():
        pictures = {p.name: p for p in (folder / "img_align_celeba").iterdir() if p.suffix == ".jpg"}
    elif archive.exists():
        with _opened(archive) as file:
            pictures = {os.path.basename(n): n for n in file.namelist() if n.endswith(".jpg")}
    if not pictures:
        raise UserError(f"CelebA is not in {folder} and no program can download it: get img_align_celeba.zip from "
                        f"https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put it in {folder}")
    partition = folder / "list_eval_partition.txt"
    try:
        if partition.exists():
            of = {line.split()[0]: int(line.split()[1]) for line in partition.read_text().splitlines() if line.strip()}
            note = f"split by {partition.name}"
        else:  # the official partition is by index
            of = {name: (int(name[:-4]) > 162_770) + (int(name[:-4]) > 182_637) for name in pictures}
            note = "split by index (no list_eval_partition.txt)"
    except (ValueError, IndexError) as error:
        raise UserError(f"cannot tell the split of CelebA in {folder} ({error}): put the official "
                        "list_eval_partition.txt beside the pictures") from None
    chosen = sorted(name for name in pictures if of.get(name) == {"train": 0, "test": 2}[split])
    if archive.exists() and isinstance(next(iter(pictures.values())), str):
        with _opened(archive) as file:
            pictures = {name: file.read(pictures[name]) for name in chosen}
    if not chosen:
        raise UserError(f"none of the {len(pictures):,} pictures in {folder} is in CelebA's {split} partition: "
                        "add the missing pictures")

    def picture(name):
        pixels = _decode(pictures[name], name).pixels
        h, w = pixels.shape[1:]
        if (h, w) == (218, 178):
            pixels = pixels[:, 35:183, 15:163]
        return convert(torch.from_numpy(pixels)[None], (3, 32, 32))

    with ThreadPoolExecutor() as pool:
        return Images(folder.name, torch.cat(list(pool.map(picture, chosen))), [note])


DATASETS = {"fashionmnist": _idx, "mnist": _idx, "cifar10": _cifar10, "svhn": _svhn, "celeba": _celeba}


# ---- own images --------------------------------------------------------------------------------------------------

def own_images(path, shape=None, skip_bad=False, levels=None):
    """A folder of pictures (recursively), a picture, a .npy or a .npz as `Images`. Pictures of different sizes are
    converted to `shape` one by one where it is given. Of an .npz with arrays train_images and test_images, the first
    `given` are the former. `levels` (low, high) are mapped to 0 and 255, in pictures and arrays of every kind."""
    if path.suffix.lower() in (".npy", ".npz") and not path.is_dir():
        return _arrays(path, levels)
    if path.is_dir() or path.suffix.lower() in _formats():
        return _pictures(path, shape, skip_bad, levels)
    raise UserError(f"{path} is neither a folder of pictures, nor a picture, a .npy or a .npz file")


GROUND = 128  # the gray under what is transparent
NOBODYS = {".ds_store", "thumbs.db", "desktop.ini"}  # the operating system's
STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # formats that Pillow knows and does not decode itself
SOFTWARE = "vae-ood"  # names the figures that this program writes, which are never read as data


class _Undecodable(UserError):
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
class _Picture:
    """uint8 pixels [1 or 3, h, w], or None of a figure of ours; the frames of the file; whether something in it is
    transparent; the largest level of 16-bit pixels."""

    pixels: np.ndarray | None
    frames: int = 1
    transparent: bool = False
    highest: int | None = None


def _decode(source, name, levels=None):
    """The _Picture of a path or of bytes, as a viewer shows its first frame: 16 bits and floats in [0, 1] scaled,
    upright by its EXIF data, transparent parts over GROUND. _Undecodable names it where it cannot be decoded, and says
    what it holds where that has no agreed black and white and `levels` gives none."""
    image = _pillow()
    from PIL import ImageOps
    try:
        with image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if picture.info.get("Software") == SOFTWARE:
                return _Picture(None)
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
    except _Undecodable:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise _Undecodable(f"cannot decode the picture {name} ({type(error).__name__}): replace or remove it") from None
    pixels = pixels[None] if gray else pixels.transpose(2, 0, 1)
    return _Picture(pixels if levels is None else to_levels(pixels, levels), frames, transparent)


def _deep(pixels, name, frames, sixteen, levels):
    """The _Picture of one channel [h, w] of more than 8 bits."""
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise _Undecodable(f"the picture {name} holds NaN or infinite pixels: clean it first")
    low, high = pixels.min(), pixels.max()
    if levels is not None:
        return _Picture(to_levels(pixels, levels)[None], frames)
    if sixteen and low >= 0 and high <= 65535:
        return _Picture(to_levels(pixels, (0, 65535))[None], frames, highest=int(high))
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        return _Picture(to_levels(pixels, (0, 1))[None], frames)
    raise _Undecodable(f"the picture {name} holds {pixels.dtype} from {low:,} to {high:,}: say with --range LOW HIGH "
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
            one = _decode(file, os.fsdecode(file), levels)
        except _Undecodable as error:
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
                        f"({_reason(error)})") from None


def _reason(error):
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


# ---- embedded data -----------------------------------------------------------------------------------------------

SPRITES = ("sprites", "two_blobs", "discs", "cut_out")
SYNTHETIC = ("noise", "constant")
CORRUPTIONS = ("blurred", "noisy", "faded", "patched")


def corrupt(images, kind):
    """`images` spoilt in one way: blurred (by a Gaussian of one pixel), noisy (normal noise of 10 gray levels), faded
    (half the contrast around its mean) or patched (a square of half its sides, cut out of the next image at the same
    random place)."""
    n, _, h, w = images.pixels.shape
    rng, x = generator(0, CORRUPTION, CORRUPTIONS.index(kind)), images.pixels.float()
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
