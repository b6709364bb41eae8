"""Every format read back, every kind of bad file refused in one clear line, downloads against a local server."""

import gzip
import hashlib
import io
import os
import re
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image, ImageOps
from scipy.io import savemat

from vae_ood import UserError
from vae_ood.data import cache, decoding, load, official, own
from vae_ood.data.cache import read_own
from vae_ood.data.decoding import decode, header
from vae_ood.data.groups import PARTS, checksum, parts
from vae_ood.data.images import Images, Rows, convert, generator, to_unit
from vae_ood.data.likeness import digests
from vae_ood.data.official import fetch
from vae_ood.data.own import open_own, to_pixels
from vae_ood.data.synthetic import CORRUPTIONS, corrupt, render
from vae_ood.parallel import crc32

RNG = np.random.default_rng(0)


def random_images(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def idx(images):
    return b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape) + images.tobytes()


def cifar(images, label=3):
    return np.concatenate([np.full((len(images), 1), label, np.uint8), images.reshape(len(images), -1)], 1).tobytes()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def save_picture(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


# ---- official formats

@pytest.mark.parametrize("compressed", [True, False])
def test_idx(tmp_path, compressed):
    images = random_images(5, 28, 28)
    name = "train-images-idx3-ubyte" + ".gz" * compressed
    put(tmp_path / "mnist" / name, gzip.compress(idx(images)) if compressed else idx(images))
    pixels = load("mnist", "train", tmp_path).pixels
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.numpy(), images[:, None])


