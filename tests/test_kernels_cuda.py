"""The CUDA C++ kernels of `iw_nll`, without a GPU: their machine code, the blocks that share an image, what picks and
what builds them. Their values are those of tests/test_kernels_iw_nll.py."""

import math
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.compare import assert_matches, cuda_cpp, nvcc_home  # noqa: F401
from tests.conftest import ROOT
from tests.test_kernels_iw_nll import log_of, problem, ratio
from vae_ood import UserError, cli
from vae_ood.kernels import cuda
from vae_ood.kernels.iw_nll import iw_nll


@pytest.fixture(scope="module", params=[80, 90, 100])
def functions(request, tmp_path_factory):
    """{mangled name: (usage, machine code)} of every instance that the binding launches, for one architecture."""
    tools = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin"
    file = tmp_path_factory.mktemp("cuda") / "iw_nll.cubin"
    include = Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]
    subprocess.run([nvcc_home() / "bin/nvcc", "-std=c++17", "-cubin", f"-arch=sm_{request.param}", "-o", file,
                    "-DTORCH_EXTENSION_NAME=iw_nll", *(f"-I{folder}" for folder in include), *torch_flags(),
                    *cuda.FLAGS, ROOT / "kernels/iw_nll.cu"], check=True, capture_output=True, text=True, timeout=1000)
    usage, code = (subprocess.check_output([tools / "cuobjdump", option, file], text=True)
                   for option in ("-res-usage", "-sass"))
    usage = {name: dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", line))
             for name, line in re.findall(r"Function (\w+):\n(.*)", usage)}
    code = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", code, re.S))
    assert set(usage) == set(code)
    return {name: (usage[name], code[name]) for name in code}


def torch_flags():
    """Without the operators that torch's flags for nvcc take away."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS
    return COMMON_NVCC_FLAGS


def of_kernel(functions, name):
    """((x's type, the mean's, the values of a load), usage, operations of the machine code) of a kernel's instances."""
    for mangled, (usage, code) in functions.items():
        found = re.search(rf"{len(name)}{name}I(h|f)(f|6__half|13__nv_bfloat16)Li(\d)E(?:Li(\d)E)?", mangled)
        if found:
            yield found.groups(), usage, re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", code)


def test_every_instance_is_there_and_none_spills_and_half_of_the_threads_fit(functions):
    assert len(functions) == 31
    assert len(list(of_kernel(functions, "forward"))) == 18 and len(list(of_kernel(functions, "backward"))) == 12
    for name, (usage, code) in functions.items():
        assert usage["STACK"] == usage["LOCAL"] == "0" and int(usage["REG"]) <= 64, (name, usage)
        assert not re.search(r"\b(LDL|STL)\b", code), name


def test_means_are_read_and_gradients_written_128_bits_at_a_time_all_loads_before_the_first_use(functions):
    for kernel, of_samples in (("forward", 4), ("backward", None)):
        for (x, mean, width, samples), _, operations in of_kernel(functions, kernel):
            if width == "1":
                assert not [name for name in operations if ".128" in name and name.startswith(("LDG", "STG"))]
                continue
            assert int(width) == (4 if mean == "f" else 8)
            loads, most = 0, 0  # in a row, before a sigmoid
            for name in operations:
                loads = 0 if name.startswith("MUFU.EX2") else loads + name.startswith("LDG.E.128")
                most = max(most, loads)
            together = of_samples if samples != "1" else 4 if width == "4" else 2
            assert most >= (together or 4), (kernel, x, mean, samples, most)
            if kernel == "backward":
                stores = [name for name in operations if name.startswith("STG")]
                assert stores and all(name.startswith("STG.E.128") for name in stores), stores


@pytest.mark.parametrize("blocks", [1, 8, 1024])
@pytest.mark.parametrize(("d", "dtype"), [(784, torch.float32), (997, torch.bfloat16), (1048, torch.bfloat16)], ids=str)
@pytest.mark.usefixtures("cuda_cpp")
def test_any_number_of_blocks_shares_an_image(monkeypatch, d, dtype, blocks):
    monkeypatch.setattr(cuda, "BLOCKS", blocks)  # of 17 tiles for each of three images: 17, 2 or 1
    x, mean = problem(3, (d,), k=65, dtype=dtype)
    log_ratio = ratio(3, 65).detach()
    log_ratio[0, :40] = log_ratio[1] = -math.inf
    assert_matches(lambda mean, log_gamma: iw_nll(x, mean, log_ratio, log_gamma, True, return_squared_error=True)[:1],
                   mean, log_of(0.1).requires_grad_())


@pytest.mark.usefixtures("cuda_cpp")
def test_pixels_of_other_types_are_read_in_any_order_of_memory():
    pixels, mean = problem(4, (3, 8, 8), torch.channels_last, torch.channels_last, 5, pixels=torch.float16)
    for x in (pixels[:1].expand(4, -1, -1, -1), pixels.repeat(2, 1, 1, 1)[::2], pixels.double()):
        assert_matches(lambda mean: iw_nll(x, mean, None, log_of(0.1).detach(), return_squared_error=True), mean)


def test_one_code_an_image_is_read_16_bytes_at_a_time_as_many_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    x, mean = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, 3, 32, 32)
    x, mean = (t.contiguous(memory_format=torch.channels_last) for t in (x, mean))
    for b in (1, 4):  # strides of a dimension of size 1 are arbitrary: 3 here, which is no multiple of 16 bytes
        strides = cuda._call(x[:b], mean[:b].unsqueeze(1), True)[4:7]
        assert strides == ((0, 0, 0) if b == 1 else (3072, 3072, 0))


def test_other_kernels_are_refused_by_name(monkeypatch):
    code = "from vae_ood.kernels import cuda; cuda.chosen()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | {"VAE_OOD_KERNELS": "cutlass"})
    assert result.returncode and result.stderr.splitlines()[-1].endswith(
        "VAE_OOD_KERNELS=cutlass: there are no such kernels; set it to triton or cuda")
    monkeypatch.setattr(cuda, "IMPLEMENTATION", "cutlass")
    with pytest.raises(cuda.Unavailable, match="VAE_OOD_KERNELS=cutlass"):
        iw_nll(*problem(2, (3,), k=2), None, log_of(1))


@pytest.mark.parametrize(("missing", "message"), [("ninja", "Ninja is required"), ("nvcc", "nvcc: not found"),
                                                  ("CUDA_HOME", "CUDA_HOME .* is not set")])
def test_what_is_missing_to_build_them_is_said_in_one_line(monkeypatch, tmp_path, missing, message):
    from torch.utils import cpp_extension
    if missing != "ninja":
        nvcc_home()
    if missing == "ninja":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None if missing == "CUDA_HOME" else str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cuda, "IMPLEMENTATION", "cuda")
    for name, value in (("is_available", True), ("device_count", 1), ("set_device", None),
                        ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    cuda.extension.cache_clear()
    with pytest.raises(UserError, match=rf"^VAE_OOD_KERNELS=cuda: .*built \(.*{message}.*\); have ninja .*$"):
        cli.pick_device("cuda")


@pytest.mark.skipif(not torch.version.cuda, reason="needs torch for CUDA")
def test_torch_builds_and_loads_them(monkeypatch, tmp_path):
    from torch.utils import cpp_extension
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(nvcc_home()))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module = cuda.extension.__wrapped__("cuda")
    assert {"forward", "backward"} <= set(dir(module))
