import json
import math

import pytest
import torch

from theory import Report, theorem1
from theory.penalties import exponential, identity, indicator, logarithm, power, ratio

PENALTIES = [identity, ratio(0.1), exponential(0.1), logarithm(0.1), power(0.5), power(0.1)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: p.name)
def test_penalties_are_concave_and_non_decreasing_and_their_derivatives_are_those_of_autograd(penalty):
    u = torch.logspace(-8, 1, 50, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(penalty.h(u).sum(), u)
    torch.testing.assert_close(penalty.derivative(u.detach()), slope, rtol=1e-10, atol=1e-14)
    assert (slope >= 0).all() and (slope.diff() <= 1e-15).all()
    assert float(penalty.h(torch.zeros(1, dtype=torch.float64))) == 0
    if penalty.bounded:
        assert float(penalty.derivative(torch.zeros(1, dtype=torch.float64))) == pytest.approx(penalty.slope)
    else:
        assert float(slope[0]) > 1e3


def test_the_closed_forms_equate_the_two_costs():
    for penalty, eps in [(power(p), theorem1.predicted_power(p)) for p in (0.1, 0.5, 0.8)] + [
            (logarithm(theorem1.predicted_delta(eps)), eps) for eps in (0.01, 0.3)] + [
            (h(tau), theorem1.predicted_bounded(h, tau)) for h in (ratio, exponential, logarithm) for tau in (1, 1e-3)]:
        sparse, dense = theorem1.cost(penalty, theorem1.analytic(eps)[:2, :3]).tolist()
        assert sparse == pytest.approx(dense, rel=1e-3), penalty.name


def test_the_minimum_where_it_is_known():
    a, b = 0.01 * theorem1.M1, 0.01 * theorem1.M2
    lowest, point = theorem1.minimum(identity, 0.1)  # at theta = 0, ridge regression: z = x / 2
    assert lowest == pytest.approx((a + b) / 4, rel=1e-4)
    assert point.tolist() == pytest.approx([(a + b) / 8, a / 4, b / 4, 0], rel=0.03, abs=1e-9)
    assert theorem1.minimum(indicator, 0.1)[0] == 0.5
    assert theorem1.constrained_minimum(power(0.5), 0.1) == (pytest.approx((a**0.5 + b**0.5) / 2), 0)


def test_random_starts_find_what_is_easy_to_find():
    assert theorem1.random_starts(identity, 0.1) == pytest.approx(theorem1.minimum(identity, 0.1)[0], rel=1e-3)


def test_the_vae_energy_against_its_closed_form_and_against_samples():
    eps, n = 0.3, len(theorem1.T)
    mu, log_sigma = torch.rand(n, 2).double(), -torch.rand(n, 2).double()
    log_gamma, noise = torch.tensor(-2.0).double(), torch.randn(200_000, n, dtype=torch.float64)
    x = theorem1.curve(theorem1.T, eps)
    error = ((x - mu).square() + (2 * log_sigma).exp()).sum(1)  # the decoder is the identity
    q = torch.distributions.Normal(mu, log_sigma.exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros_like(mu), 1)).sum(1)
    exact = (0.5 * error / log_gamma.exp() + log_gamma + math.log(2 * math.pi) + kl).mean()
    dense, sparse = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(theorem1.vae_energy(mu, log_sigma, dense, log_gamma, eps), exact)
    for theta in (dense, sparse, 0.5 * sparse):
        torch.testing.assert_close(theorem1.vae_energy(mu, log_sigma, theta, log_gamma, eps, noise),
                                   theorem1.vae_energy(mu, log_sigma, theta, log_gamma, eps), rtol=0, atol=0.01)


def test_a_report_with_every_prediction_held_exits_0_and_writes_what_it_measured(tmp_path, capsys):
    report = Report("name")
    report.check("two", 2, True)
    with pytest.raises(SystemExit) as stop:
        report.finish(None, {}, None)
    assert stop.value.code == 0
    report.check("three", 2, False)
    matplotlib = pytest.importorskip("matplotlib.figure")
    with pytest.raises(SystemExit) as stop:
        report.finish(tmp_path, {"numbers": [1]}, matplotlib.Figure)
    assert stop.value.code == 1
    written = json.loads((tmp_path / "name.json").read_text())
    assert written["numbers"] == [1] and [row["holds"] for row in written["rows"]] == [True, False]
    assert (tmp_path / "name.png").stat().st_size > 0
