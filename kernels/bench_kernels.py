"""Benchmarks of the fused ops: pytest kernels/bench_kernels.py

On CUDA: eager torch, torch.compile, the Triton kernels and, where they can be built, those in CUDA C++, with the
bandwidth that each reaches and its peak memory; on a CPU: eager against compiled torch. Prints a table and writes it to
runs/kernels_<device>.csv. The bytes are the op's inputs and outputs, each moved once; the floor is their time at
3.35 TB/s (the HBM3 of an H100 SXM).

python -m kernels.bench_kernels prints the bytes of every op and size: results/kernels.md.
"""

import csv
import functools
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch.utils.benchmark

from vae_ood import kernels  # not relative: pytest takes this file for kernels.bench_kernels, and OVERRIDE counts here
from vae_ood.kernels import cuda
from vae_ood.kernels.iw_nll import gaussian_log_likelihood, iw_nll, tile
from vae_ood.kernels.reparameterize import reparameterize

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NAME = torch.cuda.get_device_name() if CUDA else "cpu"
BANDWIDTH = 3.35e12  # bytes a second
SIZES = {  # the sizes of the commands: (B, K, d), where d is kappa for reparameterize
    "reparameterize": [(64, 1, 32), (1024, 1, 32), (4096, 1, 32), (262144, 1, 32)],
    "gaussian_log_likelihood": [(64, 1, 784), (64, 1, 3072), (1024, 1, 784), (1024, 1, 3072), (16384, 1, 3072)],
    "iw_nll": [(256, 16, 784), (256, 16, 3072), (4096, 1, 3072), (1, 4096, 3072), (2048, 16, 784), (2048, 16, 3072),
               (64, 4096, 784), (16384, 16, 3072)],
}
LARGEST = math.inf if CUDA else 2e7  # elements
QUICK = {  # three an op, in float32: pytest kernels/bench_kernels.py -k quick
    "reparameterize": [(64, 1, 32), (4096, 1, 32), (262144, 1, 32)],
    "gaussian_log_likelihood": [(64, 1, 3072), (1024, 1, 3072), (16384, 1, 3072)],
    "iw_nll": [(256, 16, 784), (256, 16, 3072), (2048, 16, 3072)]}


def cases():
    """The benchmarked (op, B, K, d, dtype)."""
    for op, sizes in SIZES.items():
        for size in sizes:
            for dtype in (torch.float32, torch.bfloat16) if CUDA else (torch.float32,):
                if math.prod(size) <= LARGEST:
                    quick = "quick-" * (dtype == torch.float32 and size in QUICK[op])
                    yield pytest.param(op, *size, dtype, id=f"{quick}{op}-{size}-{dtype}")


def traffic(op, direction, b, k, d, itemsize):
    """Bytes that the op has to move: every input read once, every output written once (uint8 pixels)."""
    if op == "reparameterize":  # forward: mu, log_sigma -> z, kl; backward: mu, log_sigma, dz, dkl -> both gradients
        return {"forward": 3, "backward": 5}[direction] * b * d * itemsize + 4 * b * d + 4 * b  # eps is float32
    large = {"forward": 1, "backward": 2}[direction] * b * k * d * itemsize + b * d  # the mean, its gradient, x
    if direction == "backward":  # the gradients by the squared errors
        return large + 4 * b * k
    if op == "gaussian_log_likelihood":  # log_gamma; log_likelihood and squared_error
        return large + 4 + 8 * b
    return large + 4 + 4 * b + 8 * b * k  # log_gamma; the NLL; log_prior_minus_log_q and squared_error


def repeated(op, direction, b, k, d, itemsize):
    """Bytes that the kernels move beyond `traffic`: mostly x, read again by each tile of samples, from the cache."""
    if op == "reparameterize":
        return 0
    config = tile(k, d, itemsize)
    tiles, blocks = -(-k // config["TILE"]), -(-d // config["BLOCK"])
    x_again = (tiles - 1) * b * d
    if direction == "backward":
        return x_again + 4 * b * k * (blocks - 1)  # the samples' gradients, once for each block of columns
    log_gamma_again, nll_of_tiles = 4 * (b * tiles - 1), 2 * 4 * b * tiles if tiles > 1 else 0
    return x_again + log_gamma_again + nll_of_tiles


def problem(op, b, k, d, dtype):
    """(function, leaves): the op on random inputs, and what it is differentiated by."""
    g = torch.Generator(DEVICE).manual_seed(0)
    new = functools.partial(torch.randn, generator=g, device=DEVICE)
    if op == "reparameterize":
        leaves = [new(b, d, dtype=dtype).requires_grad_() for _ in range(2)]
        eps = new(b, d)
        return lambda: reparameterize(*leaves, eps), leaves
    x = torch.randint(256, (b, d), dtype=torch.uint8, generator=g, device=DEVICE)
    log_gamma = torch.tensor(-5.0, device=DEVICE, requires_grad=True)
    if op == "gaussian_log_likelihood":
        leaves = [new(b, d, dtype=dtype).requires_grad_(), log_gamma]
        return lambda: (gaussian_log_likelihood(x, *leaves, logits=True),), leaves
    leaves = [new(b, k, d, dtype=dtype).requires_grad_(), new(b, k).requires_grad_(), log_gamma]
    return lambda: (iw_nll(x, *leaves, logits=True),), leaves


def seconds(function):
    """(median, 20% and 80% quantile) of one call."""
    if CUDA:
        from triton.testing import do_bench
        return [1e-3 * t for t in do_bench(function, quantiles=[0.5, 0.2, 0.8])]
    timer = torch.utils.benchmark.Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=0.5)
    return [times.median, *torch.tensor(times.times).quantile(torch.tensor([0.2, 0.8])).tolist()]


