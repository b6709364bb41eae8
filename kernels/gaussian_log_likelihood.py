"""log N(x; mean, gamma I) of each sample, from uint8 pixels and the decoder's logits, in one pass over both."""

from __future__ import annotations

import math

import torch

from kernels import accumulation_dtype, tl, triton, use_triton

LOG_2PI = math.log(2 * math.pi)


def log_normal(squared_error, d, log_gamma):
    """log N(x; mean, gamma I) in nats from ||x - mean||^2 (any shape), the dimension d and log gamma (a tensor)."""
    return -0.5 * (squared_error * (-log_gamma).exp() + d * (LOG_2PI + log_gamma))


def squared_error_ref(x, mean_or_logits, logits):
    """||x - mean||^2: x [B, *S] uint8 (of 255) or float, mean_or_logits [B, *S] or [B, K, *S] -> [B] or [B, K]."""
    dtype = accumulation_dtype(mean_or_logits)
    mean = mean_or_logits.to(dtype)
    mean = mean.sigmoid() if logits else mean
    x = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
    axis = 1 if mean.dim() == x.dim() else 2
    return (x.unsqueeze(1) if axis == 2 else x).sub(mean).square().sum(tuple(range(axis, mean.dim())))


def gaussian_log_likelihood_ref(x, mean_or_logits, log_gamma, logits):
    """`gaussian_log_likelihood` in plain torch, with the squared error: ([B] in nats, [B])."""
    squared_error = squared_error_ref(x, mean_or_logits, logits)
    return log_normal(squared_error, math.prod(x.shape[1:]), log_gamma), squared_error


# The kernels below walk over `D` columns, the elements of a sample in the order in which the mean lies in memory; x
# may lie in another order (contiguous images, a channels-last decoder), which two factors describe: column j of the
# mean is element j // INNER * X_OUTER + j % INNER * X_INNER of x.


@triton.jit
def load_x_and_mean(x_ptr, mean_ptr, stride_k, k, n_k, columns, D: tl.constexpr, INNER: tl.constexpr,
                    X_OUTER: tl.constexpr, X_INNER: tl.constexpr, LOGITS: tl.constexpr):
    """x [1, BLOCK], mean [TILE, BLOCK] and where both are within the sample and the n_k samples, in float32."""
    inside = columns < D
    x_columns = columns * X_OUTER if INNER == 1 else columns // INNER * X_OUTER + columns % INNER * X_INNER
    x = tl.load(x_ptr + x_columns, inside, other=0).to(tl.float32)
    if x_ptr.dtype.element_ty == tl.uint8:
        x /= 255
    mask = (k < n_k)[:, None] & inside[None, :]
    mean = tl.load(mean_ptr + k[:, None].to(tl.int64) * stride_k + columns[None, :], mask, other=0).to(tl.float32)
    if LOGITS:
        mean = tl.sigmoid(mean)
    return x[None, :], mean, mask


