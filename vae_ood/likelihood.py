"""The estimators: ELBO, importance-weighted NLL, bits per dimension. Everything is in nats unless it says bits."""

import math

import numpy as np
import torch

from vae_ood.data import EVALUATION, generator, to_unit

LOG_2PI = math.log(2 * math.pi)
MEMORY_BUDGET = 512 * 2**20  # bytes for the activations of one chunk


def gaussian_nll(squared_error, d, gamma):
    """-log N(x; mean, gamma I) in nats from ||x - mean||^2 (any shape), dimension d and variance gamma (a tensor)."""
    return 0.5 * (squared_error / gamma + d * (LOG_2PI + gamma.log()))


def kl_per_dim(mu, log_sigma):
    """KL(N(mu, sigma^2) || N(0, 1)) of each latent dimension in nats, [B, kappa]."""
    return 0.5 * (mu.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma)


def iw_nll(log_w):
    """Importance-weighted NLL in nats (arXiv 1509.00519): -log mean_k exp(log_w[..., k]); log_w [..., K] -> [...].

    log_w = log p(x|z_k) + log p(z_k) - log q(z_k|x) with z_k ~ q(.|x). An upper bound of -log p(x) in expectation;
    K = 1 is the negative ELBO in expectation and the bound tightens as K grows.
    """
    return math.log(log_w.shape[-1]) - torch.logsumexp(log_w, -1)


def bits_per_dim(nll, d):
    """Bits per dimension of 8-bit data from an NLL in nats of the density on [0, 1]^d: nll / (d ln 2) + 8.

    The 8 = log2(256) turns the density on [0, 1] into that on {0..255}. The paper's tables have 4 in its place, so
    they read 4 bits too low.
    """
    return nll / (d * math.log(2)) + 8


def log_weights(squared_error, d, gamma, mu, log_sigma, eps):
    """log p(x|z) + log p(z) - log q(z|x) in nats for z = mu + sigma eps.

    squared_error [B, K], mu and log_sigma [B, kappa], eps [B, K, kappa] -> [B, K].
    """
    z = mu[:, None] + log_sigma.exp()[:, None] * eps
    log_prior_minus_log_q = 0.5 * (eps.square() - z.square()).sum(-1) + log_sigma.sum(-1)[:, None]
    return log_prior_minus_log_q - gaussian_nll(squared_error, d, gamma)


def chunk_size(model):
    """How many latent codes the decoder may take at once within MEMORY_BUDGET."""
    floats, size = math.prod(model.code_shape) + 4 * model.kappa, model.code_shape[1] * model.code_shape[2]
    for conv in model.decoder:
        size *= 4  # each stage doubles height and width (at most)
        floats += conv.out_channels * size
    return max(1, MEMORY_BUDGET // (4 * 3 * floats))  # 4 bytes, and about three copies alive at a stage


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)  # TF32 would be off by 1e-3
def evaluate(model, images, iw_samples, seed=0, dequantize=False, first=0, progress=lambda done: None):
    """Per-image likelihoods of uint8 `images` [N, C, H, W] under `model`.

    Encodes each image once and decodes `iw_samples` codes z ~ q(z|x) in chunks. The noise of image i depends on
    (seed, first + i) alone, so neither the chunks nor N change a figure beyond rounding. Returns float64 numpy arrays:
    nll: negative ELBO, its expectation averaged over the same samples [N]; iw_nll [N]; mse: mean squared error per
    dimension, same average [N]; kl [N]; kl_per_dim: mean over the images [kappa].
    """
    device, d, kappa, k = model.log_gamma.device, math.prod(model.shape), model.kappa, iw_samples
    gamma = model.log_gamma.double().exp()
    chunk = chunk_size(model)
    block = max(1, chunk // k)  # images whose samples are decoded together
    out = {name: [] for name in ("nll", "iw_nll", "mse", "kl")}
    kl_sum = torch.zeros(kappa, dtype=torch.float64)
    for start in range(0, len(images), block):
        rows = range(start, min(start + block, len(images)))
        noise = [generator(seed, EVALUATION, first + i) for i in rows]
        eps = torch.from_numpy(np.stack([g.standard_normal((k, kappa), np.float32) for g in noise])).to(device)
        x = images[start:rows.stop].to(device)
        if dequantize:
            uniform = np.stack([g.random(model.shape, np.float32) for g in noise])
            x = to_unit(x, torch.from_numpy(uniform).to(device))
        else:
            x = to_unit(x)
        mu, log_sigma = (t.float() for t in model.encode(x.contiguous(memory_format=torch.channels_last)))
        z = (mu[:, None] + log_sigma.exp()[:, None] * eps).flatten(0, 1)
        squared_error = torch.cat([
            (x[torch.arange(a, min(a + chunk, len(z)), device=device) // k] - model.decode(z[a:a + chunk]))
            .square().sum((1, 2, 3)) for a in range(0, len(z), chunk)
        ]).double().unflatten(0, (len(x), k))
        mu, log_sigma, eps = mu.double(), log_sigma.double(), eps.double()
        kl = kl_per_dim(mu, log_sigma)
        out["nll"].append(gaussian_nll(squared_error, d, gamma).mean(1) + kl.sum(1))
        out["iw_nll"].append(iw_nll(log_weights(squared_error, d, gamma, mu, log_sigma, eps)))
        out["mse"].append(squared_error.mean(1) / d)
        out["kl"].append(kl.sum(1))
        kl_sum += kl.sum(0).cpu()
        progress(rows.stop)
    result = {name: torch.cat(parts).cpu().numpy() for name, parts in out.items()}
    return result | {"kl_per_dim": (kl_sum / len(images)).numpy()}
