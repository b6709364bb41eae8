"""z = mu + sigma * eps with eps drawn in the kernel, and KL(q || N(0, I)), in one pass."""

from __future__ import annotations

import math

import torch

from kernels import accumulation_dtype, tl, triton, use_triton


def philox_ref(key, counter):
    """Philox 4x32-10 (Salmon et al., SC 2011): key [2] and counter [4], int64 tensors or ints below 2^32 -> 4 words."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps around like unsigned 64 bits
        c0, c1, c2, c3 = b >> 32 & 0xFFFFFFFF ^ c1 ^ k0, b & 0xFFFFFFFF, a >> 32 & 0xFFFFFFFF ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def _halves(offset):
    return offset & 0x7FFFFFFF, offset >> 31  # both below 2^31: the kernels take them as int32


def normal_ref(shape, seed, offset, device):
    """The kernel's eps [B, kappa] in float32: four normals by Box-Muller from each block of Philox at the counter (row,
    column // 4, offset), under the key `seed`."""
    b, kappa = shape
    row = torch.arange(b, device=device)[:, None]
    column = torch.arange(-(-kappa // 4), device=device)[None, :]
    words = philox_ref((seed & 0xFFFFFFFF, seed >> 32), (row, column, *_halves(offset)))
    # signed words, mirrored, to [0, 1): what triton.language.uint_to_uniform_float does
    u = [torch.minimum(word, 0xFFFFFFFF - word).float() * 4.6566127342e-10 for word in words]
    eps = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r = (-2 * radius.clamp(min=1e-7).log()).sqrt()
        eps += [r * (2 * math.pi * angle).cos(), r * (2 * math.pi * angle).sin()]
    return torch.stack(eps, -1).flatten(1)[:, :kappa]


def kl_per_dim(mu, log_sigma):
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, elementwise."""
    return 0.5 * (mu.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma)


def reparameterize_ref(mu, log_sigma, eps, seed, offset, per_dim):
    """`reparameterize` in plain torch: (z [B, kappa], KL in nats [B, kappa] or [B])."""
    dtype = accumulation_dtype(mu)
    eps = normal_ref(mu.shape, seed, offset, mu.device) if eps is None else eps
    mu, log_sigma, out = mu.to(dtype), log_sigma.to(dtype), mu.dtype
    kl = kl_per_dim(mu, log_sigma)
    return (mu + log_sigma.exp() * eps).to(out), kl if per_dim else kl.sum(1)


@triton.jit
def _load(ptr, rows, columns, mask, KAPPA: tl.constexpr):
    return tl.load(ptr + rows[:, None].to(tl.int64) * KAPPA + columns[None, :], mask, other=0).to(tl.float32)


@triton.jit
def _philox_normal(seed, low, high, rows, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """eps [ROWS, BLOCK] of the columns from `start`: each call of Philox makes four neighbours."""
    c0 = tl.broadcast_to(rows[:, None], [ROWS, BLOCK // 4])
    c1 = tl.broadcast_to((start // 4 + tl.arange(0, BLOCK // 4))[None, :], [ROWS, BLOCK // 4])
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c0 * 0 + low, c0 * 0 + high)
    n0, n1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1))
    n2, n3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3))
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [ROWS, BLOCK])


@triton.jit(do_not_specialize=["seed", "low", "high"])  # they change from step to step
def _forward_kernel(
    mu_ptr,  # [B, KAPPA]
    log_sigma_ptr,  # [B, KAPPA]
    eps_ptr,  # [B, KAPPA], or None: Philox
    z_ptr,  # [B, KAPPA] out
    kl_ptr,  # [B, KAPPA] if PER_DIM, else [B], out
    seed, low, high, B, KAPPA: tl.constexpr, PER_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, KAPPA, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows < B)[:, None] & (columns < KAPPA)[None, :]
        here = rows[:, None].to(tl.int64) * KAPPA + columns[None, :]
        mu, log_sigma = _load(mu_ptr, rows, columns, mask, KAPPA), _load(log_sigma_ptr, rows, columns, mask, KAPPA)
        if eps_ptr is None:
            eps = _philox_normal(seed, low, high, rows, start, ROWS, BLOCK)
        else:
            eps = _load(eps_ptr, rows, columns, mask, KAPPA)
        sigma = tl.exp(log_sigma)
        tl.store(z_ptr + here, mu + sigma * eps, mask)
        kl = 0.5 * (mu * mu + sigma * sigma - 1 - 2 * log_sigma)  # 0 outside of the mask
        if PER_DIM:
            tl.store(kl_ptr + here, kl, mask)
        else:
            total += kl
    if not PER_DIM:
        tl.store(kl_ptr + rows, tl.sum(total, 1), rows < B)


@triton.jit(do_not_specialize=["seed", "low", "high"])
def _backward_kernel(
    mu_ptr,  # [B, KAPPA]
    log_sigma_ptr,  # [B, KAPPA]
    eps_ptr,  # [B, KAPPA], or None: Philox, the same as in the forward
    grad_z_ptr,  # [B, KAPPA]
    grad_kl_ptr,  # [B, KAPPA] if PER_DIM, else [B]
    grad_mu_ptr,  # [B, KAPPA] out
    grad_log_sigma_ptr,  # [B, KAPPA] out
    seed, low, high, B, KAPPA: tl.constexpr, PER_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (KAPPA + BLOCK - 1) // BLOCK
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(0) % blocks * BLOCK
    columns = start + tl.arange(0, BLOCK)
    mask = (rows < B)[:, None] & (columns < KAPPA)[None, :]
    here = rows[:, None].to(tl.int64) * KAPPA + columns[None, :]
    mu, log_sigma = _load(mu_ptr, rows, columns, mask, KAPPA), _load(log_sigma_ptr, rows, columns, mask, KAPPA)
    if eps_ptr is None:
        eps = _philox_normal(seed, low, high, rows, start, ROWS, BLOCK)
    else:
        eps = _load(eps_ptr, rows, columns, mask, KAPPA)
    grad_z = _load(grad_z_ptr, rows, columns, mask, KAPPA)
    if PER_DIM:
        grad_kl = _load(grad_kl_ptr, rows, columns, mask, KAPPA)
    else:
        grad_kl = tl.load(grad_kl_ptr + rows, rows < B, other=0)[:, None]
    sigma = tl.exp(log_sigma)
    tl.store(grad_mu_ptr + here, grad_z + grad_kl * mu, mask)
    tl.store(grad_log_sigma_ptr + here, grad_z * sigma * eps + grad_kl * (sigma * sigma - 1), mask)


def _tile(mu):
    """The kernels' tile, ROWS times BLOCK columns: of each row, a thread holds what one 128-bit load brings."""
    kappa = mu.shape[1]
    width = 16 // mu.element_size() if kappa % 8 == 0 else 4
    block = max(4, min(128 * width, 1 << (kappa - 1).bit_length()))
    return {"ROWS": 128 * width // block, "BLOCK": block, "num_warps": 4}


@torch.library.custom_op("vae_ood::reparameterize", mutates_args=())
def forward(mu: torch.Tensor, log_sigma: torch.Tensor, eps: torch.Tensor | None, seed: int, offset: int,
            per_dim: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel: (z [B, kappa] like mu, KL in nats [B, kappa] or [B], float32)."""
    b, kappa = mu.shape
    mu, log_sigma, eps = mu.contiguous(), log_sigma.contiguous(), None if eps is None else eps.contiguous()
    z = torch.empty_like(mu)
    kl = mu.new_empty((b, kappa) if per_dim else b, dtype=torch.float32)
    config = _tile(mu)
    with torch.cuda.device_of(mu):
        _forward_kernel[(-(-b // config["ROWS"]),)](mu, log_sigma, eps, z, kl, seed, *_halves(offset), b, kappa,
                                                    per_dim, **config)
    return z, kl


@forward.register_fake
def _(mu, log_sigma, eps, seed, offset, per_dim):
    b, kappa = mu.shape
    return (mu.new_empty(mu.shape), mu.new_empty((b, kappa) if per_dim else b, dtype=torch.float32))


@torch.library.custom_op("vae_ood::reparameterize_backward", mutates_args=())
def backward(mu: torch.Tensor, log_sigma: torch.Tensor, eps: torch.Tensor | None, grad_z: torch.Tensor,
             grad_kl: torch.Tensor, seed: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernel: the gradients by mu and log_sigma [B, kappa]."""
    b, kappa = mu.shape
    mu, log_sigma, eps = mu.contiguous(), log_sigma.contiguous(), None if eps is None else eps.contiguous()
    grad_mu, grad_log_sigma = torch.empty_like(mu), torch.empty_like(log_sigma)
    config = _tile(mu)
    with torch.cuda.device_of(mu):
        _backward_kernel[(-(-b // config["ROWS"]) * -(-kappa // config["BLOCK"]),)](
            mu, log_sigma, eps, grad_z.contiguous(), grad_kl.contiguous(), grad_mu, grad_log_sigma, seed,
            *_halves(offset), b, kappa, grad_kl.dim() == 2, **config)
    return grad_mu, grad_log_sigma


@backward.register_fake
def _(mu, log_sigma, eps, grad_z, grad_kl, seed, offset):
    return mu.new_empty(mu.shape), log_sigma.new_empty(mu.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.seed, ctx.offset, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_z, grad_kl):
    mu, log_sigma, eps = ctx.saved_tensors
    grad_mu, grad_log_sigma = backward(mu, log_sigma, eps, grad_z, grad_kl, ctx.seed, ctx.offset)
    return grad_mu, grad_log_sigma, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup)


def reparameterize(mu, log_sigma, eps=None, seed=None, offset=0, per_dim=False):
    """z ~ q(z|x) = N(mu, diag sigma^2), and KL(q || N(0, I)) in nats (arXiv 1312.6114).

    mu, log_sigma: [B, kappa] float32, float16 or bfloat16 (float64: computed in torch). The noise is either given,
    eps [B, kappa], data without a gradient; or drawn from (seed, offset), in [0, 2^63) and [0, 2^62): the same seed and
    offset give the same noise on every device (to rounding), which is not stored but drawn again for the gradient. Row
    b of it does not depend on B, nor on kappa. Count the steps by `offset`.
    Returns z [B, kappa] like mu, and the KL in float32: summed per sample, [B], or with `per_dim` [B, kappa], whose
    mean over a data set is the mutual information of each dimension (paper, section 4.2). Both are differentiable (on
    CUDA, once). Raises ValueError where the shapes differ, unless one of eps and seed is given, and outside the ranges.
    """
    if mu.shape != log_sigma.shape or mu.dim() != 2 or (eps is not None and eps.shape != mu.shape):
        raise ValueError(f"mu {tuple(mu.shape)}, log_sigma {tuple(log_sigma.shape)} and eps "
                         f"{None if eps is None else tuple(eps.shape)} do not fit: all are [B, kappa]")
    if (eps is None) == (seed is None):
        raise ValueError("give either eps or a seed")
    if not (0 <= (seed or 0) < 2**63 and 0 <= offset < 2**62):
        raise ValueError(f"seed {seed} or offset {offset} is not in [0, 2^63) or [0, 2^62)")
    op = forward if use_triton(mu) else reparameterize_ref
    return op(mu, log_sigma, None if eps is None else eps.detach(), seed or 0, offset, per_dim)
