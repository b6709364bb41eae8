"""The parts of the training loop: batches, schedules, the loss and its gradient."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import run
from tests.conftest import ROOT
from vae_ood import UserError, checkpoint, evaluation, member, training
from vae_ood.bench import plain_loss
from vae_ood.data.images import Images, Rows, batch_indices, to_unit
from vae_ood.model import VAE
from vae_ood.scores import SCORES
from vae_ood.step import MIN_GAMMA, Training, default_precision, gamma_floor, learning_rate

SHAPE = (1, 8, 8)


def test_batches_are_shuffled_epochs_that_depend_on_seed_and_step_alone():
    n, size = 10, 4
    steps = [batch_indices(5, t, size, n) for t in range(10)]
    sequence = np.concatenate(steps)
    for epoch in range(4):
        assert sorted(sequence[n * epoch:n * epoch + n]) == list(range(n))
    assert not np.array_equal(sequence[:n], sequence[n:2 * n])
    for t in (7, 2, 0):  # in any order
        np.testing.assert_array_equal(batch_indices(5, t, size, n), steps[t])
    assert not np.array_equal(batch_indices(6, 0, size, n), steps[0])
    assert batch_indices(5, 0, size, 3).max() == 2  # of another data set
    assert len(batch_indices(0, 3, 25, n)) == 25  # a batch larger than the data


def test_schedules():
    args = SimpleNamespace(schedule="cosine", lr=0.1, iters=1000)
    rates = [learning_rate(t, args) for t in range(1000)]
    assert rates[0] == pytest.approx(0.1 / 20) and max(rates) > 0.099 and 0 < rates[-1] < 1e-5
    assert np.argmax(rates) in (19, 20) and all(np.diff(rates[20:]) < 0)
    assert learning_rate(0, SimpleNamespace(schedule="constant", lr=0.1)) == 0.1
    for iters, length in ((9000, 2000), (3000, 2000), (300, 200)):
        floors = [gamma_floor(t, SimpleNamespace(gamma="homotopy", iters=iters)) for t in range(iters)]
        bend = length * 5 // 14
        fast, slow = np.diff(np.log(floors[:bend])), np.diff(np.log(floors[bend + 1:length + 1]))
        assert floors[0] == 1
        np.testing.assert_allclose(fast, -14 / length)
        np.testing.assert_allclose(slow, -2 / (length * 9 / 14))
        np.testing.assert_allclose(floors[length:], math.exp(-7))
    assert gamma_floor(3, SimpleNamespace(gamma="optimal", iters=10)) == MIN_GAMMA


def tiny(device="cpu", **changes):
    """A `Training` on six random images, all of them in each step."""
    args = {"alpha": 0.1, "kappa": 3, "gamma": "optimal", "schedule": "constant", "iters": 100, "batch_size": 6,
            "lr": 1e-3, "seed": 0, "precision": "float32", "dequantize": False, "compile": False} | changes
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, *SHAPE), np.uint8))
    return Training(SimpleNamespace(**args), images, torch.device(device))


def plain_terms(one, step):
    """Of a step, in other words: squared error [B, C, H, W], KL [B, kappa], z, from the images and noise of `one`."""
    x, eps = one.batches(step)
    mu, log_sigma = one.model.encode(x)
    z = mu + log_sigma.exp() * eps
    error = (to_unit(x) - one.model.decode(z).sigmoid()).square()
    return error, 0.5 * (mu**2 + (2 * log_sigma).exp() - 1 - 2 * log_sigma), z


def test_optimal_gamma_has_the_value_and_gradient_of_the_profiled_loss():
    one = tiny()
    loss, mse, gamma, kl, _ = one.backward(*one.prepare(0))
    error, divergence, _ = plain_terms(one, 0)
    profiled = 0.5 * math.prod(SHAPE) * torch.log(2 * math.pi * math.e * error.mean()) + divergence.sum(1).mean()
    torch.testing.assert_close((loss, mse, gamma), (profiled.detach(), error.mean().detach(), error.mean().detach()))
    torch.testing.assert_close(kl, divergence.detach())
    for ours, theirs in zip(one.trained, torch.autograd.grad(profiled, one.trained), strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-5)


def test_floor_bounds_gamma_from_below():
    one = tiny(gamma="homotopy")
    _, mse, gamma, _, _ = one.backward(*one.prepare(0))
    assert gamma.item() == 1 and mse < 1


def test_learned_gamma_has_its_minimum_at_the_mse():
    one = tiny(gamma="learn")
    mse = one.backward(*one.prepare(0)).mse
    with torch.no_grad():
        one.model.log_gamma.copy_(mse.log())
    gamma = one.backward(*one.prepare(0)).gamma
    assert gamma == pytest.approx(mse.item())
    assert one.model.log_gamma.grad.item() == pytest.approx(0, abs=1e-4)


def test_the_logged_gradient_at_z_is_that_of_each_image_s_own_loss():
    one = tiny(gamma=0.05)
    ours = one.backward(*one.prepare(0)).probe.grad.norm(dim=1).sum()
    error, _, z = plain_terms(one, 0)
    gradient, = torch.autograd.grad(error.sum() / (2 * 0.05), z)
    torch.testing.assert_close(ours, gradient.norm(dim=1).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", ["learn", "homotopy", 0.05])
def test_twenty_steps_are_those_of_the_plain_formulation(gamma):
    """Channels-last memory, the sub-pixel layer, in-place activations and the fused optimiser change no result."""
    one, plain = tiny(gamma=gamma), tiny(gamma=gamma)
    optimizer = torch.optim.Adam(plain.trained, lr=1e-3, foreach=False)
    plain.model.to(memory_format=torch.contiguous_format)
    for step in range(20):
        one.step(step)
        x, eps = plain.batches(step)
        if gamma == "homotopy":
            with torch.no_grad():
                error = plain_terms(plain, step)[0].mean()
                plain.model.log_gamma.copy_(error.clamp(min=gamma_floor(step, plain.args)).log())
        optimizer.zero_grad()
        plain_loss(plain.model, to_unit(x), eps).backward()
        optimizer.step()
    for ours, theirs in zip(one.trained, plain.trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("has", "recipe", "alpha", "device", "precision"), [
    ("avx512_bf16", "fast", 1, "cpu", "bfloat16"), ("amx_bf16", "fast", 4, "cpu", "bfloat16"),
    ("avx512_f", "fast", 1, "cpu", "float32"), ("avx512_bf16", "paper", 1, "cpu", "float32"),
    ("avx512_bf16", "fast", 0.5, "cpu", "float32"), ("avx512_bf16", "fast", 1, "cuda", "float32")])
def test_bfloat16_is_chosen_where_it_gains(monkeypatch, has, recipe, alpha, device, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    assert default_precision(SimpleNamespace(recipe=recipe, alpha=alpha), torch.device(device)) == precision


def test_a_step_imports_no_compiler():
    """It would take a second of each command."""
    code = "import sys; from tests.test_run import tiny; tiny().step(0); sys.exit('torch._dynamo' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode


class Count(TorchDispatchMode):
    """Counts the operators but those that only look at memory in another way."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.n += not (function.is_view or function.namespace == "profiler" or "detach" in str(function))
        return result


