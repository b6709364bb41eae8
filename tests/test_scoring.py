"""Own images, however many, against a detector: rows in blocks, and what is kept where that ends early."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.test_detector import CONFIG, SHAPE, pictures
from vae_ood import UserError, scoring
from vae_ood.cli import lock
from vae_ood.data import arrays
from vae_ood.data.images import Images, convert
from vae_ood.data.own import open_own
from vae_ood.detector import Detector
from vae_ood.member import Member
from vae_ood.model import VAE


def options(path, **changes):
    return SimpleNamespace(**{"score": str(path), "scores": [], "fpr": 0.05, "fdr": None, "confidence": None,
                              "skip_bad": False, "out": None, "max_images": None, "maps": None,
                              "maps_format": "png"} | changes)


def table(folder):
    with open(folder / "scores.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def folder_of(path, images):
    path.mkdir()
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(path / f"{i:02d}.png")
    return path


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    model = VAE(SHAPE, 0.1, 4, 0.01).eval().requires_grad_(False)
    args, config = SimpleNamespace(max_images=None, iw_samples=2), CONFIG | {"skip_bad": False}
    sets = {"train": Images("train", pictures(300)), "test": Images("test", pictures(99, 10))}
    return Detector.of(config, [Member.fit(model, config, sets, ["default"], args)], args)


@pytest.mark.parametrize("choice", [{"fpr": 0.1}, {"fdr": 0.3}])
def test_blocks_change_nothing(found, tmp_path, monkeypatch, choice, capsys):
    images = torch.cat([pictures(25, 3), torch.randint(256, (6, 3, 16, 12), dtype=torch.uint8)])
    folder = folder_of(tmp_path / "new", images)
    (folder / "05a.png").write_bytes(b"not a picture")
    args = options(folder, skip_bad=True, out="x", **choice)
    scoring.score_images(found, args, tmp_path / "whole")
    monkeypatch.setattr(scoring, "BLOCK", 7)
    scoring.score_images(found, args, tmp_path / "parts")
    whole, parts = table(tmp_path / "whole"), table(tmp_path / "parts")
    assert [row["file"] for row in parts] == [f"{i:02d}.png" for i in range(31)]
    for name in whole[0]:
        if name != "file":
            np.testing.assert_allclose([float(row[name]) for row in parts], [float(row[name]) for row in whole],
                                       rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal([row["outlier"] == "1" for row in parts], found.predict(images, **choice))
    assert sum(row["outlier"] == "1" for row in parts) >= 6 and not list(tmp_path.glob("parts/*.part*"))
    out = capsys.readouterr().out
    said, again = ([line for line in text.splitlines() if str(tmp_path) not in line]
                   for text in out.split("\nimage ")[1:])
    assert said == again and len(said) > 9 and out.count("1 files left out: 1 undecodable") == 2


def test_what_was_scored_before_a_picture_that_cannot_be_decoded_is_kept(found, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "new", pictures(9, 3))
    (folder / "06.png").write_bytes(b"not a picture")
    monkeypatch.setattr(scoring, "BLOCK", 2)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"06\.png.*--skip-bad; the rows of 6 of 9 images are in .*scores\.part\.csv"):
        scoring.score_images(found, options(folder, out="x"), tmp_path / "out")
    assert len((tmp_path / "out" / "scores.part.csv").read_text().splitlines()) == 7
    (folder / "06.png").unlink()
    scoring.score_images(found, options(folder, out="x"), tmp_path / "out")
    assert len(table(tmp_path / "out")) == 8 and not (tmp_path / "out" / "scores.part.csv").exists()


def test_arrays_are_read_in_parts(tmp_path):
    images = pictures(20, 1).numpy()
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", train_images=images[:12], test_images=images[12:])
    for name in ("a.npy", "a.npz"):
        source = open_own(tmp_path / name)
        for rows in (slice(0, 5), slice(10, 15), slice(18, 30)):
            np.testing.assert_array_equal(source.read(rows).pixels, images[rows])
        assert len(source) == 20 and source.read(slice(3, 8), (1, 8, 8)).pixels.shape == (5, 1, 8, 8)


def test_an_interrupted_command_keeps_its_rows_and_says_how_many(found, tmp_path):
    found.save(tmp_path / "detector.pt")
    np.save(tmp_path / "a.npy", pictures(100).repeat(1500, 1, 1, 1).numpy())
    process = subprocess.Popen([sys.executable, ROOT / "eval.py", "--detector", "detector.pt", "--score", "a.npy"],
                               cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job may ignore it
    part, end = tmp_path / "score-a" / "scores.part.csv", time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") > 4001) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    rows = part.read_text().splitlines()[1:]
    assert process.returncode == 130 and f"the rows of {len(rows):,} of 150,000 images are in" in error, error
    assert [row.split(",")[0] for row in rows] == [str(i) for i in range(len(rows))]
    assert len(rows) % 4000 == 0 and rows


def test_no_more_than_two_blocks_are_in_memory(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", pictures(50).numpy())
    source, read = open_own(tmp_path / "a.npy"), []
    monkeypatch.setattr(scoring, "BLOCK", 5)
    whole = source.read
    monkeypatch.setattr(source, "read", lambda rows, *how: (read.append(rows.start), whole(rows, *how))[1])
    for i, images in enumerate(scoring.blocks(source, CONFIG)):
        np.testing.assert_array_equal(images.pixels, pictures(50)[5 * i:5 * i + 5])
        assert len(read) <= i + 2
    assert read == list(range(0, 50, 5))


def test_only_so_much_is_kept_of_many_images(found):
    many, scored = pictures(300, 4), scoring.Scored(found, "default", 0.05)
    for part in many.split(60):
        scored.add(Images("many", part))
    p, value = np.concatenate(scored.p), found.decision_function(many)
    order = np.lexsort((-value, p))
    assert [row["index"] for row in scored.most] == order[:scoring.LISTED].tolist()
    assert [row["index"] for row in scored.least] == order[-scoring.FIGURE:].tolist()
    np.testing.assert_array_equal(scored.most[0]["image"], many[order[0]].permute(1, 2, 0))
    np.testing.assert_array_equal(scored.sample["pixels"], many)  # all, as they are fewer than are compared
    np.testing.assert_allclose(scored.sample["distance"], found.compare(many)[0], atol=1e-6)
    np.testing.assert_allclose(scored.sample["view 0"], found.look(Images("many", many)).views[0], atol=1e-4)


def test_the_sample_is_of_all_images_and_the_same_by_any_blocks(found, monkeypatch):
    monkeypatch.setattr(scoring, "COMPARED", 50)
    many, samples = pictures(300, 4), []
    for size in (60, 300):
        scored = scoring.Scored(found, "default", 0.05)
        for part in many.split(size):
            scored.add(Images("many", part))
        samples.append(scored.sample)
    np.testing.assert_array_equal(samples[0]["pixels"], samples[1]["pixels"])
    index = [int((many == torch.from_numpy(one)).flatten(1).all(1).nonzero()[0]) for one in samples[0]["pixels"]]
    assert index == sorted(set(index)) and len(index) == 50 and index[0] < 60 and index[-1] > 240


def test_names_that_hold_line_ends_stay_whole(found, tmp_path):
    folder = folder_of(tmp_path / "new", pictures(4, 3))
    for i, name in enumerate(("a\r.png", 'b\n".png', "c,\r\n.png")):
        (folder / f"{i:02d}.png").rename(folder / name)
    for choice in ({"fpr": 0.1}, {"fdr": 0.5}):
        scoring.score_images(found, options(folder, out="x", **choice), tmp_path / "out")
        assert sorted(row["file"] for row in table(tmp_path / "out")) == sorted(
            ["03.png", "a\r.png", 'b\n".png', "c,\r\n.png"])
        assert {row["outlier"] for row in table(tmp_path / "out")} <= {"0", "1"}


def test_two_scorings_do_not_share_a_folder(found, tmp_path):
    np.save(tmp_path / "a.npy", pictures(4).numpy())
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out", wait=False), pytest.raises(UserError, match="another scoring writes"):
        scoring.score_images(found, options(tmp_path / "a.npy", out="x"), tmp_path / "out")
    scoring.score_images(found, options(tmp_path / "a.npy", out="x"), tmp_path / "out")
    with pytest.raises(UserError, match="results of other images"):
        scoring.score_images(found, options(folder_of(tmp_path / "new", pictures(2)), out="x"), tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_named(found, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", pictures(4).numpy())
    monkeypatch.setattr(scoring, "folder_of_scores", lambda *_: tmp_path)
    (tmp_path / "scores.part.csv").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*scores\.part\.csv \(No space left on device\)"):
        scoring.score_images(found, options(tmp_path / "a.npy"), tmp_path)


def test_large_arrays_are_converted_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "PART", 3 * 3 * 16 * 12)
    np.save(tmp_path / "a.npy", pictures(20).numpy())
    seen = []
    whole = arrays.to_uint8
    monkeypatch.setattr(arrays, "to_uint8", lambda part, *rest: (seen.append(len(part)), whole(part, *rest))[1])
    found = open_own(tmp_path / "a.npy").read(slice(2, 15), (1, 8, 8)).pixels
    np.testing.assert_array_equal(found, convert(pictures(20)[2:15], (1, 8, 8)))
    assert max(seen) == 3
