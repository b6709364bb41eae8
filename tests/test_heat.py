"""Maps as files and pictures: one scale of colours, the names of the pictures, their own sizes."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.test_detector import CONFIG, pictures
from tests.test_scoring import found, options  # noqa: F401
from vae_ood import UserError, scoring
from vae_ood.data.decoding import header
from vae_ood.data.images import Images
from vae_ood.detector import Detector
from vae_ood.heat import NOTHING, MapFiles, Scale, colours, marked, scale_of

SCALE = Scale(3.0, 0.05, 6.0, "5% show what is marked")


def test_colours_change_at_the_threshold_and_are_the_same_for_all_maps():
    assert colours(np.array([0, 2.99, 3.0, 3.001, 5.9, 99, np.nan]), SCALE).tolist() == [0, 127, 127, 128, 250, 254,
                                                                                       NOTHING]
    never = Scale(np.inf, 0.05, 4.0, "")
    assert colours(np.array([0.0, 2, 4, 99]), never).tolist() == [0, 64, 127, 127]


@pytest.mark.parametrize("shape", [(20, 16, 3), (30, 40, 1), (300, 200, 3), (1, 9, 3)])
def test_what_is_above_the_threshold_alone_is_coloured(shape):
    values, image = np.zeros(shape[:2], np.float32), np.full(shape, 80, np.uint8)
    assert (np.ptp(marked(image, values, SCALE), 2) <= 1).all()  # gray
    values[shape[0] // 2:] = 4
    drawn = marked(image, values, SCALE)
    coloured = np.ptp(drawn.astype(int), 2) > 10
    assert max(drawn.shape[:2]) >= 192 and coloured[-1].all() and (shape[0] == 1 or not coloured[0].any())
    assert 0.4 < coloured.mean() < 0.62 or shape[0] == 1


@pytest.fixture
def scored(found, tmp_path):  # noqa: F811
    """(a detector that crops, a folder of pictures of two sizes)."""
    folder = tmp_path / "new"
    (folder / "sub").mkdir(parents=True)
    big = np.asarray(pictures(1, 3)[0].permute(1, 2, 0).numpy()).repeat(3, 0).repeat(3, 1)
    Image.fromarray(big).save(folder / "a.png")
    Image.fromarray(big[:30]).save(folder / "sub" / "a.b.jpg")
    return Detector.of(CONFIG | {"skip_bad": False, "crop": "centre"}, found.members, found.args), folder


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_each_picture_has_its_map_at_its_own_size(scored, tmp_path, kind, capsys):
    detector, folder = scored
    args = options(folder, out="x", fpr=0.1, maps=str(tmp_path / "maps"), maps_format=kind)
    for _ in range(2):  # the second time over the first
        scoring.score_images(detector, args, tmp_path / "out")
    files = sorted(str(path.relative_to(tmp_path / "maps")) for path in (tmp_path / "maps").rglob("*.*"))
    assert files == [f"a.png.{kind}", "maps.json", f"sub/a.b.jpg.{kind}"]
    limit, record = detector.map_threshold(0.1), json.loads((tmp_path / "maps" / "maps.json").read_text())
    assert record["threshold"] == limit and record["fpr"] == 0.1 and record["meaning"] in capsys.readouterr().out
    whole, cut = (tmp_path / "maps" / name for name in (f"a.png.{kind}", f"sub/a.b.jpg.{kind}"))
    own = detector.map([folder / "a.png"])[0]
    if kind == "npy":
        values, left_out = np.load(whole), np.isnan(np.load(cut))
        assert values.dtype == np.float16 and values.shape == (48, 36) and abs(values.max() - own.max()) < 0.3
    else:
        assert header(whole) is None  # never read as a picture
        picture = Image.open(whole)
        assert picture.size == (36, 48) and (np.asarray(picture) >= 128).any() == (own > limit).any()
        left_out = np.asarray(Image.open(cut).convert("RGBA"))[..., 3] == 0
    assert left_out.shape == (30, 36) and left_out[:, :7].all() and left_out[:, -7:].all()
    assert not left_out[:, 7:-7].any()


def test_an_array_has_numbers_and_one_line_tells_of_the_crop(scored, tmp_path, capsys):
    detector, _ = scored
    np.save(tmp_path / "new.npy", np.zeros((3, 20, 30, 3), np.uint8))
    scoring.score_images(detector, options(tmp_path / "new.npy", out="x", maps=str(tmp_path / "m")), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["0.png", "1.png", "2.png", "maps.json"]
    assert "3 of the maps have no value where --crop centre leaves the picture out" in capsys.readouterr().out


def test_no_map_leaves_the_folder_or_takes_what_is_there(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.png").touch()
    with pytest.raises(UserError, match="not empty"):
        MapFiles(tmp_path / "full", "png", "x", SCALE, None).claim()
    files = MapFiles(tmp_path / "m", "npy", "x", SCALE, None)
    files.claim()
    for name in ("../out.png", "a/../../out.png", str(tmp_path / "out.png")):
        one = Images("x", pictures(1), files=[name], sizes=np.array([[16, 12]]))
        with pytest.raises(UserError, match="leads out of the folder"):
            files.add(one, np.zeros((1, 16, 12), np.float32), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m"]


def test_too_few_things_mark_nothing_and_say_why(found):  # noqa: F811
    scale = scale_of(found.members[0], 0.001)
    assert scale.threshold == np.inf and 0 < scale.top < np.inf
    assert "999 things must calibrate them for a rate of 0.001, and there are 99" in scale.meaning


def test_maps_are_of_pictures_that_are_scored(command):
    result = command("eval.py", "--ckpt", "x", "--maps", "y", check=False)
    assert result.returncode == 2 and "--maps: give --score PATH" in result.stderr
