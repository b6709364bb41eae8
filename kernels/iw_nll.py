"""log N(x; mean, gamma I) and the importance-weighted NLL, from uint8 pixels and the decoder's logits, in one pass."""

from __future__ import annotations

import math

import torch

from . import accumulation_dtype, cuda, tl, triton, use_kernel

LOG_2PI = math.log(2 * math.pi)


def log_normal(squared_error, d, log_gamma):
    """log N(x; mean, gamma I) in nats from ||x - mean||^2 (any shape), the dimension d and log gamma (a tensor)."""
    return -0.5 * (squared_error * (-log_gamma).exp() + d * (LOG_2PI + log_gamma))


def iw_nll_ref(x, mean_or_logits, log_prior_minus_log_q, log_gamma, logits):
    """`iw_nll` in plain torch, with the squared errors: ([B] in nats, [B, K])."""
    dtype = accumulation_dtype(mean_or_logits)
    mean = mean_or_logits.to(dtype)
    mean = mean.sigmoid() if logits else mean
    x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
    squared_error = x.unsqueeze(1).sub(mean).square().sum(tuple(range(2, mean.dim())))
    log_w = log_normal(squared_error, math.prod(x.shape[1:]), log_gamma)
    if log_prior_minus_log_q is not None:
        log_w = log_w + log_prior_minus_log_q.to(log_w.dtype)
    return math.log(log_w.shape[1]) - torch.logsumexp(log_w, 1), squared_error


@triton.jit
def _load_x_and_mean(x_ptr, mean_ptr, stride_k, k, n_k, columns, D: tl.constexpr, LOGITS: tl.constexpr):
    """x [1, BLOCK], mean [TILE, BLOCK] and where both are within the sample and the n_k samples, in float32."""
    inside = columns < D
    x = tl.load(x_ptr + columns, inside, other=0).to(tl.float32)
    if x_ptr.dtype.element_ty == tl.uint8:
        x /= 255
    mask = (k < n_k)[:, None] & inside[None, :]
    mean = tl.load(mean_ptr + k[:, None].to(tl.int64) * stride_k + columns[None, :], mask, other=0).to(tl.float32)
    if LOGITS:
        mean = tl.sigmoid(mean)
    return x[None, :], mean, mask


@triton.jit
def _log_sum_exp(log_w):
    """log of the sum of exp(log_w) [BLOCK], -inf where all of them are."""
    maximum = tl.max(log_w, 0)
    shift = tl.where(tl.abs(maximum) == float("inf"), 0, maximum)  # as inf - inf would be NaN
    return shift + tl.log(tl.sum(tl.exp(log_w - shift), 0))


