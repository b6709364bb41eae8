"""What the three ops have in common: where they run, what they move, and a training step through all of them."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.compare import DEVICE, triton  # noqa: F401
from tests.conftest import ROOT
from vae_ood import kernels
from vae_ood.kernels import bench_kernels, use_kernel
from vae_ood.kernels.iw_nll import gaussian_log_likelihood, iw_nll
from vae_ood.kernels.reparameterize import reparameterize
from vae_ood.likelihood import evaluate
from vae_ood.model import VAE
from vae_ood.step import Objective


@pytest.fixture
def moved(monkeypatch):
    """Counts the bytes that the kernels load and store, in the interpreter: {"load", "store"}."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import interpreter_builder
    if DEVICE == "cuda":
        pytest.skip("counts in the interpreter, which is not in use where there is a GPU")
    monkeypatch.setattr(kernels, "OVERRIDE", True)
    count = {"load": 0, "store": 0}
    for kind in count:
        original = getattr(interpreter_builder, f"create_masked_{kind}")
        at = {"load": 1, "store": 2}[kind]  # the mask among the arguments

        def counted(*arguments, kind=kind, at=at, original=original):
            count[kind] += int(arguments[at].data.sum()) * arguments[0].get_element_ty().primitive_bitwidth // 8
            return original(*arguments)

        monkeypatch.setattr(interpreter_builder, f"create_masked_{kind}", counted)
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "b", "k", "d"), [
    ("reparameterize", 64, 1, 32), ("reparameterize", 5, 1, 3), ("gaussian_log_likelihood", 7, 1, 784),
    ("gaussian_log_likelihood", 3, 1, 3072), ("gaussian_log_likelihood", 2, 1, 997), ("iw_nll", 9, 1, 784),
    ("iw_nll", 3, 4, 3072), ("iw_nll", 2, 17, 784)])
def test_every_byte_is_moved_once(op, b, k, d, dtype, moved):
    function, leaves = bench_kernels.problem(op, b, k, d, dtype)
    for direction in ("forward", "backward"):
        moved["load"] = moved["store"] = 0
        if direction == "forward":
            outputs = function()
        else:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        size = b, k, d, dtype.itemsize
        least, again = (count(op, direction, *size) for count in (bench_kernels.traffic, bench_kernels.repeated))
        assert moved["load"] + moved["store"] == least + again
        assert again < 0.13 * least


def test_the_table_of_bytes_is_up_to_date(command):
    assert (ROOT / "results/kernels.md").read_text() == command("-m", "kernels.bench_kernels").stdout


def test_triton_runs_on_cuda_unless_float64_or_missing(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "driver_starts", lambda: True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert not use_kernel(torch.zeros(1, dtype=dtype))
        assert use_kernel(SimpleNamespace(is_cuda=True, dtype=dtype)) == (dtype != torch.float64)
    monkeypatch.setattr(kernels, "tl", None)
    assert not use_kernel(SimpleNamespace(is_cuda=True, dtype=torch.float32))


def test_plain_torch_runs_where_the_driver_of_triton_does_not_start(monkeypatch):
    driver = pytest.importorskip("triton.runtime").driver

    def no_compiler():
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_device=no_compiler))
    kernels.driver_starts.cache_clear()
    with pytest.warns(UserWarning, match="plain torch instead of .* C compiler"):
        assert not use_kernel(SimpleNamespace(is_cuda=True, dtype=torch.float32))
    compiled = torch.compile(lambda x: x + kernels.driver_starts(), fullgraph=True, backend="aot_eager")
    assert float(compiled(torch.zeros(()))) == 0
    monkeypatch.undo()
    kernels.driver_starts.cache_clear()


@pytest.mark.parametrize("forced", [False, True])
def test_data_get_no_gradient_on_either_path(monkeypatch, forced):
    if forced:
        pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "OVERRIDE", forced)
    data, leaf = (torch.rand(2, 3, device=DEVICE, requires_grad=True) for _ in range(2))
    gamma = torch.tensor(0.0, device=DEVICE)
    outputs = (reparameterize(leaf, leaf, data)[0], gaussian_log_likelihood(data, leaf, gamma),
               iw_nll(data, leaf[:, None], gamma.expand(2, 1), gamma))
    for output in outputs:
        assert torch.autograd.grad(output.sum(), (leaf, data), allow_unused=True)[1] is None


@pytest.mark.parametrize("gamma", ["learned", "profiled"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.usefixtures("triton")
def test_training_step_is_the_same_on_both_paths(monkeypatch, gamma, precision):
    torch.manual_seed(0)
    model = VAE((3, 9, 8), 0.1, 5, 0.1, learn_gamma=gamma == "learned").to(DEVICE, memory_format=torch.channels_last)
    x = torch.randint(256, (6, 3, 9, 8), dtype=torch.uint8).to(DEVICE, memory_format=torch.channels_last)
    eps = torch.randn(6, 5, device=DEVICE)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(forced):
        monkeypatch.setattr(kernels, "OVERRIDE", forced)
        probe = torch.zeros_like(eps, requires_grad=True)
        objective = Objective(model, len(x), gamma == "profiled", precision)
        loss, *others = objective(x, eps, probe, torch.tensor(1e-10, device=DEVICE))
        return loss, *others, *torch.autograd.grad(loss, [*parameters, probe])

    limits = {"float32": {"rtol": 1e-4, "atol": 1e-5},
              "bfloat16": {"rtol": 0.05, "atol": 0.05}}[precision]  # of weights' gradients
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for ours, plain in zip(step(True), step(False), strict=True):
            torch.testing.assert_close(ours, plain, **limits)


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
def test_inductor_compiles_a_training_step_around_the_kernels():
    torch.manual_seed(0)
    model, eps = VAE((3, 8, 8), 0.1, 5, 0.1, learn_gamma=True).to(DEVICE), torch.randn(6, 5, device=DEVICE)
    arguments = (torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, device=DEVICE), eps, torch.zeros_like(eps),
                 torch.tensor(1.0, device=DEVICE))
    losses, gradients, objective = [], [], Objective(model, 6)
    for terms in (objective, torch.compile(objective, fullgraph=True)):
        losses.append(terms(*arguments)[0])
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.usefixtures("triton")
def test_evaluation_is_the_same_on_both_paths(monkeypatch, dequantize):
    torch.manual_seed(0)
    model = VAE((3, 9, 8), 0.1, 5, 0.1).to(DEVICE)
    pixels = torch.randint(256, (7, 3, 9, 8), dtype=torch.uint8)
    ours = evaluate(model, pixels, 11, dequantize=dequantize)
    monkeypatch.setattr(kernels, "OVERRIDE", False)
    for name, values in evaluate(model, pixels, 11, dequantize=dequantize).items():
        torch.testing.assert_close(ours[name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_everything_runs_without_triton():
    code = ("import sys; sys.modules['triton'] = None; import torch; from vae_ood.step import Objective\n"
            "from vae_ood.model import VAE\n"
            "model, eps = VAE((1, 8, 8), 0.1, 2), torch.zeros(3, 2, requires_grad=True)\n"
            "x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)\n"
            "Objective(model, 3)(x, eps, eps, torch.tensor(1.0))[0].backward()")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
