"""The importance-weighted NLL and, of one sample, the Gaussian log-likelihood: against float64, torch.distributions and
closed forms, over shapes, orders, types and extreme weights."""

import math

import pytest
import torch
from torch.distributions import Normal

from tests.compare import DEVICE, assert_matches, cuda_cpp, each, triton  # noqa: F401
from vae_ood.kernels.iw_nll import (
    _combine_kernel,
    forward,
    gaussian_log_likelihood,
    iw_nll,
    iw_nll_ref,
    squared_error_backward,
)

CL = torch.channels_last
ORDERS = [  # sample, memory format of x, memory format of the mean
    ((1,), None, None), ((3,), None, None), ((997,), None, None), ((1, 28, 28), None, CL), ((3, 32, 32), None, None),
    ((3, 32, 32), CL, CL), ((3, 32, 32), None, CL), ((3, 32, 32), CL, None), ((3, 64, 64), CL, CL),
    ((5, 3, 7), None, CL), ((2, 1, 9), CL, None), ((4, 6), None, None),
]


def problem(b, sample, x_order=None, mean_order=None, k=None, dtype=torch.float32, pixels=torch.uint8):
    """x [B, *S] and logits [B, *S] or [B, K, *S] of random images in the given orders."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (b, *sample), generator=g, dtype=torch.uint8)
    x = x if pixels == torch.uint8 else (x / 255).to(pixels)
    mean = torch.randn(b * (k or 1), *sample, generator=g).to(dtype)
    x = x.contiguous(memory_format=x_order) if x_order else x
    mean = mean.contiguous(memory_format=mean_order) if mean_order else mean
    return x.to(DEVICE), (mean.unflatten(0, (b, k)) if k else mean).to(DEVICE).requires_grad_()


def log_of(gamma):
    return torch.tensor(float(gamma), device=DEVICE).log().requires_grad_()


def ratio(b, k, scale=3.0):
    g = torch.Generator().manual_seed(1)
    return (scale * torch.randn(b, k, generator=g)).to(DEVICE).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sample", "x_order", "mean_order"), ORDERS, ids=str)
@pytest.mark.usefixtures("each")
def test_kernel_matches_float64(sample, x_order, mean_order, dtype):
    for b, k, gamma, pixels, logits in ((1, 1, 0.0055, torch.uint8, True), (3, 5, 0.1, torch.uint8, True),
                                        (1, 17, 10.0, torch.float32, False), (5, 2, 1e-6, torch.uint8, True)):
        x, mean = problem(b, sample, x_order, mean_order, k, dtype, pixels)
        assert_matches(lambda mean, log_ratio, log_gamma: iw_nll(
            x, mean, log_ratio, log_gamma, logits, return_squared_error=True), mean, ratio(b, k), log_of(gamma))
    for b, gamma, pixels, logits in ((1, 1e-6, torch.uint8, True), (3, 0.01, torch.float32, False)):
        x, mean = problem(b, sample, x_order, mean_order, dtype=dtype, pixels=pixels)
        assert_matches(lambda mean, log_gamma: gaussian_log_likelihood(
            x, mean, log_gamma, logits, return_squared_error=True), mean, log_of(gamma))


@pytest.mark.parametrize("k", [1, 3, 4, 5, 64])
@pytest.mark.usefixtures("each")
def test_extreme_weights(k):
    x, mean = problem(3, (2,), k=k)
    for scale in (1.0, 1e4):
        log_ratio = ratio(3, k, scale).detach()
        log_ratio[0, : k // 2] = -math.inf
        log_ratio[1] += 1e4
        log_ratio[2] -= 1e4
        assert_matches(lambda mean, log_ratio, log_gamma: (iw_nll(x, mean, log_ratio, log_gamma, True),), mean,
                       log_ratio.requires_grad_(), log_of(0.1), floor=1e-3)  # gradients by weights rounded to 1e-3
        ours = iw_nll(x, mean, log_ratio, log_of(0.1), True).double()
        exact = iw_nll_ref(x, mean.double(), log_ratio.double(), log_of(0.1).double(), True)[0]
        assert ((ours - exact).abs() <= 4 * 2**-23 * exact.abs().clamp(min=10)).all()


@pytest.mark.parametrize("order", [None, CL])
@pytest.mark.usefixtures("each")
def test_means_that_overlap_or_are_spread_in_memory(order):
    x, whole = problem(3, (3, 4, 5), None, order, k=6)
    whole = whole.detach()
    windows = torch.randn(3, 100, device=DEVICE).as_strided((3, 4, 3, 4, 5), (100, 7, 20, 5, 1))
    for mean in (whole[:, 1:4], whole[:, ::2], whole[:1].expand(3, -1, -1, -1, -1), whole[:, :1].expand(
            -1, 4, -1, -1, -1), windows):
        assert_matches(lambda mean: (iw_nll(x, mean, ratio(3, mean.shape[1]).detach(), log_of(0.1), True),),
                       mean.requires_grad_())


@pytest.mark.usefixtures("each")
def test_gradient_lies_in_memory_like_the_mean():
    for order in (CL, torch.contiguous_format):
        x, mean = problem(2, (3, 8, 8), None, order)
        gradient = torch.autograd.grad(gaussian_log_likelihood(x, mean, log_of(1), True).sum(), mean)[0]
        assert gradient.stride() == mean.stride()


@pytest.mark.usefixtures("each")
def test_any_strides_are_read():
    whole = torch.randint(256, (8, 3, 9, 10), dtype=torch.uint8, device=DEVICE)
    mean = torch.randn(4, 10, 9, 3, device=DEVICE).permute(0, 3, 2, 1).requires_grad_()
    views = [whole[::2], whole[:1].expand(4, -1, -1, -1), whole[:4].flip(3)]
    wide = torch.randint(256, (4, 3, 9, 20), dtype=torch.uint8, device=DEVICE)
    tall = wide.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    for x in [*views, wide[..., ::2], wide[..., 5:15], tall[..., 3:13]]:
        for m in (mean, mean.detach().contiguous().requires_grad_(),
                  torch.randn(4, 3, 9, 20, device=DEVICE)[..., ::2].requires_grad_()):
            assert_matches(lambda m: (gaussian_log_likelihood(x, m, log_of(0.1), True),), m)


@pytest.mark.usefixtures("each")
def test_extreme_logits_saturate():
    x = torch.tensor([[0, 255, 128]], dtype=torch.uint8, device=DEVICE)
    for value in (-200.0, 200.0):
        logits = torch.full((1, 3), value, device=DEVICE)
        error = gaussian_log_likelihood(x, logits, log_of(1), True, return_squared_error=True)[1]
        expected = (x / 255 - float(value > 0)).square().sum(1)
        torch.testing.assert_close(error, expected)


@pytest.mark.parametrize("tiles", [2, 1024, 2501])
@pytest.mark.usefixtures("triton")
def test_tiles_are_combined(tiles):
    of_tiles, nll = 100 * torch.randn(3, tiles, device=DEVICE), torch.empty(3, device=DEVICE)
    of_tiles[1] = math.inf
    _combine_kernel[(3,)](of_tiles, nll, tiles, 1 << (tiles - 1).bit_length())
    torch.testing.assert_close(nll, -(-of_tiles).logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("each")
def test_no_weight_at_all_is_an_infinite_nll_of_that_sample_alone():
    x, mean = problem(2, (4,), k=9)
    log_ratio = ratio(2, 9).detach()
    finite = iw_nll(x, mean, log_ratio, log_of(0.1))
    log_ratio[0] = -math.inf
    nll = iw_nll(x, mean, log_ratio, log_of(0.1))
    assert nll[0] == math.inf and nll[1] == finite[1]
    log_ratio[0, 3] = math.nan
    assert iw_nll(x, mean, log_ratio, log_of(0.1))[0].isnan()


def test_reference_matches_torch_distributions():
    x, logits = (t.detach().cpu() for t in problem(4, (3, 5, 2), dtype=torch.float64))
    for gamma in (1e-6, 0.0055, 10.0):
        value, error = gaussian_log_likelihood(x, logits, torch.tensor(gamma, dtype=torch.float64).log(), True, True)
        expected = Normal(logits.sigmoid(), math.sqrt(gamma)).log_prob(x.double() / 255).sum((1, 2, 3))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(error, (x.double() / 255 - logits.sigmoid()).square().sum((1, 2, 3)))


def test_reference_is_stable_and_per_sample():
    x, mean = torch.zeros(3, 0, dtype=torch.float64), torch.zeros(3, 2, 0, dtype=torch.float64)  # likelihood 1
    log_w = torch.tensor([[-1e4, -1e4 + math.log(3)], [5e3, -math.inf], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([1e4 - math.log(2), -5e3 + math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(iw_nll_ref(x, mean, log_w, torch.tensor(0.0), False)[0], expected, rtol=1e-12, atol=1e-9)


def test_gradients_of_the_reference_are_numerical_ones_and_the_self_normalised_weights():
    x, mean = problem(3, (4,), k=5, dtype=torch.float64)
    arguments = [t.detach().cpu().double().requires_grad_() for t in (mean, ratio(3, 5), log_of(0.3))]
    for logits in (False, True):
        assert torch.autograd.gradcheck(lambda *leaves: iw_nll_ref(x.cpu(), *leaves, logits), arguments)
        assert torch.autograd.gradcheck(lambda mean, log_gamma: iw_nll_ref(x.cpu(), mean, None, log_gamma, logits),
                                        arguments[::2])
    nll, error = iw_nll_ref(x.cpu(), *arguments, True)
    weights = torch.softmax(arguments[1] - error / 0.6, 1)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), arguments[1])[0], -weights)


@pytest.mark.usefixtures("each")
def test_compiles_without_a_graph_break_and_passes_opcheck():
    x, mean = problem(3, (3, 6, 6), None, CL, k=5)
    leaves = mean, ratio(3, 5), log_of(0.1)
    torch.library.opcheck(forward, (x, *leaves, True))
    torch.library.opcheck(forward, (x, mean, None, log_of(0.1), True))
    torch.library.opcheck(squared_error_backward, (x, mean.detach(), torch.randn(3, 5, device=DEVICE), True))

    def function(mean, log_ratio, log_gamma):
        weighted = iw_nll(x, 2 * mean, log_ratio, log_gamma, True).square().sum()
        return weighted + gaussian_log_likelihood(x, 3 * mean[:, 0], log_gamma, True).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, plain = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function))
    torch.testing.assert_close(ours, plain)


def test_shapes_are_checked():
    x, mean, log_ratio, log_gamma = torch.zeros(2, 3), torch.zeros(2, 5, 3), torch.zeros(2, 5), torch.tensor(0.0)
    for arguments in ((x[:1], mean, log_ratio), (x, mean, log_ratio[:, :1]), (x, mean[..., :1], log_ratio),
                      (x, mean[:, :0], log_ratio[:, :0]), (x, mean[..., :1], None)):
        with pytest.raises(ValueError, match="do not fit"):
            iw_nll(*arguments, log_gamma)
    with pytest.raises(ValueError, match="do not fit"):
        gaussian_log_likelihood(x, torch.zeros(2, 4), log_gamma)
    with pytest.raises(ValueError, match=r"log_gamma is of shape \(2,\)"):
        gaussian_log_likelihood(x, x, torch.zeros(2))
