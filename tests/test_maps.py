"""Maps: what is planted is found where it is, on one scale, and ordinary pictures show it as seldom as promised."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vae_ood.data.images import convert, placed_back
from vae_ood.maps import Maps, sizes, threshold
from vae_ood.model import VAE

SHAPE = (1, 32, 24)


def textured(n, shape=SHAPE, seed=0, spread=12.0):
    """Ordinary pictures: noise on a ramp, busier where `spread` [h, w] is larger; uint8 [n, *shape]."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(90, 150, shape[1])[:, None] * np.ones(shape[2])
    return torch.from_numpy((ramp + spread * rng.standard_normal((n, *shape))).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VAE(SHAPE, 0.1, 4, 0.01).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def maps(model):
    return Maps.fit(model, textured(200))


def blurred(picture):
    side = picture.shape[2] // 2
    return F.avg_pool2d(picture.float(), 2 * side + 1, 1, side, count_include_pad=False).byte()


@pytest.mark.parametrize("crop", ["centre", "pad", "stretch", None])
@pytest.mark.parametrize("size", [(90, 130), (150, 70), (32, 24)])
def test_what_is_odd_is_found_at_its_place_in_the_picture(model, crop, size):
    h, w = size
    share = min(h / SHAPE[1], w / SHAPE[2])  # pixels of the picture to one of the image
    ordinary = F.interpolate(textured(150, (1, round(h / share), round(w / share))).float(), size).byte()
    fitted = Maps.fit(model, convert(ordinary[1:], SHAPE, crop))
    top, left, side = round(0.5 * h), round(0.4 * w), round(0.45 * min(h, w))
    spoilt = [lambda part: (part.float() + 100).clamp(0, 255).byte(), blurred]
    for spoil in spoilt[:1] if crop == "pad" else spoilt:  # "pad" leaves too few pixels to see a blur in
        picture = ordinary[:1].clone()
        place = picture[..., top:top + side, left:left + side]
        place[:] = spoil(place.clone())
        found = placed_back(fitted(model, convert(picture, SHAPE, crop))[0], h, w, crop)
        assert found.shape == size and found.dtype == torch.float32
        y, x = divmod(int(found.nan_to_num(-1).argmax()), w)
        near = 4 * max(h / SHAPE[1], w / SHAPE[2])  # four pixels of the image, half of the largest patch
        assert top - near <= y < top + side + near and left - near <= x < left + side + near, (y, x)


@pytest.mark.parametrize("crop", ["centre", "pad", "stretch"])
@pytest.mark.parametrize("size", [(40, 100), (100, 40), (33, 24), (8, 6), (200, 150)])
def test_a_map_lies_over_the_part_of_the_picture_that_was_scored(size, crop):
    h, w = size
    for side, ramp in ((h, torch.arange(h)[:, None].expand(h, w)), (w, torch.arange(w).expand(h, w))):
        image = convert(ramp.byte()[None, None], SHAPE, crop)[0, 0]  # each pixel says its own place
        back = placed_back(image.float(), h, w, crop)
        inside = ~back.isnan()
        if crop == "centre":
            tall, wide = (min(h, w * 32 // 24), min(w, h * 24 // 32))
            top, left = (h - tall) // 2, (w - wide) // 2
            assert inside[top:top + tall, left:left + wide].all() and inside.sum() == tall * wide
        else:
            assert inside.all()
        wrong = (back - ramp).abs()[inside]
        assert wrong.median() <= 0.6 and wrong.max() <= 1 + 1.5 * side / 16  # at the edges scaling repeats the last one


def test_the_promised_share_of_ordinary_pictures_shows_anything(model, maps):
    rng, things = np.random.default_rng(0), 300
    busy = torch.from_numpy(rng.uniform(0.7, 1.3, things)).float().repeat_interleave(2)  # two pictures a thing, alike
    ordinary = 120 + (textured(2 * things, seed=3).float() - 120) * busy[:, None, None, None]
    peaks, groups = maps(model, ordinary.clamp(0, 255).byte()).amax((1, 2)).numpy(), np.arange(2 * things) // 2
    rates = []
    for _ in range(300):
        known = np.isin(groups, rng.permutation(things)[:39])
        rates.append((peaks[~known] > threshold(peaks[known], groups[known], 0.1)).mean())
    assert 0.06 < np.mean(rates) < 0.1 + 3 * np.std(rates) / len(rates)**0.5


def test_the_threshold_is_that_of_the_conformal_p_value():
    peaks, groups = np.array([1.0, 2, 3, 4, 5, 6]), np.array([0, 0, 1, 1, 2, 2])
    # above 5, half of one thing of three exceeds: p = (1 + 1/2) / 4; above 6 it is 1/4; above 4, (1 + 1) / 4
    assert [threshold(peaks, groups, fpr) for fpr in (0.5, 0.49, 0.375, 0.3, 0.25, 0.24)] == [4, 5, 5, 6, 6, np.inf]


def test_a_corner_that_is_always_busy_is_ordinary_there_and_nowhere_else(model):
    spread = np.full(SHAPE[1:], 4.0)
    spread[:12, :12] = 40
    fitted, other = Maps.fit(model, textured(300, spread=spread)), spread[::-1, ::-1]
    limit = threshold(fitted(model, textured(99, seed=1, spread=spread)).amax((1, 2)).numpy(), np.arange(99), 0.05)
    assert (fitted(model, textured(40, seed=2, spread=spread)).amax((1, 2)) > limit).float().mean() <= 0.2
    elsewhere = fitted(model, textured(40, seed=2, spread=other))
    assert (elsewhere[:, 22:, 14:].amax((1, 2)) > limit).all()


@pytest.mark.parametrize("shape", [(3, 16, 12), (1, 9, 3), (3, 128, 20), (1, 1, 9)])
def test_every_shape_has_maps_and_a_state(shape):
    model = VAE(shape, 0.1, 4, 0.01).eval().requires_grad_(False)
    pixels = textured(12, shape)
    fitted = Maps.fit(model, pixels)
    found = fitted(model, pixels)
    assert found.shape == (12, *shape[1:]) and found.isfinite().all()
    assert torch.equal(Maps(**fitted.state_dict())(model, pixels), found)
    assert all(p % 2 and p <= min(size) and max(size) <= 64 for size, p in sizes(shape))


def test_pictures_without_any_structure_are_ordinary_among_such(model):
    black = torch.zeros(20, *SHAPE, dtype=torch.uint8)
    fitted = Maps.fit(model, black)
    assert fitted(model, black).max() < 3
    spot = black[:1].clone()
    spot[..., 10:14, 10:14] = 200
    y, x = divmod(int(fitted(model, spot)[0].argmax()), SHAPE[2])
    assert 6 <= y < 18 and 6 <= x < 18
