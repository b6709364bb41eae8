"""z = mu + sigma * eps, and KL(q || N(0, I)), in one pass."""

from __future__ import annotations

import torch

from . import accumulation_dtype, tl, triton, use_kernel


def kl_per_dim(mu, log_sigma):
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, elementwise."""
    return 0.5 * (mu.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma)


def reparameterize_ref(mu, log_sigma, eps, per_dim):
    """`reparameterize` in plain torch: (z [B, kappa], KL in nats [B, kappa] or [B])."""
    dtype = accumulation_dtype(mu)
    mu, log_sigma, out = mu.to(dtype), log_sigma.to(dtype), mu.dtype
    kl = kl_per_dim(mu, log_sigma)
    return (mu + log_sigma.exp() * eps).to(out), kl if per_dim else kl.sum(1)


@triton.jit
def _load(ptr, rows, columns, mask, KAPPA: tl.constexpr):
    return tl.load(ptr + rows[:, None].to(tl.int64) * KAPPA + columns[None, :], mask, other=0).to(tl.float32)


@triton.jit
def _forward_kernel(
    mu_ptr,  # [B, KAPPA]
    log_sigma_ptr,  # [B, KAPPA]
    eps_ptr,  # [B, KAPPA]
    z_ptr,  # [B, KAPPA] out
    kl_ptr,  # [B, KAPPA] if PER_DIM, else [B], out
    B, KAPPA: tl.constexpr, PER_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, KAPPA, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows < B)[:, None] & (columns < KAPPA)[None, :]
        here = rows[:, None].to(tl.int64) * KAPPA + columns[None, :]
        mu, log_sigma = _load(mu_ptr, rows, columns, mask, KAPPA), _load(log_sigma_ptr, rows, columns, mask, KAPPA)
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


@triton.jit
def _backward_kernel(
    mu_ptr,  # [B, KAPPA]
    log_sigma_ptr,  # [B, KAPPA]
    eps_ptr,  # [B, KAPPA]
    grad_z_ptr,  # [B, KAPPA]
    grad_kl_ptr,  # [B, KAPPA] if PER_DIM, else [B]
    grad_mu_ptr,  # [B, KAPPA] out
    grad_log_sigma_ptr,  # [B, KAPPA] out
    B, KAPPA: tl.constexpr, PER_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (KAPPA + BLOCK - 1) // BLOCK
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < B)[:, None] & (columns < KAPPA)[None, :]
    here = rows[:, None].to(tl.int64) * KAPPA + columns[None, :]
    mu, log_sigma = _load(mu_ptr, rows, columns, mask, KAPPA), _load(log_sigma_ptr, rows, columns, mask, KAPPA)
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
def forward(mu: torch.Tensor, log_sigma: torch.Tensor, eps: torch.Tensor,
            per_dim: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel: (z [B, kappa] like mu, KL in nats [B, kappa] or [B], float32)."""
    b, kappa = mu.shape
    mu, log_sigma, eps = mu.contiguous(), log_sigma.contiguous(), eps.contiguous()
    z = torch.empty_like(mu)
    kl = mu.new_empty((b, kappa) if per_dim else b, dtype=torch.float32)
    config = _tile(mu)
    with torch.cuda.device_of(mu):
        _forward_kernel[(-(-b // config["ROWS"]),)](mu, log_sigma, eps, z, kl, b, kappa, per_dim,
                                                    **config)
    return z, kl


@forward.register_fake
def _(mu, log_sigma, eps, per_dim):
    b, kappa = mu.shape
    return (mu.new_empty(mu.shape), mu.new_empty((b, kappa) if per_dim else b, dtype=torch.float32))


@torch.library.custom_op("vae_ood::reparameterize_backward", mutates_args=())
def backward(mu: torch.Tensor, log_sigma: torch.Tensor, eps: torch.Tensor, grad_z: torch.Tensor,
             grad_kl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernel: the gradients by mu and log_sigma [B, kappa]."""
    b, kappa = mu.shape
    mu, log_sigma, eps = mu.contiguous(), log_sigma.contiguous(), eps.contiguous()
    grad_mu, grad_log_sigma = torch.empty_like(mu), torch.empty_like(log_sigma)
    config = _tile(mu)
    with torch.cuda.device_of(mu):
        _backward_kernel[(-(-b // config["ROWS"]) * -(-kappa // config["BLOCK"]),)](
            mu, log_sigma, eps, grad_z.contiguous(), grad_kl.contiguous(), grad_mu, grad_log_sigma, b,
            kappa, grad_kl.dim() == 2, **config)
    return grad_mu, grad_log_sigma


@backward.register_fake
def _(mu, log_sigma, eps, grad_z, grad_kl):
    return mu.new_empty(mu.shape), log_sigma.new_empty(mu.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, grad_z, grad_kl):
    return *backward(*ctx.saved_tensors, grad_z, grad_kl), None, None


forward.register_autograd(_backward, setup_context=_setup)


def reparameterize(mu, log_sigma, eps, per_dim=False):
    """z = mu + sigma eps ~ q(z|x) = N(mu, diag sigma^2), and KL(q || N(0, I)) in nats (arXiv 1312.6114).

    mu, log_sigma: [B, kappa] float32, float16 or bfloat16 (float64: computed in torch); eps [B, kappa]: standard normal
    noise, data without a gradient.
    Returns z [B, kappa] like mu, and the KL in float32: summed per sample, [B], or with `per_dim` [B, kappa], whose
    mean over a data set is the mutual information of each dimension (paper, section 4.2). Both are differentiable (on
    CUDA, once). Raises ValueError where the shapes differ.
    """
    if mu.shape != log_sigma.shape or mu.dim() != 2 or eps.shape != mu.shape:
        raise ValueError(f"mu {tuple(mu.shape)}, log_sigma {tuple(log_sigma.shape)} and eps {tuple(eps.shape)} do not "
                         "fit: all are [B, kappa]")
    op = forward if use_kernel(mu) else reparameterize_ref
    return op(mu, log_sigma, eps.detach(), per_dim)
