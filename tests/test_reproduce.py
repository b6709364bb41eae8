"""The reproduction: its plans, tables and claims on runs whose figures are made up, and one real run of it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from vae_ood import UserError, plots
from vae_ood.reproduce import latents, pages, runs
from vae_ood.reproduce.__main__ import TARGETS, main
from vae_ood.reproduce.runs import Run

TRAINING = [name for name in TARGETS if name not in ("path", "early", "seen", "unknowns")]  # a column, or more


def write_run(folder, test=6.5, outlier=9.0, gamma=0.005, kappa=32, outliers=("mnist",), mmd=0.002):
    """What run.py writes, with these means of bpd."""
    folder.mkdir(parents=True, exist_ok=True)
    means = {"train": test - 0.1, "test": test} | dict.fromkeys(outliers, outlier)
    rng, d = np.random.default_rng(0), 784
    nll = {name: (mean + 0.1 * rng.standard_normal(200) - np.log2(255)) * d * np.log(2) for name, mean in means.items()}
    row = {"n": 200, "bpd_iw": 1.0, "mse": 0.005, "kl": 30.0, "nll_std": 0.1 * d * np.log(2), "notes": []}
    metrics = {"config": {"batch_size": 64}, "gamma": gamma, "active_dims": kappa // 2,
               "mmd": mmd, "mmd_images": 200, "fit_images": 500,
               "kl_per_dim": [3.0] * (kappa // 2) + [0.001] * (kappa // 2),
               "sets": {name: row | {"bpd": mean, "nll": float(nll[name].mean())} for name, mean in means.items()},
               "scores": {"nll": {n: {"auroc": 0.95, "auroc_ci95": [0.94, 0.96], "fpr95": 0.2} for n in outliers}}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "log.jsonl").write_text("".join(json.dumps(
        {"step": step, "images_per_second": 640.0, "seconds": step / 10, "grad_z_norm": 50 + 100 / step,
         "mse": 0.1 / step}) + "\n" for step in (1, 50)))
    (folder / "scores.csv").write_text("set,index,nll,iw_nll\n" + "".join(
        f"{name},{i},{value},0\n" for name, values in nll.items() for i, value in enumerate(values)))


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Run the reproduction with made-up runs; returns (a function of its arguments, the commands that it ran)."""
    ran = []

    def execute(arguments, data_root):
        value = lambda flag: arguments[arguments.index(flag) + 1]  # noqa: E731
        out, kappa = Path(value("--out")), int(value("--kappa"))
        ran.append(arguments)
        if "--no-eval" in arguments:
            out.mkdir(parents=True)
            (out / "log.jsonl").write_text(json.dumps({"seconds": 20 * 0.1 * float(value("--alpha"))}) + "\n")
        else:
            cifar = value("--data") == "cifar10"
            write_run(out, kappa=kappa, gamma=0.01 / kappa, outliers=("svhn", "celeba") if cifar else ("mnist",))

    monkeypatch.setattr(runs, "execute", execute)

    figure = pages.figure

    def run(*arguments, figures=False):
        ran.clear()
        monkeypatch.setattr(pages, "figure", figure if figures else lambda *arguments: None)
        runs.seconds_a_step.cache_clear()
        monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, arguments), "--runs", str(tmp_path / "runs"), "--out",
                                          str(tmp_path / "out")])
        main()
        return tmp_path / "out"

    return run, ran


def trained(ran):
    """The commands that train a column, and are not timing alone."""
    return [arguments for arguments in ran if "--no-eval" not in arguments]


