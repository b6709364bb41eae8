"""The official files of the data sets: formats and downloads.

They lie in `<root>/<name>/`; a missing one is downloaded there and its MD5 checked. Files that are already there are
used as they are. No path out of an archive is followed.
"""

import gzip
import hashlib
import http.client
import os
import re
import socket
import struct
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.cli import lock
from vae_ood.data.arrays import EXPANSION, reason
from vae_ood.data.decoding import decode
from vae_ood.data.images import Images, convert

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


def idx(folder, split):
    """(Fashion)MNIST's part of `folder`, an IDX file, as `Images`. Raises UserError."""
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


def cifar10_records(folder, split):
    """(the records of CIFAR-10's part, uint8 [N, 3073], each a class and its pixels [3, 32, 32]; of how many files)."""
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
    return np.concatenate([np.frombuffer(parts[name], np.uint8).reshape(-1, 3073)
                           for name in sorted(parts)]), len(parts)


def cifar10(folder, split):
    """CIFAR-10's part, of as many of its files as there are, as `Images`. Raises UserError."""
    records, files = cifar10_records(folder, split)
    images = Images(folder.name, torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()))
    if split == "train" and len(records) < 50_000:
        images.notes.append(f"{files} of 5 training files found: {len(records):,} of 50,000 images")
    return images


def svhn(folder, split):
    """SVHN's part, a MATLAB file, as `Images`. Raises UserError."""
    path = fetch(folder, f"{split}_32x32.mat")
    try:
        pixels = matlab_array(path.read_bytes(), b"X")
        if pixels.shape[:3] != (32, 32, 3) or pixels.ndim != 4 or not pixels.size:
            raise ValueError(f"X has the shape {pixels.shape}, not 32x32x3xN")
    except (ValueError, TypeError, StopIteration, struct.error, zlib.error) as error:
        raise UserError(f"{path} is not an SVHN file or is damaged ({error}): delete it or replace it") from None
    return Images(folder.name, torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))))


def matlab_array(data, name):
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
        raise UserError(f"{archive} is truncated or damaged ({reason(error)}): delete it or replace it") from None


def celeba_pictures(folder, split):
    """({name: path or bytes} of CelebA's part, by name; what the split goes by). Raises UserError."""
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
    return {name: pictures[name] for name in chosen}, note


def celeba(folder, split):
    """CelebA's part, faces cropped to their middle 148x148 and scaled to 32x32, as `Images`. Raises UserError."""
    pictures, note = celeba_pictures(folder, split)

    def picture(name):
        pixels = decode(pictures[name], name).pixels
        h, w = pixels.shape[1:]
        if (h, w) == (218, 178):
            pixels = pixels[:, 35:183, 15:163]
        return convert(pixels[None], (3, 32, 32))

    with ThreadPoolExecutor() as pool:
        return Images(folder.name, torch.cat(list(pool.map(picture, pictures))), [note])


DATASETS = {"fashionmnist": idx, "mnist": idx, "cifar10": cifar10, "svhn": svhn, "celeba": celeba}
