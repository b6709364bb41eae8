"""The Gaussian VAE of the paper (section 4; DCGAN-like layers after arXiv 1801.01401), for any image size.

q(z|x) = N(mu, diag sigma^2), p(x|z) = N(sigmoid(logits(z)), gamma I), p(z) = N(0, I) on R^kappa; x in [0, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vae_ood.data import to_unit


class VAE(nn.Module):
    """Encoder and decoder of three 5x5 stride-2 convolutions each; `alpha` scales every channel count but kappa.

    shape: (C, H, W) of the images. gamma: the decoder variance's initial value (a variance, in squared units of
    [0, 1] pixels); it is a trained parameter when `learn_gamma`, else a constant that the training loop may set.
    """

    logits = True  # `decode` gives the mean's logits, and the likelihood takes their sigmoid as it reads them

    def __init__(self, shape, alpha, kappa, gamma=1.0, learn_gamma=False):
        super().__init__()
        self.shape, self.kappa = tuple(shape), kappa
        channels, *size = shape
        sizes = [size]  # each stage halves, rounding up: 32 -> 16 -> 8 -> 4, 28 -> 14 -> 7 -> 4
        for _ in range(3):
            sizes.append([math.ceil(s / 2) for s in sizes[-1]])
        widths = [channels] + [max(1, round(c * alpha)) for c in (64, 128, 256)]
        self.code_shape = (widths[3], *sizes[3])
        features = math.prod(self.code_shape)

        self.encoder = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 5, stride=2, padding=2) for i in range(3))
        self.mu = nn.Linear(features, kappa)
        self.log_sigma = nn.Linear(features, kappa)
        self.expand = nn.Linear(kappa, features)
        self.decoder = nn.ModuleList(
            nn.ConvTranspose2d(widths[i + 1], widths[i], 5, stride=2, padding=2,
                               output_padding=[a - (2 * b - 1) for a, b in zip(sizes[i], sizes[i + 1], strict=True)])
            for i in (2, 1, 0)
        )
        self.log_gamma = nn.Parameter(torch.tensor(math.log(gamma)), requires_grad=learn_gamma)

    def encode(self, x):
        """x [B, C, H, W], uint8 or in [0, 1] -> mu [B, kappa], log_sigma [B, kappa] of q(z|x)."""
        h = to_unit(x) if x.dtype == torch.uint8 else x
        for conv in self.encoder:
            h = F.leaky_relu(conv(h), 0.2)
        h = h.flatten(1)
        # Far from the data the linear head extrapolates: past e^10 (the optimum never exceeds about 1) sigma would
        # soon overflow and an extreme outlier's score be NaN.
        return self.mu(h), self.log_sigma(h).clamp(max=10)

    def decode(self, z):
        """z [B, kappa] -> the logits of the mean of p(x|z), [B, C, H, W]."""
        h = F.relu(self.expand(z)).unflatten(1, self.code_shape).contiguous(memory_format=torch.channels_last)
        for conv in self.decoder[:-1]:
            h = F.relu(conv(h))
        return self.decoder[-1](h)