@pytest.mark.parametrize(("content", "message"), [
    (gzip.compress(idx(random_images(9, 28, 28)))[:-600], "truncated"),
    (gzip.compress(b"\0\0\x08\x01" + bytes(40)), "wrong magic"),
    (gzip.compress(idx(random_images(2, 4, 4)) + b"more"), "more found"),
    (gzip.compress(idx(random_images(2, 4, 4))[:-3]), "fewer found"),
    (gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(100)), "claims"),
    (gzip.compress(b"\0\0\x08\x03" + bytes(12)), "truncated"),
    (b"not gzip at all", "damaged"),
    (b"", "wrong magic"),
])
def test_bad_idx(tmp_path, content, message):
    path = put(tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz", content)
    with pytest.raises(UserError, match=message) as error:
        load("mnist", "test", tmp_path)
    assert str(path) in str(error.value)


def test_cifar10_loose_files_of_any_length(tmp_path):
    a, b = random_images(4, 3, 32, 32), random_images(2, 3, 32, 32)
    put(tmp_path / "cifar10" / "data_batch_2.bin", cifar(b))
    put(tmp_path / "cifar10" / "data_batch_1.bin", cifar(a))
    images = load("cifar10", "train", tmp_path)
    np.testing.assert_array_equal(images.pixels.numpy(), np.concatenate([a, b]))
    assert images.notes == ["2 of 5 training files found: 6 of 50,000 images"]
    for i in (3, 4, 5):
        put(tmp_path / "cifar10" / f"data_batch_{i}.bin", cifar(b))
    assert load("cifar10", "train", tmp_path).notes == ["5 of 5 training files found: 12 of 50,000 images"]


def test_cifar10_archive_is_read_without_extracting(tmp_path):
    batches = [random_images(2, 3, 32, 32) for _ in range(6)]
    archive = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        for i, batch in enumerate(batches):
            name = f"../../data_batch_{i + 1}.bin" if i < 5 else "/test_batch.bin"  # a path that is not followed
            member = tarfile.TarInfo(name)
            member.size = len(cifar(batch))
            file.addfile(member, io.BytesIO(cifar(batch)))
    train = load("cifar10", "train", tmp_path)
    np.testing.assert_array_equal(train.pixels.numpy(), np.concatenate(batches[:5]))
    assert train.notes == ["5 of 5 training files found: 10 of 50,000 images"]
    np.testing.assert_array_equal(load("cifar10", "test", tmp_path).pixels.numpy(), batches[5])
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["cifar-10-binary.tar.gz"]
    archive.write_bytes(archive.read_bytes()[:-3000])
    with pytest.raises(UserError, match="truncated or damaged"):
        load("cifar10", "test", tmp_path)


@pytest.mark.parametrize("content", [b"", bytes(3072), cifar(random_images(2, 3, 32, 32), label=200)])
def test_bad_cifar10(tmp_path, content):
    put(tmp_path / "cifar10" / "test_batch.bin", content)
    with pytest.raises(UserError, match=r"test_batch\.bin is not a CIFAR-10 batch"):
        load("cifar10", "test", tmp_path)


def test_svhn(tmp_path):
    images = random_images(32, 32, 3, 5)
    (tmp_path / "svhn").mkdir()
    savemat(tmp_path / "svhn" / "test_32x32.mat", {"X": images, "y": np.ones((5, 1))}, do_compression=True)
    np.testing.assert_array_equal(load("svhn", "test", tmp_path).pixels.numpy(), images.transpose(3, 2, 0, 1))


def test_bad_svhn(tmp_path):
    path = put(tmp_path / "svhn" / "test_32x32.mat", b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(UserError, match="not an SVHN file"):
        load("svhn", "test", tmp_path)
    savemat(path, {"X": random_images(8, 8, 3, 5)})
    with pytest.raises(UserError, match="X has the shape"):
        load("svhn", "test", tmp_path)


def celeba_pictures():
    buffers = {}
    for name, size in (("000001.jpg", (218, 178)), ("182638.jpg", (218, 178)), ("182639.jpg", (100, 60))):
        buffers[name] = io.BytesIO()
        Image.fromarray(random_images(*size, 3)).save(buffers[name], "JPEG", quality=95)
    return {name: buffer.getvalue() for name, buffer in buffers.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_celeba_split_and_crop(tmp_path, zipped):
    pictures, folder = celeba_pictures(), tmp_path / "celeba"
    folder.mkdir()
    if zipped:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as file:
            for name, content in pictures.items():
                file.writestr(f"../img_align_celeba/{name}", content)
    else:
        for name, content in pictures.items():
            put(folder / "img_align_celeba" / name, content)
    test = load("celeba", "test", tmp_path)
    assert test.pixels.shape == (2, 3, 32, 32) and "split by index" in test.notes[0]
    decoded = [np.asarray(Image.open(io.BytesIO(pictures[n]))).transpose(2, 0, 1) for n in ("182638.jpg", "182639.jpg")]
    crops = decoded[0][:, 35:183, 15:163], decoded[1][:, 20:80]  # 148 x 148, and the centre square
    for pixels, crop in zip(test.pixels, crops, strict=True):
        assert crop.shape[1] == crop.shape[2]
        torch.testing.assert_close(pixels, convert(torch.from_numpy(crop.copy())[None], (3, 32, 32))[0])
    assert load("celeba", "train", tmp_path).pixels.shape[0] == 1
    put(folder / "list_eval_partition.txt", b"000001.jpg 2\n182638.jpg 0\n182639.jpg 0\n")
    assert load("celeba", "test", tmp_path).pixels.shape[0] == 1
    assert load("celeba", "train", tmp_path).pixels.shape[0] == 2


def test_celeba_that_is_missing_says_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"mmlab.*put it in"):
        load("celeba", "test", tmp_path)


# ---- downloads

class Handler(BaseHTTPRequestHandler):
    """/good/ serves the file, /wrong/ another one, /cut/ and /chunked/ a part of it, anything else 404."""

    content = gzip.compress(idx(random_images(40, 28, 28)))

    def do_GET(self):
        kind = self.path.split("/")[1]
        if kind not in ("good", "wrong", "cut", "chunked"):
            self.send_error(404)
            return
        self.send_response(200)
        if kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"fff\r\nfar fewer than announced")
            return
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        content = self.content[::-1] if kind == "wrong" else self.content
        self.wfile.write(content[:len(content) // 2] if kind == "cut" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Point MNIST's test file at a path of a local server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def point_at(kind):
        address = f"http://127.0.0.1:{server.server_port}/{kind}/"
        key = ("mnist", "t10k-images-idx3-ubyte.gz")
        monkeypatch.setitem(official.DOWNLOADS, key, (address, hashlib.md5(Handler.content).hexdigest()))

    yield point_at
    server.shutdown()
    server.server_close()


def test_download(tmp_path, serve):
    serve("good")
    assert load("mnist", "test", tmp_path).pixels.shape == (40, 1, 28, 28)
    serve("missing")
    assert load("mnist", "test", tmp_path).pixels.shape == (40, 1, 28, 28)  # it is there: no second download


@pytest.mark.parametrize(("kind", "message"), [("wrong", "MD5"), ("cut", "MD5"), ("missing", "404"),
                                              ("chunked", "could not be downloaded")])
def test_failed_download_leaves_nothing_and_can_be_repeated(tmp_path, serve, kind, message):
    serve(kind)
    with pytest.raises(UserError, match=message) as error:
        load("mnist", "test", tmp_path)
    text = str(error.value)
    assert "t10k-images-idx3-ubyte.gz" in text and "http://127.0.0.1" in text and str(tmp_path / "mnist") in text
    assert list((tmp_path / "mnist").iterdir()) == []
    serve("good")
    assert len(load("mnist", "test", tmp_path).pixels) == 40


def test_without_a_network_one_line_names_file_address_and_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(official.DOWNLOADS, ("svhn", "test_32x32.mat"), ("http://127.0.0.1:9/", "0" * 32))
    with pytest.raises(UserError, match=r"test_32x32\.mat is missing.*127\.0\.0\.1:9/test_32x32\.mat.*svhn"):
        fetch(tmp_path / "svhn", "test_32x32.mat")


# ---- own images

@pytest.mark.parametrize("layout", ["folder", "npy", "npz", "nchw", "float"])
def test_own_images_in_every_layout(tmp_path, layout):
    images = random_images(30, 6, 7, 3)
    path = tmp_path / {"folder": "pictures", "npz": "a.npz"}.get(layout, "a.npy")
    if layout == "folder":
        for i, image in enumerate(images):
            save_picture(path / f"class{i % 3}" / f"{i:02d}.png", image)
    elif layout == "npz":
        np.savez(path, images)
    else:
        np.save(path, {"nchw": images.transpose(0, 3, 1, 2), "float": images / 255}.get(layout, images))
    everything = load(str(path), "all")
    order = sorted(range(30), key=lambda i: (i % 3, i)) if layout == "folder" else range(30)
    np.testing.assert_array_equal(everything.pixels.numpy(), images[list(order)].transpose(0, 3, 1, 2))
    split = {"group": torch.arange(30), "part": torch.arange(30, dtype=torch.uint8) % 3,
             "crc32": checksum(digests(everything.pixels))}
    some = parts(everything, split)
    assert [len(some[name].pixels) for name in PARTS] == [10, 10, 10]
    for number, name in enumerate(PARTS):
        assert sorted(some[name].groups) == list(range(number, 30, 3))
        assert torch.equal(some[name].pixels, everything.pixels[torch.from_numpy(some[name].groups)])
        if layout == "folder":
            assert some[name].files == [everything.files[i] for i in some[name].groups]
    assert layout != "folder" or everything.files[0] == "class0/00.png"


def test_checkpoints_from_before_groups_keep_their_split(tmp_path):
    """About a tenth, by the pixels alone: adding images moves none, and copies stay together."""
    images = random_images(300, 5, 5)
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "b.npy", np.concatenate([random_images(50, 5, 5), images, images[:100]]))
    split = {(name, part): [p.numpy().tobytes() for p in some.pixels] for name in ("a.npy", "b.npy")
             for part, some in parts(load(str(tmp_path / name), "all")).items()}
    assert 12 <= len(split["a.npy", "test"]) <= 50  # a tenth, within four standard errors
    for part in ("train", "test"):
        assert set(split["a.npy", part]) <= set(split["b.npy", part])
    assert not set(split["b.npy", "train"]) & set(split["b.npy", "test"])
    order = [{i.tobytes(): n for n, i in enumerate(images)}[p] for p in split["a.npy", "train"]]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.3  # shuffled: the first N are a fair sample


def test_a_split_of_other_images_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", random_images(12, 5, 5))
    for n in (11, 12):
        with pytest.raises(UserError, match=rf"the 12 images in .*a\.npy are not the {n} that the model"):
            parts(load(str(tmp_path / "a.npy"), "all"), {"group": torch.arange(n), "part": torch.zeros(n), "crc32": 0})


def test_gray_arrays_and_ready_made_splits(tmp_path):
    np.save(tmp_path / "gray.npy", random_images(25, 5, 9))
    assert load(str(tmp_path / "gray.npy"), "all").pixels.shape == (25, 1, 5, 9)
    path = tmp_path / "split.npz"
    np.savez(path, train_images=random_images(4, 8, 8), test_images=random_images(2, 8, 8))
    images = load(str(path), "all")
    assert images.given == 4 and [len(parts(images)[s].pixels) for s in ("train", "test")] == [4, 2]
    np.savez(path, train_images=random_images(200, 8, 8))  # one array, whatever its name: to be split as any other
    assert load(str(path), "all").given is None
    np.savez(path, train_images=random_images(4, 8, 8), test_images=random_images(2, 9, 9))
    with pytest.raises(UserError, match="differ in shape"):
        load(str(path), "all")
    np.savez(path, a=random_images(4, 8, 8), b=random_images(4, 8, 8))
    with pytest.raises(UserError, match="holds the arrays a, b"):
        load(str(path), "all")


def test_pictures_of_every_mode(tmp_path):
    gray = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    save_picture(tmp_path / "gray.png", gray)
    save_picture(tmp_path / "sixteen.png", gray.astype(np.uint16) * 257)
    images = load(str(tmp_path), "all")
    assert images.pixels.shape == (2, 1, 8, 8)
    np.testing.assert_array_equal(images.pixels[:, 0].numpy(), [gray, gray])
    save_picture(tmp_path / "rgba.png", random_images(8, 8, 4))
    assert load(str(tmp_path), "all").pixels.shape == (3, 3, 8, 8)  # one in colour: all in colour


def tiff(array, photometric=1):
    """A TIFF file of one channel [h, w], little-endian and uncompressed."""
    (h, w), kind = array.shape, {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    entries = [(256, 4, w), (257, 4, h), (258, 3, 8 * array.itemsize), (259, 3, 1), (262, 3, photometric),
               (273, 4, 134), (277, 3, 1), (278, 4, h), (279, 4, array.nbytes), (339, 3, kind)]
    return (b"II*\0" + struct.pack("<IH", 8, len(entries))
            + b"".join(struct.pack("<HHIHH", tag, size, 1, value, 0) for tag, size, value in entries)
            + struct.pack("<I", 0) + array.tobytes())


GRADIENT = np.linspace(0, 1, 12).reshape(3, 4)


@pytest.mark.parametrize(("values", "photometric", "levels", "expected"), [
    (GRADIENT.astype("<f4"), 1, None, GRADIENT), (GRADIENT.astype("<f4"), 0, None, 1 - GRADIENT),
    ((4812 * GRADIENT).astype("<f4"), 1, None, "holds float32 from 0.0 to 4,812.0"),
    ((4812 * GRADIENT).astype("<f4"), 1, (0, 4812), GRADIENT),
    (np.where(GRADIENT == 1, np.nan, GRADIENT).astype("<f4"), 1, None, "NaN or infinite"),
    (np.where(GRADIENT == 1, np.inf, GRADIENT).astype("<f4"), 1, (0, 1), "NaN or infinite"),
    ((65535 * GRADIENT).astype("<u2"), 1, None, GRADIENT), ((65535 * GRADIENT).astype("<u2"), 0, None, 1 - GRADIENT),
    ((4000 * GRADIENT).astype("<u2"), 1, (0, 4000), GRADIENT), ((255 * GRADIENT).astype("<u1"), 0, None, 1 - GRADIENT),
    ((1000 * GRADIENT - 500).astype("<i2"), 1, None, "holds int32 from -500 to 500"),
    ((1000 * GRADIENT - 500).astype("<i2"), 1, (-500, 500), GRADIENT),
    ((100 * GRADIENT - 50).astype("<i1"), 1, None, "holds int8 from -50 to 50"),
    ((100 * GRADIENT - 50).astype("<i1"), 1, (-50, 50), GRADIENT),
    ((2e9 * GRADIENT).astype("<i4"), 1, None, "holds int32 from 0 to 2,000,000,000: say with --range LOW HIGH"),
    ((4e9 * GRADIENT).astype("<u4"), 1, None, "holds uint32 from 0 to 4,000,000,000"),
    ((4e9 * GRADIENT).astype("<u4"), 1, (0, 4e9), GRADIENT),
    ((255 * GRADIENT).astype("<u1"), 1, (51, 204), (GRADIENT - 0.2) / 0.6),
])
def test_pixels_of_more_than_eight_bits_are_what_a_viewer_shows_or_refused(
        tmp_path, values, photometric, levels, expected):
    put(tmp_path / "a.tif", tiff(values, photometric))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=re.escape(expected)):
            load(str(tmp_path), "all", levels=levels)
    else:
        pixels = load(str(tmp_path), "all", levels=levels).pixels
        coarse = 2.9 if values.dtype == np.int8 else 1.7 if values.dtype == np.uint8 else 0.6
        np.testing.assert_allclose(pixels[0, 0], 255 * expected.clip(0, 1), atol=coarse)


def test_sixteen_bit_pictures_that_use_a_sixteenth_of_their_range_say_so(tmp_path):
    twelve = (4095 * GRADIENT).astype(np.uint16)
    save_picture(tmp_path / "a.png", twelve)
    assert load(str(tmp_path), "all").notes == ["16-bit pictures that use the levels up to 4,095 of 65,535 alone: "
                                                "nearly black; --range 0 4095 makes that white"]
    images = load(str(tmp_path), "all", levels=(0, 4095))
    assert not images.notes and images.pixels.max() == 255
    save_picture(tmp_path / "b.png", 16 * twelve)
    assert not load(str(tmp_path), "all").notes
    pgm = b"P5 4 3 4095\n" + twelve.astype(">u2").tobytes()  # says itself what is white
    (tmp_path / "a.png").unlink()
    put(tmp_path / "b.png", pgm)
    np.testing.assert_allclose(load(str(tmp_path), "all").pixels[0, 0], 255 * GRADIENT, atol=0.6)


def test_what_is_transparent_is_shown_on_mid_gray(tmp_path):
    colour, alpha = random_images(8, 8, 3), np.array([0, 255, 51] * 22, np.uint8)[:64].reshape(8, 8)
    save_picture(tmp_path / "a.png", np.dstack([colour, alpha]))
    images = load(str(tmp_path), "all")
    assert images.notes == ["1 pictures are transparent in places: shown on mid gray"]
    shown = (colour * (alpha / 255)[:, :, None] + 128 * (1 - alpha / 255)[:, :, None]).transpose(2, 0, 1)
    np.testing.assert_allclose(images.pixels[0], shown, atol=1)
    gray = Image.fromarray(colour[:, :, 0])
    gray.putalpha(Image.fromarray(alpha))  # LA
    gray.save(tmp_path / "a.png")
    images = load(str(tmp_path), "all")
    assert images.pixels.shape == (1, 1, 8, 8)
    np.testing.assert_allclose(images.pixels[0, 0], shown[0], atol=1)
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    palette.save(tmp_path / "a.png", transparency=5)
    pixels = load(str(tmp_path), "all").pixels
    assert pixels.shape == (1, 3, 8, 8) and (pixels.flatten(1).view(3, 64)[:, 5] == 128).all()
    save_picture(tmp_path / "a.png", np.dstack([colour, np.full((8, 8), 255, np.uint8)]))
    assert not load(str(tmp_path), "all").notes


def test_every_file_is_used_or_counted(tmp_path):
    for name in ("a.PNG", "sub/b.Jpeg", "c.jfif", "d.jpe", "e.pnm", "f.ppm", "g.TIFF", "h.bmp", "i.webp", "j.jp2"):
        file = io.BytesIO()
        Image.fromarray(random_images(8, 8, 3)).save(file, Image.registered_extensions()[Path(name).suffix.lower()])
        put(tmp_path / "p" / name, file.getvalue())
    frames = [Image.fromarray(image) for image in random_images(3, 8, 8, 3)]
    frames[0].save(tmp_path / "p" / "k.gif", save_all=True, append_images=frames[1:])
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "sub/desktop.ini"):
        put(tmp_path / "p" / name, b"x")
    for name in ("a.heic", "b.heic", "c.HEIC", "d.dcm", "e.txt", "noextension"):
        put(tmp_path / "p" / name, b"x")
    images = load(str(tmp_path / "p"), "all")
    assert len(images.files) == 11 and images.files[0] == "a.PNG" and "sub/b.Jpeg" in images.files
    assert images.notes == ["6 files left out: 3 .heic, 1 .dcm, 1 .txt, 1 without extension",
                            "first frame of 3 in 1 files"]


def test_links_are_followed_once(tmp_path):
    save_picture(tmp_path / "elsewhere" / "x.png", random_images(8, 8))
    save_picture(tmp_path / "p" / "y.png", random_images(8, 8))
    (tmp_path / "p" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "p")
    assert load(str(tmp_path / "p"), "all").files == ["again/x.png", "y.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    save_picture(tmp_path / "a.png", random_images(8, 8))
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="closed cannot be read"):
        load(str(tmp_path), "all")


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    save_picture(tmp_path / "a.png", random_images(8, 8))
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="closed cannot be read"):
        load(str(tmp_path), "all")


