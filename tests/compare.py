"""The kernels that the tests run, and the tolerance rule."""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT
from vae_ood import kernels
from vae_ood.kernels import cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = 2e-6  # relative to the largest value: some roundings of float32


@pytest.fixture
def triton(monkeypatch):
    """Every op runs as a Triton kernel: in the interpreter, unless there is a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "OVERRIDE", True)
    monkeypatch.setattr(cuda, "IMPLEMENTATION", "triton")


@functools.cache
def emulated():
    """The CUDA C++ kernels on a CPU (emulated.cpp): skips without the headers of CUDA's compiler."""
    home = nvcc_home()
    from torch.utils.cpp_extension import load
    return load("vae_ood_iw_nll_emulated", [str(ROOT / "tests/emulated.cpp")], extra_cflags=["-O1"],
                extra_include_paths=[str(home / "include")])


def nvcc_home():
    """The folder of CUDA's compiler; skips the test if there is none, or no ninja."""
    nvcc = next(filter(None, map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc"))), None)
    if not nvcc or not shutil.which("ninja"):
        pytest.skip("needs nvcc and ninja on the PATH")
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True)
    return Path(re.search(r"^#\$ TOP=(.*)", shown.stderr, re.M)[1])  # /usr/local/bin/nvcc may only call it


@pytest.fixture
def cuda_cpp(monkeypatch):
    """`iw_nll` runs in CUDA C++: emulated, unless there is a GPU. Skips where that cannot be compiled."""
    from torch.utils import cpp_extension
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(nvcc_home()))
    monkeypatch.setattr(kernels, "OVERRIDE", True)
    monkeypatch.setattr(cuda, "IMPLEMENTATION", "cuda")
    if DEVICE == "cpu":
        module = emulated()
        monkeypatch.setattr(cuda, "extension", lambda device: module)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


@pytest.fixture(params=["triton", "cuda_cpp"])
def each(request):
    """`iw_nll` runs as a Triton kernel, and in CUDA C++."""
    return request.getfixturevalue(request.param)


def assert_matches(function, *leaves, floor=FLOOR):
    """function(*leaves) -> tensors, and their gradient by the leaves: kernels against plain torch in float64.

    The error, in the maximum and in the 2-norm, is at most twice that of plain torch on the same inputs, plus a floor.
    """

    def run(leaves):
        outputs = function(*leaves)
        g = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(output.shape, generator=g).to(output) for output in outputs]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, cotangents)
        for leaf, gradient in zip(wanted, gradients, strict=True):
            assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        return *outputs, *gradients

    kernels.OVERRIDE = True
    ours = run(leaves)
    kernels.OVERRIDE = False
    plain = run(leaves)
    exact = run([leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves])
    kernels.OVERRIDE = True
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape and c.dtype == torch.float64, i
        finite = c.isfinite()
        torch.testing.assert_close(a[~finite].double(), c[~finite], equal_nan=True)
        assert not a[finite & ~b.isfinite()].isfinite().any(), i  # both overflow, or neither
        finite &= b.isfinite()
        a, b, c = a[finite].double(), b[finite].double(), c[finite]
        if not len(c):
            continue
        ulp = torch.finfo(ours[i].dtype).eps
        truncated = ours[i].dtype == torch.bfloat16 and DEVICE == "cpu"  # the interpreter rounds bfloat16 towards 0
        for norm, least in ((torch.inf, max(floor, ulp)), (2, ulp if truncated else floor)):
            size = torch.linalg.vector_norm
            error, limit = size(a - c, norm), 2 * size(b - c, norm) + least * size(c, norm)
            assert error <= limit, f"tensor {i}: error {error:.3g} above {limit:.3g} in the {norm}-norm"
