"""The commands as a user runs them, for a few steps."""

import csv
import fcntl
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from vae_ood import checkpoint
from vae_ood.data import load
from vae_ood.scores import COMPONENTS, PATCHES, SCORES

TINY = ("run.py", "--alpha", 0.1, "--batch-size", 16, "--no-compile")
OWN = (*TINY, "--recipe", "fast", "--no-eval", "--data")


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


COLUMNS = ["file", "default", "p_value", "outlier", "likeness", "known"]


def refused(result, *words):
    """A user's mistake: exit code 2 and one line on stderr that holds the words."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    for word in words:
        assert word in result.stderr
    return True


def test_run_writes_what_it_promises(tiny_run):
    out, stdout = tiny_run
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "config.json", "detector.pt", "log.jsonl",
                                                     "metrics.json", "mutual_information.png", "nll_histogram.png",
                                                     "scores.csv"]
    first = stdout.splitlines()[0]
    assert re.match(r"179,170 parameters, 20,000 training images, 200 steps of 64 on \w+: about \d+ \w+", first), first
    assert "latent dimensions carry the data; the family has 4" in stdout
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == [1, 50, 100, 150, 200]
    assert set(log[0]) == {"step", "seconds", "images_per_second", "loss", "bpd", "mse", "gamma", "kl", "grad_norm",
                           "grad_z_norm", "active_dims"}
    assert all(math.isfinite(v) for r in log for v in r.values())
    config = json.loads((out / "config.json").read_text())
    assert config == checkpoint.load(out / "ckpt.pt")["config"]
    for name in ("mutual_information.png", "nll_histogram.png"):
        pixels = np.asarray(Image.open(out / name).convert("L"))
        assert pixels.shape[0] > 300 and 0.005 < (pixels < 200).mean() < 0.9


def test_metrics_follow_from_the_scores(tiny_run):
    out, stdout = tiny_run
    metrics, table = json.loads((out / "metrics.json").read_text()), rows(out / "scores.csv")
    assert list(metrics["sets"]) == ["train", "test", "two_blobs", "discs", "cut_out", "noise", "constant"]
    for name, summary in metrics["sets"].items():
        nll = np.array([float(r["nll"]) for r in table if r["set"] == name])
        assert len(nll) == summary["n"] == 300
        assert summary["nll"] == pytest.approx(nll.mean())
        bpd = nll.mean() / (1024 * math.log(2)) + math.log2(255)
        assert summary["bpd"] == (None if metrics["gamma"] < 1 / 255**2 else pytest.approx(bpd))
        assert summary["nll_iw"] < summary["nll"]
    assert metrics["kappa"] == 16 and metrics["iw_samples"] == 2 and metrics["config"]["data"] == "sprites"
    assert metrics["mmd"] > 0 and metrics["mmd_images"] == 300
    assert metrics["gamma"] == pytest.approx(metrics["sets"]["train"]["mse"], rel=0.1)  # the training set's MSE
    test, noise = ([float(r["nll"]) for r in table if r["set"] == s] for s in ("test", "noise"))
    row = metrics["scores"]["nll"]["noise"]
    assert row["auroc"] == np.mean(np.subtract.outer(noise, test) > 0) and (row["n_in"], row["n_out"]) == (300, 300)
    assert f"{row['auroc']:.4f}" in stdout


def test_eval_repeats_what_run_measured(tiny_run, command, tmp_path):
    out, _ = tiny_run
    command("eval.py", "--ckpt", out / "ckpt.pt", "--iw-samples", 2, "--max-images", 300, "--out", tmp_path / "a",
            env=os.environ)  # not a fork of what ran it
    for name in ("metrics.json", "scores.csv"):
        assert (tmp_path / "a" / name).read_text() == (out / name).read_text()
    command("eval.py", "--ckpt", out / "ckpt.pt", "--iw-samples", 2, "--max-images", 300, "--scores", "all", "--out",
            tmp_path / "b")
    few, all_of_them = (json.loads((place / "metrics.json").read_text())["scores"] for place in (out, tmp_path / "b"))
    assert list(few) == ["default", "nll", "pca"] and set(all_of_them) == set(SCORES) - {"regret"}
    assert all(all_of_them[name] == few[name] for name in few)


def test_score_own_images(tiny_run, command, tmp_path):
    out, _ = tiny_run
    folder = tmp_path / "mine.1"
    folder.mkdir()
    for kind in ("sprites", "discs"):
        for i, image in enumerate(load(kind, "test").pixels[:40, 0].numpy()):
            Image.fromarray(image).save(folder / f"{kind}{i:02d}.png")
    result = command("eval.py", "--ckpt", out / "ckpt.pt", "--score", folder, "--fpr", 0.1, "--iw-samples", 2)
    table = rows(out / "score-mine.1" / "scores.csv")
    assert list(table[0]) == [*COLUMNS, *(f"p_{name}" for name in (*COMPONENTS, PATCHES))] and len(table) == 80
    assert min(float(row[f"p_{name}"]) for row in table for name in COMPONENTS) >= 1 / 301 - 1e-9
    for row in table:
        assert row["outlier"] == str(int(float(row["p_value"]) <= 0.1))
    flagged = {kind: sum(int(r["outlier"]) for r in table if r["file"].startswith(kind))
               for kind in ("sprites", "discs")}
    assert flagged["discs"] >= 39 and flagged["sprites"] <= 14  # 10% of 40, four standard errors above
    assert f"{sum(flagged.values())} of 80 images flagged at p <= 0.1" in result.stdout
    assert np.asarray(Image.open(out / "score-mine.1" / "outliers.png")).std() > 5
    worst = sorted(table, key=lambda row: -float(row["default"]))[:10]  # p-values are equal there, scores are not
    assert [line.split()[0] for line in result.stdout.splitlines() if ".png  " in line] == [
        r["file"] for r in worst]
    assert (out / "scores.csv").exists() and len(rows(out / "scores.csv")) == 2100  # the evaluation's are kept

    np.save(tmp_path / "mine.npy", load("noise", "test", shape=(3, 20, 30)).pixels[:5])  # another size and colour
    command("eval.py", "--ckpt", out / "ckpt.pt", "--score", tmp_path / "mine.npy", "--scores", "nll", "--max-images",
            60, "--out", tmp_path / "s")
    flags = [(r["index"], r["outlier"]) for r in rows(tmp_path / "s" / "scores.csv")]
    assert flags == [(str(i), "1") for i in range(5)]


def test_of_the_flagged_few_are_ordinary(tiny_run, command, tmp_path):
    out, _ = tiny_run
    np.save(tmp_path / "new.npy", torch.cat([load("sprites", "test").pixels[1000:1060], load("discs", "test").pixels[
        :40]]).numpy())
    scored = ("eval.py", "--detector", out / "detector.pt", "--score", tmp_path / "new.npy", "--out", tmp_path / "s")
    result = command(*scored, "--fdr", 0.1)
    flagged = [int(row["outlier"]) for row in rows(tmp_path / "s" / "scores.csv")]
    assert sum(flagged[60:]) >= 38 and sum(flagged[:60]) <= 12
    assert f"{sum(flagged)} of 100 images flagged, of which at most 10.0% are ordinary" in result.stdout
    np.save(tmp_path / "new.npy", load("sprites", "test").pixels[1000:1100].numpy())
    result = command(*scored, "--fdr", 0.001)
    assert "0 of 100 images flagged" in result.stdout and "333 images must score above" in result.stdout
    assert refused(command(*scored, "--fdr", 0.1, "--confidence", 0.9, check=False), "--fdr")


def test_the_readme_s_commands_for_own_images(tiny_run, tmp_path):
    def commands(page, heading):
        section = (ROOT / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
        return "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL))
    script = commands("README.md", "Two commands") + commands(
        "vae_ood/README.md", "An example without pictures of your own")
    assert "--out runs/photos" in script
    script = script.replace("--out runs/photos", "--iters 30 --alpha 0.1 --no-eval --out runs/photos")  # not 10,000
    for name in ("run.py", "eval.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_run[0], tmp_path / "runs/sprites_a0.25_k16_s0")
    for folder, kinds, n in (("photos", ("sprites",), 300), ("new", ("sprites", "noise"), 20)):
        (tmp_path / folder).mkdir()
        for kind in kinds:
            for i, image in enumerate(load(kind, "train", shape=(1, 16, 16)).pixels[-n:, 0].numpy()):
                Image.fromarray(image).save(tmp_path / folder / f"{kind}{i:03d}.png")
    result = subprocess.run(["sh", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=300, env={
        **os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert result.returncode == 0, result.stdout + result.stderr
    photos = rows(tmp_path / "runs/photos/score-new/scores.csv")
    assert len(photos) == 40 and {row["outlier"] for row in photos if row["file"].startswith("noise")} == {"1"}
    new = rows(tmp_path / "runs/sprites_a0.25_k16_s0/score-new/scores.csv")
    flagged = [int(row["outlier"]) for row in new]
    assert len(new) == 530 and sum(flagged[:500]) <= 18 and sum(flagged[510:520]) >= 9  # 1%, and the discs
    for folder in ("photos/score-new", "sprites_a0.25_k16_s0/score-new"):
        assert np.asarray(Image.open(tmp_path / "runs" / folder / "outliers.png")).std() > 5


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_false_alarm_rate_on_held_out_inliers_is_the_asked_one(tiny_run, command, tmp_path, rate):
    out, _ = tiny_run
    from vae_ood.data.images import generator
    from vae_ood.data.synthetic import render
    unit = generator(123, 0).random((1500, 7))  # inliers that neither training nor calibration has seen
    unit[:, 4] = 0.5
    np.save(tmp_path / "new.npy", np.rint(255 * render("sprites", unit)).astype(np.uint8))
    command("eval.py", "--ckpt", out / "ckpt.pt", "--score", tmp_path / "new.npy", "--fpr", rate, "--iw-samples", 1,
            "--scores", "nll", "--out", tmp_path)
    flagged = np.mean([int(r["outlier"]) for r in rows(tmp_path / "scores.csv")])
    assert abs(flagged - rate) < 4 * math.sqrt(rate * (1 - rate) * (1 / 1500 + 1 / 2000))  # binomial, both samples


# ---- resuming

def parameters(out):
    return checkpoint.load(out / "ckpt.pt")["model"]


def interrupted_run(arguments, out, seed):
    """Start the command over and over, ending it by one signal after another once it has logged a step or two."""
    rng, log = random.Random(seed), out / "log.jsonl"

    def logged():
        return len(log.read_text().splitlines()) if log.exists() else 0

    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL, None):
        goal = logged() + rng.choice((1, 2))
        process = subprocess.Popen([sys.executable, *map(str, arguments), "--out", out, "--resume"], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if number is not None:
            while logged() < goal:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(number)
        sent = time.monotonic()
        output, _ = process.communicate(timeout=300)
        assert number is None or time.monotonic() - sent < 2  # a step takes some milliseconds
        assert process.returncode == {None: 0, signal.SIGKILL: -signal.SIGKILL}.get(number, 130), output


@pytest.mark.parametrize("gamma", ["homotopy", pytest.param("learn", marks=pytest.mark.slow)])
def test_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(command, tmp_path, gamma):
    arguments = (*TINY, "--iters", 700, "--gamma", gamma, "--no-eval", "--checkpoint-seconds", 0.02)
    command(*arguments, "--out", tmp_path / "whole")
    interrupted_run(arguments, tmp_path / "pieces", gamma)
    whole, pieces = parameters(tmp_path / "whole"), parameters(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "pieces")]
    assert [r["step"] for r in logs[1]] == [1, *range(50, 701, 50)]
    for a, b in zip(*logs, strict=True):
        for key in set(a) - {"seconds", "images_per_second"}:
            assert a[key] == b[key]


def test_weights_kept_at_a_step_are_those_of_a_run_that_ends_there(command, tmp_path):
    arguments = (*TINY, "--recipe", "paper",  # no schedule, so the number of steps changes none of them
                 "--max-images", 60, "--iw-samples", 1, "--no-eval")
    command(*arguments, "--iters", 60, "--keep-at", 20, 60, "--out", tmp_path / "long")
    command(*arguments, "--iters", 20, "--out", tmp_path / "short")
    kept = checkpoint.load(tmp_path / "long" / "step-20.pt")
    assert kept["step"] == 20 and not kept["optimizer"] and (tmp_path / "long" / "step-60.pt").exists()
    assert all(torch.equal(value, kept["model"][name]) for name, value in parameters(tmp_path / "short").items())
    command("eval.py", "--ckpt", tmp_path / "long" / "step-20.pt", "--scores", "nll", "--max-images", 60,
            "--iw-samples", 1, "--out", tmp_path / "evaluated")
    assert (tmp_path / "evaluated" / "metrics.json").exists()


@pytest.mark.slow
def test_compiled_run_resumes_bit_for_bit(command, tmp_path):
    arguments = ("run.py", "--iters", 700, "--no-eval", "--checkpoint-seconds", 0.2, "--compile")
    command(*arguments, "--out", tmp_path / "whole")
    interrupted_run(arguments, tmp_path / "pieces", 0)
    whole, pieces = parameters(tmp_path / "whole"), parameters(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(("factors", "at_least"), [(2, 5), (3, 5), (4, 3)])
def test_latent_spectrum_shows_the_dimension_of_the_sprites(command, tmp_path, factors, at_least):
    cuts = []
    for seed in range(5):
        out = tmp_path / str(seed)
        command("run.py", "--sprite-factors", factors, "--seed", seed, "--out", out, "--scores", "nll",
                "--max-images", 2000, "--iw-samples", 1)
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["kappa"] == 4 * factors and metrics["spectrum_ratio"] >= 5
        assert all(row["auroc"] >= 0.95 for row in metrics["scores"]["nll"].values())
        cuts.append(metrics["spectrum_cut"])
    assert cuts.count(factors) >= at_least  # with four factors, one is split over two dimensions in 2 of 16 seeds
    assert set(cuts) <= {factors, factors + 1}


def test_half_written_log_and_flags_that_differ(command, tmp_path):
    arguments = (*TINY, "--no-eval", "--out", tmp_path / "a")
    command(*arguments, "--iters", 100, "--precision", "bfloat16")
    with open(tmp_path / "a" / "log.jsonl", "a") as file:
        file.write('{"step": 150, "seconds": 3.1}\n{"step": 2')
    assert refused(command(*arguments, "--iters", 100, check=False), "already holds a run", "--resume")
    assert refused(command(*arguments, "--iters", 200, "--resume", check=False), "iters = 100, not 200")
    assert refused(command(*arguments, "--iters", 100, "--resume", "--precision", "float32", check=False),
                   "precision = bfloat16, not float32")
    assert len((tmp_path / "a" / "log.jsonl").read_text().splitlines()) == 5  # nothing was touched
    command(*arguments, "--iters", 100, "--resume")  # with the precision that it has
    lines = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 50, 100]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(command, tmp_path):
    arguments = (*TINY, "--iters", 120, "--no-eval", "--checkpoint-seconds", 0, "--out", tmp_path / "a")
    command(*arguments)
    whole, ckpt = parameters(tmp_path / "a"), tmp_path / "a" / "ckpt.pt"
    assert {p.name for p in (tmp_path / "a").glob("*.pt")} == {"ckpt.pt", "ckpt-119.pt"}
    ckpt.write_bytes(ckpt.read_bytes()[:100_000])
    with open(tmp_path / "a" / "log.jsonl", "a") as file:
        file.write('{"step": 12')
    output = command(*arguments, "--resume").stdout
    assert f"{ckpt} is not a checkpoint" in output and "resuming" in output and "at step 119" in output
    assert all(torch.equal(whole[name], value) for name, value in parameters(tmp_path / "a").items())
    lines = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 50, 100, 120]


def test_a_second_run_in_the_same_folder_is_refused(command, tmp_path):
    arguments = (*TINY, "--iters", 100_000, "--no-eval", "--resume", "--out", tmp_path / "a")
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "a" / "log.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert refused(command(*arguments, check=False), "another run is writing to", "--out")
    finally:
        process.kill()
        process.wait()
    command(*TINY, "--iters", 1, "--no-eval", "--resume", "--out", tmp_path / "a")  # a killed one leaves no lock


# ---- mistakes

@pytest.mark.parametrize(("arguments", "words"), [
    (["--data", "fashionmnst"], ["unknown data 'fashionmnst'", "fashionmnist"]),
    (["--alpha", "0"], ["--alpha", "greater than 0"]),
    (["--alpha", "nan"], ["--alpha"]),
    (["--kappa", "0"], ["--kappa", "at least 1"]),
    (["--iters", "many"], ["--iters"]),
    (["--gamma", "-1"], ["--gamma"]),
    (["--gamma", "best"], ["--gamma", "learn, optimal, homotopy"]),
    (["--outliers", "letters"], ["unknown data 'letters'"]),
    (["--data", "noise"], ["unknown data 'noise'"]),
    (["--scores", "magic"], ["unknown score 'magic'", "nll, iw_nll"]),
    (["--outliers", "test"], ["--outliers test"]),
    (["--data", "celeba", "--data-root", "/nowhere"], ["CelebA is not in /nowhere/celeba"]),
    (["--outliers", "celeba", "--data-root", "/nowhere"], ["CelebA is not in /nowhere/celeba"]),
    (["--seed", "-1"], ["--seed"]),
    (["--iters", "10", "--keep-at", "5", "20"], ["--keep-at 20", "the last step is 10"]),
])
def test_run_refuses_in_one_line(command, tmp_path, arguments, words):
    assert refused(command("run.py", *arguments, "--out", tmp_path / "out", check=False), *words)
    assert not (tmp_path / "out").exists()


def test_missing_file_of_a_known_data_set(command, tmp_path):
    result = command("run.py", "--data", "mnist", "--data-root", tmp_path, "--out", tmp_path / "out", check=False,
                     env=os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"})
    assert refused(result, "train-images-idx3-ubyte.gz is missing", "https://ossci-datasets", str(tmp_path / "mnist"))


def test_eval_refuses_in_one_line(tiny_run, command, tmp_path):
    out, _ = tiny_run
    (tmp_path / "no.pt").write_text("hello")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "one.npy", np.zeros((1, 16, 16), np.uint8))
    ckpt = ["--ckpt", out / "ckpt.pt"]
    for arguments, words in ((["--ckpt", tmp_path / "no.pt"], ["is not a checkpoint"]),
                             (["--ckpt", tmp_path / "missing.pt"], ["there is no checkpoint"]),
                             ([], ["--ckpt, or --detector"]),
                             (["--detector", tmp_path / "no.pt"], ["give --score"]),
                             (["--detector", out / "ckpt.pt", "--score", tmp_path], ["is not a detector"]),
                             (["--detector", out / "detector.pt", "--score", tmp_path, "--scores", "nll"],
                              ["is fitted with default", "--fit"]),
                             ([*ckpt, "--score", "noise"], ["there is no such folder or file"]),
                             ([*ckpt, "--score", tmp_path / "empty"], ["holds no pictures"]),
                             ([*ckpt, "--score", tmp_path, "--fpr", 2], ["--fpr"]),
                             ([*ckpt, "--score", tmp_path / "one.npy", "--fpr", 0.01, "--max-images", 15],
                              ["needs 99 things", "there are 15", "--fpr 0.0625 or more", "--max-images"]),
                             ([*ckpt, "--max-images", 1], ["two training images"])):
        assert refused(command("eval.py", *arguments, check=False), *words)


def test_unwritable_output_folder(command, tmp_path):
    (tmp_path / "file").touch()
    assert refused(command(*TINY, "--iters", 1, "--out", tmp_path / "file" / "out", check=False), "cannot write")


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk],
                                                       capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here: needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_disk_that_fills_up_keeps_the_checkpoint_before(command, disk, tmp_path):
    arguments = ("run.py", "--alpha", 0.2, "--no-compile", "--no-eval", "--out", disk / "run")
    command(*arguments, "--iters", 1)
    before = parameters(disk / "run")
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(free - 100_000))
    torch.save(checkpoint.load(disk / "run" / "ckpt.pt") | {"step": 0}, tmp_path / "ckpt.pt")
    (disk / "run" / "ckpt.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes())
    result = command(*arguments, "--iters", 1, "--resume", check=False)
    assert refused(result, "No space left on device", "the one saved before is kept")
    after = parameters(disk / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list((disk / "run").glob("*.part"))


def test_folder_that_cannot_be_written_keeps_all(command, disk):
    arguments = (*TINY, "--no-eval", "--out", disk / "run", "--iters", 1)
    command(*arguments)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert refused(command(*arguments, "--resume", check=False), "cannot write in the folder", "Read-only file system")
    assert checkpoint.load(disk / "run" / "ckpt.pt")["step"] == 1


def test_divergence_is_refused_in_one_line(command, tmp_path):
    arguments = (*TINY, "--iters", 300, "--no-eval", "--out", tmp_path / "a", "--lr", "1e20")
    assert refused(command(*arguments, check=False), "training diverged", "at step ", "smaller --lr")


def test_file_names_of_any_bytes(tiny_run, command, tmp_path):
    out, _ = tiny_run
    (tmp_path / "mine").mkdir()
    with open(os.fsencode(tmp_path / "mine") + b"/\xe9.png", "wb") as file:
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(file, "PNG")
    for name in ("a\nb.png", "a,\"b.png"):
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "mine" / name)
    with open(os.fsencode(tmp_path / "mine") + b"/\xea.png", "wb") as file:
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(file, "PNG")
    result = command("eval.py", "--ckpt", out / "ckpt.pt", "--score", tmp_path / "mine", "--out", tmp_path / "o",
                     "--scores", "nll", "--max-images", 60, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    with open(tmp_path / "o" / "scores.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert sorted(map(os.fsencode, names)) == [b"a\nb.png", b'a,"b.png', b"\xe9.png", b"\xea.png"]
    assert sum(".png  " in line for line in result.stdout.splitlines()) == 4  # one line each


def test_nobody_reads_on(tiny_run, tmp_path):
    script = (f"{sys.executable} run.py --iters 400 --no-eval --alpha 0.1 --no-compile --out {tmp_path / 'r'} "
              "| head -n 1")
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.stdout.count("\n") == 1 and not result.stderr


def test_results_of_one_input_replace_no_others(tiny_run, command, tmp_path):
    out, _ = tiny_run
    scored = ("eval.py", "--ckpt", out, "--iw-samples", 1, "--scores", "nll", "--max-images", 60, "--score")
    for day, kind in (("mon", "sprites"), ("tue", "discs")):
        (tmp_path / day).mkdir()
        np.save(tmp_path / day / "new.npy", load(kind, "test").pixels[:20].numpy())
        command(*scored, tmp_path / day / "new.npy")
    command(*scored, tmp_path / "mon" / "new.npy")  # again: its own results may go
    means = [np.mean([float(row["nll"]) for row in rows(out / name / "scores.csv")])
             for name in ("score-new", "score-new-2")]
    assert means[0] < means[1] and not (out / "score-new-3").exists()
    for arguments in ((*scored, tmp_path / "tue" / "new.npy"), ("eval.py", "--ckpt", out)):
        assert refused(command(*arguments, "--out", out / "score-new", check=False), "of other images")


@pytest.mark.parametrize("shape", [(1, 9), pytest.param((9, 1), marks=pytest.mark.slow), (1, 1, 3)])
def test_images_of_any_size(command, tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, (90, *shape), np.uint8)
    np.save(tmp_path / "a.npy", images)
    result = command(*TINY, "--data", tmp_path / "a.npy", "--recipe", "fast", "--iters", 2, "--group-by", "none",
                     "--out", tmp_path / "r", "--iw-samples", 1, "--scores", "default", "nll")
    assert (tmp_path / "r" / "metrics.json").exists() and "no nll_histogram" not in result.stdout
    command("eval.py", "--ckpt", tmp_path / "r", "--score", tmp_path / "a.npy", "--out", tmp_path / "s")
    assert Image.open(tmp_path / "s" / "outliers.png").width == 1200 and (tmp_path / "s" / "report.html").exists()


def test_levels_are_kept_and_moved_training_images_are_named_and_found(command, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (90, 8, 8)).astype(np.uint16)
    np.save(tmp_path / "a.npy", values)
    arguments = (*OWN, tmp_path / "a.npy", "--iters", 2, "--out", tmp_path / "r")
    assert refused(command(*arguments, check=False), "holds uint16 from 0 to 4095", "--range LOW HIGH")
    assert refused(command(*arguments, "--range", 5, 5, check=False), "--range")
    command(*arguments, "--range", 0, 4095)
    assert checkpoint.load(tmp_path / "r" / "ckpt.pt")["config"]["range"] == [0, 4095]
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    scored = ("eval.py", "--ckpt", tmp_path / "r", "--score", tmp_path / "b.npy", "--scores", "nll", "--out",
              tmp_path / "s")
    assert refused(command(*scored, check=False), "not at", "any more", "--data")
    command(*scored, "--data", tmp_path / "b.npy")


def test_a_detector_needs_nothing_else(own_run, command, tmp_path):
    photos, out, _ = own_run
    (tmp_path / "r").mkdir()
    for name in ("ckpt.pt", "best.pt"):
        shutil.copy(out / name, tmp_path / "r")
    assert "written to" in command("eval.py", "--ckpt", tmp_path / "r", "--fit", "--iw-samples", 1).stdout
    new, kept = photographs(tmp_path / "new", 4, 100), tmp_path / "r" / "detector.pt"
    command("eval.py", "--ckpt", tmp_path / "r" / "best.pt", "--score", new, "--out", tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kept.rename(elsewhere / "d.pt")
    photos.rename(tmp_path / "gone")
    try:
        result = subprocess.run([sys.executable, ROOT / "eval.py", "--detector", "d.pt", "--score", new], cwd=elsewhere,
                                capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert refused(command("eval.py", "--ckpt", tmp_path / "r", "--score", new, check=False), "any more", "--data")
    finally:
        (tmp_path / "gone").rename(photos)
    assert (tmp_path / "a/scores.csv").read_text() == (elsewhere / "score-new/scores.csv").read_text()
    command("eval.py", "--ckpt", out, "--score", new, "--iw-samples", 1, "--out", tmp_path / "b")  # fitted anew
    assert (tmp_path / "a/scores.csv").read_text() == (tmp_path / "b/scores.csv").read_text()


@pytest.mark.slow
def test_an_evaluation_beside_a_training(command, tmp_path):
    arguments = [*map(str, TINY), "--iters", "1500", "--no-eval", "--checkpoint-seconds", "0.02", "--out",
                 str(tmp_path / "r")]
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "r" / "ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    command("eval.py", "--ckpt", tmp_path / "r" / "ckpt.pt", "--scores", "nll", "--max-images", 50, "--iw-samples", 1)
    assert process.wait(timeout=200) == 0 and (tmp_path / "r" / "metrics.json").exists()
    assert not list((tmp_path / "r").glob("*.part"))


def test_shipped_checkpoints_score(command, data_root, tmp_path):
    """They were trained on CIFAR-10's first three files."""
    np.save(tmp_path / "new.npy", load("svhn", "test", data_root).pixels[:50].numpy())
    command("eval.py", "--ckpt", "results/runs/cifar10_a0.25_k32_fast_i10000_s0", "--score", tmp_path / "new.npy",
                     "--max-images", 500, "--out", tmp_path / "s", "--data-root", data_root)
    table = rows(tmp_path / "s" / "scores.csv")
    assert len(table) == 50 and sum(int(row["outlier"]) for row in table) >= 40


