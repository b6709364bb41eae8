"""What is fitted to inliers: modules whose buffers are all they know; `type(it)(**it.state_dict())` is it again.

Each is fitted by `fit(x)` to rows x [N, D] (`Tail`: to scores [N]), and takes others to one number each [M], larger
where they lie farther out. All are float64 tensors.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood.features import LAYOUT


class Density(torch.nn.Module):
    """Buffers by name."""

    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64))


def under(state, prefix):
    """The entries of a state_dict below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def shrunk_covariance(x):
    """The covariance [D, D] of x [N, D] around 0, shrunk towards a multiple of I by the oracle-approximating weight
    (arXiv 0907.4698, equation 23) and then, by a little, towards I, so that it can be inverted however few images there
    are, and however alike."""
    n, d = x.shape
    covariance = x.T @ x / n
    trace, squares = covariance.trace(), covariance.square().sum()
    spread = (n + 1 - 2 / d) * (squares - trace**2 / d)
    weight = min(1.0, float(((1 - 2 / d) * squares + trace**2) / spread)) if spread > 0 else 1.0
    return (1 - weight) * covariance + (weight * trace / d + 1e-9) * torch.eye(d, dtype=x.dtype, device=x.device)


def inverse_factor(covariance):
    """T with T T' = the inverse of the covariance."""
    lower = torch.linalg.cholesky(covariance)
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device),
                                         upper=False).T


class Gaussian(Density):
    """The squared Mahalanobis distance. Buffers: mean, scale [D], factor [D, D], which decorrelates scaled rows."""

    @classmethod
    def fit(cls, x):
        mean, scale = x.mean(0), x.std(0, correction=0) + 1e-6
        return cls(mean=mean, scale=scale, factor=inverse_factor(shrunk_covariance((x - mean) / scale)))

    def whitened(self, x):
        """Rows centred, scaled and decorrelated."""
        return (x - self.mean) / self.scale @ self.factor

    def forward(self, x):
        return self.whitened(x).square().sum(1)


class Halves(Gaussian):
    """The sum of the squared Mahalanobis distances of a row's two halves, which are of equal width, each by a Gaussian
    of its own."""

    @classmethod
    def fit(cls, x):
        halves = [Gaussian.fit(half).state_dict() for half in x.chunk(2, 1)]
        mean, scale = (torch.cat([half[name] for half in halves]) for name in ("mean", "scale"))
        return cls(mean=mean, scale=scale, factor=torch.block_diag(*(half["factor"] for half in halves)))


def log_joint(z, log_weights, means, factors):
    """The log of each component's weight times its density, of rows [M, D], up to a constant [M, K]."""
    return torch.stack([
        log_weight + factor.diagonal().log().sum() - 0.5 * ((z - mean) @ factor).square().sum(1)
        for log_weight, mean, factor in zip(log_weights, means, factors, strict=True)], 1)


