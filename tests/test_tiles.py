"""Large pictures in tiles: where these lie, how they train, and what they find."""

import csv
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import run
from tests.test_run import options
from vae_ood import UserError, checkpoint, training
from vae_ood.data.images import Images, Rows
from vae_ood.data.own import WHOLE, rule_of, sized
from vae_ood.data.tiles import (
    BLOCK_BYTES,
    Tiles,
    at_once,
    grid,
    of_step,
    places,
    put_together,
    random_corners,
    sampled,
    tiled,
)
from vae_ood.detector import Detector
from vae_ood.features import Features, Part
from vae_ood.model import VAE
from vae_ood.scores import COMPONENTS
from vae_ood.step import Training

CPU = torch.device("cpu")


def noise(*shape):
    """Random uint8 pixels."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("tile", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("sides", [(16, 16), (17, 40), (63, 16), (31, 32)])
def test_tiles_cover_every_pixel_and_none_leaves_the_picture(sides, tile):
    covered = np.zeros(sides, int)
    for top, left in grid((3, *sides), tile):
        assert 0 <= top <= sides[0] - tile and 0 <= left <= sides[1] - tile
        covered[top:top + tile, left:left + tile] += 1
    assert covered.min() >= 1
    for side in sides:
        steps = np.diff(places(side, tile))
        assert (steps > 0).all() and (steps <= max(1, tile // 2)).all()


def test_a_part_of_tiles_is_cut_when_it_is_read():
    tiles, rows = Tiles.covering(noise(4, 1, 20, 20), 8), np.arange(4 * 16) % 5 == 1
    part = Part(Features(VAE((1, 8, 8), 0.1, 2), tiles, dict), rows)["images"]
    assert isinstance(part, Tiles) and torch.equal(part[:], tiles[:][torch.from_numpy(rows)])


def test_random_tiles_lie_as_often_at_each_place_of_the_grid():
    corners = random_corners(np.random.default_rng(0), 60_000, (1, 80, 48), 16)
    assert corners.min() == 0 and corners.max(0).tolist() == [64, 32]
    for along, side in zip(corners.T, (80, 48), strict=True):
        count = np.bincount(np.abs(along[:, None] - np.array(places(side, 16))).argmin(1))
        np.testing.assert_allclose(count / count.mean(), 1, atol=0.15)


def test_tiles_are_what_a_tensor_of_them_would_be():
    pictures, order = noise(5, 3, 20, 27), torch.tensor([4, 0, 2, 2])
    for whole, other in ((pictures[order], Rows(pictures, order)), (pictures, Rows(pictures))):
        ours, theirs = Tiles.covering(whole, 8), Tiles.covering(other, 8)
        expected = torch.stack([one[:, y:y + 8, x:x + 8] for one in whole for y, x in grid((3, 20, 27), 8)])
        assert ours.shape == expected.shape == theirs.shape and len(ours) == len(expected)
        for tiles in (ours, theirs):
            assert torch.equal(tiles[:], expected) and torch.equal(tiles[3:9], expected[3:9])
            assert torch.equal(tiles[torch.tensor([7, 1])], expected[[7, 1]])
            assert torch.equal(torch.cat(list(tiles.split(7))), expected)
    per_picture = Tiles.covering(pictures, 8)[:].unflatten(0, (5, -1)).permute(0, 1, 3, 4, 2)
    for tiles, picture in zip(per_picture.numpy(), pictures, strict=True):
        np.testing.assert_array_equal(put_together(tiles, picture.shape, 8), picture.permute(1, 2, 0))


def test_tiles_that_scores_are_fitted_to_are_of_all_pictures_and_in_their_groups():
    images = Images("x", noise(7, 1, 20, 20), groups=np.array([3, 3, 5, 8, 8, 9, 11]))
    tiles = sampled(images, {"tile": 8, "seed": 1}, 50)
    picture = tiles.pixels.corners[:, 0]
    assert len(picture) == 50 and set(np.bincount(picture)) == {7, 8}
    np.testing.assert_array_equal(tiles.groups, images.groups[picture])
    assert torch.equal(tiles.pixels[:], sampled(images, {"tile": 8, "seed": 1}, 50).pixels[:])
    assert len(sampled(images, {"tile": 8, "seed": 1}, 10**6).pixels) == 7 * len(grid((1, 20, 20), 8))
    assert sampled(images, {}, 3) is images


def test_a_step_draws_its_tiles_by_the_seed_whatever_the_workers():
    tiles = tiled(noise(5, 1, 20, 30), 8)
    whole = of_step(tiles, 3, 7, 6, slice(0, 6))
    assert whole.shape == (6, 1, 8, 8)
    assert torch.equal(whole, torch.cat([of_step(tiles, 3, 7, 6, rows) for rows in (slice(0, 4), slice(4, 6))]))
    others = [of_step(tiles, *which, 6, slice(0, 6)) for which in ((3, 8), (4, 7))]
    assert not any(torch.equal(whole, other) for other in others)


def test_a_training_on_tiles_resumes_bit_for_bit(tmp_path, monkeypatch):
    pictures, order = noise(40, 1, 20, 30), torch.randperm(40)
    args = options(iters=8, tile=8, group_by="none", folds=1, range=None, size=None, crop=None, cache=None)
    split = {"group": torch.arange(40, dtype=torch.int32), "part": torch.zeros(40, dtype=torch.uint8), "crc32": 1}

    def trained(name, whole):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        _, config = training.train(args, tiled(whole, 8), out, CPU, split, tiled(whole[:4], 8))
        return config, checkpoint.load(out / "ckpt.pt")["model"]
    config, expected = trained("whole", pictures[order])
    assert (config["shape"], config["tile"], config["picture"]) == ([1, 8, 8], 8, [1, 20, 30])
    take, step = Training.step, []

    def interrupted(self, number):
        step.append(number)
        if len(step) == 3:
            signal.raise_signal(signal.SIGTERM)
        return take(self, number)
    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained("parts", Rows(pictures, order))
    assert checkpoint.load(tmp_path / "parts" / "ckpt.pt")["step"] == 3
    _, found = trained("parts", Rows(pictures, order))
    assert step == list(range(8)) and all(torch.equal(found[name], value) for name, value in expected.items())


def textured(n, seed, defect=0):
    """Pictures of noise in another light each, uint8 [n, 128, 128], with a chequered defect of so many pixels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 12, (n, 128, 128))
    x = (np.roll(x, 1, 1) + x + np.roll(x, 1, 2)) / 3**0.5 + rng.uniform(100, 150, (n, 1, 1))
    for one in x[:n if defect else 0]:
        top, left = rng.integers(0, 128 - defect, 2)
        one[top:top + defect, left:left + defect] += 40 * (-1.0) ** np.add.outer(np.arange(defect), np.arange(defect))
    return x.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def found():
    """Detectors of the same pictures: {"tile": in tiles, "size": scaled down}."""
    return {name: Detector.fit(textured(110, 0), alpha=0.1, kappa=4, iters=40, groups=np.arange(110), fpr=0.03,
                               device="cpu", **{name: 32}) for name in ("tile", "size")}