def test_a_single_picture(tmp_path):
    save_picture(tmp_path / "a.png", random_images(8, 8))
    images = load(str(tmp_path / "a.png"), "all")
    assert images.pixels.shape == (1, 1, 8, 8) and images.files == ["a.png"]


def test_figures_of_ours_are_not_data(tmp_path):
    from vae_ood import plots
    save_picture(tmp_path / "a.png", random_images(8, 8))
    plots.mutual_information(tmp_path / "fig.png", np.array([1.0, 0.1]), "t")
    images = load(str(tmp_path), "all")
    assert images.files == ["a.png"] and images.notes == ["1 files left out: 1 figures of vae-ood"]


@pytest.mark.parametrize(("array", "expected"), [
    (np.array([[[True, False]] * 2] * 4), [[255, 0]] * 2), (GRADIENT[None].repeat(2, 0), 255 * GRADIENT),
    (np.uint16(1000 * GRADIENT)[None].repeat(2, 0), "--range LOW HIGH")])
def test_arrays_of_other_kinds(tmp_path, array, expected):
    with open(tmp_path / "a.NPY", "wb") as file:
        np.save(file, array)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            load(str(tmp_path / "a.NPY"), "all")
        expected = 255 * GRADIENT
        images = load(str(tmp_path / "a.NPY"), "all", levels=(0, 1000))
    else:
        images = load(str(tmp_path / "a.NPY"), "all")
    np.testing.assert_allclose(images.pixels[0, 0], expected, atol=0.6)