def test_what_fits_the_budget_is_run_and_the_second_time_nothing(commands):
    run, ran = commands
    steps, decodes = 3_700, 10_000 * (1 + 3 * 5)
    expected = 6 * (steps * 0.1 + decodes * runs.DECODE_SHARE * 0.1 / 64 + runs.STARTUP)
    assert 0.97 * 45 * 60 < expected <= 45 * 60
    out = run("table1", "--budget", "45", "--iters", steps)
    assert len(trained(ran)) == 6
    first = (out / "table1.json").read_text()
    run("table1", "--budget", "45", "--iters", steps)
    assert not ran and (out / "table1.json").read_text() == first
    assert "--out runs/fashionmnist_a1_k16_fast_i3700_s0" in first  # what to type, wherever the runs were kept
    run("table1", "--budget", "45", "--iters", steps + 100)
    assert len(trained(ran)) == 5


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib")
def test_a_table_has_a_figure_and_histograms_which_stay_where_the_scores_are_gone(commands, tmp_path, capsys):
    from matplotlib.image import imread
    run, _ = commands
    for target, name in (("table1", "fashionmnist_a1_k16"), ("table2", "cifar10_a4_k32")):
        out = run(target, "--iters", "2000", figures=True)
        pictures = [out / f"{target}.png", out / f"{target}_histograms.png"]
        for picture in pictures:
            assert imread(picture)[..., :3].std() > 0.05
            picture.write_bytes(b"of another time")
        (tmp_path / "runs" / f"{name}_fast_i2000_s0" / "scores.csv").unlink()
        run(target, "--iters", "2000", figures=True)
        assert f"no histograms: {name}_fast_i2000_s0 came without scores.csv" in capsys.readouterr().out
        assert [picture.read_bytes() == b"of another time" for picture in pictures] == [False, True]


def test_columns_beyond_the_budget_are_not_run_and_say_so(commands, capsys):
    run, ran = commands
    out = run("table2", "--budget", "12", "--iters", "1500")
    reached = {float(a[a.index("--alpha") + 1]) for a in trained(ran)}
    assert reached == {0.25, 0.5, 1}
    assert "NOT RUN, the budget does not reach it: alpha 2" in capsys.readouterr().out
    columns = json.loads((out / "table2.json").read_text())["columns"]
    assert [column["runs"] == [] for column in columns] == [False] * 3 + [True] * 3
    row = next(line for line in (out / "table2.md").read_text().splitlines() if line.startswith("| svhn bpd |"))
    assert row.split("|")[2:-1] == [" 9.000 "] * 3 + [" not run "] * 3
    page = (out / "table2.md").read_text()
    assert "- NOT held: svhn bpd below the inlier test bpd at alpha = 0.25, 0.5, 1 (" in page
    assert "- not reached: svhn bpd above the inlier test bpd at alpha = 2, 3, 4 (" in page


def test_an_interrupted_reproduction_goes_on(commands, monkeypatch):
    run, ran = commands
    execute = runs.execute

    def interrupted(arguments, data_root):
        if len(trained(ran)) == 2:
            raise KeyboardInterrupt
        execute(arguments, data_root)

    monkeypatch.setattr(runs, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("table1", "--budget", "45", "--iters", "3700")
    monkeypatch.setattr(runs, "execute", execute)
    run("table1", "--budget", "45", "--iters", "3700")
    assert len(trained(ran)) == 4 and all("--resume" in a for a in trained(ran))


def test_without_a_budget_every_column_runs_at_the_recipe_s_length_and_the_cost_is_told(commands, capsys):
    run, ran = commands
    run("table2", "--recipe", "paper")
    assert [a[a.index("--iters") + 1] for a in trained(ran)] == ["200000"] * 6
    assert "6 runs are left to train and evaluate: about 2.5 days" in capsys.readouterr().out


@pytest.mark.parametrize("target", TRAINING)
def test_the_targets_write_their_files_and_no_others(commands, target):
    run, _ = commands
    out = run(target, "--budget", "120", figures=True)
    pictures = {f"{target}.png"} | ({f"{target}_histograms.png"} if target.startswith("table") else set())
    pictures = pictures if plots.available() else set()
    assert {path.name for path in out.iterdir()} == {f"{target}.json", f"{target}.md"} | pictures
    numbers = json.loads((out / f"{target}.json").read_text())
    assert numbers["command"].startswith(f"python -m vae_ood.reproduce {target} --budget 120 --runs ")
    assert any(claim["held"] is not None for claim in numbers["claims"])
    assert (out / f"{target}.md").read_text().startswith("# ")


@pytest.mark.parametrize("target", TRAINING)
def test_with_nothing_run_nothing_is_judged(commands, target, tmp_path):
    run, ran = commands
    (tmp_path / "out").mkdir()
    for name in (target, f"{target}_histograms"):
        (tmp_path / "out" / f"{name}.png").touch()  # of another time
    out = run(target, "--budget", "0")
    assert not ran and not (out / f"{target}.png").exists()
    assert (out / f"{target}_histograms.png").exists() == (not target.startswith("table"))
    assert all(claim["held"] is None for claim in json.loads((out / f"{target}.json").read_text())["claims"])
    assert "- held: " not in (out / f"{target}.md").read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    (["fig2"], "invalid choice: 'fig2'"), (["claims"], "claims takes no flags"),
    (["table1", "--budget", "-1"], "must be 0 or more"), (["early", "--budget", "5"], "early does not take --budget"),
    (["path", "--iters", "10"], "path does not take --iters"), (["unknowns", "--seeds", "2"], "does not take --seeds")])
