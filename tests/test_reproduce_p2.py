"""The reproduction's targets that look at weights along a training, and the one that varies what the paper leaves open,
on runs whose figures are made up; and a real training of the latter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_reproduce import commands, write_run  # noqa: F401
from vae_ood import plots
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


def random_cifar10(root, train):
    """A small CIFAR-10, whose images are these and one test image, and folders for the outliers."""
    for name in ("cifar10", "svhn", "celeba"):
        (root / name).mkdir(parents=True)
    records = np.pad(train.reshape(len(train), -1), ((0, 0), (1, 0)))
    for i in range(5):
        (root / "cifar10" / f"data_batch_{i + 1}.bin").write_bytes(records[i::5].tobytes())
    (root / "cifar10" / "test_batch.bin").write_bytes(records[:1].tobytes())


def test_a_cut_data_root_holds_the_first_images_and_the_others_apart(tmp_path):
    train = np.random.default_rng(0).integers(256, size=(10, 3, 32, 32), dtype=np.uint8)
    random_cifar10(tmp_path / "whole", train)
    whole = load("cifar10", "train", tmp_path / "whole").pixels
    early.cut(tmp_path / "whole", tmp_path / "cut", -3)
    images = load("cifar10", "train", tmp_path / "cut")
    assert torch.equal(images.pixels, whole[:-3])
    assert images.notes == ["1 of 5 training files found: 7 of 50,000 images"]
    assert torch.equal(load(str(tmp_path / "cut" / "validation.npy"), "all").pixels, whole[-3:])
    assert torch.equal(load("cifar10", "test", tmp_path / "cut").pixels, whole[:1])
    assert (tmp_path / "cut" / "svhn").resolve() == tmp_path / "whole" / "svhn"


def test_each_alpha_is_stopped_where_validation_is_best(evaluated, tmp_path):
    """However good the test images or the outliers are elsewhere."""
    run, ran, use = evaluated
    random_cifar10(tmp_path / "whole", np.zeros((10, 3, 32, 32), np.uint8))
    best = {0.25: 40_000, 0.5: 20_000, 1: 7_500, 2: 5_000}

    def measure(out):
        alpha, step = float(out.parent.name.split("_a")[1].split("_")[0]), int(out.name.removeprefix("at-"))
        chosen = step == best[alpha]
        return {"train": 6.5, "test": 6.9 - alpha / 10 if chosen else 6.0, "svhn": 6.4 if chosen else 9.0,
                "celeba": 7.0 if chosen else 5.0, "validation": 6.8 if chosen else 6.9, "gamma": 0.01 - alpha / 1000}
    use(measure, keep)
    out = run("early", "--data-root", str(tmp_path / "whole"), figures=True)
    assert sum(arguments[0] == "run.py" for arguments in ran) == 4 and (out / "early.png").exists() == plots.available()
    assert not (tmp_path / "runs" / "early_data").exists()
    numbers = json.loads((out / "early.json").read_text())
    assert numbers["chosen"] == {f"{alpha:g}": step for alpha, step in best.items()}
    held = {check["claim"].removesuffix(", where validation is best"): check["held"] for check in numbers["claims"]}
    assert held == {
        "SVHN minus test (bpd) rises from each alpha to the next where validation is best": None,  # 3 and 4 are missing
        "gamma falls from each alpha to the next where validation is best": None,
        "test bpd falls from each alpha to the next where validation is best": None,
        "svhn bpd below the inlier test bpd at alpha = 0.25, 0.5, 1": True,
        "svhn bpd above the inlier test bpd at alpha = 2, 3, 4": None,
        "celeba bpd above the inlier test bpd at alpha = 0.25, 0.5, 1, 2, 3, 4": None}
    run("early", "--budget", "0")
    assert not ran
    assert json.loads((out / "early.json").read_text())["chosen"] == numbers["chosen"]


@pytest.mark.parametrize(("as_paper", "expected"), [
    ("train", {"svhn": True, "test": False, "rises": True, "above 0": True}),
    ("test", {"svhn": False, "test": True, "rises": False, "above 0": None})])
def test_seen_compares_at_the_papers_training_bpd(evaluated, tmp_path, as_paper, expected):
    """Runs whose outliers lie against their training images as the paper's do, or whose test images do as its."""
    run, ran, use = evaluated
    random_cifar10(tmp_path / "whole", np.zeros((10, 3, 32, 32), np.uint8))
    columns = [{name: value + OFFSET for name, value in column.items()} for column in PAPER["table2"].values()]

    def measure(out):
        step = int(out.name.removeprefix("at-")) // 5_000
        column = columns[min(max(0, step - 2), 5)]
        train = column["train"] + {1: 0.01, 8: -0.01}.get(step, 0)
        return {"train": train, "gamma": 0.01} | (
            {"svhn": column["svhn"], "test": train + 0.2, "celeba": 7.0} if as_paper == "train" else
            {"svhn": train - 0.4 - step / 100, "test": column["test"], "celeba": 7.0})
    use(measure, keep)
    out = run("seen", "--data-root", str(tmp_path / "whole"), figures=True)
    assert [arguments[0] for arguments in ran] == ["run.py"] + ["eval.py"] * 8
    assert (out / "seen.png").exists() == plots.available()
    checks = json.loads((out / "seen.json").read_text())["claims"]
    assert {word: next(check["held"] for check in checks if word in check["claim"]) for word in (
        "our svhn", "our test", "rises where", "above 0")} == {
        "our svhn": expected["svhn"], "our test": expected["test"], "rises where": expected["rises"],
        "above 0": expected["above 0"]}
    run("seen", "--budget", "0")
    assert not ran


def test_between_runs_and_not_beyond_them():
    every = [{"sets": {"train": {"bpd": x}, "svhn": {"bpd": 2 * x}}} for x in (6.0, 6.5)]
    assert seen.at(every, 6.1, "svhn") == pytest.approx(12.2)
    assert seen.at(every, 5.9, "svhn") is seen.at(every, 6.6, "svhn") is seen.at([], 6.1, "svhn") is None


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
        "as here": unknowns.VARIED["as here"], "kernel 3": (16, {"kernel": 3, "slopes": (0.0, 0.0)})})
    out = run("unknowns", "--iters", "3")
    numbers = json.loads((out / "unknowns.json").read_text())
    assert list(numbers["runs"]) == ["as here", "kernel 3"]
    metrics = json.loads((tmp_path / "runs" / "unknowns_kernel_3_i3" / "metrics.json").read_text())
    assert metrics["config"]["batch_size"] == 16 and metrics["config"]["layers"] == {"kernel": 3, "slopes": [0.0, 0.0]}
    bpd = [run["sets"]["test"]["bpd"] for run in numbers["runs"].values()]
    assert all(np.isfinite(bpd)) and bpd[0] != bpd[1]
