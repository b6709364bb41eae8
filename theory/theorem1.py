"""Theorem 1: which penalties make an autoencoder find an optimal sparse reconstruction? (section 3.3, supplement 3)

    python -m theory.theorem1 [--quick] [--out DIR]        under a minute on two cores

`theory.sparse` holds the toy, the predictions with their derivation, and the minimisation; here they are compared.
"""

import math

import numpy as np
import torch

from theory import Report, parse, sparse
from theory.penalties import exponential, identity, indicator, logarithm, power, ratio
from vae_ood.cli import one_line_errors

FAMILIES = (ratio, exponential, logarithm)  # of bounded slope, 1 / tau


def check_minima(report, scales):
    """The global minimum for eleven penalties, and whether random starts end below it; a row of figures for each."""
    print("Global minima (E relative to that of z = 0; nonzero rows: above 1e-6 of the larger):")
    penalties = [identity, *(family(tau) for family in FAMILIES for tau in (0.1, 0.03)), *map(power, (0.75, 0.5, 0.1)),
                 indicator]
    rows = []
    for eps in scales:
        for penalty in penalties:
            lowest, best = sparse.minimum(penalty, eps)
            row = {"eps": eps, "penalty": penalty.name, "cost": lowest, "theta": float(best[3]),
                   "nonzero_rows": int((best[1:3] > 1e-6 * best[1:3].max()).sum()),
                   "relative_error": float(best[0] / sparse.analytic(eps)[2, 0]),
                   "kind": "optimal sparse" if sparse.is_sparse(best) else "not optimal sparse",
                   "best_start": sparse.random_starts(penalty, eps)}
            print("  eps {eps:g}  h {penalty:19}  cost {cost:.5g}  theta {theta:.3g}  nonzero rows {nonzero_rows}  "
                  "E {relative_error:.2g}  {kind}; best random start {best_start:.5g}".format(**row))
            rows.append(row)
    worst = max(1 - row["best_start"] / row["cost"] for row in rows)
    report.check("no start ends below the reported minimum by more than 1e-4 of it, the resolution of its grids",
                 f"the best start is {abs(worst):.1e} {'below' if worst > 0 else 'above'}", worst < 1e-4)
    return rows


def check_powers(report):
    """u^p: the eps above which the sparse solution wins; [p, predicted, measured] for each p."""
    rows = []
    for p in (0.5, 0.25, 0.1):
        predicted = sparse.predicted_power(p)
        measured = sparse.crossover(lambda eps, p=p: sparse.is_sparse(sparse.minimum(power(p), eps)[1]), 0.01)
        off = abs(measured / predicted - 1)
        rows.append([p, predicted, measured])
        report.check(f"u^{p:g}: the global minimum is the optimal sparse one above eps* = {predicted:.5g} only",
                     f"{measured:.5g}, {off:.1e} off", off < 0.02)
    errors = [float(sparse.minimum(power(p), eps)[1][0]) for p in (0.6, 0.75, 0.9) for eps in (0.1, 0.5, 0.9, 0.99)]
    report.check("u^p with p = 0.6, 0.75, 0.9: no global minimum has zero error, though the slope at 0 is unbounded",
                 f"{errors.count(0)} of {len(errors)} have; E from {min(errors):.1e} to {max(errors):.1e}",
                 0 not in errors)
    return rows


