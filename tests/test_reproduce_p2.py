"""The reproduction's targets that look at weights along a training, and the one that varies what the paper leaves open,
on runs whose figures are made up; and a real training of the latter."""

import json
from argparse import Namespace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from tests.test_reproduce import commands, write_run  # noqa: F401
from vae_ood import UserError, plots
from vae_ood.data import load
from vae_ood.data.images import Images
from vae_ood.reproduce import early, runs, seen, unknowns
from vae_ood.reproduce.paper import OFFSET, PAPER
from vae_ood.reproduce.path import PROTOCOL


@pytest.fixture
def evaluated(commands, monkeypatch):  # noqa: F811
    """`commands`, eval.py's measuring what a function of the folder says: {set: bpd}, "gamma"."""
    run, ran = commands

    def use(measure, trained=lambda arguments, data_root: None):
        def execute(arguments, data_root):
            ran.append(arguments)
            if arguments[0] == "run.py":
                trained(arguments, data_root)
                return
            start = arguments.index("--outliers") + 1
            outliers = arguments[start:arguments.index("--iw-samples")]
            out = Path(arguments[arguments.index("--out") + 1])
            figures = measure(out)
            write_run(out, figures["test"], gamma=figures["gamma"], outliers=outliers)
            metrics = json.loads((out / "metrics.json").read_text())
            metrics["config"]["precision"] = "bfloat16"
            for name in metrics["sets"]:
                metrics["sets"][name]["bpd"] = figures[Path(name).stem]
            (out / "metrics.json").write_text(json.dumps(metrics))
        monkeypatch.setattr(runs, "execute", execute)
    return run, ran, use


def test_a_path_is_that_of_the_weights_that_were_kept(evaluated, tmp_path):
    run, ran, use = evaluated
    steps = {5_000: (6.9, 6.5), 50_000: (6.8, 6.3), 200_000: (6.7, 6.1)}  # of which the first is too early to judge by
    for name, alpha, last in (("a", 0.25, 200_000), ("b", 0.5, 50_000), ("c", 0.5, 200_000)):  # another kappa
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(
            PROTOCOL | {"alpha": alpha, "kappa": 64 if name == "c" else 32}))
        for step in (step for step in steps if step <= last):
            (tmp_path / "runs" / name / f"step-{step}.pt").touch()

    def measure(out):
        test, outlier = steps[int(out.name.removeprefix("at-"))]
        return {"train": test - 0.1, "test": test, "svhn": outlier, "celeba": outlier, "gamma": 0.005}
    use(measure)
    out = run("path", figures=True)
    assert len(ran) == 5 and (out / "path.png").exists() == plots.available()
    numbers = json.loads((out / "path.json").read_text())
    assert [(m["alpha"], m["step"]) for m in numbers["runs"]] == [
        (0.25, 5_000), (0.25, 50_000), (0.25, 200_000), (0.5, 5_000), (0.5, 50_000)]
    assert {check["claim"]: check["held"] for check in numbers["claims"]} == {
        "SVHN minus test (bpd) is below 0 after 200,000 steps at alpha = 0.25, 0.5, 1": None,  # at 0.25 alone
        "SVHN minus test (bpd) is above 0 after 200,000 steps at alpha = 2, 3, 4": None,
        "test bpd is within 0.01 of the training bpd after 200,000 steps": False,
        "CelebA minus test (bpd) is above 0 after 200,000 steps at alpha = 0.25, 0.5, 1, 2, 3, 4": False,
        "SVHN minus test (bpd) rises from each alpha to the next after 200,000 steps": None,
        "gamma falls from each alpha to the next after 200,000 steps": None,
        "test bpd falls from each alpha to the next after 200,000 steps": None,
        "test bpd falls with the steps at each alpha, from 50,000 on": None,  # at 0.25 alone to the end
        "SVHN minus test (bpd) rises with the steps at each alpha, from 50,000 on": False}
    run("path", "--budget", "0")
    assert not ran