def test_a_captured_step_asks_little_of_the_host():
    """To take its inputs, which have come for 50 steps at once, to start it, and to copy the loss."""
    one, sent = tiny(gamma="homotopy"), []
    send, one.batches.to_device = one.batches.to_device, lambda values: sent.append(len(values)) or send(values)
    inputs, terms = one.prepare(2), one.step(2)
    one.inputs, one.terms, one.graph = [value.clone() for value in inputs], terms, SimpleNamespace(replay=list)
    one.graphed, one.lr = True, torch.tensor(0.0)
    with Count() as captured:
        found = one.step(3)
    assert captured.n <= 8
    assert torch.equal(one.inputs[0], one.batches(3)[0]) and torch.equal(one.inputs[1], one.batches(3)[1])
    assert found.loss == terms.loss and found.loss is not terms.loss
    assert one.lr == pytest.approx(1e-3) and one.floor == pytest.approx(gamma_floor(3, one.args))
    for step in range(4, 100):
        one.batches(step)
    assert sent == [50, 50, 48, 48]


def test_each_step_has_its_own_images_and_noise_wherever_a_run_begins():
    one, other = tiny(), tiny()
    for step in (0, 49, 50, 99):
        ours, theirs = one.batches(step), (tiny() if step == 49 else other).batches(step)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(one.batches(3)[1], one.batches(4)[1])