def test_arrays_that_may_be_one_picture_are_refused_and_masks_warn(tmp_path):
    for shape in ((16, 16, 3), (3, 16, 16)):
        np.save(tmp_path / "a.npy", random_images(*shape))
        with pytest.raises(UserError, match="may be one picture in colour or several in gray: save it as NxHxWxC"):
            load(str(tmp_path / "a.npy"), "all")
    np.save(tmp_path / "a.npy", random_images(5, 4, 4) % 2)
    assert load(str(tmp_path / "a.npy"), "all").notes == [
        "uint8 up to 1: nearly black; if 1 is white, save it as bool, or add --range 0 1"]


def test_undecodable_picture(tmp_path):
    for i in range(3):
        save_picture(tmp_path / f"{i}.png", random_images(8, 8))
    put(tmp_path / "broken.png", (tmp_path / "0.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"broken\.png.*--skip-bad"):
        load(str(tmp_path), "all")
    images = load(str(tmp_path), "all", skip_bad=True)
    assert len(images.pixels) == 3 and images.notes == ["1 files left out: 1 undecodable"]


def test_pictures_of_any_size_are_converted(tmp_path):
    save_picture(tmp_path / "a.png", random_images(8, 8))
    save_picture(tmp_path / "b.png", random_images(10, 12))
    images = load(str(tmp_path), "all", shape=(3, 6, 6))
    assert images.pixels.shape == (2, 3, 6, 6) and images.notes == ["converted from various sizes"]
    (tmp_path / "b.png").unlink()
    assert load(str(tmp_path), "all", shape=(3, 6, 6)).notes == ["converted from 1x8x8"]


@pytest.mark.parametrize(("array", "message"), [
    (np.full((5, 4, 4), np.nan), "NaN"),
    (np.full((5, 4, 4), 7.5), "from 7.5 to 7.5"),
    (np.full((5, 4, 4), -3), "from -3 to -3"),
    (np.full((5, 4, 4), "x"), "save uint8"),
    (random_images(5, 4, 4, 7), "shape"),
    (random_images(3, 4), "shape"),
    (random_images(0, 4, 4), "shape"),
    (np.array([{"a": 1}], dtype=object), "without pickled objects"),
])
def test_bad_arrays(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "a.npy"), "all")


def npy(shape):
    """The bytes of a .npy whose header claims a shape, with 100 bytes of content."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(100)


@pytest.mark.parametrize("kind", ["npy", "npz", "idx", "mat"])
def test_a_header_that_claims_a_million_million_images_is_refused_before_anything_is_allocated(tmp_path, kind):
    if kind == "idx":
        data, message = "mnist", "header claims"
        put(tmp_path / "mnist/t10k-images-idx3-ubyte", b"\0\0\x08\x03" + 3 * (10**4).to_bytes(4, "big") + bytes(2000))
    elif kind == "mat":
        path = tmp_path / "svhn/test_32x32.mat"
        put(path, b"")
        savemat(path, {"X": random_images(32, 32, 3, 5)})
        content = path.read_bytes()
        place = content.index((32).to_bytes(4, "little") * 2 + (3).to_bytes(4, "little")) + 12
        path.write_bytes(content[:place] + (2**31 - 1).to_bytes(4, "little") + content[place + 4:])
        data, message = "svhn", "damaged"
    else:
        data, message = str(tmp_path / f"a.{kind}"), "not a readable array file"
        put(tmp_path / "a.npy", npy((10**12, 8, 8)))
        if kind == "npz":
            with zipfile.ZipFile(data, "w") as archive:
                archive.write(tmp_path / "a.npy", "images.npy")
    tracemalloc.start()
    with pytest.raises(UserError, match=message):
        load(data, "all", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(("name", "message"), [("nothing-here", "unknown data"), ("empty", "no pictures"),
                                               ("text.txt", "neither a folder")])
def test_what_is_no_data_set(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UserError, match=message):
        load(name if name == "nothing-here" else str(tmp_path / name), "all")


# ---- own pictures of any size

def photograph(h, w, seed=0, gray=False):
    """A smooth picture with a few hard edges."""
    rng = np.random.default_rng(seed)
    fine = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((w, h), Image.BICUBIC)
    fine.paste((250, 20, 20), (w // 3, h // 3, w // 2, h // 2))
    return fine.convert("L") if gray else fine


@pytest.fixture
def mixed(tmp_path):
    """A folder of pictures of many sizes and kinds, large JPEGs among them."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, h, w, options in (("landscape.jpg", 480, 640, {}), ("portrait.jpg", 900, 301, {}),
                                ("rotated.jpg", 500, 333, {"exif": exif(6)}), ("small.png", 12, 640, {}),
                                ("upside.jpg", 400, 700, {"exif": exif(3)}), ("turned.png", 40, 20, {"exif": exif(8)})):
        photograph(h, w, len(name)).save(folder / name, **options)
    photograph(333, 444, gray=True).save(folder / "gray.jpg")
    return folder


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(("h", "w"), [(48, 100), (91, 30), (12, 20), (24, 16), (60, 40)])
def test_each_crop_is_that_of_pillow(h, w):
    image, (rows, columns) = photograph(h, w), (24, 16)
    pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1))[None]
    part, scale = min(h / rows, w / columns), max(h / rows, w / columns)
    top, left = (h - rows * part) / 2, (w - columns * part) / 2
    high, wide = max(1, round(h / scale)), max(1, round(w / scale))
    above, before = (rows - high) // 2, (columns - wide) // 2
    expected = {
        "centre": image.crop((left, top, w - left, h - top)).resize((columns, rows), Image.BILINEAR),
        "pad": np.pad(image.resize((wide, high), Image.BILINEAR), (
            (above, rows - high - above), (before, columns - wide - before), (0, 0)), mode="edge"),
        "stretch": image.resize((columns, rows), Image.BILINEAR)}
    for crop, one in expected.items():
        difference = abs(convert(pixels, (3, rows, columns), crop)[0].numpy().transpose(1, 2, 0) - np.array(one, float))
        assert difference.max() <= 1, crop
    assert torch.equal(convert(pixels, (3, rows, columns)), convert(pixels, (3, rows, columns), "centre"))