def check_bounded(report, powers_of_ten):
    """Bounded slopes 1 / tau, these powers of ten: the eps above which the sparse solution wins. For each family its
    name and [slope, predicted, measured with zero error imposed, measured of equation 4] for each slope."""
    rows = []
    for family, exponent in zip(FAMILIES, (-1 / 2, -1 / 2, -1 / 4), strict=True):
        stars, name = [], family.__name__
        for tau in 10.0 ** -np.array(powers_of_ten):
            penalty, predicted = family(tau), sparse.predicted_bounded(family, tau)
            imposed = sparse.crossover(lambda eps, h=penalty: sparse.constrained_minimum(h, eps)[1] == 1)
            free = sparse.crossover(lambda eps, h=penalty: sparse.nearly_sparse(h, eps), predicted / 2, 1, 1e-3)
            stars.append([penalty.slope, predicted, imposed, free])
        rows.append([name, stars])
        off = max(abs(imposed / predicted - 1) for _, predicted, imposed, _ in stars)
        report.check(f"{name}, zero error imposed: one row wins only above eps*, in closed form",
                     f"{off:.1e} off at most, over slopes 1 to 1e5", off < 0.02)
        ratios = [free / predicted for _, predicted, _, free in stars]
        report.check(f"{name}, equation 4: nothing near the sparse shape below that eps*, at any slope",
                     f"from {min(ratios):.3f} to {max(ratios):.3f} times eps*", min(ratios) > 0.999)
        for kind, i in (("zero error imposed", 2), ("equation 4", 3)):
            fitted = math.log(stars[-1][i] / stars[-2][i]) / math.log(10)
            report.check(f"{name}, {kind}: the crossover falls as the slope to the power {exponent:g}",
                         f"{fitted:.4f} between slopes 1e4 and 1e5", abs(fitted / exponent - 1) < 0.02)
    errors = [float(sparse.minimum(family(tau), eps)[1][0])
              for family in FAMILIES for tau in (1.0, 0.1) for eps in (0.1, 0.9)]
    report.check("bounded, equation 4: no global minimum has zero error, at slopes 1 and 10",
                 f"{errors.count(0)} of {len(errors)} have; E from {min(errors):.1e} to {max(errors):.1e}",
                 0 not in errors)
    return rows


def check_logarithm(report):
    """log(u + delta): the delta below which the sparse shape wins; [eps, predicted, measured] for each eps."""
    rows = []
    for eps in (0.01, 0.03, 0.1, 0.3):
        predicted = sparse.predicted_delta(eps)
        measured = sparse.crossover(lambda delta, eps=eps: not sparse.nearly_sparse(logarithm(delta), eps),
                                    eps**4 / 100, eps**4 * 100)
        rows.append([eps, predicted, measured])
        where = "delta*" if eps <= 0.1 else "a delta below delta*"  # there the free error tells
        report.check(f"log(u + delta), eps {eps:g}: the sparse shape wins below {where} = {predicted:.4g} only "
                     f"(eps^4 m2 = {eps**4 * sparse.M2:.4g})", f"{measured:.4g}, {measured / predicted - 1:+.1e} off",
                     abs(measured / predicted - 1) < 0.02 if eps <= 0.1 else measured < predicted)
    return rows


def check_indicator_and_zero_error(report):
    """The indicator finds the sparse solution at every eps; which penalties do so where zero error is imposed."""
    best = [sparse.minimum(indicator, eps) for eps in (1e-3, 0.1, 0.9)]
    report.check("indicator: theta = 1, one row, zero error, cost 1/2, at eps 0.001, 0.1 and 0.9",
                 f"costs {[lowest for lowest, _ in best]}, thetas {[float(point[3]) for _, point in best]}",
                 all(lowest == 0.5 and point[3] == 1 and point[0] == point[2] == 0 for lowest, point in best))
    for penalty, wins in ((power(0.1), True), (indicator, True), (power(0.5), False), (identity, False),
                          (ratio(0.01), False), (exponential(0.01), False), (logarithm(0.01), False)):
        theta = sparse.constrained_minimum(penalty, 0.1)[1]
        report.check(f"{penalty.name}, zero error imposed, eps 0.1: {'one row wins' if wins else 'two rows win'}",
                     f"theta {theta:g}", (theta == 1) == wins)


def check_vae(report, eps=0.02):
    """The VAE's energy as gamma -> 0 at both solutions, and what training finds where autoencoders fail."""
    log_gammas = torch.logspace(-4, -12, 9, dtype=torch.float64).log()
    energies = {kind: [sparse.vae_minimum(theta, log_gamma, eps) for log_gamma in log_gammas]
                for kind, theta in (("sparse", 1), ("dense", 0))}
    for kind, predicted in (("sparse", 0.5), ("dense", 0.0)):
        slope = (energies[kind][-1] - energies[kind][4]) / float(log_gammas[-1] - log_gammas[4])
        report.check(f"VAE, {kind} solution: the energy rises by {predicted:g} nats per unit of log gamma, gamma -> 0",
                     f"{slope:.5f} between gamma 1e-8 and 1e-12", abs(slope - predicted) < 0.025)
    trained = sparse.train_vae(eps)
    theta, gamma, kl_1, kl_2, energy = trained.T
    excess = energy - torch.tensor([sparse.vae_minimum(1, log_gamma, eps) for log_gamma in gamma.log()])
    small = gamma < 1e-3 * sparse.curve(sparse.T, eps).var(0, correction=0).mean()
    found = int(((theta > 0.99) & (kl_1 > 0.05) & (kl_2 < 0.05) & small & (excess.abs() < 0.05)).sum())
    others = [sparse.nearly_sparse(family(tau), eps) for family in FAMILIES for tau in (1, 0.1, 0.01, 1e-3)]
    report.check(f"VAE trained at eps {eps:g}: theta = 1, z_1 alone active, gamma below 1e-3 of the data's variance, "
                 f"the energy that of the sparse solution to 0.05 nats, where all of the {len(others)} autoencoders "
                 "with slopes of 1 to 1000 fail",
                 f"{found} of {len(trained)} seeds, gamma {float(gamma.min()):.1e} to {float(gamma.max()):.1e}; "
                 f"{sum(others)} autoencoders find it", found == len(trained) and not any(others))
    names = ("theta", "gamma", "kl_1", "kl_2", "energy")
    return {"eps": eps, "gamma": log_gammas.exp().tolist(), "energy": energies,
            "trained": dict(zip(names, trained.T.tolist(), strict=True))}


