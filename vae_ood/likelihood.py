"""The estimators: ELBO, importance-weighted NLL, bits per dimension. Everything is in nats unless it says bits."""

import functools
import math
import threading

import numpy as np
import torch

from vae_ood.data.images import EVALUATION, generator, to_unit
from vae_ood.kernels.iw_nll import iw_nll, log_normal
from vae_ood.kernels.reparameterize import reparameterize
from vae_ood.parallel import WORLD, spread

MEMORY_BUDGET = 512 * 2**20  # bytes for the activations of one chunk
EXACT = threading.RLock()  # cuDNN's flags are the process's


def exact_convolutions(function):
    """A decorator: without TF32, which would be off by 1e-3. One thread at a time computes so."""
    @functools.wraps(function)
    def exactly(*args, **kwargs):
        with EXACT, torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return function(*args, **kwargs)
    return exactly


def bits_per_dim(nll, d, gamma, dequantize=False):
    """Bits per dimension of 8-bit data from an NLL in nats of the density on [0, 1]^d: nll / (d ln 2) + log2 255.

    The levels of x / 255 lie 1/255 apart; those of `dequantize`, (x + u) / 256, 1/256, and take log2 256. None where
    `gamma`, the density's variance, is below (1/255)^2: so narrow a density has no level's probability, and its NLL is
    no code length. Noise as wide as a level makes it one again, whatever gamma. The paper's tables have 4 in place of
    log2 255, so they read 3.9944 bits too low.
    """
    levels = 256 if dequantize else 255
    if not dequantize and gamma < levels**-2:
        return None
    return nll / (d * math.log(2)) + math.log2(levels)


def log_prior_minus_log_q(z, eps, log_sigma):
    """log p(z) - log q(z|x) in nats of z = mu + sigma eps; z and eps [B, K, kappa], log_sigma [B, kappa] -> [B, K]."""
    return 0.5 * (eps.square() - z.square()).sum(-1) + log_sigma.sum(-1)[:, None]


def chunk_size(model):
    """How many latent codes the decoder may take at once within MEMORY_BUDGET."""
    floats, size = math.prod(model.code_shape) + 4 * model.kappa, model.code_shape[1] * model.code_shape[2]
    for conv in model.decoder:
        size *= 4  # each stage doubles height and width (at most)
        floats += conv.out_channels * size
    return max(1, MEMORY_BUDGET // (4 * 3 * floats))  # 4 bytes, and about three copies alive at a stage


def evaluate(model, images, iw_samples, seed=0, dequantize=False, first=0, progress=lambda done: None):
    """Per-image likelihoods of uint8 `images` [N, C, H, W] under `model`, each worker taking a part of them.

    Encodes each image once and decodes `iw_samples` codes z ~ q(z|x) in chunks. The noise of image i depends on
    (seed, first + i) alone, so neither the chunks, the workers nor N change a figure beyond rounding. Returns numpy
    arrays, float64: nll: negative ELBO, its expectation averaged over the same samples [N]; iw_nll [N]; mse: mean
    squared error per dimension, same average [N]; kl [N]; float32: kl_per_dim [N, kappa]; z: one sample of q(z|x)
    [N, kappa].
    """
    return spread(lambda part: _evaluate(model, images[part], iw_samples, seed, dequantize, first + part.start,
                                         lambda done: progress(min(done * WORLD, len(images)))), len(images))


@torch.inference_mode()
@exact_convolutions
def _evaluate(model, images, iw_samples, seed, dequantize, first, progress):
    device, d, kappa, k = model.log_gamma.device, math.prod(model.shape), model.kappa, iw_samples
    chunk = chunk_size(model)
    block = max(1, chunk // k)  # images whose samples are decoded together
    out = {name: [] for name in ("nll", "iw_nll", "mse", "kl", "kl_per_dim", "z")}
    for start in range(0, len(images), block):
        rows = range(start, min(start + block, len(images)))
        noise = [generator(seed, EVALUATION, first + i) for i in rows]
        eps = torch.from_numpy(np.stack([g.standard_normal((k, kappa), np.float32) for g in noise])).to(device)
        x = images[start:rows.stop].to(device).contiguous(memory_format=torch.channels_last)
        if dequantize:
            uniform = np.stack([g.random(model.shape, np.float32) for g in noise])
            x = to_unit(x, torch.from_numpy(uniform).to(device))
        mu, log_sigma = model.encode(x)
        z, kl = reparameterize(mu.repeat_interleave(k, 0), log_sigma.repeat_interleave(k, 0), eps.flatten(0, 1),
                               per_dim=True)
        z, kl_per_dim = z.unflatten(0, (-1, k)), kl[::k].clone()  # a view would keep all K samples
        kl = kl_per_dim.sum(1, dtype=torch.float64)
        log_ratio = log_prior_minus_log_q(z.double(), eps.double(), log_sigma.double())
        log_mean_w, squared_error = [], []
        for z_part, log_ratio_part in zip(z.split(chunk, 1), log_ratio.split(chunk, 1), strict=True):  # one, mostly
            part = z_part.shape[1]
            decoded = model.decode(z_part.flatten(0, 1)).unflatten(0, (-1, part))
            nll, error = iw_nll(x, decoded, log_ratio_part, model.log_gamma, model.logits, True)
            log_mean_w.append(math.log(part / k) - nll.double())
            squared_error.append(error.double())
        squared_error = torch.cat(squared_error, 1)
        out["nll"].append(kl - log_normal(squared_error, d, model.log_gamma.double()).mean(1))
        out["iw_nll"].append(-torch.stack(log_mean_w).logsumexp(0))
        out["mse"].append(squared_error.mean(1) / d)
        out["kl"].append(kl)
        out["kl_per_dim"].append(kl_per_dim)
        out["z"].append(z[:, 0].clone())
        progress(rows.stop)
    return {name: torch.cat(parts).cpu().numpy() for name, parts in out.items()}