@pytest.mark.parametrize("crop", ["centre", "pad", "stretch"])
def test_a_picture_alone_has_the_pixels_that_it_has_in_its_folder(mixed, crop):
    images, size, rule = read_own(mixed, size=(48, 32), crop=crop)
    assert (size, rule) == ([48, 32], crop) and images.pixels.shape == (7, 3, 48, 32)
    alone = [to_pixels([mixed / name], (3, 48, 32), crop=crop) for name in images.files]
    one_by_one = [open_own(mixed / name).read(slice(0, 1), (3, 48, 32), crop).pixels for name in images.files]
    assert torch.equal(torch.cat(alone), images.pixels) and torch.equal(torch.cat(one_by_one), images.pixels)
    gray = images.pixels[images.files.index("gray.jpg")]
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    upright = ImageOps.exif_transpose(Image.open(mixed / "rotated.jpg"))
    shown = convert(torch.from_numpy(np.array(upright).transpose(2, 0, 1))[None], (3, 48, 32), crop)[0].float()
    assert upright.size == (500, 333)
    assert (images.pixels[images.files.index("rotated.jpg")].float() - shown).abs().mean() < 1.5


def test_a_jpeg_that_is_decoded_small_has_nearly_the_same_pixels(mixed, monkeypatch):
    def both(crop, size):
        small = read_own(mixed, size=size, crop=crop)[0].pixels.float()
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_drafted", lambda *picture: drawn.append(picture[0].size))
            return small, read_own(mixed, size=size, crop=crop)[0].pixels.float()
    for crop, size in (("centre", (64, 64)), ("pad", (40, 72)), ("stretch", (30, 90))):
        drawn = []
        small, full = both(crop, size)
        difference = (small - full).abs()
        assert len(drawn) == 5 and 0 < difference.mean() < 1 and difference.quantile(0.99) <= 8, crop
    with Image.open(mixed / "rotated.jpg") as picture:  # 500 x 333, shown as 333 x 500
        assert decoding._drafted(picture, (3, 64, 64), "centre") == (333, 500) and picture.size == (167, 250)
    with Image.open(mixed / "rotated.jpg") as picture:
        assert decoding._drafted(picture, (3, 20, 250), "stretch") == (333, 500) and picture.size == (333, 500)


