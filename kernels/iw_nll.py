"""The importance-weighted NLL from pixels, K decoder outputs and the log weights' latent part, in one pass over all."""

from __future__ import annotations

import math

import torch

from kernels import tl, triton, use_triton
from kernels.gaussian_log_likelihood import (
    check_log_gamma,
    dense,
    log_normal,
    log_normal_tile,
    match,
    squared_error_backward,
    squared_error_ref,
    squared_error_tile,
    tile,
)


def iw_nll_ref(x, mean_or_logits, log_prior_minus_log_q, log_gamma, logits):
    """`iw_nll` in plain torch, with the squared errors: ([B] in nats, [B, K])."""
    squared_error = squared_error_ref(x, mean_or_logits, logits)
    log_normals = log_normal(squared_error, math.prod(x.shape[1:]), log_gamma)
    log_w = log_normals + log_prior_minus_log_q.to(log_normals.dtype)
    return math.log(log_w.shape[1]) - torch.logsumexp(log_w, 1), squared_error


@triton.jit
def _add(maximum, total, log_w):
    """One step of the online log-sum-exp: exp(maximum) * total grows by the sum of exp(log_w) [BLOCK]."""
    new = tl.maximum(maximum, tl.max(log_w, 0))
    finite = tl.where(tl.abs(new) == float("inf"), 0, new)  # as inf - inf would be NaN
    return new, total * tl.exp(maximum - finite) + tl.sum(tl.exp(log_w - finite), 0)


