"""z and KL against float64 and against torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.compare import DEVICE, assert_matches, triton  # noqa: F401
from vae_ood.kernels.reparameterize import forward, reparameterize, reparameterize_ref

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
        assert_matches(lambda mu, log_sigma: reparameterize(mu, log_sigma, eps, per_dim), *leaves(shape, dtype))


@pytest.mark.usefixtures("triton")
def test_rows_may_have_a_stride():
    both = torch.randn(6, 10, device=DEVICE)  # as one linear layer with two heads gives them
    eps = torch.randn(10, 6, device=DEVICE).t()[:, ::2]
    assert_matches(lambda both: reparameterize(*both.chunk(2, 1), eps), both.requires_grad_())


def test_reference_matches_torch_distributions_and_its_gradients_numerical_ones():
    mu, log_sigma = (t.detach().cpu().double().requires_grad_() for t in leaves((4, 5), torch.float64))
    eps = torch.randn(4, 5, dtype=torch.float64)
    z, kl = reparameterize_ref(mu, log_sigma, eps, True)
    torch.testing.assert_close(z, mu + log_sigma.exp() * eps)
    torch.testing.assert_close(kl, kl_divergence(Normal(mu, log_sigma.exp()), Normal(0.0, 1.0)))
    for per_dim in (False, True):
        assert torch.autograd.gradcheck(lambda *x: reparameterize_ref(*x, eps, per_dim), (mu, log_sigma))


@pytest.mark.usefixtures("triton")
def test_compiles_without_a_graph_break_and_passes_opcheck():
    mu, log_sigma = leaves((6, 5), torch.float32)
    eps = torch.randn(6, 5, device=DEVICE)
    for per_dim in (False, True):
        torch.library.opcheck(forward, (mu, log_sigma, eps, per_dim))

    def function(mu, log_sigma):
        z, kl = reparameterize(mu, log_sigma, eps)
        return z.square().sum() + kl.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, plain = (torch.autograd.grad(f(mu, log_sigma), (mu, log_sigma)) for f in (compiled, function))
    torch.testing.assert_close(ours, plain)


def test_arguments_are_checked():
    x = torch.zeros(2, 3)
    for arguments in ((x, x, torch.zeros(2, 4)), (x, torch.zeros(3, 3), x), (x[0], x[0], x[0])):
        with pytest.raises(ValueError, match="do not fit"):
            reparameterize(*arguments)
