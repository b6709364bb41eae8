"""What only a GPU can show, in a few minutes: pytest -m cuda. Skipped where there is none."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.compare import assert_matches, cuda_cpp, each, triton  # noqa: F401
from tests.conftest import ROOT
from tests.test_kernels_iw_nll import CL, log_of, problem, ratio
from tests.test_kernels_reparameterize import leaves
from tests.test_run import tiny
from vae_ood import checkpoint
from vae_ood.features import Features
from vae_ood.kernels.iw_nll import gaussian_log_likelihood, iw_nll
from vae_ood.kernels.reparameterize import reparameterize
from vae_ood.likelihood import evaluate
from vae_ood.model import VAE
from vae_ood.scores import SCORES

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SAMPLES = [((1,), None, None), ((997,), None, None), ((1, 28, 28), None, CL), ((3, 32, 32), CL, CL),
           ((3, 32, 32), None, CL), ((5, 3, 7), CL, None)]
TRAINING = ("run.py", "--data", "sprites", "--device", "cuda", "--alpha", 0.25, "--iters", 2000, "--no-eval",
            "--checkpoint-seconds", 0.2)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (64, 32), (37, 33), (3, 512), (2, 1031)], ids=str)
@pytest.mark.usefixtures("triton")
def test_reparameterize(shape, dtype):
    eps = torch.randn(shape, device="cuda")
    for per_dim in (False, True):
        assert_matches(lambda mu, log_sigma: reparameterize(mu, log_sigma, eps, per_dim=per_dim), *leaves(shape, dtype))


@DTYPES
@pytest.mark.parametrize(("sample", "x_order", "mean_order"), SAMPLES, ids=str)
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32], ids=str)
@pytest.mark.usefixtures("each")
def test_gaussian_log_likelihood(sample, x_order, mean_order, dtype, pixels):
    for b, gamma in ((1, 1e-6), (5, 0.0055), (64, 1.0)):
        x, mean = problem(b, sample, x_order, mean_order, None, dtype, pixels)
        assert_matches(lambda mean, log_gamma: gaussian_log_likelihood(x, mean, log_gamma, True, True), mean,
                       log_of(gamma))


@DTYPES
@pytest.mark.parametrize(("sample", "x_order", "mean_order"), SAMPLES, ids=str)
@pytest.mark.usefixtures("each")
def test_iw_nll(sample, x_order, mean_order, dtype):
    for b, k, gamma in ((1, 1, 0.0055), (3, 17, 0.1), (64, 5, 1e-4)):
        x, mean = problem(b, sample, x_order, mean_order, k, dtype)
        assert_matches(lambda mean, log_ratio, log_gamma: iw_nll(
            x, mean, log_ratio, log_gamma, True, return_squared_error=True), mean, ratio(b, k), log_of(gamma))


@pytest.mark.parametrize("flags", [("--no-compile",), ("--compile",), ("--compile", "--precision", "tf32"),
                                   ("--no-compile", "--precision", "bfloat16")], ids=" ".join)
def test_training_learns_and_goes_on_bit_for_bit(command, tmp_path, flags):
    assert "without torch.compile" not in command(*TRAINING, *flags, "--out", tmp_path / "whole").stdout
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 700 and all(np.isfinite(record["loss"]) for record in log)
    pieces = tmp_path / "pieces"
    process = subprocess.Popen([sys.executable, *map(str, TRAINING), *flags, "--out", pieces], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (pieces / "ckpt.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert checkpoint.load(pieces / "ckpt.pt")["step"] < 2000
    assert "resuming" in command(*TRAINING, *flags, "--resume", "--out", pieces).stdout
    whole, again = (checkpoint.load(out / "ckpt.pt")["model"] for out in (tmp_path / "whole", pieces))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("gamma", ["homotopy", "learn"])
def test_a_captured_step_is_an_eager_one(gamma):
    captured, eager = tiny("cuda", gamma=gamma, compile=None), tiny("cuda", gamma=gamma)
    assert captured.graphed and not eager.graphed
    for step in range(100):
        got, expected = captured.step(step), eager.step(step)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-3, atol=1e-2, msg=f"step {step}")
        torch.testing.assert_close(got.kl, expected.kl, rtol=1e-2, atol=1e-2)
    assert captured.graph and captured.compiled


@pytest.fixture(scope="module")
def models():
    """The same small model on both devices."""
    torch.manual_seed(0)
    model = VAE((3, 32, 32), 0.25, 16, gamma=0.01).eval().requires_grad_(False)
    other = VAE((3, 32, 32), 0.25, 16).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return model, other.to("cuda", memory_format=torch.channels_last)


def images(n):
    return torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, 3, 32, 32), np.uint8))


def test_evaluation_is_that_of_the_cpu(models):
    cpu, cuda = (evaluate(model, images(200), 8) for model in models)
    for name in cpu:
        np.testing.assert_allclose(cuda[name], cpu[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_scores_are_those_of_the_cpu(models):
    found = []
    for model in models:
        train, new = (Features(model, images(n), lambda n=n, model=model: evaluate(model, images(n), 4))
                      for n in (300, 50))
        found.append({name: SCORES[name].fit(train)(new) for name in SCORES if name != "regret"})
    for name, scores in found[0].items():
        np.testing.assert_allclose(found[1][name], scores, rtol=1e-2, atol=1e-2 * np.std(scores), err_msg=name)