def peak_memory(function):
    """Bytes that `function` allocates at its peak beyond what is there already; NaN on a CPU."""
    if not CUDA:
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def paths(op):
    """What computes the op here."""
    if not CUDA:
        return "eager", "compiled"
    try:
        if op != "reparameterize":
            cuda.extension(DEVICE)
            return "eager", "compiled", "triton", "cuda"
    except cuda.Unavailable as error:
        warnings.warn(str(error), stacklevel=1)
    return "eager", "compiled", "triton"


@functools.cache
def copy_bandwidth():
    """Bytes a second (read and written) of a copy from device memory to device memory."""
    source = torch.empty(2**30 if CUDA else 2**26, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))[0]


@pytest.fixture(scope="module")
def table(request):
    """The rows of the benchmark; afterwards they are printed and written to runs/."""
    rows = []
    with torch._functorch.config.patch(donated_buffer=False):  # the backward is timed on a kept graph
        yield rows
    path = Path("runs", f"kernels_{NAME.replace(' ', '_')}.csv")
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        show(rows, path)


def show(rows, path):
    """Print the table."""
    print(f"\n{NAME}, torch {torch.__version__}, copy {copy_bandwidth() / 1e9:.0f} GB/s; eager, compiled"
          + (", Triton and CUDA C++" if CUDA else ": no GPU here, the kernels are not timed") + f"; {path}")
    print(f"{'op':<24}{'direction':<10}{'B':>7}{'K':>6}{'d':>6} {'dtype':<9}{'path':<9}{'us':>10}{'GB/s':>7}"
          f"{'of copy':>8}{'floor us':>9}{'peak MB':>9}")
    for row in rows:
        print(f"{row['op']:<24}{row['direction']:<10}{row['B']:>7}{row['K']:>6}{row['d']:>6} {row['dtype']:<9}"
              f"{row['path']:<9}{row['us']:>10.1f}{row['gb_per_s']:>7.0f}{row['of_copy']:>8.2f}{row['floor_us']:>9.2f}"
              f"{row['peak_bytes'] / 2**20:>9.1f}")


@pytest.mark.parametrize(("op", "b", "k", "d", "dtype"), list(cases()))
def test_speed(op, b, k, d, dtype, table, monkeypatch):
    """Time, bandwidth and peak memory of one op and size on every path; on a GPU, Triton's against the targets."""
    shares, peaks = {}, {}
    for path in paths(op):
        monkeypatch.setattr(kernels, "OVERRIDE", path in ("triton", "cuda"))
        monkeypatch.setattr(cuda, "IMPLEMENTATION", "cuda" if path == "cuda" else "triton")
        torch.compiler.reset()
        function, leaves = problem(op, b, k, d, dtype)
        run = torch.compile(function, fullgraph=True, dynamic=False) if path == "compiled" else function
        outputs = run()
        cotangents = [torch.ones_like(output) for output in outputs]

        def forward(run=run):
            with torch.no_grad():
                return run()

        def backward(outputs=outputs, leaves=leaves, cotangents=cotangents):
            return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)

        def both(run=run, leaves=leaves, cotangents=cotangents):
            return torch.autograd.grad(run(), leaves, cotangents)

        for direction, call in (("forward", forward), ("backward", backward), ("both", both)):
            moved = sum(traffic(op, part, b, k, d, dtype.itemsize)
                        for part in (("forward", "backward") if direction == "both" else (direction,)))
            median, low, high = seconds(call)
            shares[path, direction] = moved / median / copy_bandwidth()
            peaks[path, direction] = peak_memory(call)
            table.append({
                "device": NAME, "op": op, "direction": direction, "B": b, "K": k, "d": d,
                "dtype": str(dtype).removeprefix("torch."), "path": path, "us": 1e6 * median, "us_p20": 1e6 * low,
                "us_p80": 1e6 * high, "bytes": moved, "floor_us": 1e6 * moved / BANDWIDTH,
                "gb_per_s": moved / median / 1e9, "of_copy": shares[path, direction],
                "peak_bytes": peaks[path, direction]})
    if CUDA and op != "reparameterize" and b * k * d >= 25e6:
        assert shares["triton", "forward"] >= 0.85
        assert peaks["triton", "forward"] <= 0.5 * peaks["eager", "forward"]


if __name__ == "__main__":
    print("""Bytes of the fused ops (`python -m kernels.bench_kernels`): the least that each has to move, every input
read and every output written once, with uint8 pixels; its time at 3.35 TB/s; and what the kernels' loads and stores
move beside that, as counted in Triton's interpreter (tests/test_kernels.py), repeated reads from the cache included.
The backward's few operations on [B] and [B, K] floats in torch are not in it.
""")
    print("| op | direction | B | K | d | dtype | least (MB) | floor (µs) | moved / least |\n|" + "---|" * 9)
    for op, sizes in SIZES.items():
        for b, k, d in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                for direction in ("forward", "backward"):
                    size = b, k, d, dtype.itemsize
                    least = traffic(op, direction, *size)
                    print(f"| `{op}` | {direction} | {b:,} | {k:,} | {d:,} | {str(dtype).removeprefix('torch.')} | "
                          f"{least / 1e6:.3f} | {1e6 * least / BANDWIDTH:.2f} | "
                          f"{1 + repeated(op, direction, *size) / least:.3f} |")
