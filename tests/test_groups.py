"""Which pictures show one thing, on sets whose truth is known, and the split into whole things."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from vae_ood import UserError
from vae_ood.data import likeness, load
from vae_ood.data.groups import CALIBRATION, TRAIN, VALIDATION, checksum, group, ordered, parts, split
from vae_ood.data.images import Images
from vae_ood.data.likeness import Nearest, connected, digests, farther, near

SIZE = 48


def scenes(n, seed=0, size=SIZE + 16):
    """n unrelated textures [n, size, size] in [0, 255], with the spectrum of natural images."""
    rng, f = np.random.default_rng(seed), np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    noise = np.fft.fft2(rng.standard_normal((n, size, size)))
    x = np.fft.ifft2(noise / np.maximum(f, 1 / size) ** 1.3).real
    x -= x.min((1, 2), keepdims=True)
    return 255 * x / x.max((1, 2), keepdims=True)


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file))


def crop(image, x=0, y=0):
    return image[8 + y:8 + y + SIZE, 8 + x:8 + x + SIZE]


def photograph(kind, scene, rng):
    """One more picture [SIZE, SIZE] of a scene."""
    if kind == "burst":
        return crop(scene, *rng.integers(-1, 2, 2)) + rng.normal(0, 3, (SIZE, SIZE))
    if kind == "shifted":
        return crop(scene, *rng.integers(-2, 3, 2)) + rng.normal(0, 3, (SIZE, SIZE))
    if kind == "exposed":
        return crop(scene) * rng.uniform(0.4, 1.4) + rng.uniform(-20, 20)
    if kind == "lit":  # from one side or another
        slope = np.linspace(-1, 1, SIZE)
        return crop(scene) * (1 + 0.4 * rng.uniform(-1, 1) * slope[:, None] + 0.4 * rng.uniform(-1, 1) * slope)
    return jpeg(crop(scene).astype(np.uint8), rng.integers(15, 95))  # copies of another quality


def pictures(list_of_arrays):
    return torch.from_numpy(np.stack(list_of_arrays).clip(0, 255).astype(np.uint8)[:, None])


def found(pixels, truth):
    """(the share of pure groups, the share of pictures with a sibling in another group, the groups) after a shuffle."""
    order = np.random.default_rng(1).permutation(len(truth))
    labels, truth = near(pixels[torch.from_numpy(order)]), np.asarray(truth)[order]
    pure = [len(set(truth[labels == g])) == 1 for g in range(labels.max() + 1)]
    outside = [np.any((truth == t) & (labels != g)) for t, g in zip(truth, labels, strict=True)]
    return np.mean(pure), np.mean(outside), labels


@pytest.mark.parametrize(("things", "each"), [(40, 4), (30, 12), (4, 3), (2, 6)])
@pytest.mark.parametrize("kind", ["burst", "shifted", "exposed", "lit", "copies"])
def test_pictures_of_one_thing_are_found(kind, things, each):
    rng = np.random.default_rng(0)
    pixels = pictures([photograph(kind, scene, rng) for scene in scenes(things) for _ in range(each)])
    pure, outside, labels = found(pixels, np.repeat(np.arange(things), each))
    assert pure == 1 and outside <= (0.15 if kind == "lit" else 0.05), (pure, outside, labels.max() + 1)


@pytest.mark.parametrize("n", [12, 300, 1500])
def test_unrelated_pictures_stay_apart(n):
    labels = near(pictures([crop(scene) for scene in scenes(n)]))
    assert labels.max() + 1 >= 0.98 * n


def test_parts_that_lie_alike_are_told_apart():
    """All share what a camera always sees: unrelated ones correlate above 0.9."""
    frame, rng = crop(scenes(1, 5)[0]), np.random.default_rng(0)
    own = [frame + 0.15 * crop(scene) for scene in scenes(60)]
    correlation = np.corrcoef([x.ravel() for x in own])
    assert np.median(correlation) > 0.9
    pixels = pictures([x * rng.uniform(0.8, 1) + rng.normal(0, 1, x.shape) for x in own for _ in range(3)])
    pure, outside, _ = found(pixels, np.repeat(np.arange(60), 3))
    assert pure == 1 and outside == 0


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_video_is_one_thing(shuffled):
    rng, frames = np.random.default_rng(2), []
    for scene in scenes(5, 3, 128):
        frames += [scene[i // 2:i // 2 + SIZE, 10:10 + SIZE] + rng.normal(0, 2, (SIZE, SIZE)) for i in range(80)]
    order = rng.permutation(400) if shuffled else np.arange(400)
    labels = near(pictures(frames)[torch.from_numpy(order)])
    assert labels.max() + 1 == 5 and len(set(zip(labels, order // 80, strict=True))) == 5
    one = near(pictures(frames[:80]))
    assert len(set(one)) == 1


@pytest.mark.parametrize("copies", [60, 100])
def test_many_pictures_of_one_thing_among_others(copies):
    rng = np.random.default_rng(0)
    many = scenes(301)
    pixels = pictures([photograph("burst", many[0], rng) for _ in range(copies)] + [crop(s) for s in many[1:]])
    pure, outside, _ = found(pixels, [0] * copies + list(range(1, 301)))
    assert pure == 1 and outside == 0


@pytest.mark.parametrize("each", [40, 80])
@pytest.mark.parametrize("kind", ["burst", "exposed", "copies"])
def test_things_of_many_pictures_each(kind, each):
    rng = np.random.default_rng(0)
    pixels = pictures([photograph(kind, scene, rng) for scene in scenes(20) for _ in range(each)])
    pure, outside, labels = found(pixels, np.repeat(np.arange(20), each))
    assert pure == 1 and outside <= 0.05, (pure, outside, labels.max() + 1)


def test_where_likeness_takes_large_things_apart_it_says_so(capsys, data_root):
    rng = np.random.default_rng(0)
    near(pictures([photograph("burst", scene, rng) for scene in scenes(4) for _ in range(150)]))
    assert "say so with --group-by" in capsys.readouterr().out
    for pixels in (load("sprites", "test").pixels, load("mnist", "test", data_root).pixels[:2000],
                   load("cifar10", "test", data_root).pixels[:2000], pictures([crop(s) for s in scenes(400)])):
        near(pixels)
        assert "--group-by" not in capsys.readouterr().out


@pytest.mark.parametrize("factors", [2, 4])
def test_pictures_in_which_little_varies_are_not_all_one_thing(factors):
    labels = near(load("sprites", "test", factors=factors).pixels)
    assert labels.max() + 1 > 1800


def test_real_pictures(data_root):
    """CIFAR-10 and MNIST show a thing once; magnetic tiles are photographed some six times under other light."""
    for name, apart in (("cifar10", 0.99), ("mnist", 0.9), ("svhn", 0.97)):
        labels = near(load(name, "test", data_root).pixels[:3000])
        assert labels.max() + 1 > apart * 3000, name
    files = sorted((data_root / "magnetic_tile/good").rglob("*.jpg"))
    if not files:
        pytest.skip("needs magnetic_tile")
    pixels = pictures([np.asarray(Image.open(f).convert("L").resize((64, 64), Image.BILINEAR)) for f in files])
    pure, outside, labels = found(pixels, [f.parent.name for f in files])
    assert pure > 0.93 and outside < 0.2 and 160 <= labels.max() + 1 < 200 and np.bincount(labels).max() <= 20


def test_sketches_find_what_the_full_comparison_finds(monkeypatch):
    rng = np.random.default_rng(0)
    pixels = pictures([photograph("burst", s, rng) for s in scenes(150) for _ in range(4)])
    exact = near(pixels)
    monkeypatch.setattr(likeness, "EXACT", 100)
    np.testing.assert_array_equal(near(pixels), exact)
    assert exact.max() + 1 == 150


@pytest.mark.slow
def test_fifty_thousand_pictures_take_two_minutes_on_two_cores(data_root):
    pixels = load("cifar10", "train", data_root).pixels
    started = time.perf_counter()
    labels = near(pixels)
    assert time.perf_counter() - started < 120 and labels.max() + 1 > 0.95 * len(pixels)


def test_copies_and_plain_pictures():
    x = pictures([crop(s) for s in scenes(5)])
    plain = torch.full((3, 1, SIZE, SIZE), 7, dtype=torch.uint8)
    plain[2] = 200
    np.testing.assert_array_equal(near(torch.cat([x, x[2:3], plain])), [0, 1, 2, 3, 4, 2, 5, 5, 6])
    assert near(x[:1]).tolist() == [0] and near(torch.cat([x[:1]] * 4)).tolist() == [0] * 4
    assert near(x[:2]).tolist() == [0, 1]


def test_connected_components_by_brute_force():
    rng = np.random.default_rng(0)
    for edges in (0, 10, 40, 99):
        first, second = rng.integers(0, 80, (2, edges))
        label, label_before = np.arange(80), None
        while not np.array_equal(label, label_before):
            label_before = label.copy()
            for i, j in zip(first, second, strict=True):
                label[label == max(label[i], label[j])] = min(label[i], label[j])
        np.testing.assert_array_equal(connected(80, first, second), np.unique(label, return_inverse=True)[1])
    chain = np.random.default_rng(1).permutation(20_000)
    assert connected(20_000, chain[:-1], chain[1:]).max() == 0


# ---- groups by name

NAMES = ["a/x1_0.png", "a/x1_1.png", "b/x2_0.png", "c/x3_0.png"]


def own(names=NAMES):
    return Images("own", pictures([crop(s) for s in scenes(len(names))]), files=list(names))


def test_groups_by_name(tmp_path):
    assert group(own(), "folder").tolist() == [0, 0, 1, 2]
    assert group(own(), r"x\d").tolist() == [0, 0, 1, 2]
    assert group(own(), r"_(\d)").tolist() == [0, 1, 0, 0]
    assert group(own(), "none").tolist() == [0, 1, 2, 3]
    table = tmp_path / "g.csv"
    table.write_text("part,group,file\n" + "".join(f"x,{g},{name}\n" for g, name in zip("pqqp", NAMES, strict=True)))
    assert group(own(), str(table)).tolist() == [0, 1, 1, 0]
    array = Images("array", own().pixels)
    table.write_text("\ufeffindex,group\n3,k\n1,l\n0,k\n2,m\n9,m\n")
    assert group(array, str(table)).tolist() == [0, 1, 2, 0]
    assert array.notes == [f"1 lines of {table} name no picture of array"]


@pytest.mark.parametrize(("how", "text", "message"), [
    ("x[", None, "no regular expression"), ("x(1)", None, "not found in b/x2_0.png"),
    ("g.csv", None, "no such file"), ("g.csv", "name,group\na,b\n", "no columns file and group"),
    ("g.csv", "", "no columns"), ("g.csv", "file,group\na/x1_0.png,1\n", "no group to a/x1_1.png"),
    ("g.csv", "file,group\na/x1_0.png,1\na/x1_0.png,2\n", "twice")])
def test_groups_that_cannot_be_had(tmp_path, how, text, message):
    if text is not None:
        (tmp_path / how).write_text(text)
    with pytest.raises(UserError, match=message):
        group(own(), str(tmp_path / how) if how.endswith(".csv") else how)


@pytest.mark.parametrize("how", ["folder", "x"])
def test_arrays_have_no_names_to_group_by(how):
    with pytest.raises(UserError, match="has no file names"):
        group(Images("array", own().pixels), how)


# ---- the split

@pytest.mark.parametrize(("things", "fpr", "calibrating", "validating"), [
    (3, 0.05, 1, 0), (12, 0.05, 4, 0), (29, 0.05, 9, 0), (30, 0.05, 10, 3), (60, 0.05, 19, 6), (119, 0.05, 19, 12),
    (500, 0.05, 50, 50), (500, 0.01, 99, 50), (60, 0.01, 20, 6), (500, 0.07, 50, 50), (100, 0.07, 14, 10)])
def test_whole_things_are_held_out_as_many_as_the_rate_needs(things, fpr, calibrating, validating):
    rng = np.random.default_rng(things)
    labels = np.concatenate([np.arange(things), rng.integers(0, things, 3 * things)])
    names = [rng.bytes(8) for _ in labels]
    part = split(labels, names, fpr)
    of = {number: set(labels[part == number]) for number in (TRAIN, VALIDATION, CALIBRATION)}
    assert [len(of[CALIBRATION]), len(of[VALIDATION])] == [calibrating, validating]
    assert sum(map(len, of.values())) == things  # none is in two parts
    assert of[CALIBRATION] == set(ordered(labels, names)[:calibrating])
    order = rng.permutation(len(labels))
    np.testing.assert_array_equal(split(labels[order], [names[i] for i in order], fpr), part[order])


def test_large_things_are_held_out_as_often_as_small_ones():
    """By their smallest digest, things of 20 pictures would be 59% of those held out, and a tenth of all."""
    rng, large, pictures_held_out = np.random.default_rng(0), [], []
    labels = np.concatenate([np.arange(180), np.repeat(np.arange(180, 200), 20)])
    for _ in range(100):
        part = split(labels, [rng.bytes(8) for _ in labels], 0.05)
        held_out = set(labels[part == CALIBRATION])
        large.append(sum(g >= 180 for g in held_out) / len(held_out))
        pictures_held_out.append((part == CALIBRATION).mean())
    for share in (large, pictures_held_out):
        assert abs(np.mean(share) - 0.1) <= 3 * np.std(share) / 10


def test_the_first_held_out_pictures_are_whole_things():
    images = own([f"{i:02d}.png" for i in range(48)])
    labels = np.repeat(np.arange(12, dtype=np.int32), 4)
    names = digests(images.pixels)
    part = split(labels, names, 0.05)
    some = parts(images, {"group": torch.from_numpy(labels), "part": torch.from_numpy(part), "crc32": checksum(names)})
    assert (np.diff(some["test"].groups.reshape(-1, 4)) == 0).all()
    assert some["train"].files == sorted(some["train"].files, key=lambda f: names[int(f[:2])])


def test_every_thing_calibrates_in_one_fold():
    labels = np.repeat(np.arange(31), 2)
    names = [bytes([i]) for i in range(62)]
    parts = np.array([split(labels, names, 0.05, 4, fold) for fold in range(4)])
    assert ((parts == CALIBRATION).sum(0) == 1).all() and (parts[:, ::2] == parts[:, 1::2]).all()
    assert [(p == VALIDATION).sum() for p in parts] == [6] * 4  # of 30 things or more, a tenth


def test_too_few_things_are_refused_by_name():
    with pytest.raises(UserError, match=r"the 5 images show 2 things, and three are needed.*--group-by.*none"):
        split(np.array([0, 0, 1, 1, 0]), [b"a", b"b", b"c", b"d", b"e"], 0.05)
    with pytest.raises(UserError, match="train_images and test_images say what calibrates"):
        split(np.arange(4), [b"a", b"b", b"c", b"d"], 0.05, 2, given=2)
    with pytest.raises(UserError, match="--folds 5: there are 4 things"):
        split(np.arange(4), [b"a", b"b", b"c", b"d"], 0.05, 5)


def test_given_parts_are_kept():
    labels = np.concatenate([np.arange(60), np.arange(50, 70)])
    part = split(labels, [bytes([i]) for i in range(80)], 0.05, given=60)
    assert (part[60:] == CALIBRATION).all() and not (part[:60] == CALIBRATION).any()
    assert (part == VALIDATION).sum() == 5 and not (part[50:60] == VALIDATION).any()


# ---- new pictures beside the training pictures

def test_copies_and_siblings_of_training_pictures_are_recognised():
    rng, many = np.random.default_rng(0), scenes(240)
    train = pictures([photograph("burst", s, rng) for s in many[:120]])
    new = torch.cat([train[7:9], pictures([photograph("burst", s, rng) for s in many[100:140]])])
    nearest = Nearest.of(train)
    strangers = nearest.distance(pictures([crop(s) for s in many[140:]]))
    distance, copies, siblings = nearest.known(new, strangers)
    assert copies.tolist() == [True] * 2 + [False] * 40 and np.abs(distance[:2]).max() < 1e-3
    assert siblings[:22].all() and not siblings[22:].any()
    for i in range(0, 42, 5):  # whatever else is looked up with it
        assert nearest.known(new[i:i + 1], strangers)[2] == siblings[i]


def test_new_pictures_are_seldom_taken_for_siblings_where_little_varies():
    """20,000 sprites lie so densely that a new one has a near one among them, as those held out have."""
    train, test = (load("sprites", part).pixels for part in ("train", "test"))
    nearest = Nearest.of(train)
    _, copies, siblings = nearest.known(test[1000:], nearest.distance(test[:1000]))
    assert not copies.any() and siblings.mean() < 0.03


def test_new_pictures_of_another_kind_lie_farther():
    train, held_out, same = (pictures([crop(s) for s in scenes(n, seed)]) for n, seed in ((200, 1), (60, 2), (60, 3)))
    other = torch.randint(256, same.shape, dtype=torch.uint8)
    nearest, singly = Nearest.of(train), np.arange(60)
    known = nearest.distance(held_out)[0]
    assert farther(nearest.distance(same)[0], singly, known, singly) > 0.01
    assert farther(nearest.distance(other)[0], singly, known, singly) < 1e-6
    assert farther(nearest.distance(other)[0], np.zeros(60, int), known, singly) > 0.03  # of one thing


def test_rank_test_matches_scipy():
    from scipy.stats import mannwhitneyu
    rng = np.random.default_rng(0)
    for decimals in (1, 9):
        x, y = rng.standard_normal(15).round(decimals) + 0.4, rng.standard_normal(11).round(decimals)
        expected = mannwhitneyu(x, y, alternative="greater", method="asymptotic").pvalue
        assert farther(x, np.arange(15), y, np.arange(11)) == pytest.approx(expected, rel=1e-9)
    twice = farther(np.repeat(x, 2), np.repeat(np.arange(15), 2), y, np.arange(11))  # a thing counts once
    assert twice == pytest.approx(expected, rel=1e-9)


def test_digests_are_equal_for_copies_alone():
    x = torch.randint(256, (6, 3, 4, 5), dtype=torch.uint8)
    x[3] = x[1]
    assert len(set(digests(x))) == 5 and digests(x)[3] == digests(x)[1]


def test_groups_csv_can_be_given_back(tmp_path):
    from vae_ood.checkpoint import write_csv
    labels = group(own(), "folder")
    write_csv(tmp_path / "groups.csv", ["file", "group", "part"], zip(NAMES, labels.tolist(), "abcd", strict=True))
    assert (tmp_path / "groups.csv").read_text().splitlines()[1] == "a/x1_0.png,0,a"
    np.testing.assert_array_equal(group(own(), str(tmp_path / "groups.csv")), labels)