def test_what_cannot_be_asked_for_is_told_in_one_line(commands, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        commands[0](*arguments)
    assert "\n" not in str(error.value)


def test_a_budget_of_0_uses_the_runs_that_are_there(commands, tmp_path):
    run, ran = commands
    for alpha, seed in ((0.25, 0), (0.25, 1), (0.5, 0)):
        write_run(tmp_path / "runs" / Run("cifar10", alpha, 32, seed, iters=2_500).folder, outliers=("svhn", "celeba"))
    out = run("table2", "--budget", "0", "--iters", "2500", "--seeds", "3")
    columns = json.loads((out / "table2.json").read_text())["columns"]
    assert not ran and [len(column["runs"]) for column in columns] == [2, 1, 0, 0, 0, 0]
    out = run("compute", "--budget", "0")
    assert not ran and [m["alpha"] for m in json.loads((out / "compute.json").read_text())["runs"]] == [0.25, 0.5]


def test_given_steps_a_budget_leaves_out_what_it_does_not_reach_one_seed_after_the_other(commands):
    run, ran = commands
    steps = 2_000  # 0.1 s each at alpha = 1: some 4 minutes with the evaluation, 1 at alpha = 1/4
    run("table2", "--budget", "11", "--iters", steps, "--seeds", "2")
    reached = [[float(a[a.index("--alpha") + 1]), int(a[a.index("--seed") + 1])] for a in trained(ran)]
    assert sorted(reached, key=lambda pair: pair[::-1]) == [[0.25, 0], [0.5, 0], [1, 0], [0.25, 1]]
    assert all(a[a.index("--iters") + 1] == str(steps) for a in trained(ran))


def test_homotopy_fixes_gamma_at_what_the_same_seed_learned(commands, capsys, monkeypatch):
    run, ran = commands

    def load(data, split, root):
        raise UserError("there is no CelebA")

    monkeypatch.setattr(latents, "load", load)
    numbers = json.loads((run("homotopy", "--iters", "100", "--seeds", "3") / "homotopy.json").read_text())
    assert "CIFAR-10 instead of the paper's CelebA" in capsys.readouterr().out
    modes = [(a[a.index("--gamma") + 1], a[a.index("--seed") + 1]) for a in trained(ran)]
    assert modes == [(mode, seed) for mode in ("learn", f"{0.01 / 64:.6g}", "optimal", "homotopy")
                     for seed in "012"]
    assert [len(seeds) for seeds in numbers["arms"].values()] == [3, 3, 3, 3]
    held = {claim["claim"]: claim["held"] for claim in numbers["claims"]}
    assert held["the training reconstruction errors, learned and fixed, are within 5%, in every seed"]
    assert not held["the MMD is lower where gamma is learned, in every seed"]  # the made-up runs are equal
    assert not held["learned, the gradient starts below its last value, in every seed"]  # 150, then 52
    assert not held["the gradient, fixed, is more than twice the learned one's at steps 1 and 50, in every seed"]


def test_homotopy_compares_the_runs_of_one_seed(commands, tmp_path):
    run, _ = commands
    for gamma, seed, value in (("learn", 1, 0.02), ("fixed", 0, 0.1), ("fixed", 1, 0.01), ("homotopy", 0, 0.1)):
        write_run(tmp_path / "runs" / Run("cifar10", 0.25, 64, seed, iters=10, gamma=gamma).folder, gamma=value,
                  kappa=64, outliers=("svhn", "celeba"), mmd=value)
    out = run("homotopy", "--budget", "0", "--iters", "10", "--seeds", "2")
    numbers = json.loads((out / "homotopy.json").read_text())
    assert [len(runs) for runs in numbers["arms"].values()] == [1, 1, 0, 1]
    claim = next(claim for claim in numbers["claims"] if claim["claim"].startswith("the MMD is lower"))
    assert claim["held"] is False and claim["figures"] == "20.00 and 10.00"


def test_select_chooses_nothing_where_every_gap_is_significant(commands):
    run, _ = commands
    result = json.loads((run("select", "--iters", "100") / "select.json").read_text())  # a gap of one deviation
    assert result["chosen_alpha"] == {"100": None}
    assert [claim["held"] for claim in result["claims"]] == [False, None, None]  # nothing chosen, nothing to judge


def test_select_stops_before_the_first_significant_gap(commands, monkeypatch):
    run, _ = commands
    measured = runs.measured
    gaps = {0.25: 0.0, 0.5: 0.001, 1: 0.05, 2: 0.0, 3: 0.0, 4: 0.0}  # bpd; one deviation of an image's is 0.1

    def shifted(one, args):
        m = measured(one, args)
        for key, unit in (("nll", 784 * np.log(2)), ("bpd", 1)):
            m["sets"]["test"][key] = m["sets"]["train"][key] + gaps[one.alpha] * unit
        return m

    monkeypatch.setattr(runs, "measured", shifted)
    result = json.loads((run("select", "--iters", "100") / "select.json").read_text())
    assert result["chosen_alpha"] == {"100": 0.5}
    rows = result["rows"]["100"]
    assert [row["significant"] for row in rows] == [False, False, True, False, False, False]
    assert rows[2]["z"] == pytest.approx(0.05 / np.sqrt(2 * 0.1**2 / 200))


def test_fig4_asks_for_a_cut_off_and_not_for_a_few_inactive_dimensions(commands, monkeypatch):
    run, _ = commands
    measured = runs.measured
    ratio = {0.25: 1.1, 1: 30.0, 4: 60.0}  # of which the paper shows the last two

    def with_ratio(one, args):
        half = one.kappa // 2
        kl = [0.06] * half + [0.06 / ratio[one.alpha]] * half
        return measured(one, args) | {"active_dims": half, "kl_per_dim": kl}

    monkeypatch.setattr(runs, "measured", with_ratio)
    held = [claim["held"] for claim in json.loads((run("fig4", "--iters", "9") / "fig4.json").read_text())["claims"]]
    assert held == [True, True, True, True]
    ratio[1] = ratio[4] = 1.0
    held = [claim["held"] for claim in json.loads((run("fig4", "--iters", "9") / "fig4.json").read_text())["claims"]]
    assert held == [False, False, None, True]


def test_how_many_dimensions_hold_most_of_the_kl():
    assert latents.holding([1.0, 5.0, 3.0, 1.0]) == 3  # 5 + 3 of 10 are not yet nine tenths
    assert latents.holding([2.0] * 5) == 5 and latents.holding([7.0, 0.0, 0.1]) == 1


def test_a_run_that_fails_is_left_out_and_named_at_the_end(commands, monkeypatch):
    run, _ = commands
    measured = runs.measured

    def diverging(one, args):
        if one.alpha == 2:
            raise UserError("the command above failed")
        return measured(one, args)

    monkeypatch.setattr(runs, "measured", diverging)
    with pytest.raises(UserError, match=r"left out.*cifar10_a2_k32_fast_i2000_s0"):
        run("table2", "--iters", "2000")


def test_table_2_s_claims_are_judged_by_the_worst_seed(commands, monkeypatch):
    run, _ = commands
    measured = runs.measured

    def with_one_bad_seed(one, args):
        result = measured(one, args)
        result["sets"]["celeba"]["bpd"] = 6.0 if one.seed == 0 else 9.0
        return result

    monkeypatch.setattr(runs, "measured", with_one_bad_seed)
    claims = json.loads((run("table2", "--seeds", "3") / "table2.json").read_text())["claims"]
    assert not next(claim for claim in claims if claim["claim"].startswith("celeba bpd above"))["held"]


@pytest.mark.slow
def test_table1_in_a_few_minutes(command, data_root, tmp_path):
    command("-m", "vae_ood.reproduce", "table1", "--budget", 3, "--iters", 200, "--data-root", data_root,
            "--runs", tmp_path / "runs", "--out", tmp_path)
    result = json.loads((tmp_path / "table1.json").read_text())
    reached = [column["runs"][0] for column in result["columns"] if column["runs"]]
    assert reached and all(run["sets"]["mnist"]["n"] == 10_000 for run in reached)
    assert result["claims"][0]["held"] is not False  # None where the budget did not reach every column
    assert str(ROOT) not in json.dumps(result)
