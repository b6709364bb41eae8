"""The theory commands as a user runs them, and what they do when a prediction is wrong."""

import json
import math
import sys

import pytest
import torch

from tests.cli.test_commands import refused
from theory import circle, regimes, sparse, theorem1


@pytest.mark.parametrize(("name", "form"), [("theorem1", "--quick"), ("circle", "--quick"), *(
    pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("regimes", "--quick"), ("theorem1", ""), ("circle", ""), ("regimes", "")))])
def test_every_prediction_holds_and_the_figure_is_drawn(command, tmp_path, name, form):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread
    result = command("-m", f"theory.{name}", *form.split(), "--out", tmp_path)
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert len(rows) >= 5 and all(row["holds"] for row in rows)
    assert result.stdout.count("holds ") == len(rows)
    assert f"{len(rows)} of {len(rows)} predictions hold" in result.stdout
    assert imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05


def run_main(module, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__])
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code


def test_circle_exits_1_where_outliers_are_not_inside(monkeypatch, capsys):
    monkeypatch.setattr(circle, "INSIDE", 2.0)
    monkeypatch.setattr(circle.VAE, "fit", lambda self, x, steps: self)  # only what the Gaussian makes of them is read
    assert run_main(circle, monkeypatch) == 1
    assert "FAILS  each point inside" in capsys.readouterr().out


def test_theorem1_exits_1_on_a_wrong_prediction(monkeypatch, capsys):
    for name, value in {"random_starts": math.inf, "predicted_bounded": 1.0, "train_vae": torch.ones(1, 5)}.items():
        monkeypatch.setattr(sparse, name, lambda *arguments, value=value: value)
    monkeypatch.setattr(sparse, "vae_minimum", lambda theta, log_gamma, eps: float(theta * log_gamma / 2))
    monkeypatch.setattr(sparse, "crossover", lambda wins, low=0, *arguments: sparse.predicted_power(0.5))
    assert run_main(theorem1, monkeypatch) == 1
    out = capsys.readouterr().out
    assert "holds  u^0.5: the global minimum" in out and "FAILS  u^0.25: the global minimum" in out


def test_regimes_exits_1_on_a_wrong_prediction(monkeypatch, capsys):
    fit = regimes.VAE.fit
    monkeypatch.setattr(regimes.VAE, "fit", lambda self, x, steps: fit(self, x, 1000))
    monkeypatch.setattr(regimes, "PANELS", {"a": regimes.PANELS["a"]})
    assert run_main(regimes, monkeypatch) == 0
    monkeypatch.setattr(regimes, "PREDICTIONS", {"a": (False, False, {"hollow": False})})
    assert run_main(regimes, monkeypatch) == 1
    assert "FAILS  (a) no trouble" in capsys.readouterr().out


def test_the_sets_of_the_regimes_lie_where_they_are_said_to():
    g = torch.Generator().manual_seed(0)
    arc, beside = (points(1000, g) for points in (regimes.arc, regimes.beside_arc))
    torch.testing.assert_close(arc.norm(dim=1), torch.ones(1000, dtype=torch.float64))
    off = (beside.norm(dim=1) - 1).abs()
    assert off.min() >= 0.05 and off.max() <= 0.2
    for points, inside in ((regimes.crescent, True), (regimes.beside_tips, False)):
        x = points(1000, g)
        s = ((torch.atan2(x[:, 1], x[:, 0]) % (2 * torch.pi)) - torch.pi) / regimes.SPAN
        within = (x.norm(dim=1) - 1).abs() <= regimes.half_width(s) + 1e-9
        assert s.abs().max() <= 1 and (within if inside else ~within).all()


def test_an_unwritable_folder_is_refused_before_the_work(command, tmp_path):
    (tmp_path / "file").write_text("")
    below_a_file = tmp_path / "file" / "x"
    refused(command("-m", "theory.circle", "--out", below_a_file, check=False), "choose another --out")
    refused(command("-m", "theory.circle", "--seeds", 2, check=False), "--seeds")
