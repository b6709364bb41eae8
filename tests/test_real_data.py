"""Real images in their official formats; skipped where $VAE_OOD_DATA is not set."""

import json

import pytest

from vae_ood.data import load

MEANS = {  # pixel means of the official sets, of 255
    ("fashionmnist", "train"): (60_000, (1, 28, 28), 72.94), ("fashionmnist", "test"): (10_000, (1, 28, 28), 73.15),
    ("mnist", "test"): (10_000, (1, 28, 28), 33.79), ("cifar10", "test"): (10_000, (3, 32, 32), 121.53),
}


def need(root, *names):
    """Skip where this machine has not got a set, rather than download it."""
    for name in names:
        if not (root / name).is_dir():
            pytest.skip(f"{name} is not in {root}")


@pytest.mark.parametrize(("name", "split"), MEANS)
def test_official_sets(data_root, name, split):
    n, shape, mean = MEANS[name, split]
    need(data_root, name)
    pixels = load(name, split, data_root).pixels
    assert pixels.shape == (n, *shape)
    assert pixels.double().mean().item() == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize(("name", "mean"), [("svhn", 115), ("celeba", 115)])
def test_colour_outliers(data_root, name, mean):
    need(data_root, name)
    pixels = load(name, "test", data_root).pixels
    assert pixels.shape[1:] == (3, 32, 32) and len(pixels) >= 1000
    assert pixels.double().mean().item() == pytest.approx(mean, abs=15)


def test_the_papers_command_and_its_evaluation(data_root, command, tmp_path):
    need(data_root, "cifar10", "svhn", "celeba")
    result = command("run.py", "--data", "cifar10", "--alpha", 0.25, "--kappa", 32, "--iters", 20, "--data-root",
                     data_root, "--no-eval", "--device", "cpu", "--out", tmp_path)
    assert "shorter with" not in result.stdout  # twenty steps take no hour
    result = command("eval.py", "--ckpt", tmp_path / "ckpt.pt", "--outliers", "svhn", "celeba", "--data-root",
                     data_root, "--max-images", 100)
    sets = json.loads((tmp_path / "metrics.json").read_text())["sets"]
    assert {name: row["n"] for name, row in sets.items()} == dict.fromkeys(("train", "test", "svhn", "celeba"), 100)


def test_an_outlier_set_of_another_shape_is_converted_and_said_to_be(data_root):
    need(data_root, "cifar10")
    images = load("cifar10", "test", data_root, shape=(1, 28, 28))
    assert images.pixels.shape == (10_000, 1, 28, 28) and images.notes == ["converted from 3x32x32"]
