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
    BLOCK_BYTES, Tiles, at_once, cut, grid, of_step, picture_shape, places, put_together, random_corners, sampled, tiled)
from vae_ood.detector import Detector

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
        model, config = training.train(args, tiled(whole, 8), out, CPU, split, tiled(whole[:4], 8))
        return config, checkpoint.load(out / "ckpt.pt")["model"]
    config, expected = trained("whole", pictures[order])
    assert (config["shape"], config["tile"], config["picture"]) == ([1, 8, 8], 8, [1, 20, 30])
    update, step = training.Training.update, []

    def interrupted(self, *rest):
        update(self, *rest)
        step.append(rest[0])
        if len(step) == 3:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(training.Training, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained("parts", Rows(pictures, order))
    assert checkpoint.load(tmp_path / "parts" / "ckpt.pt")["step"] == 3
    _, found = trained("parts", Rows(pictures, order))
    assert step == list(range(8)) and all(torch.equal(found[name], value) for name, value in expected.items())