def test_headers_tell_the_size_that_is_shown(mixed):
    for file in mixed.iterdir():
        assert header(file) == decode(file, file.name).size
        with Image.open(file) as picture:
            assert header(picture) == decode(picture, file.name).size
    put(mixed / "broken.jpg", b"no picture")
    assert header(mixed / "broken.jpg") is None


def test_the_default_size(mixed, tmp_path, capsys):
    _, size, crop = read_own(mixed, show=True)
    assert (size, crop) == ([64, 64], "centre")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "7 pictures of 7 sizes, 20x40 to 480x640, are scaled and cropped to 64x64: " + (
        "--size and --crop say otherwise")
    assert said[-1] == "7 pictures of 3x64x64: 86 kB in memory"
    for i in range(3):
        save_picture(tmp_path / "small" / f"{i}.png", random_images(64, 33))
        save_picture(tmp_path / "large" / f"{i}.png", random_images(65, 33))
    images, *rule = read_own(tmp_path / "small", crop="pad", show=True)
    assert rule == [None, None] and images.pixels.shape == (3, 1, 64, 33)
    assert "scaled" not in capsys.readouterr().out
    assert read_own(tmp_path / "large", crop="pad", show=True)[1:] == ([64, 64], "pad")
    assert "3 pictures of 65x33 are scaled and padded to 64x64" in capsys.readouterr().out
    assert read_own(tmp_path / "large", size=None)[0].pixels.shape == (3, 1, 65, 33)  # as older runs took them
    with pytest.raises(UserError, match="7 sizes, 20x40 to 480x640, and those that the model was trained on had one"):
        read_own(mixed, size=None)
    np.save(tmp_path / "a.npy", random_images(4, 70, 90))
    assert read_own(tmp_path / "a.npy")[0].pixels.shape == (4, 1, 70, 90)
    images, *rule = read_own(tmp_path / "a.npy", size=(20, 10))
    assert images.pixels.shape == (4, 1, 20, 10) and rule == [[20, 10], "centre"]


