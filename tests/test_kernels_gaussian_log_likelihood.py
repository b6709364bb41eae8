"""The Gaussian log-likelihood against torch.distributions and against float64, over shapes, orders and types."""

import math

import pytest
import torch
from torch.distributions import Normal

from kernels.gaussian_log_likelihood import (
    forward,
    gaussian_log_likelihood,
    gaussian_log_likelihood_ref,
    match,
    squared_error_backward,
)
from tests.compare import DEVICE, assert_matches, triton  # noqa: F401

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sample", "x_order", "mean_order"), ORDERS, ids=str)
@pytest.mark.usefixtures("triton")
def test_kernel_matches_float64(sample, x_order, mean_order, dtype):
    for b, gamma, pixels, logits in ((1, 1e-6, torch.uint8, True), (3, 0.0055, torch.uint8, True),
                                     (5, 10.0, torch.uint8, False), (3, 0.01, torch.float32, True)):
        x, mean = problem(b, sample, x_order, mean_order, dtype=dtype, pixels=pixels)
        assert_matches(lambda mean, log_gamma: gaussian_log_likelihood(
            x, mean, log_gamma, logits, return_squared_error=True), mean, log_of(gamma))


@pytest.mark.usefixtures("triton")
def test_gradient_lies_in_memory_like_the_mean():
    for order in (CL, torch.contiguous_format):
        x, mean = problem(2, (3, 8, 8), None, order)
        gradient = torch.autograd.grad(gaussian_log_likelihood(x, mean, log_of(1), True).sum(), mean)[0]
        assert gradient.stride() == mean.stride()


@pytest.mark.usefixtures("triton")
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


@pytest.mark.usefixtures("triton")
def test_extreme_logits_saturate():
    x = torch.tensor([[0, 255, 128]], dtype=torch.uint8, device=DEVICE)
    for value in (-200.0, 200.0):
        logits = torch.full((1, 3), value, device=DEVICE)
        error = gaussian_log_likelihood(x, logits, log_of(1), True, return_squared_error=True)[1]
        expected = (x / 255 - float(value > 0)).square().sum(1)
        torch.testing.assert_close(error, expected)


def test_reference_matches_torch_distributions_and_its_gradients_numerical_ones():
    x, logits = (t.detach().cpu() for t in problem(4, (3, 5, 2), dtype=torch.float64))
    for gamma in (1e-6, 0.0055, 10.0):
        log_gamma = torch.tensor(gamma, dtype=torch.float64).log()
        value, error = gaussian_log_likelihood_ref(x, logits, log_gamma, True)
        expected = Normal(logits.sigmoid(), math.sqrt(gamma)).log_prob(x.double() / 255).sum((1, 2, 3))
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(error, (x.double() / 255 - logits.sigmoid()).square().sum((1, 2, 3)))
    for flag in (False, True):
        arguments = [t.clone().requires_grad_() for t in (logits, log_gamma)]
        assert torch.autograd.gradcheck(lambda m, s: gaussian_log_likelihood_ref(x, m, s, flag), arguments)


@pytest.mark.usefixtures("triton")
def test_compiles_without_a_graph_break_and_passes_opcheck():
    x, mean = problem(4, (3, 6, 6), None, CL)
    log_gamma = log_of(0.1)
    torch.library.opcheck(forward, (x, mean, log_gamma, True))
    torch.library.opcheck(squared_error_backward, (x, mean.detach()[:, None], torch.randn(4, 1, device=DEVICE), True))

    def function(mean, log_gamma):
        return gaussian_log_likelihood(x, 2 * mean, log_gamma, True).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, plain = (torch.autograd.grad(f(mean, log_gamma), (mean, log_gamma)) for f in (compiled, function))
    torch.testing.assert_close(ours, plain)


def test_pixels_too_far_apart_for_int32_are_copied():
    far = torch.empty_strided((4, 12288), (1, 200_000), dtype=torch.uint8, device="meta")
    mean = torch.empty(4, 12288, device="meta")
    assert match(far, mean, 1)[0].stride() == (12288, 1)
    assert match(far[:, :10_000], mean[:, :10_000], 1)[0].stride() == (1, 200_000)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(2, 3\) and the mean \(2, 4\) differ"):
        gaussian_log_likelihood(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"log_gamma is of shape \(2,\)"):
        gaussian_log_likelihood(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
