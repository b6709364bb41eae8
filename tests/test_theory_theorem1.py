import json
import math

import pytest
import torch

from theory import Report, sparse
from theory.penalties import exponential, identity, indicator, logarithm, power, ratio

PENALTIES = [identity, ratio(0.1), exponential(0.1), logarithm(0.1), power(0.5), power(0.1)]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: p.name)
def test_penalties_are_concave_and_non_decreasing_and_their_derivatives_are_those_of_autograd(penalty):
    u = torch.logspace(-8, 1, 50, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(penalty.h(u).sum(), u)
    torch.testing.assert_close(penalty.derivative(u.detach()), slope, rtol=1e-10, atol=1e-14)
    assert (slope >= 0).all() and (slope.diff() <= 1e-15).all()
    assert float(penalty.h(torch.zeros(1, dtype=torch.float64))) == 0
    if math.isfinite(penalty.slope):
        assert float(penalty.derivative(torch.zeros(1, dtype=torch.float64))) == pytest.approx(penalty.slope)
    else:
        assert float(slope[0]) > 1e3


def test_the_closed_forms_equate_the_two_costs():
    for penalty, eps in [(power(p), sparse.predicted_power(p)) for p in (0.1, 0.5, 0.8)] + [
            (logarithm(sparse.predicted_delta(eps)), eps) for eps in (0.01, 0.3)] + [
            (h(tau), sparse.predicted_bounded(h, tau)) for h in (ratio, exponential, logarithm) for tau in (1, 1e-3)]:
        one_row, two_rows = sparse.cost(penalty, sparse.analytic(eps)[:2, :3]).tolist()
        assert one_row == pytest.approx(two_rows, rel=1e-3), penalty.name


def test_the_minimum_where_it_is_known():
    a, b = 0.01 * sparse.M1, 0.01 * sparse.M2
    lowest, point = sparse.minimum(identity, 0.1)  # at theta = 0, ridge regression: z = x / 2
    assert lowest == pytest.approx((a + b) / 4, rel=1e-4)
    assert point.tolist() == pytest.approx([(a + b) / 8, a / 4, b / 4, 0], rel=0.03, abs=1e-9)
    assert sparse.minimum(indicator, 0.1)[0] == 0.5
    assert sparse.constrained_minimum(power(0.5), 0.1) == (pytest.approx((a**0.5 + b**0.5) / 2), 0)


def test_random_starts_find_what_is_easy_to_find():
    assert sparse.random_starts(identity, 0.1) == pytest.approx(sparse.minimum(identity, 0.1)[0], rel=1e-3)


def test_the_vae_energy_against_its_closed_form_and_against_samples():
    eps, n = 0.3, len(sparse.T)
    mu, log_sigma = torch.rand(n, 2).double(), -torch.rand(n, 2).double()
    log_gamma, noise = torch.tensor(-2.0).double(), torch.randn(200_000, n, dtype=torch.float64)
    x = sparse.curve(sparse.T, eps)
    error = ((x - mu).square() + (2 * log_sigma).exp()).sum(1)  # the decoder is the identity
    q = torch.distributions.Normal(mu, log_sigma.exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros_like(mu), 1)).sum(1)
    exact = (0.5 * error / log_gamma.exp() + log_gamma + math.log(2 * math.pi) + kl).mean()
    thetas = torch.tensor([0, 0.5, 1], dtype=torch.float64)
    torch.testing.assert_close(sparse.vae_energy(mu, log_sigma, thetas[0], log_gamma, eps), exact)
    for theta in thetas:
        torch.testing.assert_close(sparse.vae_energy(mu, log_sigma, theta, log_gamma, eps, noise),
                                   sparse.vae_energy(mu, log_sigma, theta, log_gamma, eps), rtol=0, atol=0.01)


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
