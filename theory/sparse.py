"""Theorem 1's toy (section 3.3, supplement 3): an autoencoder and a VAE of points on a curve, and their minima.

The supplement's toy: n points x = pi(t) = eps * (t, t^2) of a curve, t in [0.5, 0.9], so 0 < |x_j| < eps; the decoder
mu_x(z; theta) = theta * pi(clip(z_1, 0, 1)) + (1 - theta) * (z_1, z_2), theta in [0, 1]; kappa = d = 2. Equation 4 is

    L(Z, theta) = h(E) + (h(U_1) + h(U_2)) / 2,   E = sum |x - mu_x|^2 / (2 n),   U_k = sum z_k^2 / n,

to be minimised over Z [n, 2] and theta. The optimal sparse reconstruction, E = 0 with one nonzero row of Z, is
theta = 1, z = (t, 0): U = (m1, 0), where m1 = mean t^2, and costs h(m1) / 2. The dense one, theta = 0, z = x, has
U = eps^2 (m1, m2), where m2 = mean t^4, and costs (h(eps^2 m1) + h(eps^2 m2)) / 2. With h(0) = 0 they are equal where

    u^p:             eps^2p = m1^p / (m1^p + m2^p)
    log(1 + u / d):  d = eps^4 m1 m2 / (m1 - eps^2 (m1 + m2)), about eps^4 m2, from (m1 + d) d = prod_k (eps^2 m_k + d)
    bounded:         h(m1) = h(eps^2 m1) + h(eps^2 m2), which has a root in (0, 1), as h(0) < h(m1) < h(m1) + h(m2);
                     for u / (u + tau), v = eps^2 solves v^2 m1 m2 (m1 + 2 tau) + v tau^2 (m1 + m2) = m1 tau^2,
                     and for log(1 + u / tau), v^2 m1 m2 + v tau (m1 + m2) = m1 tau

and the sparse one is the cheaper above that eps* (or below that d). As tau -> 0, eps*^2 is proportional to tau for
u / (u + tau) and 1 - exp(-u / tau), eps*^4 for log(1 + u / tau): eps* falls as the slope to the power -1/2, or -1/4.
The zero-error dense solution is not the best dense one: where the error is free, sparsity needs a larger eps (or a
smaller d) still, so that the closed forms of the bounded penalties and of log(u + d) are bounds there.

With E = 0 imposed, nothing else competes: for theta < 1 it forces z_1 = r t, r = eps / (theta eps + 1 - theta), and
z_2 = eps t^2 (1 - theta r^2) / (1 - theta), and both grow with theta, so theta = 0 is the cheapest of these.

Otherwise zero error is a further demand. Replace z_1 = t by (1 - s) t: the penalty falls by about s m1 h'(m1), while
E is O(s^2), and h(E) is O(s^2) if h'(0) is bounded, O(s^2p) for u^p. So the sparse solution is a global minimum at no
eps for a bounded penalty that still rises at m1, h'(m1) > 0 (one that is flat there, as 1 - exp(-u / tau) with a small
tau is in float64, has it above its eps*, and like every bounded one fails below), nor for u^p with p > 1/2. The same
holds of the dense one, z = (1 - s) x. For p < 1/2 the error term protects both; at p = 1/2 it grows like the gain, and
the minimum is found to be exact. Hence an unbounded slope is necessary, as the theorem says, and not sufficient: u^p
fails for p > 1/2 at every eps and for p <= 1/2 below its eps*, which tends to 0 with p.

Global minimisation: L is a concave, non-decreasing function of (E, U_1, U_2), so its minimum over all (Z, theta) is
taken at a point that minimises some linear function w . (E, U_1, U_2), w >= 0. For given w and theta that one separates
into the n points; z_2 is in closed form, and z_1 is found on a grid. A grid of w serves every h; then w = the gradient
of L at the best point so far, where the linear function bounds L from above, refines it. Random starts, and starts
near the two analytic solutions, check it to 1e-4, which is what the grids of theta and z_1 leave.

The VAE (equation 1) on the same decoder: the mean over the points of KL + (E_q |x - mu_x(z)|^2 / gamma +
2 log(2 pi gamma)) / 2. To reconstruct through z_k it needs sigma_k^2 = O(gamma), which costs -log(sigma_k) in the KL;
where mu_x does not depend on z_k, sigma_k = 1 costs nothing. So as gamma -> 0 its energy is
(d - #active) / 2 * log(gamma) + O(1): bounded for the dense solution, and without bound for the sparse one, which so
wins at every eps. (A point at t = 1 would be reconstructed by every z_1 >= 1, at a cost in KL of o(log gamma), and so
steepen the slope: t ends at 0.9 here.)
"""