@triton.jit
def _forward_kernel(
    x_ptr,  # [B, D] pixels
    mean_ptr,  # [B, K, D] mean or logits
    log_ratio_ptr,  # [B, K] log p(z) - log q(z|x), or None: 0
    log_gamma_ptr,  # [] log of the variance
    squared_error_ptr,  # [B, K] out
    nll_ptr,  # [B, tiles] out: of the weights of one tile of samples alone, divided by K
    x_stride, mean_stride_b, mean_stride_k, K, tiles, log_k, D: tl.constexpr, LOGITS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, BLOCK // 4], tl.float32)  # of four neighbours, which one thread holds: fewer registers
    for start in range(0, D, BLOCK):  # x is loaded once for all samples of the tile
        x, mean, mask = _load_x_and_mean(x_ptr + b * x_stride, mean_ptr + b * mean_stride_b, mean_stride_k, k, K,
                                         start + tl.arange(0, BLOCK), D, LOGITS)
        difference = tl.where(mask, x - mean, 0)
        total += tl.sum(tl.reshape(difference * difference, [TILE, BLOCK // 4, 4]), 2)
    squared_error = tl.sum(total, 1)
    tl.store(squared_error_ptr + b * K + k, squared_error, k < K)
    log_gamma = tl.load(log_gamma_ptr).to(tl.float32)
    log_w = -0.5 * (squared_error * tl.exp(-log_gamma) + D * (1.8378770664093453 + log_gamma))  # log 2 pi
    if log_ratio_ptr is not None:
        log_w += tl.load(log_ratio_ptr + b * K + k, k < K, other=0).to(tl.float32)
    tl.store(nll_ptr + tl.program_id(0), log_k - _log_sum_exp(tl.where(k < K, log_w, -float("inf"))))


@triton.jit
def _combine_kernel(
    nll_of_tiles_ptr,  # [B, TILES]
    nll_ptr,  # [B] out
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):
    b, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    nll = tl.load(nll_of_tiles_ptr + b * TILES + columns, columns < TILES, other=float("inf"))
    tl.store(nll_ptr + b, -_log_sum_exp(-nll))


@triton.jit
def _backward_kernel(
    x_ptr,  # [B, D] pixels
    mean_ptr,  # [B, K, D] mean or logits
    grad_squared_error_ptr,  # [B, K]
    grad_mean_ptr,  # [B, K, D] out, with respect to mean or logits; a sample in the order of the mean's
    x_stride, mean_stride_b, mean_stride_k, K, tiles, D: tl.constexpr, LOGITS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    b = (row // tiles).to(tl.int64)
    k = row % tiles * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x, mean, mask = _load_x_and_mean(x_ptr + b * x_stride, mean_ptr + b * mean_stride_b, mean_stride_k, k, K, columns,
                                     D, LOGITS)
    grad = tl.load(grad_squared_error_ptr + b * K + k, k < K, other=0)[:, None] * 2 * (mean - x)
    if LOGITS:
        grad *= mean * (1 - mean)
    tl.store(grad_mean_ptr + (b * K + k[:, None]) * D + columns[None, :], grad, mask)


def _dense(mean):
    """The mean [B, K, *S] itself, or a copy if a sample of it is not one run of memory in some order of its
    dimensions."""
    d = 1
    for stride, size in sorted(zip(mean.stride()[2:], mean.shape[2:], strict=True)):
        if size > 1 and stride != d:
            return mean.contiguous()
        d *= size
    return mean


def _in_order_of(mean, x):
    """x [B, *S] itself, or a copy whose samples lie in memory as those of the dense mean [B, K, *S]."""
    same = all(a == b for a, b, size in zip(x.stride()[1:], mean.stride()[2:], x.shape[1:], strict=True) if size > 1)
    return x if same else torch.empty_like(mean[:, 0], dtype=x.dtype).copy_(x)


def _gradient_like(mean):
    """Memory for the gradient by the dense mean [B, K, *S]: its samples lie as the mean's, one after the other."""
    d = math.prod(mean.shape[2:])
    return mean.new_empty_strided(mean.shape, (mean.shape[1] * d, d, *mean.stride()[2:]))


def tile(n_k, d, itemsize):
    """The kernels' tile: TILE of the n_k samples, which share their x, times BLOCK columns.

    A block is one 128-bit load of the mean a thread, so that x and the mean are laid out alike over the threads and the
    loop over the columns needs neither shared memory nor barriers. The tile keeps to 64 registers a thread.
    """
    width = 16 // itemsize
    samples = min(4, 1 << (n_k - 1).bit_length())
    block = max(16, min(128 * width, 1 << (d - 1).bit_length()))
    return {"TILE": samples, "BLOCK": block, "num_warps": max(1, block // (32 * width))}


@torch.library.custom_op("vae_ood::iw_nll", mutates_args=())
def forward(x: torch.Tensor, mean_or_logits: torch.Tensor, log_prior_minus_log_q: torch.Tensor | None,
            log_gamma: torch.Tensor, logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernels: (NLL [B] in nats, squared errors [B, K]), float32."""
    b, k, d = *mean_or_logits.shape[:2], math.prod(x.shape[1:])
    mean = _dense(mean_or_logits)
    x = _in_order_of(mean, cuda.readable(x))
    log_ratio = None if log_prior_minus_log_q is None else log_prior_minus_log_q.contiguous()
    if cuda.chosen():
        return cuda.forward(x, mean, log_ratio, log_gamma, logits)
    config = tile(k, d, mean.element_size())
    tiles = -(-k // config["TILE"])
    squared_error, nll = (x.new_empty((b, n), dtype=torch.float32) for n in (k, tiles))
    with torch.cuda.device_of(mean):
        _forward_kernel[(b * tiles,)](x, mean, log_ratio, log_gamma, squared_error, nll, x.stride(0),
                                      *mean.stride()[:2], k, tiles, math.log(k), d, logits, **config)
        if tiles > 1:
            of_tiles, nll = nll, x.new_empty((b, 1), dtype=torch.float32)
            _combine_kernel[(b,)](of_tiles, nll, tiles, 1 << (tiles - 1).bit_length())
    return nll.squeeze(1), squared_error


@forward.register_fake
def _(x, mean_or_logits, log_prior_minus_log_q, log_gamma, logits):
    b, k = mean_or_logits.shape[:2]
    return x.new_empty(b, dtype=torch.float32), x.new_empty((b, k), dtype=torch.float32)


@torch.library.custom_op("vae_ood::squared_error_backward", mutates_args=())
def squared_error_backward(x: torch.Tensor, mean_or_logits: torch.Tensor, grad_squared_error: torch.Tensor,
                           logits: bool) -> torch.Tensor:
    """x [B, *S], mean_or_logits [B, K, *S], grad_squared_error [B, K] -> the gradient by mean_or_logits, like it."""
    b, k, d = *grad_squared_error.shape, math.prod(x.shape[1:])
    mean = _dense(mean_or_logits)
    grad = _gradient_like(mean)
    x = _in_order_of(mean, cuda.readable(x))
    grad_squared_error = grad_squared_error.float().contiguous()
    if cuda.chosen():
        cuda.backward(x, mean, grad_squared_error, grad, logits)
        return grad
    config = tile(k, d, mean.element_size())
    tiles = -(-k // config["TILE"])
    with torch.cuda.device_of(mean):
        _backward_kernel[(b * tiles * -(-d // config["BLOCK"]),)](
            x, mean, grad_squared_error, grad, x.stride(0), *mean.stride()[:2], k, tiles, d, logits, **config)
    return grad


@squared_error_backward.register_fake
def _(x, mean_or_logits, grad_squared_error, logits):
    return _gradient_like(_dense(mean_or_logits))


def _setup(ctx, inputs, output):
    *tensors, ctx.logits = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_nll, grad_squared_error):
    x, mean_or_logits, log_ratio, log_gamma, squared_error = ctx.saved_tensors
    d, by_log_w = math.prod(x.shape[1:]), -grad_nll[:, None]
    if squared_error.shape[1] > 1 or log_ratio is not None:
        log_w = log_normal(squared_error, d, log_gamma) + (0 if log_ratio is None else log_ratio)
        by_log_w = by_log_w * log_w.softmax(1)  # exp(log_w + nll) would carry the rounding of a large nll
    by_log_gamma = (by_log_w * 0.5 * (squared_error / log_gamma.exp() - d)).sum().to(log_gamma.dtype)
    by_squared_error = grad_squared_error - 0.5 * by_log_w / log_gamma.exp()
    by_mean = (squared_error_backward(x, mean_or_logits, by_squared_error, ctx.logits) if ctx.needs_input_grad[1]
               else None)
    return None, by_mean, None if log_ratio is None else by_log_w.to(log_ratio.dtype), by_log_gamma, None


forward.register_autograd(_backward, setup_context=_setup)


def iw_nll(x, mean_or_logits, log_prior_minus_log_q, log_gamma, logits=False, return_squared_error=False):
    """Importance-weighted NLL of each sample in nats (arXiv 1509.00519): -log mean_k p(x|z_k) p(z_k) / q(z_k|x).

    x: [B, *S], uint8 (divided by 255) or float, any strides; it is data and gets no gradient.
    mean_or_logits: [B, K, *S] float32, float16 or bfloat16: the decoder's output of z_k ~ q(z|x); with `logits`, the
    mean is its sigmoid, which is not written to memory. log_prior_minus_log_q: [B, K], log p(z_k) - log q(z_k|x) in
    nats, -inf allowed (a weight of 0; all of them: the NLL is inf, the gradient NaN), or None: 0. log_gamma: a scalar
    tensor, the log of the variance. Sums are in float32 (float64 for float64); the log-sum-exp is per sample over its
    own K, and stable. The gradient is that of the bound: each z_k weighs w_k / sum w (equation 13 of arXiv 1509.00519).
    Returns [B], an upper bound of -log p(x) in expectation (K = 1: the negative ELBO); with `return_squared_error`
    also ||x - mean_k||^2 [B, K]; both differentiable (on CUDA, once). Raises ValueError where the shapes do not fit,
    or log_gamma is no scalar on the means' device.
    """
    (b, k), ratio = mean_or_logits.shape[:2], log_prior_minus_log_q
    fits = len(x) == b and k and x.shape[1:] == mean_or_logits.shape[2:] and (ratio is None or ratio.shape == (b, k))
    if not fits:
        raise ValueError(f"x {tuple(x.shape)}, the means {tuple(mean_or_logits.shape)} and the log weights "
                         f"{None if ratio is None else tuple(ratio.shape)} do not fit: expected [B, *S], [B, K, *S] "
                         "and [B, K]")
    if log_gamma.dim() or log_gamma.device != mean_or_logits.device:
        raise ValueError(f"log_gamma is of shape {tuple(log_gamma.shape)} on {log_gamma.device}: expected a scalar on "
                         f"{mean_or_logits.device}")
    op = forward if use_kernel(mean_or_logits, needs_triton=not cuda.chosen()) else iw_nll_ref
    nll, squared_error = op(x.detach(), mean_or_logits, ratio, log_gamma, logits)
    return (nll, squared_error) if return_squared_error else nll


def gaussian_log_likelihood(x, mean_or_logits, log_gamma, logits=False, return_squared_error=False):
    """log p(x | z) = log N(x; mean, gamma I) of each sample, in nats (paper, section 2.1): `iw_nll` of one z, negated.

    x and mean_or_logits: [B, *S]. Returns [B], or with `return_squared_error` ([B], ||x - mean||^2 [B]).
    """
    nll, squared_error = iw_nll(x, mean_or_logits.unsqueeze(1), None, log_gamma, logits, True)
    return (-nll, squared_error.squeeze(1)) if return_squared_error else -nll
