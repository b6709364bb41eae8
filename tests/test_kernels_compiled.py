"""The machine code of every kernel, compiled ahead of time (no GPU needed) with the arguments that the launchers pass.

`python -m tests.test_kernels_compiled` prints what it finds; it runs in a process of its own, since Triton's
interpreter, which the other tests use, excludes its compiler.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from vae_ood import kernels
from vae_ood.kernels.iw_nll import gaussian_log_likelihood, iw_nll
from vae_ood.kernels.reparameterize import reparameterize

CAPABILITIES = (80, 90, 100)


def compile_all():
    """[{op, direction, kernel, capability, dtype, d, order, registers, ...}] of each launch of each op."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Target:  # in place of a GPU's driver
        def __init__(self, capability):
            self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
            self.get_current_device = lambda: capability  # so that each has its own cache
            self.get_current_stream = lambda device: 0

    launches, found = [], []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        launches.append((self.__module__.removeprefix("vae_ood.kernels.") + self.__name__,
                         launch(self, *args, grid=grid, warmup=True, **options), grid))

    def collect(**about):
        for name, kernel, grid in launches:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(kernel.asm["cubin"])
                tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
                usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
            usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
            loop = re.search(r"\n\$L__BB\w+:.*?bra \t?\$L__BB", kernel.asm["ptx"], re.S)
            found.append(about | {
                "kernel": name, "registers": int(usage["REG"]), "stack": int(usage["STACK"]),
                "local": int(usage["LOCAL"]), "threads": 32 * kernel.metadata.num_warps, "programs": grid[0],
                "loads": sorted(set(re.findall(r"ld\.global(?:\.nc)?\.(\S+)", kernel.asm["ptx"]))),
                "stores": sorted(set(re.findall(r"st\.global\.(\S+)", kernel.asm["ptx"]))),
                "barriers_in_loop": len(re.findall(r"bar\.sync", loop[0])) if loop else None})
        launches.clear()

    JITFunction.run = compile_only
    kernels.OVERRIDE = True
    log_gamma = torch.zeros((), requires_grad=True)
    for capability in CAPABILITIES:
        driver.set_active(Target(capability))
        for dtype in (torch.float32, torch.bfloat16):
            about = {"capability": capability, "dtype": str(dtype).removeprefix("torch.")}
            for kappa in (3, 32, 512):
                mu = torch.zeros(64, kappa, dtype=dtype, requires_grad=True)
                for per_dim in (False, True):
                    z, kl = reparameterize(mu, mu, torch.zeros(64, kappa), per_dim)
                    (z.sum() + kl.sum()).backward()
                    collect(**about, d=kappa)
            for shape in ((1, 28, 28), (3, 32, 32), (3, 64, 64), (997,)):
                order = torch.channels_last if len(shape) == 3 else torch.contiguous_format
                x = torch.zeros(4, *shape, dtype=torch.uint8).contiguous(memory_format=order)
                mean = torch.zeros(4, *shape, dtype=dtype).contiguous(memory_format=order).requires_grad_()
                gaussian_log_likelihood(x, mean, log_gamma, logits=True).sum().backward()
                mean = torch.zeros(64, *shape, dtype=dtype).contiguous(memory_format=order).requires_grad_()
                iw_nll(x, mean.unflatten(0, (4, 16)), torch.zeros(4, 16), log_gamma, logits=True).sum().backward()
                collect(**about, d=torch.Size(shape).numel())
        for b, k in ((4096, 1), (1, 4096)):
            x, mean = torch.zeros(b, 784, dtype=torch.uint8), torch.zeros(1).expand(b, k, 784)
            iw_nll(x, mean.contiguous(), torch.zeros(b, k), log_gamma)
            collect(capability=capability, dtype="float32", d=784, b=b, k=k)
    return found


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.test_kernels_compiled"], text=True,
                            capture_output=True, cwd=Path(__file__).parent.parent, env=environment, timeout=500)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_is_compiled_for_every_gpu(found):
    expected = {"reparameterize_forward", "reparameterize_backward", "iw_nll_forward", "iw_nll_combine",
                "iw_nll_backward"}
    for capability in CAPABILITIES:
        names = {entry["kernel"] for entry in found if entry["capability"] == capability}
        assert names == {name + "_kernel" for name in expected}


def test_nothing_spills_and_half_of_the_threads_fit(found):
    for entry in found:
        assert entry["stack"] == entry["local"] == 0, entry
        blocks = 65536 // (entry["registers"] * entry["threads"])  # registers of a multiprocessor
        assert min(32, blocks) * entry["threads"] >= 1024, entry


def test_the_mean_is_read_and_its_gradient_written_128_bits_at_a_time(found):
    checked = 0
    for entry in found:
        if entry["d"] % 16 or "combine" in entry["kernel"]:
            continue
        assert "v4.b32" in entry["loads"], entry
        if "backward" in entry["kernel"]:
            assert "v4.b32" in entry["stores"], entry
        checked += 1
    assert checked > 50


def test_the_loop_over_the_columns_needs_no_barrier(found):
    loops = [entry for entry in found if entry["kernel"] == "iw_nll_forward_kernel" and entry["d"] == 12288]
    assert loops and {entry["barriers_in_loop"] for entry in loops} == {0}


def test_many_samples_fill_a_gpu_of_132_multiprocessors(found):
    grids = {(entry["b"], entry["k"]): entry["programs"] for entry in found
             if "b" in entry and entry["kernel"] == "iw_nll_forward_kernel"}
    assert len(grids) == 2 and min(grids.values()) >= 4 * 132


if __name__ == "__main__":
    print(json.dumps(compile_all()))