@triton.jit
def squared_error_tile(x_ptr, mean_ptr, stride_k, k, n_k, D: tl.constexpr, INNER: tl.constexpr, X_OUTER: tl.constexpr,
                       X_INNER: tl.constexpr, LOGITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """||x - mean_k||^2 of the samples k, [TILE]; x is loaded once for all of them."""
    total = tl.zeros([TILE, BLOCK // 4], tl.float32)  # of four neighbours, which one thread holds: fewer registers
    for start in range(0, D, BLOCK):
        x, mean, mask = load_x_and_mean(x_ptr, mean_ptr, stride_k, k, n_k, start + tl.arange(0, BLOCK), D, INNER,
                                        X_OUTER, X_INNER, LOGITS)
        difference = tl.where(mask, x - mean, 0)
        total += tl.sum(tl.reshape(difference * difference, [TILE, BLOCK // 4, 4]), 2)
    return tl.sum(total, 1)


@triton.jit
def log_normal_tile(squared_error, log_gamma_ptr, D: tl.constexpr):
    """`log_normal` of a tile, with log gamma from memory."""
    log_gamma = tl.load(log_gamma_ptr).to(tl.float32)
    return -0.5 * (squared_error * tl.exp(-log_gamma) + D * (1.8378770664093453 + log_gamma))  # log 2 pi


@triton.jit
def _forward_kernel(
    x_ptr,  # [B, D] pixels
    mean_ptr,  # [B, D] mean or logits
    log_gamma_ptr,  # [] log of the variance
    log_likelihood_ptr,  # [B] out
    squared_error_ptr,  # [B] out
    x_stride, mean_stride, D: tl.constexpr, INNER: tl.constexpr, X_OUTER: tl.constexpr, X_INNER: tl.constexpr,
    LOGITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, TILE)  # TILE is 1
    squared_error = squared_error_tile(x_ptr + b * x_stride, mean_ptr + b * mean_stride, 0, one, 1, D, INNER, X_OUTER,
                                       X_INNER, LOGITS, TILE, BLOCK)
    tl.store(squared_error_ptr + b + one, squared_error)
    tl.store(log_likelihood_ptr + b + one, log_normal_tile(squared_error, log_gamma_ptr, D))


@triton.jit
def _backward_kernel(
    x_ptr,  # [B, D] pixels
    mean_ptr,  # [B, K, D] mean or logits
    grad_squared_error_ptr,  # [B, K]
    grad_mean_ptr,  # [B, K, D] out, with respect to mean or logits; a sample in the order of the mean's
    x_stride, mean_stride_b, mean_stride_k, K, tiles, D: tl.constexpr, INNER: tl.constexpr, X_OUTER: tl.constexpr,
    X_INNER: tl.constexpr, LOGITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    b = (row // tiles).to(tl.int64)
    k = row % tiles * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x, mean, mask = load_x_and_mean(x_ptr + b * x_stride, mean_ptr + b * mean_stride_b, mean_stride_k, k, K, columns, D,
                                    INNER, X_OUTER, X_INNER, LOGITS)
    grad = tl.load(grad_squared_error_ptr + b * K + k, k < K, other=0)[:, None] * 2 * (mean - x)
    if LOGITS:
        grad *= mean * (1 - mean)
    tl.store(grad_mean_ptr + (b * K + k[:, None]) * D + columns[None, :], grad, mask)


def dense(mean, batch_dims):
    """`mean` itself, or a copy if a sample of it is not one run of memory in some order of its dimensions."""
    d = 1
    for stride, size in sorted((stride, size) for stride, size in zip(mean.stride()[batch_dims:],
                               mean.shape[batch_dims:], strict=True) if size > 1):
        if stride != d:
            return mean.contiguous()
        d *= size
    return mean


def match(x, mean, batch_dims):
    """x and the factors of its order against that of the dense `mean`; x is copied if two factors do not describe it,
    or int32 not an offset within a sample.

    Returns (x, {INNER, X_OUTER, X_INNER})."""
    order = sorted(range(1, x.dim()), key=lambda i: -mean.stride(i + batch_dims - 1))
    groups = []  # [size, stride of x], of dimensions that x traverses in one stride
    for size, stride in ((x.shape[i], x.stride(i)) for i in order if x.shape[i] > 1):
        if groups and groups[-1][1] == size * stride:
            groups[-1] = [groups[-1][0] * size, stride]
        else:
            groups.append([size, stride])
    if len(groups) > 2 or sum((x.shape[i] - 1) * x.stride(i) for i in order) >= 2**31:
        sample = mean if batch_dims == 1 else mean[:, 0]
        return match(torch.empty_like(sample, dtype=x.dtype).copy_(x), mean, batch_dims)
    outer = groups[0][1] if groups else 1
    inner, x_inner = groups[1] if len(groups) == 2 else (1, 0)
    return x, {"INNER": inner, "X_OUTER": outer, "X_INNER": x_inner}


def gradient_like(mean):
    """Memory for the gradient by the dense mean [B, K, *S]: its samples lie as the mean's, one after the other."""
    d = math.prod(mean.shape[2:])
    return mean.new_empty_strided(mean.shape, (mean.shape[1] * d, d, *mean.stride()[2:]))


def check_log_gamma(log_gamma, mean):
    """ValueError unless log_gamma is a scalar on the mean's device."""
    if log_gamma.dim() or log_gamma.device != mean.device:
        raise ValueError(f"log_gamma is of shape {tuple(log_gamma.shape)} on {log_gamma.device}: expected a scalar on "
                         f"{mean.device}")


def tile(n_k, d, itemsize, order):
    """The kernels' tile: TILE of the n_k samples, which share their x, times BLOCK columns.

    A block is one 128-bit load of the mean a thread, so that x (in the mean's order) and the mean are laid out alike
    over the threads and the loop over the columns needs neither shared memory nor barriers. The tile keeps to 64
    registers a thread.
    """
    width = 16 // itemsize
    samples = min(4 if order["INNER"] == 1 else 2, 1 << (n_k - 1).bit_length())
    block = max(16, min(128 * width, 1 << (d - 1).bit_length()))
    return {"TILE": samples, "BLOCK": block, "num_warps": max(1, block // (32 * width))}


@torch.library.custom_op("vae_ood::gaussian_log_likelihood", mutates_args=())
def forward(x: torch.Tensor, mean_or_logits: torch.Tensor, log_gamma: torch.Tensor,
            logits: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel: (log-likelihood [B] in nats, squared error [B]), float32."""
    b, d = len(x), math.prod(x.shape[1:])
    mean = dense(mean_or_logits, 1)
    x, order = match(x, mean, 1)
    log_likelihood, squared_error = (x.new_empty(b, dtype=torch.float32) for _ in range(2))
    config = tile(1, d, mean.element_size(), order)
    with torch.cuda.device_of(mean):
        _forward_kernel[(b,)](x, mean, log_gamma, log_likelihood, squared_error, x.stride(0), mean.stride(0), d,
                              **order, LOGITS=logits, **config)
    return log_likelihood, squared_error


@forward.register_fake
def _(x, mean_or_logits, log_gamma, logits):
    return tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("vae_ood::squared_error_backward", mutates_args=())
def squared_error_backward(x: torch.Tensor, mean_or_logits: torch.Tensor, grad_squared_error: torch.Tensor,
                           logits: bool) -> torch.Tensor:
    """x [B, *S], mean_or_logits [B, K, *S], grad_squared_error [B, K] -> the gradient by mean_or_logits, like it."""
    b, k, d = *grad_squared_error.shape, math.prod(x.shape[1:])
    mean = dense(mean_or_logits, 2)
    grad = gradient_like(mean)
    x, order = match(x, mean, 2)
    config = tile(k, d, mean.element_size(), order)
    tiles = -(-k // config["TILE"])
    with torch.cuda.device_of(mean):
        _backward_kernel[(b * tiles * -(-d // config["BLOCK"]),)](
            x, mean, grad_squared_error.float().contiguous(), grad, x.stride(0), *mean.stride()[:2], k, tiles, d,
            **order, LOGITS=logits, **config)
    return grad


@squared_error_backward.register_fake
def _(x, mean_or_logits, grad_squared_error, logits):
    return gradient_like(dense(mean_or_logits, 2))


def _setup(ctx, inputs, output):
    x, mean_or_logits, log_gamma, ctx.logits = inputs
    ctx.save_for_backward(x, mean_or_logits, log_gamma, output[1])


def _backward(ctx, grad_log_likelihood, grad_squared_error):
    x, mean_or_logits, log_gamma, squared_error = ctx.saved_tensors
    scaled = squared_error / log_gamma.exp()
    by_log_gamma = (grad_log_likelihood * 0.5 * (scaled - math.prod(x.shape[1:]))).sum().to(log_gamma.dtype)
    by_squared_error = grad_squared_error - 0.5 * grad_log_likelihood / log_gamma.exp()
    by_mean = None
    if ctx.needs_input_grad[1]:
        by_mean = squared_error_backward(x, mean_or_logits.unsqueeze(1), by_squared_error[:, None], ctx.logits)
        by_mean = by_mean.squeeze(1)
    return None, by_mean, by_log_gamma, None


forward.register_autograd(_backward, setup_context=_setup)


def gaussian_log_likelihood(x, mean_or_logits, log_gamma, logits=False, return_squared_error=False):
    """log p(x | z) = log N(x; mean, gamma I) of each sample, in nats (paper, section 2.1).

    x: [B, *S], uint8 (divided by 255) or float, any strides; it is data and gets no gradient.
    mean_or_logits: [B, *S] float32, float16 or bfloat16; with `logits`, the mean is its sigmoid, which is not written
    to memory. log_gamma: a scalar tensor, the log of the variance. Sums are in float32 (float64 for float64).
    Returns [B], or with `return_squared_error` ([B], ||x - mean||^2 [B]), both differentiable (on CUDA, once).
    Raises ValueError where the shapes differ, or log_gamma is no scalar on the mean's device.
    """
    if x.shape != mean_or_logits.shape:
        raise ValueError(f"x {tuple(x.shape)} and the mean {tuple(mean_or_logits.shape)} differ in shape")
    check_log_gamma(log_gamma, mean_or_logits)
    op = forward if use_triton(mean_or_logits) else gaussian_log_likelihood_ref
    log_likelihood, squared_error = op(x.detach(), mean_or_logits, log_gamma, logits)
    return (log_likelihood, squared_error) if return_squared_error else log_likelihood