import functools
import math

import numpy as np
import torch

from theory.penalties import exponential, indicator, power, ratio
from vae_ood.kernels.reparameterize import kl_per_dim

T = torch.linspace(0.5, 0.9, 8, dtype=torch.float64)
SPARSE = torch.stack([T, torch.zeros_like(T)], -1)  # z of the optimal sparse reconstruction
M1, M2 = float(T.square().mean()), float(T.pow(4).mean())
THETA = torch.cat([torch.linspace(0, 0.9, 10), torch.tensor([0.95, 0.99, 0.999, 1])]).double()  # theta's grid


def curve(t, eps):
    """pi(t) = eps (t, t^2), [..., 2]."""
    return eps * torch.stack([t, t.square()], -1)


def decode(z, theta, eps):
    """The decoder's mean of z [..., n, 2] under theta [...]."""
    theta = theta[..., None, None]
    return theta * curve(z[..., 0].clamp(0, 1), eps) + (1 - theta) * z


def terms(z, theta, eps):
    """(E, U_1, U_2) of z [..., n, 2] and theta [...], [..., 3]."""
    error = (curve(T, eps) - decode(z, theta, eps)).square().sum(-1).mean(-1) / 2
    return torch.cat([error[..., None], z.square().mean(-2)], -1)


def cost(penalty, e):
    """Equation 4 of (E, U_1, U_2) [..., 3]."""
    h = penalty.h(e)
    return h[..., 0] + (h[..., 1] + h[..., 2]) / 2


def analytic(eps):
    """(E, U_1, U_2, theta) of the sparse and the dense solution, and of z = 0 and z = (x_1, 0) at theta = 0, [4, 4]."""
    a, b = eps**2 * M1, eps**2 * M2
    return torch.tensor([[0, M1, 0, 1], [0, a, b, 0], [(a + b) / 2, 0, 0, 0], [b / 2, a, 0, 0]], dtype=torch.float64)


def predicted_power(p):
    """eps* of u^p."""
    return (M1**p / (M1**p + M2**p)) ** (1 / (2 * p))


def predicted_delta(eps):
    """delta* of log(u + delta)."""
    return eps**4 * M1 * M2 / (M1 - eps**2 * (M1 + M2))


def predicted_bounded(family, tau):
    """eps* of a bounded penalty with zero error imposed."""
    if family is exponential:  # Newton's method on e^(-v m1 / tau) + e^(-v m2 / tau) = 1 + e^(-m1 / tau), convex in v
        v = 0.0
        for _ in range(100):
            a, b = math.exp(-v * M1 / tau), math.exp(-v * M2 / tau)
            v += (a + b - 1 - math.exp(-M1 / tau)) / (a * M1 + b * M2) * tau
        return math.sqrt(v)
    a, b, c = ((M1 * M2 * (M1 + 2 * tau), tau**2 * (M1 + M2), M1 * tau**2) if family is ratio else
               (M1 * M2, tau * (M1 + M2), M1 * tau))
    return math.sqrt(2 * c / (b + math.sqrt(b * b + 4 * a * c)))


@functools.lru_cache(2)
def residuals(eps):
    """On a grid of z_1 [z1], before z_2 has its say: squared residuals of x_1 and residuals of x_2, [m, point, z1]."""
    z1 = torch.cat([eps * torch.linspace(0, 1, 121), torch.linspace(eps, 1.05, 121)]).double()
    theta = THETA[:, None, None]
    x, clipped = curve(T, eps)[..., None], z1.clamp(0, 1)
    first = x[:, 0] - theta * eps * clipped - (1 - theta) * z1
    return z1, first.square(), x[:, 1] - theta * eps * clipped.square()


