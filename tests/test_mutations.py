"""Mutated files: a good result or the project's own error, in bounded memory and time, and nothing else."""

import gzip
import io
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from tests.test_data import cifar, idx, random_images
from vae_ood import UserError, checkpoint
from vae_ood.cli import out_of_memory
from vae_ood.data import load
from vae_ood.model import VAE

SLACK = 24 * 2**20  # bytes: what libraries allocate whatever the file, and the allocator's own
NUMBERS = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 10**12, 2**63 - 1]
EDIT = st.tuples(st.integers(0, 2**20), st.sampled_from(["replace", "insert", "delete", "cut"]), st.one_of(
    st.binary(min_size=1, max_size=8),
    st.builds(lambda n, size, order: (n % 256**size).to_bytes(size, order), st.sampled_from(NUMBERS),
              st.sampled_from([2, 4, 8]), st.sampled_from(["big", "little"]))))


def mutated(content, edits):
    for place, kind, value in edits:
        place %= len(content) + 1
        if kind == "cut":
            content = content[:place]
        else:
            content = content[:place] + value * (kind != "delete") + content[place + len(value) * (kind != "insert"):]
    return content


def status(key):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(key))


@contextmanager
def refused_or_read(declared):
    """AssertionError where the block raises anything but a UserError of one line, takes more than twice `declared`
    bytes of memory, or asks for 2 GB of addresses."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, limits = status("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 2**31, limits[1]))
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error)
        assert not (error.__context__ and out_of_memory(error.__context__))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert status("VmHWM") - before <= 2 * declared + SLACK


def fuzz(strategy, write, read, n, declared):
    """`read` n different files that `write` makes of what `strategy` draws."""
    examples = 0

    @settings(max_examples=n, deadline=timedelta(seconds=10), derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(drawn):
        nonlocal examples
        examples += 1
        write(drawn)
        with refused_or_read(declared):
            read()

    started = time.monotonic()
    check()
    assert examples >= n
    print(f"{examples} files in {time.monotonic() - started:.0f} s")


def npz(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)
    return buffer.getvalue()


def tar(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def jpegs():
    buffer, picture = io.BytesIO(), io.BytesIO()
    Image.fromarray(random_images(218, 178, 3)).save(picture, "JPEG")
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in (200_000, 200_001):
            archive.writestr(f"img_align_celeba/{number}.jpg", picture.getvalue())
    return buffer.getvalue()


def mat(compressed, **others):
    buffer = io.BytesIO()
    savemat(buffer, {"X": random_images(32, 32, 3, 2), **others}, do_compression=compressed)
    return buffer.getvalue()


def compressed_mat(content):
    """A .mat whose only element, compressed, is `content`."""
    body = zlib.compress(content)
    return mat(False)[:128] + struct.pack("<II", 15, len(body)) + body


def npy():
    buffer = io.BytesIO()
    np.save(buffer, random_images(2, 8, 8))
    return buffer.getvalue()


IDX, CIFAR, ZIP = idx(random_images(3, 8, 8)), cifar(random_images(3, 3, 32, 32)), jpegs()
FILES = {  # kind: (what is mutated, what makes the file of it, the file, the name of the data or None)
    "idx": (IDX, bytes, "mnist/t10k-images-idx3-ubyte", "mnist"),
    "idx.gz": (gzip.compress(IDX), bytes, "mnist/t10k-images-idx3-ubyte.gz", "mnist"),
    "idx in gz": (IDX, gzip.compress, "mnist/t10k-images-idx3-ubyte.gz", "mnist"),
    "cifar": (CIFAR, bytes, "cifar10/test_batch.bin", "cifar10"),
    "tar.gz": (gzip.compress(tar(CIFAR)), bytes, "cifar10/cifar-10-binary.tar.gz", "cifar10"),
    "tar in gz": (tar(CIFAR), gzip.compress, "cifar10/cifar-10-binary.tar.gz", "cifar10"),
    "mat": (mat(False, y=np.ones((2, 1))), bytes, "svhn/test_32x32.mat", "svhn"),
    "compressed mat": (mat(True), bytes, "svhn/test_32x32.mat", "svhn"),
    "element of mat": (mat(False)[128:], compressed_mat, "svhn/test_32x32.mat", "svhn"),
    "npy": (npy(), bytes, "a.npy", None),
    "npz": (npz(npy()), bytes, "a.npz", None),
    "npy in npz": (npy(), npz, "a.npz", None),
    "directory of zip": (ZIP[-200:], lambda end: ZIP[:-200] + end, "celeba/img_align_celeba.zip", "celeba"),
    "zip": (ZIP, bytes, "celeba/img_align_celeba.zip", "celeba"),
}


@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FILES)
def test_mutated_images(tmp_path, kind, n):
    content, make, name, known = FILES[kind]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(make(content))
    assert len(load(known or str(path), "all", tmp_path).pixels) in (2, 3)  # as it is, it is read
    fuzz(st.lists(EDIT, min_size=1, max_size=3), lambda edits: path.write_bytes(make(mutated(content, edits))),
         lambda: load(known or str(path), "all", tmp_path), n, len(make(content)))


@pytest.fixture
def saved(tmp_path):
    model = VAE((1, 8, 8), 0.1, 2)
    config = {"data": "mnist", "sprite_factors": 4, "skip_bad": False, "dequantize": False, "seed": 0,
              "shape": [1, 8, 8], "alpha": 0.1, "kappa": 2}
    checkpoint.save(tmp_path / "ckpt.pt", model.state_dict(), torch.optim.Adam(model.parameters()).state_dict(), 7,
                    config)
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checksums", ["wrong", "right"])
def test_mutated_checkpoints(saved, n, checksums):
    content = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))

    def write(edits):
        if checksums == "wrong":
            saved.write_bytes(mutated(content, edits))
            return
        with zipfile.ZipFile(saved, "w") as archive:
            for name, value in members.items():
                archive.writestr(name, mutated(value, edits) if name == pickled else value)
    fuzz(st.lists(EDIT, min_size=1, max_size=3), write, lambda: checkpoint.load_model(saved), n, len(content))


@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_configs(saved, n):
    state = checkpoint.load(saved)
    number = st.one_of(st.integers(-2**63, 2**63 - 1), st.floats(), st.sampled_from(NUMBERS))
    value = st.one_of(st.none(), st.booleans(), number, st.text(max_size=9), st.lists(number, max_size=4))
    changes = st.dictionaries(st.sampled_from(sorted(state["config"])), value, min_size=1, max_size=3)
    fuzz(changes, lambda changed: torch.save(state | {"config": state["config"] | changed}, saved),
         lambda: checkpoint.load_model(saved), n, saved.stat().st_size)