def test_headers_that_are_wrong_about_colour(mixed, monkeypatch):
    expected = read_own(mixed)[0].pixels
    monkeypatch.setattr(own, "header", lambda file: (1, 9, 9))
    assert torch.equal(read_own(mixed, size=(64, 64))[0].pixels, expected)
    for file in set(mixed.iterdir()) - {mixed / "gray.jpg"}:
        file.unlink()
    monkeypatch.setattr(own, "header", lambda file: (3, 9, 9))
    assert read_own(mixed, size=(64, 64))[0].pixels.shape == (1, 1, 64, 64)


def test_pictures_are_decoded_once_and_runs_share_the_file(mixed, tmp_path, monkeypatch):
    put(mixed / "broken.png", b"no picture")
    expected, *_ = read_own(mixed, skip_bad=True)
    first, *rule = read_own(mixed, tmp_path / "cache", True, skip_bad=True)
    assert isinstance(first.pixels, Rows) and len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(own, "decode", None)
    again, *same = read_own(mixed, tmp_path / "cache", skip_bad=True)
    explicit, *_ = read_own(mixed, tmp_path / "cache", False, *rule, skip_bad=True)
    assert rule == same == [[64, 64], "centre"]
    for images in (first, again, explicit):
        assert isinstance(images.pixels, Rows) and torch.equal(images.pixels[:], expected.pixels)
        assert images.files == expected.files and images.notes == expected.notes == ["1 files left out: 1 undecodable"]
    some = again.take(np.array([4, 0, 2]))
    assert isinstance(some.pixels, Rows) and torch.equal(some.pixels[:], expected.pixels[[4, 0, 2]])
    assert torch.equal(some.pixels[torch.tensor([2, 1])], expected.pixels[[2, 0]])
    assert digests(some.pixels) == digests(expected.pixels[[4, 0, 2]])
    assert crc32(some.pixels) == crc32(some.first(3).pixels) and isinstance(some.first(2).pixels, Rows)
    for kind in CORRUPTIONS:  # what run.py evaluates own pictures on
        assert torch.equal(corrupt(again, kind).pixels, corrupt(expected, kind).pixels)


def test_a_file_that_does_not_fit_is_written_anew(mixed, tmp_path):
    cache = tmp_path / "cache"
    expected = read_own(mixed, cache, True)[0].pixels[:]  # read now: the file will change
    file, = cache.glob("*.npy")
    whole, record = file.read_bytes(), file.with_suffix(".json").read_bytes()

    def flipped():
        return whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:]
    for content, said in ((whole[:-5], record), (b"", record), (flipped(), record), (whole, b""), (whole, b"[]"),
                          (whole, record[:-40]), (npy((10**9, 3, 8, 8)), record),
                          (whole.replace(b"|u1", b"|i1"), record), (whole, record.replace(b"[7, 3", b"[6, 3"))):
        file.write_bytes(content)
        file.with_suffix(".json").write_bytes(said)
        assert torch.equal(read_own(mixed, cache, True)[0].pixels[:], expected)
        assert (file.read_bytes(), file.with_suffix(".json").read_bytes()) == (whole, record)
    photograph(480, 640, 99).save(mixed / "landscape.jpg")
    changed, *_ = read_own(mixed, cache, True)
    assert len(list(cache.glob("*.npy"))) == 2 and not torch.equal(changed.pixels[:], expected)
    assert torch.equal(changed.pixels[:], read_own(mixed)[0].pixels)
    os.utime(mixed / "landscape.jpg", (1, 1))
    read_own(mixed, cache, True)
    assert len(list(cache.glob("*.npy"))) == 3 and not list(cache.glob("*.part"))
    for size, crop in (((32, 32), None), ((64, 64), "pad")):
        assert read_own(mixed, cache, True, size, crop)[0].pixels[:].shape[2:] == size
    with pytest.raises(UserError, match=r"cannot write .*choose another place with --cache"):
        read_own(mixed, mixed / "gray.jpg" / "x", True)


def test_pictures_that_would_take_half_of_the_memory_go_to_the_file(mixed, tmp_path, monkeypatch):
    for free, kind in ((2 * 7 * 3 * 64 * 64, torch.Tensor), (2 * 7 * 3 * 64 * 64 - 1, Rows)):
        monkeypatch.setattr(cache, "free_memory", lambda free=free: free)
        assert isinstance(read_own(mixed, tmp_path / "cache")[0].pixels, kind)
    assert isinstance(read_own(mixed)[0].pixels, torch.Tensor)  # no folder
    monkeypatch.undo()
    assert 2**26 < cache.free_memory() < 2**50


# ---- conversion, sprites, random numbers