def linear_minima(w1, w2, eps):
    """(E, U_1, U_2, theta) that minimises E + w1 U_1 + w2 U_2 over Z at each THETA, for scalars w1 and w2: [m, 4]."""
    z1, first, second = residuals(eps)
    slope = (1 - THETA)[:, None, None]
    ridge = (slope.square() + 2 * w2).clamp_min(1e-300)
    least = torch.addcmul(first, second.square(), (2 * w2).clamp_min(1e-300) / ridge)  # 2 (E + w2 U_2) at the best z_2
    best = (least + 2 * w1 * z1.square()).argmin(-1, keepdim=True)
    first, second = first.gather(-1, best), second.gather(-1, best)
    z2 = second * slope / ridge
    error = (first + (second - slope * z2).square()) / 2
    means = [v.squeeze(-1).mean(-1) for v in (error, z1[best].square(), z2.square())]
    return torch.stack([*means, THETA], -1)


@functools.lru_cache(2)
def extreme_points(eps):
    """Candidates for the minimum of every penalty, (E, U_1, U_2, theta) [N, 4]: `analytic`, the sparse solution shrunk,
    and the minimisers of a grid of linear functions."""
    shrink = 1 - torch.logspace(-9, -0.5, 120, dtype=torch.float64)
    theta = torch.ones_like(shrink)
    shrunk = terms(shrink[:, None, None] * SPARSE, theta, eps)
    w = torch.logspace(-7, 5, 17, dtype=torch.float64) * eps**2
    grid = [linear_minima(w1, w2, eps) for w1 in w for w2 in w]
    return torch.cat([analytic(eps), torch.cat([shrunk, theta[:, None]], 1), *grid])


def minimum(penalty, eps):
    """The global minimum: (cost, (E, U_1, U_2, theta))."""
    points, lowest, best = extreme_points(eps), math.inf, None
    while True:
        values = cost(penalty, points[:, :3])
        if float(values.min()) >= lowest * (1 - 1e-7):
            return lowest, best
        lowest, best = float(values.min()), points[values.argmin()]
        slopes = penalty.derivative(best[:3].clamp_min(1e-12))
        points = linear_minima(*torch.nan_to_num(slopes[1:] / 2 / slopes[0]), eps)


def is_sparse(best):
    """Whether a global minimum's point is the optimal sparse reconstruction, to the last bit."""
    return best.tolist() == [0, M1, 0, 1]


def nearly_sparse(penalty, eps):
    """Whether the global minimum has the sparse shape, but for a small error: z_1 of order t, z_2 negligible."""
    _, (_, u_1, u_2, _) = minimum(penalty, eps)
    return bool(u_1 > M1 / 4 and u_2 < 1e-3 * u_1)


def constrained_minimum(penalty, eps):
    """The minimum over theta in [0, 1] and all Z of zero reconstruction error: (cost, theta)."""
    theta = torch.linspace(0, 1, 1001, dtype=torch.float64)
    rate = (eps / (theta * eps + 1 - theta))[:, None]
    z2 = torch.where(theta[:, None] < 1, eps * T.square() * (1 - theta[:, None] * rate.square()), 0.0)
    z2 = z2 / (1 - theta[:, None]).clamp_min(1e-300)
    e = terms(torch.stack([rate * T, z2], -1), theta, eps)
    assert float(e[:, 0].max()) < 1e-20
    e[:, 0] = 0
    values = cost(penalty, e)
    return float(values.min()), float(theta[values.argmin()])


def crossover(wins, low=1e-6, high=1.0, precision=1e-4):
    """The value in (low, high) above which `wins` is true, by bisection on a log scale, to that relative precision."""
    for _ in range(math.ceil(math.log2(math.log(high / low) / precision))):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if wins(middle) else (middle, high)
    return math.sqrt(low * high)


def descend(loss, theta, others, lr, steps):
    """Minimise loss(step) over theta in [0, 1] and the other leaves by Adam with a cosine schedule, in place."""
    parameters = [theta.requires_grad_(), *(other.requires_grad_() for other in others)]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            theta.clamp_(0, 1)
    for parameter in parameters:
        parameter.requires_grad_(False)