def test_tiles_find_what_a_small_size_loses_at_the_rate_of_pictures(found, tmp_path):
    ordinary, odd = textured(80, 1), textured(20, 2, 8)
    assert found["tile"].things == 33 == len(found["tile"].members[0].said["default"])  # pictures, not tiles
    assert found["size"].predict(odd, fpr=0.1).mean() < 0.5 and found["tile"].predict(odd, fpr=0.1).mean() > 0.9
    assert 0 < found["tile"].predict(ordinary, fpr=0.1).mean() <= 0.25  # 0.09 on average; Beta(3, 31)
    found["tile"].save(tmp_path / "detector.pt")
    again = Detector.load(tmp_path / "detector.pt")
    np.testing.assert_array_equal(again.p_value(odd[:4]), found["tile"].p_value(odd[:4]))
    one, = again.explain(odd[:1])
    assert one["image"].shape == one["reconstruction"].shape == (128, 128, 1)
    assert abs(one["reconstruction"].mean() - odd[0].mean()) < 15
    assert 0 < again.set_p_value(ordinary[:20]) <= 1


def test_a_component_of_a_picture_is_the_largest_of_its_tiles(found):
    detector = found["tile"]
    own, member = detector.images(textured(4, 5)), detector.members[0]
    features, = detector.features(own)
    tiles = Images("tiles", Tiles.covering(own.pixels, 32)[:])
    single, = detector.features(tiles)
    assert (features.tiles, single.tiles, len(tiles.pixels)) == (49, 1, 4 * 49)
    ours, theirs = member.say(features), member.say(single)
    for name in (f"default.{component}" for component in COMPONENTS):
        np.testing.assert_allclose(ours[name], theirs[name].reshape(4, 49).max(1), rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(member.viewed(features), member.viewed(single).reshape(4, 49, -1).mean(1), rtol=1e-3,
                               atol=1e-4)


def test_few_large_pictures_are_scored_at_once():
    config = {"shape": [3, 64, 64], "tile": 64, "picture": [3, 768, 1024]}
    n, tiles = at_once(config), len(grid((3, 768, 1024), 64))
    assert n * (3 * 768 * 1024 + tiles * 3 * 64 * 64) <= BLOCK_BYTES and n >= 8
    assert at_once(config | {"picture": [3, 8000, 12000]}) == 1
    assert at_once({"shape": [1, 64, 64]}) == BLOCK_BYTES // 64**2


def test_what_cannot_be_cut_is_told(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--size 70x90, the median"):
        rule_of({(60, 80): 1, (70, 90): 3, (80, 100): 1}, WHOLE)
    assert rule_of({(70, 90): 3}, WHOLE) == (None, None, "") == rule_of({}, WHOLE)
    assert sized(noise(4, 70, 90), WHOLE)[0].shape == (4, 1, 70, 90)
    with pytest.raises(UserError, match=r"--tile 71.*70x90.*at most 70"):
        tiled(noise(4, 1, 70, 90), 71)
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", "cifar10", "--tile", "16"])
    with pytest.raises(UserError, match="--tile: cifar10"):
        run.parse_args()


def test_the_commands_train_on_tiles_and_score_pictures(command, tmp_path):
    for name, pixels in (("photos", textured(60, 0)), ("new", np.concatenate([textured(5, 1), textured(5, 2, 8)]))):
        (tmp_path / name).mkdir()
        for i, one in enumerate(pixels):
            Image.fromarray(one[:96]).save(tmp_path / name / f"{i:02d}.png")
    flags = ("--data", tmp_path / "photos", "--recipe", "fast", "--alpha", 0.1, "--kappa", 4, "--group-by", "none",
             "--no-compile", "--iters", 20, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    said = command("run.py", *flags, "--tile", 32).stdout
    assert "tiles" in said and "default" in said and "\nnll " not in said  # which decodes each tile often
    refused = command("run.py", *flags, "--tile", 16, "--resume", check=False)
    assert refused.returncode == 2 and "--tile 32" in refused.stderr
    command("eval.py", "--detector", tmp_path / "run" / "detector.pt", "--score", tmp_path / "new", "--out",
            tmp_path / "scores")
    with open(tmp_path / "scores" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    score = [float(row["default"]) for row in rows]
    assert len(rows) == 10 and min(score[5:]) > max(score[:5])
    assert {path.name for path in (tmp_path / "scores").iterdir()} >= {"outliers.png", "report.html"}
