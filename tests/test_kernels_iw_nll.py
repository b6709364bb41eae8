"""The importance-weighted NLL against float64 and closed forms, over shapes, orders, types and extreme weights."""

import math

import pytest
import torch

from kernels.iw_nll import _combine_kernel, forward, iw_nll, iw_nll_ref
from tests.compare import DEVICE, assert_matches, triton  # noqa: F401
from tests.test_kernels_gaussian_log_likelihood import CL, ORDERS, log_of, problem


def ratio(b, k, scale=3.0):
    g = torch.Generator().manual_seed(1)
    return (scale * torch.randn(b, k, generator=g)).to(DEVICE).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sample", "x_order", "mean_order"), ORDERS, ids=str)
@pytest.mark.usefixtures("triton")
def test_kernel_matches_float64(sample, x_order, mean_order, dtype):
    for b, k, gamma, pixels, logits in ((1, 1, 0.0055, torch.uint8, True), (3, 5, 0.1, torch.uint8, True),
                                        (1, 17, 10.0, torch.float32, False), (5, 2, 1e-6, torch.uint8, True)):
        x, mean = problem(b, sample, x_order, mean_order, k, dtype, pixels)
        assert_matches(lambda mean, log_ratio, log_gamma: iw_nll(
            x, mean, log_ratio, log_gamma, logits, return_squared_error=True), mean, ratio(b, k), log_of(gamma))


@pytest.mark.parametrize("k", [1, 3, 4, 5, 64])
@pytest.mark.usefixtures("triton")
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
@pytest.mark.usefixtures("triton")
def test_means_that_overlap_or_are_spread_in_memory(order):
    x, whole = problem(3, (3, 4, 5), None, order, k=6)
    whole = whole.detach()
    windows = torch.randn(3, 100, device=DEVICE).as_strided((3, 4, 3, 4, 5), (100, 7, 20, 5, 1))
    for mean in (whole[:, 1:4], whole[:, ::2], whole[:1].expand(3, -1, -1, -1, -1), whole[:, :1].expand(
            -1, 4, -1, -1, -1), windows):
        assert_matches(lambda mean: (iw_nll(x, mean, ratio(3, mean.shape[1]).detach(), log_of(0.1), True),),
                       mean.requires_grad_())


@pytest.mark.parametrize("tiles", [1, 1024, 2501])
@pytest.mark.usefixtures("triton")
def test_tiles_are_combined_online(tiles):
    log_sum, nll = 100 * torch.randn(3, tiles, device=DEVICE), torch.empty(3, device=DEVICE)
    log_sum[1] = -math.inf
    _combine_kernel[(3,)](log_sum, nll, tiles, 2.5, 1024)
    torch.testing.assert_close(nll, 2.5 - log_sum.logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("triton")
def test_no_weight_at_all_is_an_infinite_nll_of_that_sample_alone():
    x, mean = problem(2, (4,), k=9)
    log_ratio = ratio(2, 9).detach()
    finite = iw_nll(x, mean, log_ratio, log_of(0.1))
    log_ratio[0] = -math.inf
    nll = iw_nll(x, mean, log_ratio, log_of(0.1))
    assert nll[0] == math.inf and nll[1] == finite[1]
    log_ratio[0, 3] = math.nan
    assert iw_nll(x, mean, log_ratio, log_of(0.1))[0].isnan()


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
    nll, error = iw_nll_ref(x.cpu(), *arguments, True)
    weights = torch.softmax(arguments[1] - error / 0.6, 1)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), arguments[1])[0], -weights)


@pytest.mark.usefixtures("triton")
def test_compiles_without_a_graph_break_and_passes_opcheck():
    x, mean = problem(3, (3, 6, 6), None, CL, k=5)
    leaves = mean, ratio(3, 5), log_of(0.1)
    torch.library.opcheck(forward, (x, *leaves, True))

    def function(mean, log_ratio, log_gamma):
        return iw_nll(x, 2 * mean, log_ratio, log_gamma, True).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, plain = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, function))
    torch.testing.assert_close(ours, plain)


def test_shapes_are_checked():
    x, mean, log_ratio = torch.zeros(2, 3), torch.zeros(2, 5, 3), torch.zeros(2, 5)
    for arguments in ((x[:1], mean, log_ratio), (x, mean, log_ratio[:, :1]), (x, mean[..., :1], log_ratio),
                      (x, mean[:, :0], log_ratio[:, :0])):
        with pytest.raises(ValueError, match="do not fit"):
            iw_nll(*arguments, torch.tensor(0.0))
