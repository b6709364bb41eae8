"""A Gaussian on a circle prefers the empty centre; a VAE with a learned gamma does not (section 2).

    python -m theory.circle [--quick] [--out DIR]        under a minute on two cores

Inliers lie on the unit circle. The maximum-likelihood Gaussian has their mean, 0, and their covariance, which for
(cos a, sin a) with a uniform is E[cos^2 a] I = I / 2 (the paper says I, whose likelihood is lower). Its NLL is
|x|^2 + log(pi): every point inside the circle is more likely than every inlier, and the AUROC of these outliers is 0. A
VAE puts its mass on the image of its decoder, thickened by gamma, and gamma falls towards 0 as the decoder learns to
follow the circle: with kappa = 1 along a line that is cut once, with kappa = 2 around a ring, which takes both
dimensions though r = 1, as a closed curve has no continuous inverse into a line. For kappa = 1 each of the three seeds
is the best of four starts by training loss: some starts end in a line that crosses itself.
"""

import math

import torch

from theory import Report, parse
from theory.vae import VAE, best_of
from vae_ood.cli import one_line_errors
from vae_ood.metrics import detection

INSIDE = 0.9  # outliers are uniform in the disc of this radius


def uniform(n, low, high, generator):
    """n numbers in [low, high)."""
    return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)


def circle(angles, radii=1.0):
    """Points [n, 2] at the angles [n]."""
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1)


def gaussian_nll(x, mean, covariance):
    """-log N(x; mean, covariance) of x [n, 2] in nats, [n]."""
    return -torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)


def auroc(inliers, outliers):
    """AUROC of NLLs [n] and [m], outliers positive."""
    return detection(inliers, outliers, resamples=1)["auroc"]


def main():
    """The command."""
    args = parse(__doc__.splitlines()[0], "one seed instead of three")
    seeds = 1 if args.quick else 3
    report, g = Report("circle"), torch.Generator().manual_seed(0)
    even = circle(2 * math.pi / 1000 * torch.arange(1000, dtype=torch.float64))  # its mean and covariance are exact
    train = circle(uniform(500, 0, 2 * math.pi, g))
    test = circle(uniform(500, 0, 2 * math.pi, g))
    outliers = circle(uniform(500, 0, 2 * math.pi, g), INSIDE * uniform(500, 0, 1, g).sqrt())

    mean, covariance = even.mean(0), even.T.cov(correction=0)
    off = float((covariance - 0.5 * torch.eye(2)).abs().max())
    report.check("the maximum-likelihood Gaussian has mean 0 and covariance I / 2 (the paper: I)",
                 f"|mean| {float(mean.norm()):.1e}, covariance within {off:.1e}", mean.norm() < 1e-12 and off < 1e-12)
    nll, paper_nll = (float(gaussian_nll(even, mean, c).mean()) for c in (covariance, torch.eye(2).double()))
    report.check("its mean NLL is log(pi) + 1 = 2.1447 nats, against log(2 pi) + 1 / 2 = 2.3379 with covariance I",
                 f"{nll:.4f} and {paper_nll:.4f}",
                 abs(nll - math.log(math.pi) - 1) < 1e-9 and abs(paper_nll - math.log(2 * math.pi) - 0.5) < 1e-9)
    gaussian = auroc(gaussian_nll(test, mean, covariance), gaussian_nll(outliers, mean, covariance))
    report.check("each point inside is more likely than each inlier: AUROC 0", f"{gaussian:.4f}", gaussian == 0)

    models = {kappa: best_of(starts, train, VAE(2, kappa, (64, 64), seeds * starts).fit(train, steps))
              for kappa, starts, steps in ((1, 4, 5000), (2, 1, 3000))}
    numbers = {"n_train": len(train), "n_in": len(test), "n_out": len(outliers), "gaussian_auroc": gaussian, "vae": {}}
    for kappa, model in models.items():
        aurocs = [auroc(a, b) for a, b in zip(model.nll(test), model.nll(outliers), strict=True)]
        numbers["vae"][kappa] = {"auroc": aurocs, "gamma": model.gammas()}
        gammas = ", ".join(f"{gamma:.2g}" for gamma in model.gammas())
        report.check(f"VAE, kappa {kappa}, gamma learned: AUROC of the points inside at least 0.99, gamma below 0.01",
                     f"{', '.join(f'{v:.4f}' for v in aurocs)}; gamma {gammas} ({seeds} seed(s))",
                     min(aurocs) >= 0.99 and max(model.gammas()) < 0.01)
    report.finish(args.out, numbers, lambda: draw(models, mean, covariance, test, outliers, numbers))


def draw(models, mean, covariance, test, outliers, numbers, extent=1.4):
    """The figure: density maps of the Gaussian and the VAEs with inliers and outliers."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axis = torch.linspace(-extent, extent, 240, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    maps = [(f"Gaussian,\nAUROC {numbers['gaussian_auroc']:.2f}",
             (-gaussian_nll(grid, mean, covariance)).exp().view(240, 240).T.flip(0).numpy())]
    maps += [(f"VAE, $\\kappa$ = {kappa},\nAUROC {numbers['vae'][kappa]['auroc'][0]:.3f}, "
              f"$\\gamma$ = {numbers['vae'][kappa]['gamma'][0]:.1g}", model.density_map(extent))
             for kappa, model in models.items()]
    for axes, (title, image) in zip(figure.subplots(1, 3), maps, strict=True):
        shown = axes.imshow(image, extent=[-extent, extent] * 2, cmap="Greys", vmin=0)
        figure.colorbar(shown, ax=axes, label="density", shrink=0.8)
        axes.plot(*test[:100].T, ".", color="C0", markersize=4, label="inliers")
        axes.plot(*outliers[:100].T, ".", color="C3", markersize=4, label="outliers")
        axes.set(title=title, xlabel="$x_1$", ylabel="$x_2$")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    with one_line_errors():
        main()
