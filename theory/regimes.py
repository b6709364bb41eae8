"""Fig. 1 of the paper, which is hypothetical there, measured: capacity against latent dimension (section 3.1).

    python -m theory.regimes [--quick] [--out DIR]        under ten minutes on two cores; --quick under one

Inliers: a crescent in the plane (r = 2), three quarters of a ring whose width falls from 0.9 to 0.1 towards its tips;
and an arc (r = 1), three quarters of the unit circle. The arc lies in the plane x_3 = 0 of R^3: in R^2 an affine
decoder with kappa = 2 = d fits every covariance, its likelihood is that of the full-rank Gaussian for any gamma up to
the smallest eigenvalue, and nothing drives gamma to 0; in R^3 the plane is the paper's "simpler but higher-
dimensional" manifold that subsumes the true one, reconstructs it without error, and gamma falls as in the paper's
panel.

The capacity is that of the decoder: insufficient, affine; suitable, two layers of 64; excessive, two layers of 128 and
few training points (16 of the crescent, 12 of the arc; 2,000 otherwise). The panels, with the outliers that each
predicts trouble for:

    (a) crescent, kappa 1, insufficient    gamma far from 0; the hollow centre is taken for an inlier
    (b) arc,      kappa 2, insufficient    gamma -> 0, but the hollow centre lies in the learned plane
    (c) crescent, kappa 1, suitable        one gamma for a band of varying width: points beside the tips are in the band
    (d) arc,      kappa 2, suitable        gamma -> 0, one active dimension, no trouble, hollow or beside the arc
    (e) crescent, kappa 1, excessive       gamma -> 0 on the training points, and test inliers as unlikely as outliers
    (f) arc,      kappa 2, excessive       gamma -> 0 on the training points, and so for points beside the arc

Trouble is an AUROC below 0.95, none at least 0.98, of -log p(x), integrated over z (equation 3), 200 inlier test
points against 200 outliers; each seed draws points, initialisation and noise anew. gamma "-> 0" is below 0.01, "far
from 0" above 0.02, where the data vary by 0.3 to 0.7 a coordinate; the fit stops at 2e-4. Overfitting is a test NLL
more than 1 nat above the training NLL. As a control beside (c), the crescent with kappa = r = 2 at the same capacity
must separate what (c) does not. The predictions are of the optimum: (d) and the control take the best of several
starts by training loss.

The importance-weighted NLL agrees with the integral on inliers that the encoder was trained for. In (e) and (f) it does
not on test points, where the encoder proposes wrong z: it is an upper bound, there a useless one. The integral is used.
"""

import math

import torch
from torch.nn.functional import pad

from theory import Report, parse
from theory.circle import auroc, circle, uniform
from theory.vae import FLOOR, VAE, best_of
from vae_ood.cli import one_line_errors
from vae_ood.metrics import ACTIVE_NATS

SPAN = 0.75 * math.pi  # of the arc, to both sides of its middle, which points left
SETS = 200  # points of each evaluation set
IW_SAMPLES = 256
STARTS = {"d": 8, "control": 4}  # of a seed: half of those of (d) keep a second dimension active, at a higher loss


def either_sign(n, generator):
    """n signs."""
    return 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1


def half_width(s):
    """Half the width of the crescent at s in [-1, 1] along it."""
    return 0.05 + 0.4 * (1 - s.abs())


def crescent(n, generator):
    """Points of the crescent, [n, 2]."""
    s = uniform(n, -1, 1, generator)
    return circle(math.pi + SPAN * s, 1 + half_width(s) * uniform(n, -1, 1, generator))


def beside_tips(n, generator):
    """Points 0.05 to 0.25 outside the crescent's edge, in the last third towards either tip, [n, 2]."""
    s = uniform(n, 0.7, 1, generator) * either_sign(n, generator)
    beyond = half_width(s) + uniform(n, 0.05, 0.25, generator)
    return circle(math.pi + SPAN * s, 1 + beyond * either_sign(n, generator))


def arc(n, generator):
    """Points of the arc in its plane, [n, 2]."""
    return circle(math.pi + uniform(n, -SPAN, SPAN, generator))


def beside_arc(n, generator):
    """Points 0.05 to 0.2 off the arc to either side in its plane, [n, 2]."""
    radii = 1 + uniform(n, 0.05, 0.2, generator) * either_sign(n, generator)
    return circle(math.pi + uniform(n, -SPAN, SPAN, generator), radii)


