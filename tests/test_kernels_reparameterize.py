"""z and KL against float64, the noise against Philox and against the normal distribution."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from kernels.reparameterize import forward, normal_ref, philox_ref, reparameterize, reparameterize_ref
from tests.compare import DEVICE, assert_matches, triton  # noqa: F401

SHAPES = [(1, 1), (1, 32), (64, 32), (5, 3), (37, 33), (3, 512), (2, 1031)]


def leaves(shape, dtype):
    g = torch.Generator().manual_seed(1)
    return [(scale * torch.randn(shape, generator=g)).to(DEVICE, dtype).requires_grad_() for scale in (2, 0.7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("triton")
def test_kernel_matches_float64(shape, dtype):
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for per_dim in (False, True):
        assert_matches(lambda mu, log_sigma: reparameterize(mu, log_sigma, eps, per_dim=per_dim), *leaves(shape, dtype))
        assert_matches(lambda mu, log_sigma: reparameterize(mu, log_sigma, seed=3, offset=5, per_dim=per_dim),
                       *leaves(shape, dtype))


@pytest.mark.usefixtures("triton")
def test_rows_may_have_a_stride():
    both = torch.randn(6, 10, device=DEVICE)  # as one linear layer with two heads gives them
    assert_matches(lambda both: reparameterize(*both.chunk(2, 1), seed=0), both.requires_grad_())


def test_reference_matches_torch_distributions_and_its_gradients_numerical_ones():
    mu, log_sigma = (t.detach().cpu().double().requires_grad_() for t in leaves((4, 5), torch.float64))
    z, kl = reparameterize_ref(mu, log_sigma, None, 3, 0, True)
    eps = normal_ref((4, 5), 3, 0, "cpu").double()
    torch.testing.assert_close(z, mu + log_sigma.exp() * eps)
    torch.testing.assert_close(kl, kl_divergence(Normal(mu, log_sigma.exp()), Normal(0.0, 1.0)))
    for per_dim in (False, True):
        assert torch.autograd.gradcheck(lambda *x: reparameterize_ref(*x, eps, 0, 0, per_dim), (mu, log_sigma))


@pytest.mark.parametrize(("key", "counter", "words"), [  # known answers of Random123, the authors' own code
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_known_answers(key, counter, words):
    assert philox_ref(key, counter) == words
    tensors = philox_ref(key, [torch.tensor([c, 0]) for c in counter])
    assert tuple(int(t[0]) for t in tensors) == words


@pytest.mark.parametrize("offset", [0, 1, 16, 2**31, 2**32 - 1, 2**33 + 5, 2**62 - 1])
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 3, 2**40 + 7, 2**63 - 1])
@pytest.mark.usefixtures("triton")
def test_kernel_draws_the_noise_of_the_reference(seed, offset):
    zero = torch.zeros(9, 14, device=DEVICE)
    eps, _ = reparameterize(zero, zero, seed=seed, offset=offset)
    torch.testing.assert_close(eps, normal_ref(zero.shape, seed, offset, DEVICE), rtol=0, atol=2e-6)


@pytest.mark.usefixtures("triton")
def test_backward_draws_the_noise_of_the_forward():
    mu, log_sigma = leaves((8, 32), torch.float32)
    z, _ = reparameterize(mu, log_sigma, seed=2, offset=9)
    gradient = torch.autograd.grad(z.sum(), log_sigma)[0]  # sigma * eps
    torch.testing.assert_close(gradient, (z - mu).detach(), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_the_other_rows_or_on_kappa():
    whole = normal_ref((16, 12), 1, 2, "cpu")
    torch.testing.assert_close(normal_ref((5, 7), 1, 2, "cpu"), whole[:5, :7], rtol=0, atol=0)


def test_noise_is_standard_normal_and_independent():
    """Fixed seeds, so no test here can fail by chance twice; limits for an error rate of 1e-6 each at first sight."""
    n = 2**20
    eps = normal_ref((2**14, 64), 0, 0, "cpu").double()
    flat = eps.flatten()
    assert abs(flat.mean()) < 4.9 / math.sqrt(n)
    assert abs(flat.var() - 1) < 4.9 * math.sqrt(2 / n)
    assert abs((flat**4).mean() - 3) < 4.9 * math.sqrt(96 / n)
    cdf = torch.special.ndtr(flat.sort().values)
    distance = (cdf - torch.arange(1, n + 1) / n).abs().max()  # Kolmogorov-Smirnov
    assert distance < 2.7 / math.sqrt(n)  # 2 exp(-2 * 2.7^2) = 9e-7
    others = {"rows": (eps[:-1], eps[1:]), "columns": (eps[:, :-1], eps[:, 1:]), "blocks": (eps[:, :-4], eps[:, 4:]),
              "cos and sin": (eps[:, ::2], eps[:, 1::2])}
    for name, (seed, offset) in {"offsets": (0, 1), "high offsets": (0, 2**32), "seeds": (1, 0),
                                 "high seeds": (2**32, 0)}.items():
        others[name] = (eps, normal_ref(eps.shape, seed, offset, "cpu").double())
    for name, (a, b) in others.items():
        for power in (1, 2):
            correlation = torch.corrcoef(torch.stack([a.flatten() ** power, b.flatten() ** power]))[0, 1]
            assert abs(correlation) < 4.9 / math.sqrt(a.numel()), (name, power)


@pytest.mark.usefixtures("triton")
def test_compiles_without_a_graph_break_and_passes_opcheck():
    mu, log_sigma = leaves((6, 5), torch.float32)
    eps = torch.randn(6, 5, device=DEVICE)
    for arguments in ((None, 3, 4, False), (None, 3, 4, True), (eps, 0, 0, False)):
        torch.library.opcheck(forward, (mu, log_sigma, *arguments))

    def function(mu, log_sigma, offset):
        z, kl = reparameterize(mu, log_sigma, seed=3, offset=offset)
        return z.square().sum() + kl.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for offset in (0, 1, 7, 2**40):
        ours, plain = (torch.autograd.grad(f(mu, log_sigma, offset), (mu, log_sigma)) for f in (compiled, function))
        torch.testing.assert_close(ours, plain)


def test_arguments_are_checked():
    x = torch.zeros(2, 3)
    for arguments in ({}, {"eps": x, "seed": 1}, {"eps": torch.zeros(2, 4)}):
        with pytest.raises(ValueError, match="eps"):
            reparameterize(x, x, **arguments)
    with pytest.raises(ValueError, match="do not fit"):
        reparameterize(x, torch.zeros(3, 3), seed=1)
    for seed, offset in ((-1, 0), (2**63, 0), (0, -1), (0, 2**62)):
        with pytest.raises(ValueError, match="is not in"):
            reparameterize(x, x, seed=seed, offset=offset)