def options(**more):
    return SimpleNamespace(**{
        "data": "x", "sprite_factors": 4, "skip_bad": False, "dequantize": False, "alpha": 0.1, "kappa": 2,
        "gamma": "optimal", "schedule": "constant", "batch_size": 4, "lr": 1e-3, "seed": 0, "precision": "float32",
        "compile": False, "checkpoint_seconds": 60, "keep": 1, "keep_at": [], "recipe": "fast"} | more)


def test_images_that_are_mapped_from_a_file_train_alike(tmp_path):
    images, results = torch.randint(256, (40, *SHAPE), dtype=torch.uint8), []
    order = torch.randperm(40)
    for some in (images[order], Rows(images, order)):
        args = options(iters=5)
        model, config = training.train(args, some, tmp_path, torch.device("cpu"), None, some)
        results.append((model.state_dict(), config))
        (tmp_path / "ckpt.pt").unlink()
    (ours, config), (theirs, other) = results
    assert config == other and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_goes_on_with_its_own_size(tmp_path):
    """One from before there was --size has no key of that name: its pictures are taken as they are."""
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (3, 70, 90), np.uint8)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    asked = {"data": str(tmp_path), "skip_bad": False, "range": None, "folds": 1, "cache": None, "crop": None,
             "tile": None}
    for name, config, expected in (("old", {}, (70, 90)), ("new", {"size": [8, 9], "crop": "pad"}, (8, 9))):
        out = tmp_path / name
        out.mkdir()
        checkpoint.save(out / "ckpt.pt", torch.nn.Linear(1, 1).state_dict(), {}, 1, config)
        args = SimpleNamespace(**asked, size=None, resume=True)
        assert run.read(args, out).pixels.shape[2:] == expected
        assert (args.size, args.crop) == (config.get("size"), config.get("crop"))
        with pytest.raises(UserError, match="as they are" if name == "old" else "--size 8x9 --crop pad"):
            run.read(SimpleNamespace(**asked, size=[9, 8], resume=True), out)
    args = SimpleNamespace(**asked, size=None, resume=False)
    assert run.read(args, out).pixels.shape[2:] == (64, 64) and (args.size, args.crop) == ([64, 64], "centre")


def test_a_training_of_hours_says_what_makes_it_shorter(tmp_path, monkeypatch, capsys):
    args = options(iters=1, recipe="paper")
    for seconds, said in ((3600, 0), (3601, 1)):
        monkeypatch.setattr(training.Training, "warm_up", lambda run, step, seconds=seconds: seconds)
        (tmp_path / str(said)).mkdir()
        training.train(args, torch.randint(256, (20, *SHAPE), dtype=torch.uint8), tmp_path / str(said),
                       torch.device("cpu"))
        lines = capsys.readouterr().out.splitlines()
        assert ("shorter with a GPU, --recipe fast, a smaller --alpha or --iters" in lines) == bool(said)


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    args = options(iters=200, checkpoint_seconds=0)
    images = torch.randint(256, (20, *SHAPE), dtype=torch.uint8)
    monkeypatch.setattr("vae_ood.step.learning_rate", lambda step, args: 1e-3 if step < 60 else math.inf)
    with pytest.raises(UserError, match=r"training diverged: .* at step 61; .*ckpt\.pt keeps the last good state"):
        training.train(args, images, tmp_path, torch.device("cpu"))
    state = checkpoint.load(tmp_path / "ckpt.pt")
    assert state["step"] == 60 and all(p.isfinite().all() for p in state["model"].values())