def random_starts(penalty, eps, starts=32, steps=600):
    """The lowest cost that Adam reaches from random Z and theta, a quarter of them near the sparse solution and a
    quarter near the dense one. It descends on h(u + s), s falling from 1e-2 to 1e-12, with u^0.05 for the indicator;
    the costs are of h itself, also with z_2 = 0."""
    g = torch.Generator().manual_seed(0)
    z = torch.rand(starts, len(T), 2, generator=g, dtype=torch.float64)
    z *= torch.tensor([1.0, eps], dtype=torch.float64)[torch.randint(0, 2, (starts, 1, 1), generator=g)]
    theta = torch.rand(starts, generator=g, dtype=torch.float64)
    near, quarter = 1 + 0.1 * torch.randn(starts, len(T), 2, generator=g, dtype=torch.float64), starts // 4
    z[:quarter] = near[:quarter] * SPARSE
    z[quarter:2 * quarter] = near[quarter:2 * quarter] * curve(T, eps)
    theta[:quarter], theta[quarter:2 * quarter] = 0.999, 0.001
    smooth = power(0.05) if penalty == indicator else penalty
    descend(lambda step: cost(smooth, terms(z, theta, eps) + 1e-2 * 1e-10 ** (step / steps)).sum(),
            theta, [z], 0.03, steps)
    flat = z * torch.tensor([1, 0])
    return min(float(cost(penalty, terms(v, theta, eps)).min()) for v in (z, flat))


def vae_energy(mu, log_sigma, theta, log_gamma, eps, noise=None):
    """Equation 1 in nats, mean over the points: mu, log_sigma [..., n, 2], theta, log_gamma [...] -> [...].

    The expectation over z_2 is exact; that over z_1 by 64-point Gauss-Hermite quadrature, or, for training, the mean
    over the standard normal `noise` [S, ..., n].
    """
    if noise is None:
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(64))
        noise, weights = nodes.view(-1, *[1] * (mu.dim() - 1)), weights / weights.sum()
    else:
        weights = torch.full((len(noise),), 1 / len(noise), dtype=torch.float64)
    z1 = mu[..., 0] + log_sigma[..., 0].exp() * noise
    z = torch.stack([z1, mu[..., 1].expand_as(z1)], -1)
    error = (curve(T, eps) - decode(z, theta, eps)).square().sum(-1)  # [S, ..., n]
    error = torch.tensordot(weights, error, 1) + (1 - theta[..., None]).square() * (2 * log_sigma[..., 1]).exp()
    kl = kl_per_dim(mu, log_sigma).sum(-1)
    return (0.5 * error / log_gamma.exp()[..., None] + log_gamma[..., None] + math.log(2 * math.pi) + kl).mean(-1)


def vae_minimum(theta, log_gamma, eps):
    """The least energy over q(z|x) at fixed theta and gamma, from the sparse (theta = 1) or the dense solution."""
    z = SPARSE if theta else curve(T, eps)
    sigma = (log_gamma.exp() / ((eps if theta else 1) ** 2 + log_gamma.exp())).sqrt().expand(len(T), 1)
    log_sigma = torch.cat([sigma, torch.ones_like(sigma) if theta else sigma], 1).log()
    theta = torch.tensor(float(theta), dtype=torch.float64)
    shift = torch.zeros_like(z).requires_grad_()  # in units of sigma
    scale = torch.zeros_like(z).requires_grad_()
    optimizer = torch.optim.LBFGS([shift, scale], max_iter=200, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        energy = vae_energy(z + log_sigma.exp() * shift, log_sigma + scale, theta, log_gamma, eps)
        energy.backward()
        return energy

    optimizer.step(closure)
    return float(closure().detach())


def train_vae(eps, seeds=8, steps=6000, samples=16):
    """Train q(z|x), theta and gamma by Adam on equation 1 with sampled z, from random starts and gamma = 1; returns
    theta, gamma, the KLs of both dimensions in nats and the energy, a row a seed [seeds, 5]."""
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(seeds, len(T), 2, generator=g, dtype=torch.float64)
    log_sigma = torch.zeros_like(mu)
    theta = torch.rand(seeds, generator=g, dtype=torch.float64)
    log_gamma = torch.zeros_like(theta)

    def loss(step):
        noise = torch.randn(samples, seeds, len(T), generator=g, dtype=torch.float64)
        return vae_energy(mu, log_sigma, theta, log_gamma, eps, noise).sum()

    descend(loss, theta, [mu, log_sigma, log_gamma], 0.02, steps)
    kl = kl_per_dim(mu, log_sigma).mean(1)
    energy = vae_energy(mu, log_sigma, theta, log_gamma, eps)
    return torch.stack([theta, log_gamma.exp(), kl[:, 0], kl[:, 1], energy], 1)