def hollow(n, generator):
    """Points of the disc of radius 0.4 in the middle, [n, 2]."""
    return circle(uniform(n, -math.pi, math.pi, generator), 0.4 * uniform(n, 0, 1, generator).sqrt())


PANELS = {  # inliers, kappa, capacity, decoder's widths, training points
    "a": (crescent, 1, "insufficient", (), 2000),
    "b": (arc, 2, "insufficient", (), 2000),
    "c": (crescent, 1, "suitable", (64, 64), 2000),
    "d": (arc, 2, "suitable", (64, 64), 2000),
    "e": (crescent, 1, "excessive", (128, 128), 16),
    "f": (arc, 2, "excessive", (128, 128), 12),
    "control": (crescent, 2, "suitable", (64, 64), 2000),
}
PREDICTIONS = {  # of gamma (to 0 or not, None: nothing said), overfitting, trouble with the outliers named
    "a": (False, False, {"hollow": True}),
    "b": (True, False, {"hollow": True}),
    "c": (False, False, {"beside": True}),
    "d": (True, False, {"hollow": False, "beside": False}),
    "e": (True, True, {"beside": True}),
    "f": (True, True, {"beside": True}),
    "control": (None, False, {"beside": False}),
}


def measure(panel, steps, seeds):
    """Train a panel's VAE and measure it: (model, sets of points, figures a seed each)."""
    inliers, kappa, _, hidden, n = PANELS[panel]
    d, beside = (2, beside_tips) if inliers is crescent else (3, beside_arc)
    draws = []
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        draws.append({"train": inliers(n, g), "test": inliers(SETS, g), "hollow": hollow(SETS, g),
                      "beside": beside(SETS, g)})
    # [S, n, d], where d = 3 in the plane x_3 = 0
    sets = {name: torch.stack([pad(draw[name], (0, d - 2)) for draw in draws]) for name in draws[0]}
    starts = STARTS.get(panel, 1)
    repeated = sets["train"].repeat_interleave(starts, 0)
    model = VAE(d, kappa, hidden, starts * seeds).fit(repeated, steps)
    active = (model.kl_per_dim(repeated) > ACTIVE_NATS).sum(1).view(seeds, starts)
    model = best_of(starts, repeated, model)
    points = [x[:, :SETS] for x in sets.values()]
    nll = dict(zip(sets, model.nll(torch.cat(points, 1)).split([x.shape[1] for x in points], 1), strict=True))
    iw = {name: model.iw_nll(sets[name][:, :SETS], IW_SAMPLES) for name in ("train", "test")}
    result = {
        "gamma": model.gammas(), "active_dims": (model.kl_per_dim(sets["train"]) > ACTIVE_NATS).sum(1).tolist(),
        "active_dims_of_all_starts": active.tolist(),
        "train_nll": nll["train"].mean(1).tolist(), "test_nll": nll["test"].mean(1).tolist(),
        "test_nll_iw": iw["test"].mean(1).tolist(),
        "iw_minus_integral": {name: (v - nll[name]).median(1).values.tolist() for name, v in iw.items()},
        "auroc": {name: [auroc(a, b) for a, b in zip(nll["test"], nll[name], strict=True)]
                  for name in ("hollow", "beside")},
    }
    return model, sets, result


def listed(values, form):
    """Numbers of the seeds for a reader."""
    return ", ".join(format(value, form) for value in values)