def draw(numbers):
    """The figure: eps* against the slope, against p, and the VAE's energy against gamma."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 4), layout="constrained")
    bounded, powers, energy = figure.subplots(1, 3)
    formulas = (r"$u / (u + \tau)$", r"$1 - e^{-u / \tau}$", r"$\log(1 + u / \tau)$")  # of FAMILIES
    for i, (formula, (_, stars)) in enumerate(zip(formulas, numbers["bounded"], strict=True)):
        slope, predicted, imposed, free = zip(*stars, strict=True)
        bounded.loglog(slope, predicted, color=f"C{i}", label=formula)
        bounded.loglog(slope, imposed, "o", color=f"C{i}", fillstyle="none")
        bounded.loglog(slope, free, "+", color=f"C{i}")
    bounded.plot([], [], "ko", fillstyle="none", label="zero error imposed")
    bounded.plot([], [], "k+", label="equation 4")
    bounded.set(xlabel=r"slope at zero, $h'(0) = 1 / \tau$", ylabel=r"$\epsilon^*$",
                title="bounded slope:\n" r"the sparse solution loses below $\epsilon^*$")
    p = np.linspace(0.02, 0.5, 100)
    powers.semilogy(p, sparse.predicted_power(p), color="C3", label="closed form")
    powers.semilogy(*zip(*[(p, measured) for p, _, measured in numbers["power"]], strict=True), "o", color="C3",
                    fillstyle="none", label="global minimum")
    powers.axvspan(0.5, 1, color="0.9")
    powers.text(0.75, 0.5, "never\nzero error", ha="center", va="center", transform=powers.get_xaxis_transform())
    powers.set(xlim=(0, 1), xlabel="$p$", ylabel=r"$\epsilon^*$",
               title="$u^p$, unbounded slope:\n" r"the sparse solution loses below $\epsilon^*$")
    for kind, values in numbers["vae"]["energy"].items():
        energy.semilogx(numbers["vae"]["gamma"], values, "o-", label=f"{kind} solution")
    trained = numbers["vae"]["trained"]
    energy.semilogx(trained["gamma"], trained["energy"], "k+", label=f"trained, {len(trained['gamma'])} seeds")
    energy.invert_xaxis()
    energy.set(xlabel=r"$\gamma$", ylabel="energy (nats)", title=rf"VAE, $\epsilon$ = {numbers['vae']['eps']:g}:" "\n"
               r"$\frac{1}{2}(d - \#\mathrm{active})\,\log\,\gamma + O(1)$")
    for axes in (bounded, powers, energy):
        axes.legend(frameon=False)
    return figure


def main():
    """The command."""
    args = parse(__doc__.splitlines()[0], "half of the slopes, and random starts at one eps instead of two")
    report = Report("theorem1")
    numbers = {"m1": sparse.M1, "m2": sparse.M2, "n": len(sparse.T)}
    numbers["minima"] = check_minima(report, (0.6,) if args.quick else (0.6, 0.1))
    numbers["power"] = check_powers(report)
    numbers["bounded"] = check_bounded(report, [0, 4, 5] if args.quick else range(6))
    numbers["logarithm"] = check_logarithm(report)
    check_indicator_and_zero_error(report)
    numbers["vae"] = check_vae(report)
    report.finish(args.out, numbers, lambda: draw(numbers))


if __name__ == "__main__":
    with one_line_errors():
        main()
