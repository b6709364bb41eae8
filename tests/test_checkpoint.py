"""Saving is atomic and loading is safe."""

import copy
import errno
import fcntl
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from vae_ood import UserError, checkpoint
from vae_ood.cli import lock
from vae_ood.model import VAE
from vae_ood.step import Adam

MODEL = {"shape": [1, 8, 8], "alpha": 0.1, "kappa": 2}
CONFIG = MODEL | {"data": "mnist", "sprite_factors": 4, "skip_bad": False, "dequantize": False, "seed": 0}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture
def saved(tmp_path):
    model = VAE(**MODEL)
    optimizer = Adam(trained(model), 1e-3)
    checkpoint.save(tmp_path / "ckpt.pt", model.state_dict(), optimizer.state_dict(), 7, CONFIG, 1.5)
    return tmp_path / "ckpt.pt", model, optimizer


def test_what_is_saved_is_loaded(saved):
    path, model, _ = saved
    loaded, config, split = checkpoint.load_model(path)
    assert config == CONFIG and split is None and checkpoint.load(path)["step"] == 7
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_copy_is_of_the_state_then(saved):
    _, model, optimizer = saved
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    states = [model.state_dict(), optimizer.state_dict()]
    copies, before = checkpoint.copied(states), copy.deepcopy(states)
    optimizer.step()
    for copied, old, now in zip(*(torch.utils._pytree.tree_leaves(one) for one in (copies, before, states)),
                                strict=True):
        assert copied is None or (torch.equal(copied, old) and copied.stride() == now.stride()
                                  if isinstance(old, torch.Tensor) else copied == old)


def test_adam_goes_on_from_torch_s_own_state(saved):
    path, model, ours = saved
    copied = copy.deepcopy(model)
    theirs = torch.optim.Adam(trained(copied), fused=True)
    for step in range(3):
        for one in (copied, model) if step == 2 else (copied,):
            sum(p.sin().sum() for p in one.parameters()).backward()
        if step == 2:
            ours.step()
        theirs.step()
        theirs.zero_grad()
        if step == 1:
            checkpoint.save(path, copied.state_dict(), theirs.state_dict(), 2, CONFIG)
            assert checkpoint.resume(path, CONFIG, model, ours)[0] == 2
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="shapes"):
        ours.load_state_dict({"state": {i: {"step": torch.zeros(2)} for i in range(len(ours.params))}})
    with pytest.raises(KeyError):
        ours.load_state_dict({"state": {0: ours.state[0]}})


def test_precision_was_once_called_amp(saved):
    path, model, optimizer = saved
    for amp, precision in ((True, "bfloat16"), (False, "float32")):
        checkpoint.save(path, model.state_dict(), optimizer.state_dict(), 7, CONFIG | {"amp": amp})
        assert checkpoint.load(path)["config"] == CONFIG | {"precision": precision}


def test_full_disk_keeps_the_checkpoint_before(saved, monkeypatch):
    path, model, optimizer = saved
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*the one saved before is kept"):
        checkpoint.save(path, model.state_dict(), optimizer.state_dict(), 8, CONFIG)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["ckpt.pt"]


def test_many_writers_of_one_file(tmp_path):
    """Each finds the file whole, whoever writes it, and none fails."""
    contents = [bytes([i]) * 200_000 for i in range(4)]

    def write(content):
        for _ in range(25):
            checkpoint.write_atomic(tmp_path / "file", content)
            assert (tmp_path / "file").read_bytes() in contents

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_held_by_one_alone(tmp_path):
    held = []

    def hold(_):
        with lock(tmp_path, wait=True):
            held.append(1)
            assert sum(held) == 1
            time.sleep(0.002)
            held.append(-1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, range(40)))
    assert len(held) == 80 and not os.listdir(tmp_path)
    with lock(tmp_path, wait=True), pytest.raises(BlockingIOError), lock(tmp_path, wait=False):
        pass


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path, wait=False):
        assert "no locks on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cifar10_a0.25_k32_fast_i10000_s0", "cifar10_a0.5_k32_fast_i10000_s0"])
def test_the_shipped_checkpoints_load(name):
    """Their weights are float16."""
    model, config, _ = checkpoint.load_model(ROOT / "results/runs" / name / "ckpt.pt")
    assert config["data"] == "cifar10" and {p.dtype for p in model.parameters()} == {torch.float32}
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert all(value.isfinite().all() for value in model.encode(images))
    with pytest.raises(UserError, match="weights alone, to evaluate and not to go on with"):
        checkpoint.resume(ROOT / "results/runs" / name / "ckpt.pt", {}, model, Adam(trained(model), 1e-3))