class Mixture(Gaussian):
    """The negative log density under a mixture of Gaussians, up to a constant. Buffers: those of the whole set's
    Gaussian, in whose whitened coordinates it lies; log_weights [K], means [K, D], factors [K, D, D]."""

    @classmethod
    def fit(cls, x, components=10, steps=50, seed=0):
        """By expectation maximisation, from the clusters of k-means. Each covariance has the prior weight of D images
        of covariance I, the whole set's; there are fewer components where one would have less than 4 D images."""
        whole = Gaussian.fit(x)
        z = whole.whitened(x)
        n, d = z.shape
        k = max(1, min(components, n // (4 * d)))
        centres = z[torch.from_numpy(np.random.default_rng(seed).permutation(n)[:k])]
        for _ in range(10):
            nearest = torch.cdist(z, centres).argmin(1)
            centres = torch.stack([z[nearest == j].mean(0) if (nearest == j).any() else centres[j] for j in range(k)])
        share, eye, before = F.one_hot(nearest, k).double(), torch.eye(d, dtype=z.dtype, device=z.device), -math.inf
        single = z.float()
        for _ in range(steps):
            count = share.sum(0)
            weights, means = (count + 1) / (n + k), share.T @ z / count.clamp(min=1e-9)[:, None]
            factors = []
            for j in range(k):
                own = share[:, j] > 1e-9  # few: late in the fit an image is nearly one component's
                centred = z[own] - means[j]
                scatter = (centred * share[own, j:j + 1]).T @ centred
                factors.append(inverse_factor((scatter + d * eye) / (count[j] + d)))
            found = {"log_weights": weights.log(), "means": means, "factors": torch.stack(factors)}
            joint = log_joint(single, *(values.float() for values in found.values())).double()  # shares need no more
            log_density = joint.logsumexp(1, keepdim=True)
            share, mean = (joint - log_density).exp(), log_density.mean().item()
            if mean - before < 1e-2:  # nats an image
                break
            before = mean
        return cls(**whole.state_dict(), **found)

    def forward(self, x):
        return -log_joint(self.whitened(x), self.log_weights, self.means, self.factors).logsumexp(1)


class Projected(Mixture):
    """A mixture over the first LAYOUT columns' leading principal components, of which there is at most one for eight
    rows, and the other columns. Buffers: centre, spread [LAYOUT], directions [LAYOUT, K], and the mixture's."""

    MOST = 96

    @classmethod
    def fit(cls, x):
        many, rest = x[:, :LAYOUT], x[:, LAYOUT:]
        centre, spread = many.mean(0), many.std(0, correction=0) + 1e-6
        z = (many - centre) / spread
        k = min(cls.MOST, max(1, len(x) // 8))
        if len(x) < LAYOUT:  # by far the faster way for few rows
            _, singular, directions = torch.linalg.svd(z, full_matrices=False)
            deviation, directions = singular[:k] / math.sqrt(len(x)), directions[:k].T
        else:
            variance, directions = torch.linalg.eigh(z.T @ z / len(x))
            deviation, directions = variance[-k:].clamp(min=0).sqrt(), directions[:, -k:]
        directions = directions / (deviation + 1e-6)
        mixture = super().fit(torch.cat([z @ directions, rest], 1))
        return cls(centre=centre, spread=spread, directions=directions, **mixture.state_dict())

    def forward(self, x):
        projected = torch.cat([(part - self.centre) / self.spread @ self.directions
                               for part in x[:, :LAYOUT].split(10_000)])  # bounded copies
        return super().forward(torch.cat([projected, x[:, LAYOUT:]], 1))


class ECOD(Density):
    """Tail probabilities (arXiv 2201.00382): the largest of the sums over columns of -log of the left, of the right and
    of the skewer tails' probabilities. Buffers: columns [D, N], sorted; skewed_left [D]."""

    @classmethod
    def fit(cls, x):
        return cls(columns=x.T.contiguous().sort(1).values, skewed_left=((x - x.mean(0)) ** 3).mean(0) < 0)

    def forward(self, x):
        n, values = self.columns.shape[1], x.T.contiguous()
        left, right = (-((1 + count.double()) / (n + 1)).log() for count in (
            torch.searchsorted(self.columns, values, right=True), n - torch.searchsorted(self.columns, values)))
        skewer = torch.where(self.skewed_left.bool()[:, None], left, right)
        return torch.stack([tails.sum(0) for tails in (left, right, skewer)]).amax(0)


class Typicality(Density):
    """How far a value [M, 1] lies from the mean, either side. Buffer: mean."""

    @classmethod
    def fit(cls, x):
        return cls(mean=x.mean())

    def forward(self, x):
        return (x[:, 0] - self.mean).abs()


class Tail(Density):
    """-log p of a score [M], where p is the share of inliers that score at least as high; beyond their largest tenth,
    or what of it is above a value that many share, a generalised Pareto tail (peaks over threshold), by the
    probability-weighted moments of Hosking and Wallis (doi 10.1080/00401706.1987.10488243), but of a shape of at least
    1/n for n values, which is what they leave open where the tail is exponential: (1 + x / (n mean))^-n, the posterior
    predictive for Jeffreys' prior of its mean. Buffers: inliers [N], sorted; threshold, shape, scale."""

    SHARE = 0.1

    @classmethod
    def fit(cls, x):
        """To inliers' scores [N]."""
        inliers = x.sort().values
        threshold = inliers.quantile(1 - cls.SHARE)
        excess = inliers[inliers > threshold] - threshold
        n = max(1e-9, len(excess))  # of none: the shape is huge, and nothing rises beyond
        mean = (excess.sum() / n).clamp(min=1e-12)
        beyond = 1 - (torch.arange(len(excess), dtype=x.dtype) + 0.65) / n  # the probability beyond each
        shape = (2 - mean / (mean - 2 * (excess * beyond).sum() / n)).clamp(0, 0.99)
        return cls(inliers=inliers, threshold=threshold, shape=shape.clamp(min=1 / n), scale=mean * (1 - shape))

    def forward(self, x):
        n = len(self.inliers)
        share = -math.log((float((self.inliers > self.threshold).sum()) + 0.5) / (n + 1))
        p = (n - torch.searchsorted(self.inliers, x.contiguous()).double() + 0.5) / (n + 1)
        beyond = (self.shape * (x - self.threshold).clamp(min=0) / self.scale).log1p() / self.shape
        return torch.where(x <= self.threshold, (-p.log()).clamp(max=share), share + beyond)