def keep(arguments, data_root):
    """A training: the weights that it was to keep."""
    start, out = arguments.index("--keep-at") + 1, Path(arguments[arguments.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    for step in arguments[start:arguments.index("--no-eval")]:
        (out / f"step-{step}.pt").touch()


def whole_cifar10(monkeypatch, root, train):
    """A data root with these as CIFAR-10's images, and a test image."""
    for name in ("cifar10", "svhn", "celeba"):
        (root / name).mkdir(parents=True)
    records = np.pad(train.reshape(len(train), -1), ((0, 0), (1, 0)))
    monkeypatch.setattr(early, "cifar10_records", lambda folder, part: (
        records if part == "train" else records[:1], 5 if part == "train" else 1))


@pytest.mark.parametrize("end", [-5_000, 10_000])
def test_a_cut_data_root_holds_the_first_images_and_the_others_apart(monkeypatch, tmp_path, end):
    train = np.zeros((50_000, 3, 32, 32), np.uint8)
    train[:, 0, 0, :4] = np.arange(50_000, dtype=np.uint32)[:, None].view(np.uint8)
    whole_cifar10(monkeypatch, tmp_path, train)
    args = Namespace(data_root=str(tmp_path))
    with early.cut(args, end, True) as root:
        images = load("cifar10", "train", root)
        np.testing.assert_array_equal(images.pixels.numpy(), train[:end])
        files = 5 if end < 0 else 1
        assert images.notes == [f"{files} of 5 training files found: {len(train[:end]):,} of 50,000 images"]
        np.testing.assert_array_equal(load(f"{root}/validation.npy", "all").pixels.numpy(), train[end:])
        np.testing.assert_array_equal(load("cifar10", "test", root).pixels.numpy(), train[:1])
        assert Path(root, "svhn").resolve() == tmp_path / "svhn"
    assert not Path(root).exists()
    with early.cut(args, end, False) as root:
        assert root is None
    whole_cifar10(monkeypatch, tmp_path / "less", train[:10])
    with pytest.raises(UserError, match="holds 10 of the 50,000 training images"), early.cut(args, end, True):
        pass


def test_each_alpha_is_stopped_where_validation_is_best(evaluated, monkeypatch, tmp_path):
    """However good the test images or the outliers are elsewhere."""
    run, ran, use = evaluated
    whole_cifar10(monkeypatch, tmp_path / "whole", np.zeros((50_000, 3, 32, 32), np.uint8))
    best, left_out = {0.25: 40_000, 0.5: 20_000, 1: 7_500, 2: 5_000}, {2: 7_500}

    def measure(out):
        alpha, step = float(out.parent.name.split("_a")[1].split("_")[0]), int(out.name.removeprefix("at-"))
        if left_out.get(alpha) == step:
            raise KeyboardInterrupt
        chosen = step == best[alpha]
        return {"train": 6.5, "test": 6.9 - alpha / 10 if chosen else 6.0, "svhn": 6.4 if chosen else 9.0,
                "celeba": 7.0 if chosen else 5.0, "validation": 6.8 if chosen else 6.9, "gamma": 0.01 - alpha / 1000}
    use(measure, keep)
    with pytest.raises(KeyboardInterrupt):
        run("early", "--data-root", str(tmp_path / "whole"))
    out = run("early", "--budget", "0")
    assert not ran and json.loads((out / "early.json").read_text())["chosen"] == {
        f"{alpha:g}": step for alpha, step in best.items() if alpha < 2}  # whose steps are not all measured
    left_out.clear()
    run("early", "--data-root", str(tmp_path / "whole"), figures=True)
    assert [arguments[0] for arguments in ran] == ["run.py", "eval.py", "eval.py"]  # of alpha = 2 what was left
    assert (out / "early.png").exists() == plots.available()
    numbers = json.loads((out / "early.json").read_text())
    assert numbers["chosen"] == {f"{alpha:g}": step for alpha, step in best.items()}
    assert set(numbers["runs"][0]["detection"]) == {"svhn", "celeba", "validation"}
    assert {check["claim"].split(" where")[0]: check["held"] for check in numbers["claims"]} == {
        "SVHN minus test (bpd) rises from each alpha to the next": True,
        "gamma falls from each alpha to the next": True, "test bpd falls from each alpha to the next": True,
        "SVHN minus test (bpd) is below 0": True, "CelebA minus test (bpd) is above 0": True}
    run("early", "--budget", "0")
    assert not ran
    assert json.loads((out / "early.json").read_text()) == numbers | {"command": ANY}


@pytest.mark.parametrize(("off", "expected"), [(0.0, True), (0.029, True), (-0.031, False)])
def test_svhn_is_compared_at_the_papers_training_bpd(evaluated, monkeypatch, tmp_path, off, expected):
    run, ran, use = evaluated
    whole_cifar10(monkeypatch, tmp_path / "whole", np.zeros((50_000, 3, 32, 32), np.uint8))
    columns = [{name: value + OFFSET for name, value in column.items()} for column in PAPER["table2"].values()]

    def measure(out):
        step = int(out.name.removeprefix("at-")) // 5_000
        column = columns[min(max(0, step - 2), 5)]
        train = column["train"] + {1: 0.01, 8: -0.01}.get(step, 0)
        return {"train": train, "gamma": 0.01, "svhn": column["svhn"] + off, "test": train + 0.2,
                "celeba": column["celeba"] + 0.04}
    use(measure, keep)
    out = run("seen", "--data-root", str(tmp_path / "whole"), figures=True)
    assert [arguments[0] for arguments in ran] == ["run.py"] + ["eval.py"] * 8
    assert (out / "seen.png").exists() == plots.available()
    numbers = json.loads((out / "seen.json").read_text())
    assert [check["held"] for check in numbers["claims"]] == [expected, False, False]
    assert numbers["lowest_test_bpd"]["1"] == pytest.approx(columns[-1]["train"] - 0.01 + 0.2)
    assert numbers["lowest_test_bpd"]["4"] is None
    run("seen", "--budget", "0")
    assert not ran


def test_runs_are_compared_with_those_of_as_many_images():
    def m(train, svhn, *notes):
        return {"sets": {"train": {"bpd": train, "notes": notes}, "svhn": {"bpd": svhn}, "celeba": {"bpd": 2 * svhn}}}
    assert seen.trained_on(m(6, 7)) == seen.trained_on(m(6, 7, "5 of 5 training files found: 45,000 of 50,000 images"))
    assert seen.trained_on(m(6, 7, "1 of 5 training files found: 10,000 of 50,000 images")) == 10_000
    every = [m(6.0, 12.0), m(6.5, 13.0)]
    assert seen.at(every, 6.1, "svhn") == pytest.approx(12.2) == seen.at(every, 6.1, "celeba") / 2
    assert seen.at(every, 5.9, "svhn") is seen.at(every, 6.6, "svhn") is None
    columns = {1: {"svhn": 6.4, "test": 6.5}, 2: {"svhn": 6.6, "test": 6.2}}
    whole, few = {50_000: 6.41, 10_000: 7.0}, {50_000: None, 10_000: 6.61}  # too few to judge by

    def held(svhn, lowest):
        return [held for _, held, _ in seen.checks(columns, {"svhn": svhn}, lowest)]
    assert held({1: whole, 2: {50_000: 6.59}}, {1: 6.51, 2: 6.21}) == [True, True]
    assert held({1: whole, 2: few}, {1: 6.51, 2: 6.3}) == [None, False]
    assert held({1: few, 2: few}, {1: None, 2: None}) == [None, None]
    assert held({1: whole, 2: {50_000: 6.64}}, {1: 6.51, 2: None}) == [False, None]


def test_one_factor_at_a_time_is_varied(commands, monkeypatch):  # noqa: F811
    run, _ = commands
    signs = dict.fromkeys(unknowns.VARIED, -0.4)

    def train(name, iters, out, args):
        write_run(out, 6.9, 6.9 + signs[name], outliers=("svhn", "celeba"))
    monkeypatch.setattr(unknowns, "train", train)
    for batch, layers in unknowns.VARIED.values():
        assert (batch != runs.BATCH) + len(layers) <= 1

    def check(*arguments):
        return json.loads((run("unknowns", *arguments) / "unknowns.json").read_text())["claims"][0]["held"]
    assert check("--budget", "0") is None
    assert check() is True and check("--budget", "0") is True
    signs["kernel 3"] = 0.1
    assert check("--iters", "10") is False


def test_a_variant_is_trained_with_what_is_varied(commands, monkeypatch, tmp_path):  # noqa: F811
    run, _ = commands
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(unknowns, "load", lambda name, *arguments: Images(name, images // (1 + (name == "svhn"))))
    monkeypatch.setattr(unknowns, "VARIED", {
        "as here": (16, {}), "kernel 3": (16, {"kernel": 3, "slopes": (0.0, 0.0)})})
    out = run("unknowns", "--iters", "3")
    numbers = json.loads((out / "unknowns.json").read_text())
    assert list(numbers["runs"]) == ["as here", "kernel 3"]
    metrics = json.loads((tmp_path / "runs" / "unknowns_kernel_3_i3" / "metrics.json").read_text())
    assert metrics["config"]["batch_size"] == 16 and metrics["config"]["layers"] == {"kernel": 3, "slopes": [0.0, 0.0]}
    bpd = [run["sets"]["test"]["bpd"] for run in numbers["runs"].values()]
    assert all(np.isfinite(bpd)) and bpd[0] != bpd[1]
