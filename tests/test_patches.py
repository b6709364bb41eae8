"""Whitened patches: against their definition in float64, and on pictures with and without a place for everything."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vae_ood.patches import BLACK, CELL, Patches, Scale, log_picture, plans, whitening
from vae_ood.scores import PATCHES, SCORES

N = 240


class Pictures(dict):
    device, tiles = torch.device("cpu"), 1

    def __init__(self, images):
        super().__init__(images=images, groups=np.arange(len(images)))


def parts(n, seed, side=32):
    """Pictures of one part: stripes at the same place in all, under other light, with noise, uint8 [n, 1, side, side].
    """
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:side, :side] / side
    stripes = 0.5 + 0.2 * np.sin(2 * np.pi * (4 * down + 2 * across)) * (across < 0.5)
    light = rng.uniform(0.6, 1.4, (n, 1, 1)) * (1 + 0.3 * rng.standard_normal((n, 1, 1)) * (down - 0.5))
    pixels = light * stripes + rng.normal(0, 0.02, (n, side, side))
    return torch.from_numpy((255 * pixels.clip(0, 1)).astype(np.uint8))[:, None]


def scratched(images, seed):
    """Copies with a short bright line each, at any place."""
    images, rng = images.clone(), np.random.default_rng(seed)
    for image in images:
        y, x = rng.integers(4, image.shape[1] - 8, 2)
        image[:, y:y + 2, x:x + 5] = (image[:, y:y + 2, x:x + 5] // 2 + 110).clamp(max=255)
    return images


@pytest.fixture(scope="module")
def fitted():
    return Patches.fit(Pictures(parts(N, 0)), Pictures(parts(60, 10)))


def test_filters_whiten_the_patches_that_they_were_fitted_to():
    """Against the float64 covariance of all patches of a correlated field: what comes out is white, and blind to the
    mean."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 1, 30, 30)))
    y = F.avg_pool2d(noise, 3, 1).float()
    filters = whitening(y, 5)
    assert filters.shape == (24, 1, 5, 5) and filters.sum((1, 2, 3)).abs().max() < 1e-3 * filters.abs().max()
    out = F.conv2d(y.double(), filters.double()).transpose(0, 1).flatten(1)
    np.testing.assert_allclose((out @ out.T / out.shape[1]).numpy(), np.eye(24), atol=0.02)
    np.testing.assert_allclose(F.conv2d(y + 5, filters).numpy(), F.conv2d(y, filters).numpy(), atol=1e-2)


def test_energies_are_those_of_the_definition(fitted):
    """The mean square of the whitened patch at every stride-th place, averaged over cells, in float64."""
    images = parts(3, 5)
    for scale in fitted.scales:
        h, w, stride, down, across = scale.plan.tolist()
        y, k = log_picture(images, (h, w)).double()[:, 0].numpy(), scale.filters.double()[:, 0].numpy()
        p = k.shape[-1]
        energy = np.array([[[np.square((k * one[i:i + p, j:j + p]).sum((1, 2))).mean()
                             for j in range(0, w - p + 1, stride)] for i in range(0, h - p + 1, stride)] for one in y])
        np.testing.assert_allclose(scale.energy(images)[:, 0].numpy(), energy, rtol=1e-3, atol=1e-5)
        assert scale.cells(images).shape == (3, down * across)
    np.testing.assert_allclose(log_picture(images, (32, 32)).numpy(), np.log(images.numpy() / 255 + BLACK), rtol=1e-4,
                               atol=1e-5)


def test_a_scratch_is_seen_and_light_is_not(fitted):
    inliers, odd = (fitted(Pictures(images)) for images in (parts(200, 1), scratched(parts(200, 2), 3)))
    assert all(scale.holds for scale in fitted.scales)
    assert (odd > np.quantile(inliers, 0.95)).mean() > 0.9
    bright = (parts(200, 1).float() * 0.8).byte()
    assert abs((fitted(Pictures(bright)) > np.quantile(inliers, 0.95)).mean() - 0.05) < 0.06


def test_pictures_without_a_common_place_are_not_held_to_one():
    """Each with its texture in a place of its own: no scale holds, and `default` does without."""
    images, rng = torch.full((N, 1, 32, 32), 128, dtype=torch.uint8), np.random.default_rng(0)
    for image in images[::2]:
        size, (y, x) = rng.integers(4, 20), rng.integers(0, 12, 2)
        image[0, y:y + size, x:x + size] = torch.from_numpy(rng.integers(0, 256, (size, size), dtype=np.uint8))
    found = SCORES[PATCHES].fit(Pictures(images))
    assert not found.holds and np.isfinite(found(Pictures(images[:5]))).all()
    tiles = Pictures(images[:216])  # the largest distances of nine in a row spread little
    tiles.tiles = 9
    assert not Patches.fit(Pictures(images), tiles).holds
    assert not Patches.fit(Pictures(parts(30, 0)), Pictures(parts(6, 10))).holds  # six are too few to say


def test_the_state_is_all_it_knows_and_parts_are_scored_alike(fitted):
    again, images = SCORES[PATCHES].restore(fitted.state_dict()), parts(40, 4)
    whole = fitted(Pictures(images))
    np.testing.assert_array_equal(again(Pictures(images)), whole)
    np.testing.assert_allclose(np.concatenate([fitted(Pictures(part)) for part in images.split(7)]), whole, rtol=1e-4)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 40), (8, 8), (12, 10), (28, 28), (32, 32), (64, 64), (96, 128),
                                           (1024, 768)])
def test_plans_fit_into_any_picture(height, width):
    for (h, w, stride, down, across), p in plans(height, width):
        assert 3 <= p <= min(h, w) <= 64 and p % 2 == 1
        assert down <= (h - p) // stride + 1 and across <= (w - p) // stride + 1
        Scale([h, w, stride, down, across], torch.randn(p * p - 1, 1, p, p)).cells(
            torch.randint(256, (2, 3, height, width), dtype=torch.uint8))
    if (height, width) == (64, 64):
        assert plans(64, 64) == [([64, 64, 2, 64 // CELL, 16], 17), ([32, 32, 1, 16, 16], 13)]
    assert bool(plans(height, width)) == (min(height, width) > 4)