@pytest.mark.parametrize(("alpha", "device", "limit"), [(1, "cpu", None), (4, "cpu", 700), (4, "cuda", None)])
def test_a_large_model_is_evaluated_on_fewer_images_on_a_cpu(alpha, device, limit):
    args = SimpleNamespace(max_images=None, iw_samples=16)
    evaluation.limit_images(args, (3, 32, 32), alpha, 32, torch.device(device))
    assert args.max_images == limit
    args.max_images = None
    evaluation.limit_images(args, (3, 32, 32), alpha, 32, torch.device(device), images=30_000, samples=1)
    assert args.max_images == (limit and 11_700)  # of 850 MFLOP each
    args.max_images = 5
    evaluation.limit_images(args, (3, 32, 32), alpha, 32, torch.device(device))
    assert args.max_images == 5


@pytest.mark.parametrize(("limit", "evaluated", "fitted"), [(None, 20, 30), (9, 9, 9)])
def test_scores_are_fitted_to_more_training_images_than_are_evaluated(tmp_path, monkeypatch, limit, evaluated, fitted):
    for module in (evaluation, member):
        monkeypatch.setattr(module, "TRAIN_IMAGES", 20)
    monkeypatch.setattr(evaluation, "FIT_IMAGES", 30)
    seen = []
    monkeypatch.setitem(evaluation.SCORES, "typicality", SimpleNamespace(
        control=False, fit=lambda train, unseen: seen.append(train["mu"]) or SCORES["nll"].fit(train)))
    args = SimpleNamespace(max_images=limit, iw_samples=2, scores=["typicality", "joint"], data_root=None,
                           skip_bad=False)
    config = {"data": "sprites", "sprite_factors": 4, "skip_bad": False, "shape": [1, 32, 32], "seed": 0, "kappa": 3,
              "alpha": 0.05, "dequantize": False}
    sets = evaluation.load_inliers(config, args)
    sets["test"] = sets["noise"] = sets["test"].first(15)
    model = VAE((1, 32, 32), 0.05, 3).eval().requires_grad_(False)
    evaluation.evaluate(model, config, sets, args, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(seen[0]) == metrics["fit_images"] == fitted and metrics["sets"]["train"]["n"] == evaluated
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert sum(row.startswith("train,") for row in rows) == evaluated


def test_a_density_narrower_than_a_level_has_its_likelihood_in_nats_alone(tmp_path, capsys):
    args = SimpleNamespace(data="x", sprite_factors=4, skip_bad=False, dequantize=False, alpha=0.1, kappa=2, gamma=1e-6,
                           schedule="constant", iters=2, batch_size=4, lr=1e-3, seed=0, precision="float32",
                           compile=False, checkpoint_seconds=99, keep=1, keep_at=[], recipe="fast", iw_samples=1,
                           max_images=None, scores=["nll"])
    images = torch.randint(256, (20, *SHAPE), dtype=torch.uint8)
    model, config = training.train(args, images, tmp_path, torch.device("cpu"))
    assert [json.loads(line)["bpd"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [None, None]
    sets = {name: Images(name, images) for name in ("train", "test", "noise")}
    evaluation.evaluate(model, config, sets, args, tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"^test +20 +\u2013 +\u2013 ", printed, re.MULTILINE) and "no code length" in printed
    row = json.loads((tmp_path / "metrics.json").read_text())["sets"]["test"]
    assert row["bpd"] is row["bpd_iw"] is None and row["nll"] > 0
    assert (tmp_path / "nll_histogram.png").stat().st_size > 5000


def test_an_older_best_pt_stays_the_best(tmp_path):
    images = torch.randint(256, (6, *SHAPE), dtype=torch.uint8)
    args = SimpleNamespace(iters=100)
    weights = VAE(SHAPE, 0.1, 2).state_dict()
    checkpoint.save_weights(tmp_path / "best.pt", weights, 50, {}, validation_bpd=6.5)
    winner = training.Winner(args, images, tmp_path / "best.pt")
    winner.resume(100)
    assert winner.step == 50 and winner.nll == pytest.approx(-1.5 * 64 * math.log(2)) and winner.weights
    winner = training.Winner(args, images, tmp_path / "best.pt")
    winner.resume(20)  # of a state before it
    assert winner.step == 0 and winner.weights is None