@pytest.fixture
def two(tmp_path):
    """Two checkpoints, of steps 7 and 9, and what the newer one holds."""
    model = VAE(**MODEL)
    optimizer = Adam(trained(model), 1e-3)
    for step, before in ((2, None), (7, 2), (9, 7)):
        checkpoint.save(tmp_path / "ckpt.pt", model.state_dict(), optimizer.state_dict(), step, CONFIG, before=before,
                        keep=2)
    return tmp_path / "ckpt.pt", (tmp_path / "ckpt.pt").read_bytes()


def test_as_many_checkpoints_are_kept_as_asked(two):
    path, _ = two
    assert sorted(os.listdir(path.parent)) == ["ckpt-7.pt", "ckpt.pt"]
    assert checkpoint.load(path)["step"] == 9 and checkpoint.load(path.with_name("ckpt-7.pt"))["step"] == 7
    model = VAE(**MODEL)
    optimizer = Adam(trained(model), 1e-3)
    states = model.state_dict(), optimizer.state_dict()
    checkpoint.save(path, *states, 8, CONFIG, before=None, keep=2)  # 9 was damaged, 7 was resumed
    assert sorted(os.listdir(path.parent)) == ["ckpt-7.pt", "ckpt.pt"]
    checkpoint.save(path, *states, 11, CONFIG, before=8, keep=1)
    assert os.listdir(path.parent) == ["ckpt.pt"]


def test_a_checkpoint_cut_off_at_any_kilobyte_gives_way_to_the_one_before(two):
    path, content = two
    assert checkpoint.load_newest(path)[0]["step"] == 9
    for size in (*range(0, len(content), 1024), len(content) - 1):
        path.write_bytes(content[:size])
        state, notes = checkpoint.load_newest(path)
        assert state["step"] == 7 and len(notes) == 1 and "ckpt.pt is not a checkpoint" in notes[0]
    path.unlink()  # a kill between the two renames of a save
    assert checkpoint.load_newest(path)[0]["step"] == 7
    path.with_name("ckpt-7.pt").write_bytes(b"")
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.load_newest(path)


def test_a_flipped_bit_in_a_tensor_is_noticed(two):
    path, content = two
    values = checkpoint.load(path)["model"]["expand.weight"].numpy().tobytes()
    for place in np.random.default_rng(0).integers(0, len(values), 20) + content.index(values):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:])
        state, notes = checkpoint.load_newest(path)
        assert state["step"] == 7 and notes


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_malicious_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"version": 1, "model": Malicious()}, "ckpt.pt")
    with pytest.raises(UserError, match=r"asks to run code.*nothing in it was executed"):
        checkpoint.load("ckpt.pt")
    assert os.listdir() == ["ckpt.pt"]


def test_files_that_are_no_checkpoint(saved, tmp_path):
    path, _, _ = saved
    content = path.read_bytes()
    foreign = (b"", b"hello", b"not a checkpoint at all", b"\x89PNG\r\n\x1a\n" + bytes(50))
    for bad in (*foreign, content[:1000], content[:len(content) // 2], content[:-1]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"ckpt\.pt is not a checkpoint of run\.py \(foreign or damaged\)"):
            checkpoint.load(path)
    for foreign in (torch.zeros(3), {"state_dict": {}}, [1], {"version": 1}):
        torch.save(foreign, path)
        with pytest.raises(UserError, match=r"ckpt\.pt is not a checkpoint"):
            checkpoint.load(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "missing.pt")


@pytest.mark.parametrize(("change", "message"), [
    ({"version": 2, "model": None}, "newer vae-ood"),
    ({"version": "x"}, "not a checkpoint"),
    ({"model": {}}, "tensors do not fit"),
    ({"config": {}}, "settings are unusable"),
    ({"config": CONFIG | {"kappa": 3}}, "tensors do not fit"),
    ({"config": CONFIG | {"alpha": "wide"}}, "settings are unusable"),
    ({"config": CONFIG | {"data": None}}, "settings are unusable"),
    ({"config": MODEL}, "settings are unusable"),
    ({"split": {"group": torch.arange(3), "part": torch.zeros(4), "crc32": 1}}, "groups are unusable"),
    ({"split": {"group": torch.arange(3, dtype=torch.int32), "part": torch.tensor([0, 1, 3], dtype=torch.uint8),
                "crc32": 1}}, "groups are unusable"),
    ({"split": 3}, "groups are unusable"),
    ({"model": {"mu.bias": torch.tensor([1.0, math.nan])}}, "not finite"),
    ({"model": {"mu.bias": 3}}, "mu.bias is no tensor"),
])
def test_tampered_checkpoints(saved, change, message):
    path, _, _ = saved
    torch.save(checkpoint.load(path) | change, path)
    with pytest.raises(UserError, match=message):
        checkpoint.load_model(path)