def test_nan_pixels(command, tmp_path):
    np.save(tmp_path / "a.npy", np.full((50, 8, 8), np.nan))
    assert refused(command("run.py", "--data", tmp_path / "a.npy", "--out", tmp_path / "out", check=False), "NaN")


def test_own_data_end_to_end(command, tmp_path):
    np.save(tmp_path / "mine.npy", load("sprites", "test").pixels[:200, 0, ::2, ::2])
    result = command(*TINY, "--data", tmp_path / "mine.npy", "--recipe", "fast", "--iters", 20, "--out", tmp_path / "r",
                     "--dequantize", "--precision", "bfloat16", "--iw-samples", 1)
    assert re.search(r"^200 pictures show about (19\d|200) things: (19|20) whole things", result.stdout, re.MULTILINE)
    assert "noise" in result.stdout and "constant" in result.stdout


# ---- pictures of one thing

def photographs(folder, things, first=0):
    """Four pictures of each of so many things, other ones from another `first`: x<thing>/<number>.png."""
    from tests.test_groups import photograph, scenes
    rng = np.random.default_rng(first)
    for number, scene in enumerate(scenes(things, first), first):
        (folder / f"x{number}").mkdir(parents=True)
        for i in range(4):
            image = Image.fromarray(photograph("burst", scene, rng).clip(0, 255).astype(np.uint8))
            image.resize((16, 16)).save(folder / f"x{number}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def own_run(command, tmp_path_factory):
    """A short run on 60 things: (the pictures, the run's folder, what it printed)."""
    place = tmp_path_factory.mktemp("own")
    photographs(place / "photos", 60)
    result = command(*OWN, place / "photos", "--iters", 150, "--out", place / "run")
    return place / "photos", place / "run", result.stdout


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder of 60 pictures of as many sizes, portrait and landscape, some gray."""
    folder, rng = tmp_path_factory.mktemp("mixed") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(60):
        fine = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((30 + 4 * i, 150), Image.BICUBIC)
        fine.convert("L" if i % 9 == 0 else "RGB").save(folder / f"{i}.jpg")
    return folder


def test_pictures_of_any_size(mixed, command, tmp_path):
    run = (*OWN, mixed, "--group-by", "none", "--iters", 2, "--out", tmp_path / "run", "--crop", "pad", "--cache",
           tmp_path / "cache")
    stdout = command(*run).stdout
    assert "60 pictures of 60 sizes, 150x30 to 150x266, are scaled and padded to 64x64: --size and" in stdout
    assert re.search(r"^read 60/60 ", stdout, re.MULTILINE)
    file, = (tmp_path / "cache").glob("*.npy")
    assert f"60 pictures of 3x64x64: 737 kB in {file}" in stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["size"], config["crop"], config["shape"]) == ([64, 64], "pad", [3, 64, 64])
    assert refused(command(*run, "--resume", "--size", 32, check=False), "--size 64x64 --crop pad", "another --out")
    again = command("eval.py", "--ckpt", tmp_path / "run", "--fit", "--score", mixed, "--out", tmp_path / "s")
    assert "read " not in again.stdout and "(35 are copies)" in again.stdout  # all that trained, bit for bit


def test_pictures_of_one_thing_stay_in_one_part(own_run, command, tmp_path):
    photos, out, stdout = own_run
    assert ("240 pictures show about 60 things: 19 whole things (76 pictures) are held out to calibrate, 6 (24) to "
            "validate\n") in stdout
    found = {}
    for row in rows(out / "groups.csv"):
        found.setdefault(row["file"].split("/")[0], set()).add((row["group"], row["part"]))
    assert len(found) == 60 and all(len(parts) == 1 for parts in found.values())
    assert len({group for parts in found.values() for group, _ in parts}) == 60
    for how in ("folder", r"x\d+", out / "groups.csv"):  # the same things, so the same parts
        command(*OWN, photos, "--iters", 1, "--group-by", how, "--out", tmp_path / Path(how).stem)
        assert [row["part"] for row in rows(tmp_path / Path(how).stem / "groups.csv")] == [
            row["part"] for row in rows(out / "groups.csv")]


def test_the_step_that_is_best_on_validation_pictures_is_evaluated(own_run):
    _, out, stdout = own_run
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seen = {record["step"]: record["validation_nll"] for record in log if "validation_nll" in record}
    best, newest = checkpoint.load(out / "best.pt"), checkpoint.load(out / "ckpt.pt")
    assert list(seen) == [50, 100, 150] and best["step"] == min(seen, key=seen.get) and newest["step"] == 150
    assert ("the best yet" if best["step"] == 150 else f"stopped improving at step {best['step']} of 150") in stdout


def test_new_things_are_scored_and_copies_told_apart(own_run, command, tmp_path):
    photos, out, _ = own_run
    new = photographs(tmp_path / "new", 30, 100)
    part = {row["file"]: row["part"] for row in rows(out / "groups.csv")}
    copied = [name for name in part if part[name] == "train"][:5]
    (new / "copies").mkdir()
    for i, name in enumerate(copied):
        shutil.copy(photos / name, new / "copies" / f"{i}.png")
    result = command("eval.py", "--ckpt", out, "--score", new, "--iw-samples", 1)
    table = rows(out / "score-new" / "scores.csv")
    assert list(table[0])[:6] == COLUMNS and len(table) == 125
    known = {row["file"] for row in table if row["known"] == "1"}
    assert {f"copies/{i}.png" for i in range(5)} <= known and len(known) <= 9
    assert re.search(r"images show what training images show \(5 are copies\)", result.stdout)
    flagged = [int(row["outlier"]) for row in table if row["file"] not in known]
    assert np.mean(flagged) <= 0.2  # 5% on average; below 14.6% for 95 calibrations in a hundred
    for words in ("at most 5.0% would be on average, between 0.3% and 14.6%", "calibrated on 19 things, 76 images"):
        assert words in result.stdout
    assert "lie farther" not in result.stdout
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16), np.uint8)
    np.save(tmp_path / "noise.npy", noise)
    result = command("eval.py", "--ckpt", out / "best.pt", "--score", tmp_path / "noise.npy", "--fpr", 0.1)
    assert "40 of 40 images flagged" in result.stdout and "lie farther" in result.stdout
    for flags, words in ((("--fpr", 0.04), ["needs 24 things", "there are 19", "--fpr 0.05"]),
                         (("--confidence", 0.95), ["needs 59 things", "there are 19", "--fpr 0.1459"])):
        assert refused(command("eval.py", "--ckpt", out, "--score", new, *flags, check=False), *words)


def test_other_pictures_in_the_folder_are_refused(own_run, command, tmp_path):
    photos, out, _ = own_run
    training = [photos / row["file"] for row in rows(out / "groups.csv") if row["part"] == "train"]
    content = training[0].read_bytes()
    try:
        shutil.copy(training[-1], training[0])
        assert refused(command("eval.py", "--ckpt", out, check=False), "240 images", "not the 240", "trained")
        training[0].unlink()
        assert refused(command("eval.py", "--ckpt", out, check=False), "239 images", "not the 240", "trained")
    finally:
        training[0].write_bytes(content)


@pytest.mark.slow
def test_a_run_on_own_pictures_goes_on_where_it_stopped(own_run, command, tmp_path):
    arguments = (*OWN, own_run[0], "--iters", 1500, "--checkpoint-seconds", 0.02)
    command(*arguments, "--out", tmp_path / "whole")
    interrupted_run(arguments, tmp_path / "pieces", 4)
    for name in ("ckpt.pt", "best.pt"):
        whole, pieces = (checkpoint.load(tmp_path / run / name) for run in ("whole", "pieces"))
        assert whole["step"] == pieces["step"]
        assert all(torch.equal(whole["model"][key], pieces["model"][key]) for key in whole["model"])
        assert all(torch.equal(whole["split"][key], pieces["split"][key]) for key in ("group", "part"))


def test_folds_calibrate_on_all_things(command, tmp_path):
    photos, new = photographs(tmp_path / "photos", 12), photographs(tmp_path / "new", 6, 100)
    arguments = (*OWN, photos, "--iters", 20, "--folds", 3, "--out", tmp_path / "run")
    result = command(*arguments)
    assert [result.stdout.count(f"fold {k} of 3") for k in (1, 2, 3)] == [1, 1, 1]
    calibrating = [{row["group"] for row in rows(tmp_path / f"run/fold-{k}/groups.csv") if row["part"] == "test"}
                   for k in (1, 2, 3)]
    assert [len(groups) for groups in calibrating] == [4, 4, 4] and len(set.union(*calibrating)) == 12
    scored = command("eval.py", "--ckpt", tmp_path / "run", "--score", new, "--fpr", 0.08, "--out", tmp_path / "s")
    for words in ("calibrated on 12 things, 48 images", "is at most 34.8% (arXiv 1905.02928)"):
        assert words in scored.stdout
    p = np.array([float(row["p_value"]) for row in rows(tmp_path / "s" / "scores.csv")])
    assert len(p) == 24 and p.min() >= 1 / 13 - 1e-9 and p.max() <= 1
    assert refused(command("eval.py", "--ckpt", tmp_path / "run", check=False), "holds 3 folds", "fold-1")
    shutil.rmtree(tmp_path / "run" / "fold-2")
    assert refused(command("eval.py", "--ckpt", tmp_path / "run", "--score", new, check=False), "2 of 3 folds")
    assert "resuming" in command(*arguments, "--resume").stdout and (tmp_path / "run/fold-2/ckpt.pt").exists()
    assert refused(command(*OWN, photos, "--iters", 1, "--out", tmp_path / "run", check=False), "already holds a run")


def test_too_few_things_say_what_can_be_promised(command, tmp_path):
    photos = photographs(tmp_path / "photos", 12)
    result = command(*OWN, photos, "--iters", 1, "--out", tmp_path / "run")
    assert "too few to validate with" in result.stdout and "4 things can promise is 20.00%, not 5.00%" in result.stdout
    for n in range(2, 12):
        shutil.rmtree(photos / f"x{n}")
    assert refused(command(*OWN, photos, "--iters", 1, "--out", tmp_path / "two", check=False), "2 things", "none")
    command(*OWN, photos, "--iters", 1, "--group-by", "none", "--out", tmp_path / "none")


def test_named_sets_keep_their_own_test_part(command, tmp_path):
    for flags in (("--group-by", "none"), ("--folds", "2")):
        assert refused(command("run.py", *flags, "--out", tmp_path / "r", check=False), flags[0], "sprites")


def without(package, folder):
    """An environment in which `package` cannot be imported."""
    (folder / "hide").mkdir()
    (folder / "hide" / "sitecustomize.py").write_text(f"import sys\nsys.modules['{package}'] = None\n")
    return os.environ | {"PYTHONPATH": str(folder / "hide")}


@pytest.mark.parametrize("package", ["matplotlib", "PIL"])
def test_without_an_optional_package(command, tiny_run, tmp_path, package):
    environment, (out, _) = without(package, tmp_path), tiny_run
    result = command("eval.py", "--ckpt", out / "ckpt.pt", "--iw-samples", 1, "--max-images", 20, "--out",
                     tmp_path / "o", env=environment)
    assert ("no figures: pip install matplotlib" in result.stdout) == (package in ("matplotlib", "PIL"))  # it needs PIL
    if package == "PIL":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
        result = command("eval.py", "--ckpt", out / "ckpt.pt", "--score", tmp_path, check=False, env=environment)
        assert refused(result, "pip install Pillow\n")


@pytest.mark.parametrize("installed", [True, False])
def test_progress_on_a_terminal(tmp_path, installed):
    environment = os.environ.copy() if installed else without("tqdm", tmp_path)
    terminal, stderr = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    arguments = [sys.executable, *map(str, TINY), "--iters", "100", "--no-eval", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    if installed:
        os.set_blocking(terminal, False)
        assert "%|" in os.read(terminal, 2**16).decode(errors="replace") and "step 100/100" not in output
    else:
        assert "step 100/100" in output
    os.close(terminal)
    os.close(stderr)