@triton.jit
def _forward_kernel(
    x_ptr,  # [B, D] pixels
    mean_ptr,  # [B, K, D] mean or logits
    log_ratio_ptr,  # [B, K] log p(z) - log q(z|x)
    log_gamma_ptr,  # [] log of the variance
    squared_error_ptr,  # [B, K] out
    log_sum_ptr,  # [B, tiles] out: log of the sum of the weights of a tile
    x_stride, mean_stride_b, mean_stride_k, K, tiles, D: tl.constexpr, INNER: tl.constexpr, X_OUTER: tl.constexpr,
    X_INNER: tl.constexpr, LOGITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    squared_error = squared_error_tile(x_ptr + b * x_stride, mean_ptr + b * mean_stride_b, mean_stride_k, k, K, D,
                                       INNER, X_OUTER, X_INNER, LOGITS, TILE, BLOCK)
    tl.store(squared_error_ptr + b * K + k, squared_error, k < K)
    log_ratio = tl.load(log_ratio_ptr + b * K + k, k < K, other=-float("inf")).to(tl.float32)
    log_w = log_ratio + log_normal_tile(squared_error, log_gamma_ptr, D)
    maximum, total = _add(-float("inf"), 0.0, log_w)
    tl.store(log_sum_ptr + tl.program_id(0), maximum + tl.log(total))


@triton.jit
def _combine_kernel(
    log_sum_ptr,  # [B, tiles]
    nll_ptr,  # [B] out
    tiles, log_k, BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    maximum, total = -float("inf"), 0.0
    for start in range(0, tiles, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_w = tl.load(log_sum_ptr + b * tiles + columns, columns < tiles, other=-float("inf"))
        maximum, total = _add(maximum, total, log_w)
    tl.store(nll_ptr + b, log_k - maximum - tl.log(total))


@torch.library.custom_op("vae_ood::iw_nll", mutates_args=())
def forward(x: torch.Tensor, mean_or_logits: torch.Tensor, log_prior_minus_log_q: torch.Tensor,
            log_gamma: torch.Tensor, logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch both forward kernels: (NLL [B] in nats, squared errors [B, K]), float32."""
    b, k, d = *mean_or_logits.shape[:2], math.prod(x.shape[1:])
    mean = dense(mean_or_logits, 2)
    x, order = match(x, mean, 2)
    config = tile(k, d, mean.element_size(), order)
    tiles = -(-k // config["TILE"])
    squared_error, log_sum, nll = (x.new_empty(shape, dtype=torch.float32) for shape in ((b, k), (b, tiles), (b,)))
    with torch.cuda.device_of(mean):
        _forward_kernel[(b * tiles,)](x, mean, log_prior_minus_log_q.contiguous(), log_gamma, squared_error, log_sum,
                                      x.stride(0), *mean.stride()[:2], k, tiles, d, **order, LOGITS=logits, **config)
        _combine_kernel[(b,)](log_sum, nll, tiles, math.log(k), 1024)
    return nll, squared_error


@forward.register_fake
def _(x, mean_or_logits, log_prior_minus_log_q, log_gamma, logits):
    b, k = mean_or_logits.shape[:2]
    return x.new_empty(b, dtype=torch.float32), x.new_empty((b, k), dtype=torch.float32)


def _setup(ctx, inputs, output):
    *tensors, ctx.logits = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_nll, grad_squared_error):
    x, mean_or_logits, log_ratio, log_gamma, squared_error = ctx.saved_tensors
    d = math.prod(x.shape[1:])
    log_w = log_normal(squared_error, d, log_gamma) + log_ratio
    by_log_w = -grad_nll[:, None] * log_w.softmax(1)  # exp(log_w + nll) would carry the rounding of a large nll
    by_log_gamma = (by_log_w * 0.5 * (squared_error / log_gamma.exp() - d)).sum().to(log_gamma.dtype)
    by_squared_error = grad_squared_error - 0.5 * by_log_w / log_gamma.exp()
    by_mean = (squared_error_backward(x, mean_or_logits, by_squared_error, ctx.logits) if ctx.needs_input_grad[1]
               else None)
    return None, by_mean, by_log_w.to(log_ratio.dtype), by_log_gamma, None


forward.register_autograd(_backward, setup_context=_setup)


def iw_nll(x, mean_or_logits, log_prior_minus_log_q, log_gamma, logits=False, return_squared_error=False):
    """Importance-weighted NLL of each sample in nats (arXiv 1509.00519): -log mean_k p(x|z_k) p(z_k) / q(z_k|x).

    x: [B, *S], uint8 (divided by 255) or float, any strides; it is data and gets no gradient.
    mean_or_logits: [B, K, *S] float32, float16 or bfloat16: the decoder's output of z_k ~ q(z|x); with `logits`, the
    mean is its sigmoid. log_prior_minus_log_q: [B, K], log p(z_k) - log q(z_k|x) in nats, -inf allowed (a weight of
    0; all of them: the NLL is inf, the gradient NaN). log_gamma: a scalar tensor, the log of the variance.
    Sums are in float32 (float64 for float64); the log-sum-exp is per sample over its own K, and stable. The gradient
    is that of the bound: each z_k weighs w_k / sum w (equation 13 of arXiv 1509.00519).
    Returns [B], an upper bound of -log p(x) in expectation (K = 1: the negative ELBO); with `return_squared_error`
    also ||x - mean_k||^2 [B, K]; both differentiable (on CUDA, once). Raises ValueError where the shapes do not fit,
    or log_gamma is no scalar on the means' device.
    """
    b, k = mean_or_logits.shape[:2]
    if (b, *x.shape[1:]) != (len(x), *mean_or_logits.shape[2:]) or log_prior_minus_log_q.shape != (b, k) or not k:
        raise ValueError(f"x {tuple(x.shape)}, the means {tuple(mean_or_logits.shape)} and the log weights "
                         f"{tuple(log_prior_minus_log_q.shape)} do not fit: expected [B, *S], [B, K, *S] and [B, K]")
    check_log_gamma(log_gamma, mean_or_logits)
    op = forward if use_triton(mean_or_logits) else iw_nll_ref
    nll, squared_error = op(x.detach(), mean_or_logits, log_prior_minus_log_q, log_gamma, logits)
    return (nll, squared_error) if return_squared_error else nll