def main():
    """The command."""
    args = parse(__doc__.splitlines()[0], quick="one seed, fewer steps and no control, under a minute")
    steps, seeds = (2500, 1) if args.quick else (5000, 3)
    report, numbers, drawn = Report("regimes"), {"steps": steps, "seeds": seeds, "iw_samples": IW_SAMPLES}, {}
    for panel, (inliers, kappa, capacity, _, n) in PANELS.items():
        if args.quick and panel == "control":  # it needs the steps
            continue
        model, sets, result = measure(panel, steps, seeds)
        drawn[panel], numbers[panel] = (model, sets), result
        print(f"({panel}) {inliers.__name__}, kappa {kappa}, {capacity}, {n:,} training points, {seeds} seed(s): gamma "
              f"{listed(result['gamma'], '.2g')}; active {listed(result['active_dims'], 'd')}; NLL train "
              f"{listed(result['train_nll'], '.2f')}, test {listed(result['test_nll'], '.2f')} (importance-weighted "
              f"{listed(result['test_nll_iw'], '.2f')}) nats")
        to_zero, overfit, trouble = PREDICTIONS[panel]
        if to_zero is not None:
            report.check(f"({panel}) gamma {f'-> 0 (no lower than {FLOOR:g})' if to_zero else 'stays far from 0'}",
                         listed(result["gamma"], ".2g"),
                         max(result["gamma"]) < 0.01 if to_zero else min(result["gamma"]) > 0.02)
        gaps = [test - train for test, train in zip(result["test_nll"], result["train_nll"], strict=True)]
        report.check(f"({panel}) {'overfits' if overfit else 'does not overfit'}: test NLL {'>' if overfit else '<'} "
                     "training NLL + 1 nat", listed(gaps, "+.2f"), min(gaps) > 1 if overfit else max(gaps) < 1)
        for name, expected in trouble.items():
            values = result["auroc"][name]
            report.check(f"({panel}) {'trouble: AUROC < 0.95' if expected else 'no trouble: AUROC >= 0.98'}, outliers: "
                         f"{name}", listed(values, ".3f"), max(values) < 0.95 if expected else min(values) >= 0.98)
        if panel == "d":
            active = result["active_dims"]
            pruned = [one for seed in result["active_dims_of_all_starts"] for one in seed].count(1)
            report.check(f"(d) one active dimension, in the best of {STARTS['d']} starts by training loss",
                         f"{listed(active, 'd')}; in {pruned} of {seeds * STARTS['d']} starts", set(active) == {1})
        where = "train" if overfit else "test"
        off = result["iw_minus_integral"][where]
        report.check(f"({panel}) importance-weighted NLL, K = {IW_SAMPLES}, of {where} points: within 0.05 nats of the "
                     "integral", f"{listed(off, '+.4f')} (median of the points)", max(map(abs, off)) < 0.05)
    report.finish(args.out, numbers, lambda: draw(drawn, numbers))


def draw(drawn, numbers, extent=1.7):
    """The figure, in the layout of Fig. 1: capacity from left to right, crescent above, arc below."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 9), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).T.flat, "abcdef", strict=True):
        (model, sets), result, trouble = drawn[panel], numbers[panel], PREDICTIONS[panel][2]
        axes.imshow(model.density_map(extent) ** 0.5, extent=[-extent, extent] * 2, cmap="Greys", vmin=0)
        z = torch.linspace(-2.5, 2.5, 401 if model.kappa == 1 else 21, dtype=torch.float64)
        z = torch.cartesian_prod(*[z] * model.kappa).view(-1, model.kappa)
        mean = model.decoder(z.expand(model.seeds, -1, -1))[0, :, :2].detach()
        if model.kappa == 1:
            normal = torch.stack([-mean.diff(dim=0)[:, 1], mean.diff(dim=0)[:, 0]], 1)
            normal = 2 * result["gamma"][0] ** 0.5 * normal / normal.norm(dim=1, keepdim=True)
            axes.plot(*mean.T, color="C2", label="learned manifold")
            for sign in (-1, 1):
                axes.plot(*(mean[1:] + sign * normal).T, "--", color="C2", linewidth=0.8,
                          label=r"$\pm 2\sqrt{\gamma}$" if sign > 0 else None)
        else:
            axes.plot(*mean.T, ".", color="C2", markersize=2, label="learned manifold")
        axes.plot(*sets["train"][0, :200, :2].T, ".", color="C0", markersize=4, label="inliers, training")
        axes.plot(*sets["test"][0, :100, :2].T, "o", color="C0", markersize=4, fillstyle="none", label="inliers, test")
        for name in trouble:
            axes.plot(*sets[name][0, :60, :2].T, "x", color="C3", markersize=4)
        _, kappa, capacity, _, _ = PANELS[panel]
        figures = "; ".join(f"AUROC {name} {result['auroc'][name][0]:.2f}" for name in trouble)
        axes.set(title=f"({panel}) {capacity}, $\\kappa$ = {kappa}, $\\gamma$ = {result['gamma'][0]:.2g}\n{figures}",
                 xlim=(-extent, extent), ylim=(-extent, extent))
    figure.axes[0].plot([], [], "x", color="C3", label="outliers")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


if __name__ == "__main__":
    with one_line_errors():
        main()
