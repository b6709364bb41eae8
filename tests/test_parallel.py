"""Several workers, as torchrun starts them: the same results as one, and through faults."""

import csv
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import run
from tests.conftest import ROOT
from vae_ood import UserError, checkpoint, parallel
from vae_ood.data.cache import read_own
from vae_ood.data.images import Images, Rows

SMALL = ("run.py", "--alpha", 0.1, "--batch-size", 50, "--gamma", "optimal", "--lr", 1e-4, "--no-compile")


def torchrun(workers, *arguments, max_restarts=0, static=False):
    """A started torchrun on this machine, standalone or with static rendezvous, under which a launch has no number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rendezvous = ["--rdzv-backend", "static", "--master-port", port] if static else ["--standalone"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(workers),
         "--max-restarts", str(max_restarts), "--monitor-interval", "0.1", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})  # more workers than GPUs


def finished(process):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def children(process):
    """The process numbers of the workers, by rank."""
    found = {}
    for folder in os.listdir("/proc"):
        try:
            if folder.isdigit() and f"\nPPid:\t{process.pid}\n" in Path(f"/proc/{folder}/status").read_text():
                environment = Path(f"/proc/{folder}/environ").read_text().split("\0")
                found[next(int(e[5:]) for e in environment if e.startswith("RANK="))] = int(folder)
        except (OSError, StopIteration):  # it has just ended
            pass
    return found


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_parameters(a, b):
    a, b = (checkpoint.load(out / "ckpt.pt")["model"] for out in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


def same_losses(a, b):
    return np.allclose([r["loss"] for r in log(a)], [r["loss"] for r in log(b)], rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 50])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_parts_are_the_whole(monkeypatch, workers, n):
    monkeypatch.setattr(parallel, "WORLD", workers)
    rows = []
    for rank in range(workers):
        monkeypatch.setattr(parallel, "RANK", rank)
        rows.append(list(range(n))[parallel.part(n)])
    assert list(chain(*rows)) == list(range(n))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    finished(torchrun(1, *SMALL, "--iters", 200, "--dequantize", "--iw-samples", 2, "--max-images", 301, "--outliers",
                      "noise", "--out", out))
    return out


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same(one_worker, tmp_path, workers):
    """50 images a step and 301 a set cannot be shared equally. The losses agree to the order of summation, and a
    checkpoint's evaluation in every count, and to 1e-6 in every value."""
    out, again = tmp_path / "run", tmp_path / "again"
    finished(torchrun(workers, *SMALL, "--iters", 200, "--dequantize", "--iw-samples", 1, "--max-images", 50,
                      "--scores", "nll", "--outliers", "noise", "--out", out))
    assert same_losses(one_worker, out)
    for key in ("mse", "gamma", "kl", "grad_norm", "grad_z_norm"):
        np.testing.assert_allclose([r[key] for r in log(out)], [r[key] for r in log(one_worker)], rtol=1e-2)
    finished(torchrun(workers, "eval.py", "--ckpt", one_worker / "ckpt.pt", "--iw-samples", 2, "--max-images", 301,
                      "--outliers", "noise", "--out", again))
    one, many = (json.loads((folder / "metrics.json").read_text()) for folder in (one_worker, again))

    def compare(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, float):
            assert b == pytest.approx(a, rel=1e-6, abs=1e-6)
        elif isinstance(a, list):
            for one, other in zip(a, b, strict=True):
                compare(one, other)
        else:
            assert a == b
    compare(one, many)
    tables = []
    for folder in (one_worker, again):
        with open(folder / "scores.csv") as file:
            tables.append([tuple(row.values()) for row in csv.DictReader(file)])
    assert [row[:2] for row in tables[0]] == [row[:2] for row in tables[1]] and len(tables[0]) == 3 * 301
    np.testing.assert_allclose(*(np.array([row[2:] for row in table], float) for table in tables), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--recipe", "paper"), ("--gamma", "homotopy", "--lr", 1e-4)])
def test_other_kinds_of_gamma_with_three_workers(tmp_path, arguments):
    for workers in (1, 3):
        finished(torchrun(workers, "run.py", "--iters", 200, "--no-compile", "--no-eval", *arguments, "--out",
                          tmp_path / str(workers)))
    assert same_losses(tmp_path / "1", tmp_path / "3")


def test_workers_need_an_image_of_each_step(monkeypatch):
    monkeypatch.setattr(run, "WORLD", 3)
    with pytest.raises(UserError, match="each of the 3 workers needs an image"):
        run.main(SimpleNamespace(scores=["nll"], device="cpu", batch_size=2, tile=None))


def test_workers_share_one_file_of_pictures(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 20, 30, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[:20 - i % 3]).save(tmp_path / "photos" / f"{i}.png")
    output = finished(torchrun(2, *SMALL, "--data", tmp_path / "photos", "--group-by", "none", "--no-eval", "--iters",
                               2, "--size", 16, "--cache", tmp_path / "cache", "--out", tmp_path / "run"))
    file, = (tmp_path / "cache").glob("*.npy")
    assert f"40 pictures of 3x16x16: 31 kB in {file}" in output and len(list((tmp_path / "cache").iterdir())) == 2
    shared, *_ = read_own(tmp_path / "photos", tmp_path / "cache", size=(16, 16))
    assert isinstance(shared.pixels, Rows) and torch.equal(shared.pixels[:], read_own(
        tmp_path / "photos", size=(16, 16))[0].pixels)


@pytest.mark.slow
def test_restarts_do_not_go_on_with_a_run_of_another_launch(one_worker):
    process = torchrun(1, *SMALL, "--iters", 200, "--dequantize", "--no-eval", "--out", one_worker, max_restarts=1)
    output, _ = process.communicate(timeout=100)
    assert process.returncode and output.count("already holds a run: add --resume") == 2


def test_workers_with_different_images_are_refused(monkeypatch):
    one, other = (Images("a", torch.full((2, 1, 4, 4), value, dtype=torch.uint8)) for value in (1, 2))
    numbers = []
    monkeypatch.setattr(parallel, "WORLD", 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda ends, how: numbers.append(ends.clone()))
    for sets in ({"train": one}, {"train": one}, {"train": other}, {"test": one}, {"train": one.first(1)}):
        parallel.agree(sets, [0.1])
    parallel.agree({"train": one}, [0.2])
    assert torch.equal(numbers[0], numbers[1]) and len({n[0].item() for n in numbers}) == 5
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda ends, how: ends.copy_(torch.maximum(*numbers[1:3])))
    with pytest.raises(UserError, match="do not have the same images"):
        parallel.agree({"train": one}, [0.1])


