"""VAEs of points in R^d, small enough to integrate over the latent space; several seeds are trained at once."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from vae_ood.kernels.iw_nll import iw_nll
from vae_ood.kernels.reparameterize import kl_per_dim
from vae_ood.likelihood import log_prior_minus_log_q

FLOOR = 2e-4  # the least gamma
LIMIT = 6.0  # the latent space is integrated over [-LIMIT, LIMIT]^kappa


class MLP(nn.Module):
    """Perceptrons of the given widths, SiLU between the layers, one a seed: [S, N, widths[0]] -> [S, N, widths[-1]]."""

    def __init__(self, widths, seeds, generator):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            bound = 1 / math.sqrt(fan_in)
            for parameters, shape in ((self.weights, (seeds, fan_in, fan_out)), (self.biases, (seeds, 1, fan_out))):
                parameters.append(bound * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1))

    def forward(self, x):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if i == 0 else nn.functional.silu(x), weight)
        return x


class VAE(nn.Module):
    """q(z|x) = N(mu, diag sigma^2), p(x|z) = N(decoder(z), gamma I) in R^d, one model a seed, in float64.

    `hidden` are the decoder's widths, which are its capacity: none, and it is affine. The encoder is always ample.
    gamma starts at 0.03, for data of unit scale: above the largest variance, a collapsed posterior is the optimum.
    """

    def __init__(self, d, kappa, hidden, seeds):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.d, self.kappa, self.seeds = d, kappa, seeds
        self.encoder = MLP((d, 64, 64, 2 * kappa), seeds, generator)
        self.decoder = MLP((kappa, *hidden, d), seeds, generator)
        self.log_gamma = nn.Parameter(torch.full((seeds, 1), math.log(0.03), dtype=torch.float64))

    def loss(self, x, eps):
        """The negative ELBO in nats (equation 1) of x [S, N, d] with noise eps [S, N, kappa], [S, N]."""
        mu, log_sigma = self.encoder(x).chunk(2, -1)
        error = (x - self.decoder(mu + log_sigma.exp() * eps)).square().sum(-1)
        kl = kl_per_dim(mu, log_sigma).sum(-1)
        return 0.5 * error / self.log_gamma.exp() + 0.5 * self.d * (self.log_gamma + math.log(2 * math.pi)) + kl

    def fit(self, x, steps, batch=128, lr=1e-2):
        """Adam with a cosine schedule on batches of x [n, d], or [S, n, d], a set a seed; gamma is learned too, down to
        FLOOR, below which the integrals over z would need a finer grid."""
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(self.parameters(), lr=lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        x, seed = x.expand(self.seeds, -1, -1), torch.arange(self.seeds)[:, None]
        for _ in range(steps):
            rows = torch.randint(x.shape[1], (self.seeds, batch), generator=generator)
            eps = torch.randn(self.seeds, batch, self.kappa, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            self.loss(x[seed, rows], eps).mean(1).sum().backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                self.log_gamma.clamp_(min=math.log(FLOOR))
        return self

    # ---- of x [n, d] for all seeds, or [S, n, d], a set a seed

    def gammas(self):
        """gamma of each seed, a list."""
        return self.log_gamma.detach().exp()[:, 0].tolist()

    @torch.no_grad()
    def kl_per_dim(self, x):
        """The mean KL of each latent dimension over x in nats, [S, kappa]."""
        mu, log_sigma = self.encoder(x.expand(self.seeds, -1, -1)).chunk(2, -1)
        return kl_per_dim(mu, log_sigma).mean(1)

    @torch.no_grad()
    def iw_nll(self, x, samples):
        """The importance-weighted NLL of x in nats, [S, n]."""
        generator = torch.Generator().manual_seed(2)
        x = x.expand(self.seeds, -1, -1)
        mu, log_sigma = self.encoder(x).chunk(2, -1)
        eps = torch.randn(*x.shape[:2], samples, self.kappa, generator=generator, dtype=torch.float64)
        z = mu[:, :, None] + log_sigma.exp()[:, :, None] * eps
        mean = self.decoder(z.flatten(1, 2)).unflatten(1, (-1, samples))
        return torch.stack([iw_nll(x[s], mean[s], log_prior_minus_log_q(z[s], eps[s], log_sigma[s]),
                                   self.log_gamma[s, 0]) for s in range(self.seeds)])

    @torch.no_grad()
    def prior_grid(self):
        """A grid over the latent space: log weights [m], which sum to 1, and the decoder's means [S, m, d]."""
        axis = torch.linspace(-LIMIT, LIMIT, 20_001 if self.kappa == 1 else 601, dtype=torch.float64)
        z = torch.cartesian_prod(*[axis] * self.kappa).view(-1, self.kappa)
        log_prior = -0.5 * z.square().sum(1)
        mean = [self.decoder(part.expand(self.seeds, -1, -1)) for part in z.split(5000)]
        return log_prior - log_prior.logsumexp(0), torch.cat(mean, 1)

    def nll(self, x):
        """-log p(x) of x in nats by quadrature over z (equation 3), [S, n]."""
        log_weight, mean = self.prior_grid()
        result = []
        for s, (gamma, points) in enumerate(zip(self.gammas(), x.expand(self.seeds, -1, -1), strict=True)):
            offset = log_weight - 0.5 * mean[s].square().sum(1) / gamma  # the square of |x - mean| expanded: one matmul
            log_p = [torch.addmm(offset, part, mean[s].T, alpha=1 / gamma).logsumexp(1) for part in points.split(4)]
            log_p = torch.cat(log_p) - 0.5 * points.square().sum(1) / gamma
            result.append(0.5 * self.d * math.log(2 * math.pi * gamma) - log_p)
        return torch.stack(result)

    def density_map(self, extent, pixels=120, seed=0):
        """p(x) over the square [-extent, extent]^2 of the first two coordinates, the others integrated out, as an image
        [pixels, pixels] with x_1 to the right and x_2 upwards: the histogram of the means, blurred by gamma, or by a
        pixel where that is more."""
        log_weight, mean = self.prior_grid()
        edges = np.linspace(-extent, extent, pixels + 1)
        mass, _, _ = np.histogram2d(*mean[seed, :, :2].T.numpy(), edges, weights=log_weight.exp().numpy())
        centres, variance = (edges[1:] + edges[:-1]) / 2, max(self.gammas()[seed], (edges[1] - edges[0]) ** 2)
        blur = np.exp(-0.5 * (centres[:, None] - centres) ** 2 / variance) / math.sqrt(2 * math.pi * variance)
        return (blur @ mass @ blur).T[::-1]


@torch.no_grad()
def best_of(starts, x, model):
    """Of each `starts` consecutive models, only that of the lowest loss on the training set x: the predictions are of
    the optimum, and some starts end elsewhere (a superfluous dimension stays active, or a line crosses itself)."""
    generator = torch.Generator().manual_seed(3)
    x = x.expand(model.seeds, -1, -1).repeat(1, 8, 1)
    eps = torch.randn(*x.shape[:2], model.kappa, generator=generator, dtype=torch.float64)
    loss = model.loss(x, eps).mean(1)
    kept = torch.arange(0, model.seeds, starts) + loss.view(-1, starts).argmin(1)
    for parameter in model.parameters():
        parameter.data = parameter[kept]
    model.seeds = len(kept)
    return model