def test_convert():
    gray, colour = torch.from_numpy(random_images(3, 1, 8, 8)), torch.from_numpy(random_images(3, 3, 8, 8))
    torch.testing.assert_close(convert(gray, (3, 8, 8)), gray.expand(3, 3, 8, 8))
    luma = (colour.double() * torch.tensor([0.299, 0.587, 0.114]).double()[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(convert(colour, (1, 8, 8)), luma.round().byte(), atol=1, rtol=0)
    checkers = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).mul(255).byte()[None, None]
    small = convert(checkers, (1, 8, 8)).float()
    assert (small - 127.5).abs().max() < 3  # antialiased: plain subsampling would give 0 or 255
    wide = torch.zeros(1, 1, 8, 24, dtype=torch.uint8)
    wide[..., 8:16] = 200
    assert (convert(wide, (1, 8, 8)) == 200).all()  # the centre square, not a squashed whole


def test_mnist_is_padded_not_resized(tmp_path):
    images = random_images(5, 28, 28)
    put(tmp_path / "mnist" / "t10k-images-idx3-ubyte", idx(images))
    padded = load("mnist", "test", tmp_path, shape=(3, 33, 32))
    assert padded.notes == ["padded from 1x28x28", "converted from 1x33x32"] and padded.pixels.shape == (5, 3, 33, 32)
    assert (padded.pixels[:, :, 2:30, 2:30].numpy() == images[:, None]).all()
    assert padded.pixels.sum() == 3 * images.sum(dtype=np.int64)
    assert load("mnist", "test", tmp_path, shape=(1, 14, 14)).notes == ["converted from 1x28x28"]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
def test_corruptions(shape):
    rng = np.random.default_rng(0)
    images = Images("some", torch.from_numpy(rng.integers(40, 216, (300, *shape), np.uint8)))
    x, constant = images.pixels.double(), replace(images, pixels=torch.full((2, *shape), 77, dtype=torch.uint8))
    made = {kind: corrupt(images, kind).pixels.double() for kind in CORRUPTIONS}
    for kind in CORRUPTIONS:
        assert made[kind].shape == x.shape and corrupt(images, kind).pixels.dtype == torch.uint8
        assert torch.equal(corrupt(images, kind).pixels.double(), made[kind])  # the same each time
        if kind != "noisy":
            assert torch.equal(corrupt(constant, kind).pixels, constant.pixels)
    expected = scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, 1, 1), mode="nearest", truncate=3)
    np.testing.assert_allclose(made["blurred"].numpy(), expected, atol=0.51)
    assert (made["noisy"] - x).std().item() == pytest.approx(10, rel=0.02)
    contrast = made["faded"].flatten(1).std(1) / x.flatten(1).std(1)
    torch.testing.assert_close(contrast, torch.full_like(contrast, 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(made["faded"].mean((1, 2, 3)), x.mean((1, 2, 3)), atol=0.5, rtol=0)
    own, pasted = (made["patched"] == x).all(1), (made["patched"] == x.roll(-1, 0)).all(1)
    h, w = shape[1:]
    assert (own | pasted).all() and ((~own).sum((1, 2)) <= (h // 2) * (w // 2)).all()
    assert pasted.sum((1, 2)).double().mean().item() == pytest.approx((h // 2) * (w // 2), rel=0.05)
    assert len({tuple(torch.nonzero(~one)[0].tolist()) for one in own}) > 30  # in many places


def test_sprites_are_deterministic_fast_and_of_the_asked_dimension():
    start = time.perf_counter()
    train = load("sprites", "train").pixels
    assert time.perf_counter() - start < 4  # under 2 s; twice that for a busy machine
    assert train.shape == (20_000, 1, 32, 32)
    torch.testing.assert_close(load("sprites", "train").pixels, train)
    assert not torch.equal(train[:2000], load("sprites", "test").pixels)
    for factors in (2, 3, 4, 5):  # the local dimension: singular values of a tight neighbourhood of one image
        unit = np.full((400, 7), 0.5)
        unit[:, :factors] += 0.01 * (RNG.random((400, factors)) - 0.5)
        images = render("sprites", unit)
        spectrum = np.linalg.svd(images.reshape(400, -1) - images.reshape(400, -1).mean(0), compute_uv=False)
        assert spectrum[factors - 1] > 20 * spectrum[factors]


@pytest.mark.parametrize("name", ["two_blobs", "discs", "cut_out", "noise", "constant"])
def test_embedded_outliers_fit_the_inliers_and_are_not_among_them(name):
    outliers = load(name, "test", shape=(1, 32, 32)).pixels
    assert outliers.shape == (2000, 1, 32, 32) and outliers.dtype == torch.uint8
    sprites = load("sprites", "train").pixels.flatten(1).float()
    nearest = torch.cdist(outliers[:100].flatten(1).float(), sprites).min(1).values
    inlier = torch.cdist(load("sprites", "test").pixels[:100].flatten(1).float(), sprites).min(1).values
    assert nearest.median() > 2 * inlier.median()
    if name in ("noise", "constant"):
        assert load(name, "test", shape=(3, 5, 6)).pixels.shape == (2000, 3, 5, 6)


def test_generators_are_repeatable_and_independent():
    draws = {key: generator(*key).standard_normal(1000) for key in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]}
    np.testing.assert_array_equal(generator(0, 1, 1).standard_normal(1000), draws[0, 1, 1])
    correlation = np.corrcoef(list(draws.values())) - np.eye(4)
    assert abs(correlation).max() < 5 / np.sqrt(1000)


def test_to_unit():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_unit(pixels), torch.tensor([0, 128 / 255, 1]))
    dequantised = torch.tensor([0, 128.5 / 256, 255.5 / 256])
    torch.testing.assert_close(to_unit(pixels, torch.tensor([0, 0.5, 0.5])), dequantised)
