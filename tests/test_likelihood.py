"""The estimators against closed forms and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from vae_ood import likelihood
from vae_ood.data.images import to_unit
from vae_ood.kernels.iw_nll import log_normal
from vae_ood.likelihood import bits_per_dim, evaluate, log_prior_minus_log_q
from vae_ood.model import VAE

D, KAPPA, GAMMA = 24, 3, 0.01


class LinearVAE(VAE):
    """A linear decoder with orthogonal columns, whose posterior is a diagonal Gaussian in closed form; the encoder
    gives the exact posterior with mu shifted by `shift` sigma and sigma widened by `widen`."""

    logits = False

    def __init__(self, shift=0.0, widen=1.0):
        super().__init__((1, 4, 6), 0.1, KAPPA, GAMMA)
        rng = np.random.default_rng(0)
        columns = np.linalg.qr(rng.standard_normal((D, KAPPA)))[0] * [0.8, 0.4, 0.2]
        self.weight, self.bias = torch.tensor(columns).float(), torch.full((D,), 0.5)
        self.covariance = 1 / (1 + self.weight.square().sum(0) / GAMMA)
        self.shift, self.widen = shift, widen

    def encode(self, x):
        x = to_unit(x) if x.dtype == torch.uint8 else x
        sigma = self.covariance.sqrt().expand(len(x), -1)
        mu = (x.flatten(1) - self.bias) @ self.weight / GAMMA * self.covariance
        return mu + self.shift * sigma, (self.widen * sigma).log()

    def decode(self, z):
        return (z @ self.weight.T + self.bias).unflatten(1, self.shape)

    def exact_nll(self, pixels):
        weight = self.weight.double()
        marginal = MultivariateNormal(self.bias.double(), weight @ weight.T + GAMMA * torch.eye(D).double())
        return -marginal.log_prob(to_unit(pixels).double().flatten(1)).numpy()


@pytest.fixture
def pixels():
    """Uint8 images from about the linear model."""
    model, g = LinearVAE(), torch.Generator().manual_seed(1)
    x = model.decode(torch.randn(50, KAPPA, generator=g)) + GAMMA**0.5 * torch.randn(50, 1, 4, 6, generator=g)
    return (x * 255).round().clamp(0, 255).byte()


@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_exact_posterior_gives_the_exact_likelihood_for_every_k(pixels, k):
    model = LinearVAE()
    np.testing.assert_allclose(evaluate(model, pixels, k)["iw_nll"], model.exact_nll(pixels), atol=1e-4, rtol=0)


def test_inexact_posterior_converges_from_above(pixels):
    model = LinearVAE(shift=0.7, widen=1.4)
    exact = model.exact_nll(pixels)
    runs = {k: np.stack([evaluate(model, pixels, k, seed=s)["iw_nll"] - exact for s in range(20)])
            for k in (1, 8, 64, 512)}
    gaps = [runs[k].mean() for k in runs]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.5 and 0 < gaps[-1] < 0.02
    for k, gap in runs.items():  # exp(-iw_nll) is an unbiased estimate of p(x)
        ratio = np.exp(-gap)
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(ratio.size), k


def test_iw_nll_of_one_sample_is_the_negative_elbo_in_expectation(pixels):
    model = LinearVAE(shift=0.7, widen=1.4)
    results = [evaluate(model, pixels, 64, seed=s) for s in range(4)]
    singles = np.stack([evaluate(model, pixels, 1, seed=s)["iw_nll"] for s in range(200)])
    elbo = np.mean([r["nll"] for r in results])
    assert abs(singles.mean() - elbo) < 5 * singles.mean(1).std() / math.sqrt(200) + 0.02
    posterior = Normal(*(f(t) for f, t in zip((lambda m: m, torch.exp), model.encode(pixels), strict=True)))
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    np.testing.assert_allclose(results[0]["kl"], kl.numpy(), rtol=1e-5)
    np.testing.assert_allclose(results[0]["nll"], results[0]["kl"] + 0.5 * D * (
        results[0]["mse"] / GAMMA + math.log(2 * math.pi * GAMMA)), rtol=1e-6)


def test_log_prior_minus_log_q_matches_torch_distributions_in_float64():
    g = torch.Generator().manual_seed(0)
    mu, log_sigma, eps = (torch.randn(5, *s, generator=g, dtype=torch.float64) for s in ((4,), (4,), (3, 4)))
    z = mu[:, None] + log_sigma.exp()[:, None] * eps
    prior, q = Normal(torch.zeros(4).double(), torch.ones(4).double()), Normal(mu[:, None], log_sigma.exp()[:, None])
    torch.testing.assert_close(log_prior_minus_log_q(z, eps, log_sigma), (prior.log_prob(z) - q.log_prob(z)).sum(-1),
                               rtol=1e-12, atol=1e-12)


def test_bits_per_dim_is_the_code_length_of_8_bit_data():
    assert bits_per_dim(0.0, 784, 1.0) == math.log2(255)  # a density of 1, over bins 1/255 wide
    assert bits_per_dim(0.0, 784, 1.0, dequantize=True) == 8  # and 1/256
    gamma, mean = 0.01, 0.4  # a density that hardly changes within a bin: -log2 of the bin's mass
    x = torch.arange(60, 150).double() / 255
    normal = Normal(torch.tensor(mean).double(), torch.tensor(gamma).double().sqrt())
    mass = normal.cdf(x + 1 / 510) - normal.cdf(x - 1 / 510)
    nll = -log_normal((x - mean).square(), 1, torch.tensor(gamma).double().log())
    torch.testing.assert_close(bits_per_dim(nll, 1, gamma), -mass.log2(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("gamma", [1 / 254**2, 1 / 255**2, 1 / 256**2])
def test_bits_per_dim_of_a_density_narrower_than_a_level_is_none(gamma):
    assert (bits_per_dim(0.0, 1, gamma) is None) == (gamma < 1 / 255**2)
    # with noise as wide as a level it is a code length, at least the entropy of one level: 0 bits
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    nll = -log_normal(((128 + u) / 256 - 128.5 / 256).square(), 1, torch.tensor(gamma).double().log())
    assert bits_per_dim(nll.mean(), 1, gamma, dequantize=True) > 0


@pytest.mark.parametrize("dequantize", [False, True])
def test_evaluate_does_not_depend_on_chunks_or_on_the_other_images(monkeypatch, dequantize):
    torch.manual_seed(0)
    model = VAE((3, 8, 9), 0.1, 5, 0.02)
    pixels = torch.randint(256, (13, 3, 8, 9), dtype=torch.uint8)
    whole = evaluate(model, pixels, 7, seed=3, dequantize=dequantize)
    part = evaluate(model, pixels[:6], 7, seed=3, dequantize=dequantize)
    for chunk in (1, 3, 20):
        monkeypatch.setattr(likelihood, "chunk_size", lambda model, chunk=chunk: chunk)
        small = evaluate(model, pixels, 7, seed=3, dequantize=dequantize)
        for name, values in whole.items():
            np.testing.assert_allclose(small[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    tail = evaluate(model, pixels[6:], 7, seed=3, dequantize=dequantize, first=6)
    for name, values in whole.items():
        np.testing.assert_allclose(np.concatenate([part[name], tail[name]]), values, rtol=1e-5, atol=1e-7)
    assert not np.allclose(evaluate(model, pixels, 7, seed=4)["nll"], whole["nll"], rtol=1e-9)


def test_chunks_keep_to_the_memory_budget(monkeypatch):
    model = VAE((3, 32, 32), 0.25, 8)
    monkeypatch.setattr(likelihood, "MEMORY_BUDGET", 8 * 2**20)
    n = likelihood.chunk_size(model)
    held, peak = 0, 0

    def pack(tensor):
        nonlocal held, peak
        held += tensor.numel() * 4
        peak = max(peak, held)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):  # keeps all activations: more than inference
        model.decode(torch.randn(n, 8))
    assert n > 1 and peak < 1.5 * 8 * 2**20