@pytest.mark.slow
def test_compiled_workers_give_the_same(tmp_path):
    arguments = ("run.py", "--alpha", 1, "--iters", 50, "--gamma", "optimal", "--lr", 1e-4, "--no-eval")
    finished(torchrun(1, *arguments, "--no-compile", "--out", tmp_path / "a"))
    finished(torchrun(2, *arguments, "--compile", "--out", tmp_path / "b"))
    assert same_losses(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_another_number_of_workers_goes_on(one_worker, tmp_path):
    arguments = (*SMALL, "--iters", 200, "--dequantize", "--no-eval", "--out", tmp_path / "run")
    process = torchrun(3, *arguments)
    while not (tmp_path / "run/log.jsonl").exists() or len(log(tmp_path / "run")) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode and "is saved in" in output
    assert 50 <= checkpoint.load(tmp_path / "run/ckpt.pt")["step"] < 200
    assert "resuming" in finished(torchrun(2, *arguments, "--resume"))
    assert same_losses(one_worker, tmp_path / "run")


def disturbed(out, arguments, workers, number, faults, seed, max_restarts, static=False):
    """A run whose workers get the signal `number` at random moments, one of them at a time."""
    rng, ckpt = random.Random(seed), out / "ckpt.pt"
    process = torchrun(workers, *arguments, "--out", out, max_restarts=max_restarts, static=static)
    seen = None
    for _ in range(faults):
        while not ckpt.exists() or ckpt.stat().st_mtime_ns == seen:  # it has gone on
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        seen = ckpt.stat().st_mtime_ns
        os.kill(children(process)[rng.randrange(workers)], number)
    return finished(process)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "faults", "static"), [(2, 1, False), (2, 1, True), (3, 10, False)])
def test_workers_that_are_killed_change_nothing(tmp_path, workers, faults, static):
    arguments = (*SMALL, "--iters", 200 * faults, "--no-eval", "--checkpoint-seconds", 0.1)
    finished(torchrun(workers, *arguments, "--out", tmp_path / "whole"))
    output = disturbed(tmp_path / "pieces", arguments, workers, signal.SIGKILL, faults, faults, max_restarts=faults,
                       static=static)
    assert output.count("resuming") == faults
    assert same_parameters(tmp_path / "whole", tmp_path / "pieces")
    assert [r["step"] for r in log(tmp_path / "pieces")] == [r["step"] for r in log(tmp_path / "whole")]


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(tmp_path):
    arguments = (*SMALL, "--iters", 400, "--no-eval", "--checkpoint-seconds", 0.1, "--timeout", 5)
    finished(torchrun(2, *arguments, "--out", tmp_path / "whole"))
    started = time.monotonic()
    assert "resuming" in disturbed(tmp_path / "pieces", arguments, 2, signal.SIGSTOP, 1, 0, max_restarts=1)
    assert time.monotonic() - started < 100  # torchrun waits for 30 s before it kills what does not end
    assert same_parameters(tmp_path / "whole", tmp_path / "pieces")


@pytest.fixture
def two_nodes():
    """Two network namespaces with a cable between them, as prefixes of a command; the disk is shared."""
    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True)

    if shutil.which("ip") is None or ip("netns", "add", "vae-ood-1").returncode:
        pytest.skip("needs root and iproute2, to make network namespaces")
    try:
        ip("netns", "add", "vae-ood-2")
        ip("link", "add", "vae-ood-1", "netns", "vae-ood-1", "type", "veth", "peer", "vae-ood-2", "netns", "vae-ood-2")
        for node in ("1", "2"):
            inside = ("-n", f"vae-ood-{node}")
            ip(*inside, "addr", "add", f"10.77.0.{node}/24", "dev", f"vae-ood-{node}")
            for device in ("lo", f"vae-ood-{node}"):
                assert ip(*inside, "link", "set", device, "up").returncode == 0
        yield [("ip", "netns", "exec", f"vae-ood-{node}", "env", f"GLOO_SOCKET_IFNAME=vae-ood-{node}",
                "OMP_NUM_THREADS=1") for node in (1, 2)]
    finally:
        for node in ("1", "2"):
            ip("netns", "del", f"vae-ood-{node}")


@pytest.mark.slow
def test_two_nodes_and_the_loss_of_a_worker(one_worker, two_nodes, tmp_path):
    out = tmp_path / "run"
    nodes = [subprocess.Popen(
        [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "test", "--max-restarts", "3",
         "--local-addr", f"10.77.0.{number}", "--rdzv-conf", f"is_host={number == 1}",  # no names are known here
         "--monitor-interval", "0.1", *map(str, SMALL), "--iters", "200", "--dequantize", "--no-eval", "--timeout",
         "20", "--checkpoint-seconds", "0.1", "--resume", "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number, prefix in enumerate(two_nodes, 1)]
    try:
        while not (out / "ckpt.pt").exists():
            assert not any(node.poll() for node in nodes), [node.communicate()[0] for node in nodes]
            time.sleep(0.01)
        os.kill(next(iter(children(nodes[1]).values())), signal.SIGKILL)
        outputs = [finished(node) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert "resuming" in "".join(outputs)
    assert same_losses(one_worker, out)
