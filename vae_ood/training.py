"""The training of one VAE, from top to bottom: the schedules, a step, the weights that win on validation images, and
the loop, which resumes, checkpoints and stops."""

import json
import math
import signal
import time
from contextlib import nullcontext
from threading import current_thread, main_thread

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vae_ood import UserError, checkpoint
from vae_ood.cli import RANK, WORLD, Progress, duration, out_of_memory
from vae_ood.data.images import TRAINING, generator, to_unit
from vae_ood.data.likeness import set_digest
from vae_ood.data.tiles import Tiles, of_step
from vae_ood.kernels.iw_nll import gaussian_log_likelihood, log_normal
from vae_ood.kernels.reparameterize import reparameterize
from vae_ood.likelihood import bits_per_dim, evaluate
from vae_ood.metrics import ACTIVE_NATS
from vae_ood.model import VAE
from vae_ood.parallel import any_worker, crc32, from_first, part, total

CONFIG = ("data", "sprite_factors", "skip_bad", "dequantize", "alpha", "kappa", "gamma", "schedule", "iters",
          "batch_size", "lr", "seed", "amp")  # what determines the result; a resumed run must agree in all of it
OWN = ("group_by", "folds", "range", "size", "crop", "tile", "cache")  # of own pictures; the last determines nothing
LOG_EVERY = 50  # steps
VALIDATED = 1_000  # images, a hundred times in a run: some twentieth of its time
GAMMA_IMAGES = 10_000  # training images whose MSE is the gamma of a finished `optimal` or `homotopy` run
MIN_GAMMA = 1e-10  # images that are reconstructed exactly have no finite log-likelihood
HOMOTOPY = (0, 5000 / 7, 2000), (0, -5, -7)  # steps, log of the floor: slower where weak factors of the data join in


def learning_rate(step, args):
    """Constant; or a linear warm-up over 2% of the steps, then a cosine to 0."""
    if args.schedule == "constant":
        return args.lr
    warm_up = max(1, args.iters // 50)
    return args.lr * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / args.iters))


def gamma_floor(step, args):
    """Homotopy: gamma = max(MSE of the batch, floor), the floor falling log-linearly from 1 to e^-5 in 714 steps, then
    to e^-7 by step 2,000 (in proportion where there are fewer than 3,000 steps); `optimal` has no floor."""
    if args.gamma != "homotopy":
        return MIN_GAMMA
    return math.exp(np.interp(step * max(1, 3000 / args.iters), *HOMOTOPY))


class Objective(nn.Module):
    """The terms of the negative ELBO of each image, as a module, which DistributedDataParallel asks for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, eps, probe, amp):
        """x [B, C, H, W], uint8 or in [0, 1]; eps and probe [B, kappa] -> KL [B, kappa] and log p(x|z) [B] in nats,
        squared error [B]. The probe is zero and its gradient is dL/dz."""
        model = self.model
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            mu, log_sigma = (t.float() for t in model.encode(x))
            z, kl = reparameterize(mu, log_sigma, eps, per_dim=True)
            decoded = model.decode(z + probe)
        return kl, *gaussian_log_likelihood(x, decoded, model.log_gamma, model.logits, True)


class Training:
    """A model, its optimiser, and the images [N, C, H, W], uint8, of which each step takes some.

    A step's images and noise are drawn for the whole batch and depend on (seed, step) alone, so a resumed run repeats
    them; each worker takes its slice. What `backward` gives are the worker's shares: their sums over the workers are
    those of the batch.
    """

    def __init__(self, args, images, device):
        self.args, self.device, self.images = args, device, images.to(device)
        self.profiled = args.gamma in ("optimal", "homotopy")
        self.compiled = device.type == "cuda" if args.compile is None else args.compile
        torch.manual_seed(args.seed)
        gamma = 1.0 if self.profiled or args.gamma == "learn" else args.gamma
        self.model = VAE(images.shape[1:], args.alpha, args.kappa, gamma, learn_gamma=args.gamma == "learn").to(
            device, memory_format=torch.channels_last)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=args.lr, fused=True)
        objective = Objective(self.model)
        if WORLD > 1:  # it averages the gradients over the workers while the backward pass goes on
            objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        self.objective = torch.compile(objective) if self.compiled else objective

    def batch(self, step):
        """This worker's x, uint8 or dequantised, and eps of a step."""
        args, device, rows = self.args, self.device, part(self.args.batch_size)
        rng = generator(args.seed, TRAINING, step)
        x = of_step(self.images, args.seed, step, args.batch_size, rows).to(device)
        eps = rng.standard_normal((args.batch_size, args.kappa), np.float32)[rows]
        if args.dequantize:
            x = to_unit(x, torch.from_numpy(rng.random((args.batch_size, *x.shape[1:]), np.float32)[rows]).to(device))
        return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(eps).to(device)

    def backward(self, step):
        """The gradients of a step; gives the loss (mean negative ELBO in nats), the MSE of the whole batch, gamma, the
        mean KL per dimension and the mean norm of an image's dL/dz.

        `optimal` and `homotopy`: gamma is max(MSE, floor), a constant to the gradient: where MSE is the larger, that is
        the gradient of the loss with gamma profiled out, d/2 log(2 pi e MSE) + KL (arXiv 2006.13202), and its value.
        """
        x, eps = self.batch(step)
        b, d, probe = self.args.batch_size, x[0].numel(), torch.zeros_like(eps, requires_grad=True)
        kl, log_likelihood, squared_error = self.objective(x, eps, probe, self.args.amp)
        mse, log_gamma = total(squared_error.detach().sum()) / (b * d), self.model.log_gamma
        if self.profiled:
            log_gamma = mse.clamp(min=gamma_floor(step, self.args)).log()
            log_likelihood = log_normal(squared_error, d, log_gamma)
        loss = (kl.sum(1) - log_likelihood).sum() / b
        (loss * WORLD).backward()  # the mean over the workers is then the gradient of the batch's loss
        return (loss.detach(), mse, log_gamma.detach().exp(), kl.detach().sum(0) / b,
                probe.grad.norm(dim=1).sum() / WORLD)

    def update(self, step, mse):
        """The optimiser's step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.profiled:  # what a checkpoint before the end is evaluated with: a running geometric mean
            with torch.no_grad():
                self.model.log_gamma.lerp_(mse.clamp(min=MIN_GAMMA).log(), 0.05)

    def settle_gamma(self):
        """Where gamma is not trained, it becomes the MSE on (at most GAMMA_IMAGES) training images."""
        if self.profiled:
            mse = evaluate(self.model, self.images[:GAMMA_IMAGES], 1, self.args.seed, self.args.dequantize)["mse"]
            with torch.no_grad():
                self.model.log_gamma.fill_(math.log(max(mse.mean(), MIN_GAMMA)))

    def warm_up(self, step):
        """Two steps without an update, the first of which compiles; the seconds of the second."""
        try:
            self.backward(step)
        except Exception as error:
            if not self.compiled or WORLD > 1 or out_of_memory(error):
                raise
            if self.args.compile:
                raise UserError(f"torch.compile failed ({type(error).__name__}): use --no-compile") from error
            print(f"training without torch.compile, which failed ({type(error).__name__}); see --no-compile")
            self.objective, self.compiled = self.objective._orig_mod, False
            self.backward(step)
        started = time.perf_counter()
        self.backward(step)[0].item()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


class Winner:
    """The weights with the lowest NLL on validation images [N, C, H, W] so far, their gamma being the training MSE
    then. `best.pt` holds them whenever a checkpoint is saved."""

    def __init__(self, args, images, path):
        self.args, self.images, self.path = args, images[:VALIDATED], path
        self.every = LOG_EVERY * max(1, args.iters // (100 * LOG_EVERY))
        self.step, self.nll, self.weights = 0, math.inf, None

    def resume(self, step):
        """Go on after `step`: with what best.pt holds of a step before it, where it is good."""
        def load():
            try:
                return checkpoint.load(self.path)
            except UserError as error:
                print(error)
        state = from_first(load) if step else None
        if not state or state["step"] > step:
            return
        nll = state.get("validation_nll")
        if nll is None and isinstance(state.get("validation_bpd"), float):  # of an older version, with 8 for log2 255
            nll = (state["validation_bpd"] - 8) * self.images[0].numel() * math.log(2)
        if isinstance(nll, float):
            self.step, self.nll, self.weights = state["step"], nll, state["model"]

    def compare(self, model, step):
        """The NLL after `step`, which wins if it is the lowest so far."""
        nll = validation_nll(model, self.images, self.args)
        if nll < self.nll:
            self.step, self.nll = step, nll
            self.weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        return nll

    def save(self, config, split):
        """Write best.pt."""
        if RANK == 0 and self.weights:
            checkpoint.save_weights(self.path, self.weights, self.step, config, split, validation_nll=self.nll)


def validation_nll(model, images, args):
    """The mean negative ELBO in nats of images [N, C, H, W] by one sample of z each, always the same ones."""
    return float(evaluate(model, images, 1, args.seed, args.dequantize)["nll"].mean())


class Loop:
    """The steps of a run from where its checkpoint in `out` stopped, with their log and the checkpoints."""

    def __init__(self, run, out, config, split, validation):
        self.run, self.args, self.out, self.config, self.split = run, run.args, out, config, split
        self.ckpt, self.losses = out / "ckpt.pt", []  # the losses since the last check
        self.step, self.seconds, self.saved_step = checkpoint.resume(self.ckpt, config, run.model, run.optimizer)
        self.winner = None if validation is None else Winner(self.args, validation, out / "best.pt")
        if self.winner:
            self.winner.resume(self.step)
        if RANK == 0:
            checkpoint.write_atomic(out / "config.json", (json.dumps(config, indent=1) + "\n").encode())
            if not self.step:
                (out / "best.pt").unlink(missing_ok=True)

    def expect(self):
        """Say what the steps that are left will take."""
        args, left, device = self.args, self.args.iters - self.step, self.run.device.type
        expected = self.run.warm_up(self.step) * left
        where = f"{device} x {WORLD}" if WORLD > 1 else device
        print(f"{sum(p.numel() for p in self.run.model.parameters()):,} parameters, {len(self.run.images):,} training "
              f"images, {left:,} steps of {args.batch_size} on {where}: about {duration(expected)}", flush=True)
        if expected > 3600:
            ways = "a GPU, " * (device == "cpu") + "--recipe fast, " * (args.recipe == "paper")
            print(f"shorter with {ways}a smaller {'--size, ' * bool(self.split)}--alpha or --iters", flush=True)

    def check(self):
        """UserError if one of the losses since the last check, or a parameter, is not finite."""
        values, self.losses = total(torch.stack(self.losses)).tolist(), []
        bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if bad or not all(p.isfinite().all() for p in self.run.trained):
            what = f"the loss is {values[bad[0]]}" if bad else "a parameter is not finite"
            where = self.step - len(values) + 1 + bad[0] if bad else self.step
            kept = f" ({self.ckpt} keeps the last good state)" if self.saved_step is not None else ""
            raise UserError(f"training diverged: {what} at step {where}; try a smaller --lr{kept}")

    def save(self):
        """Write ckpt.pt, and best.pt."""
        if self.winner:
            self.winner.save(self.config, self.split)
        if RANK == 0:
            checkpoint.save(self.ckpt, self.run.model, self.run.optimizer, self.step, self.config,
                            self.seconds + time.perf_counter() - self.started, self.saved_step, self.args.keep,
                            self.split)
        self.saved_step, self.saved = self.step, time.perf_counter()

    def go(self, signals):
        """Step until the end, or until a signal has come."""
        args, run, text, stopped = self.args, self.run, "", False
        self.first = self.logged_step = self.step
        self.started = self.saved = self.logged = time.perf_counter()
        bar = Progress(args.iters, self.step)
        try:
            with nullcontext() if RANK else checkpoint.open_log(self.out / "log.jsonl", self.step) as log:
                while self.step < args.iters and not stopped:
                    loss, mse, *others = run.backward(self.step)
                    logging = (self.step + 1) % LOG_EVERY == 0 or self.step + 1 in (1, args.iters)
                    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in run.trained]) if logging else None
                    run.update(self.step, mse)
                    self.losses.append(loss)
                    self.step += 1
                    overdue = time.perf_counter() - self.saved > args.checkpoint_seconds
                    stopped, saving = any_worker(bool(signals), RANK == 0 and overdue)
                    if logging or saving or self.step in args.keep_at:
                        self.check()
                    if logging:
                        text = self.log(log, loss, mse, *others, grad_norm)
                    bar.update(self.step, text)
                    if self.step in args.keep_at and RANK == 0:
                        checkpoint.save_weights(self.out / f"step-{self.step}.pt", run.model.state_dict(), self.step,
                                                self.config, self.split)
                    if saving:
                        self.save()
            if self.losses:
                self.check()
        finally:
            bar.close()

    def log(self, file, loss, mse, gamma, kl, grad_z_norm, grad_norm):
        """Write the line of a step; gives what the progress bar says."""
        args, now, d = self.args, time.perf_counter(), math.prod(self.config["shape"])
        loss, grad_z_norm, *kl = total(torch.cat([torch.stack([loss, grad_z_norm]), kl])).tolist()
        speed = (self.step - self.logged_step) * args.batch_size / (now - self.logged)
        record = {"step": self.step, "seconds": round(self.seconds + now - self.started, 3),
                  "images_per_second": round(speed, 1), "loss": loss,
                  "bpd": bits_per_dim(loss, d, gamma.item(), args.dequantize), "mse": mse.item(), "gamma": gamma.item(),
                  "kl": sum(kl), "grad_norm": grad_norm.item(), "grad_z_norm": grad_z_norm,
                  "active_dims": sum(k > ACTIVE_NATS for k in kl)}
        if self.winner and (self.step % self.winner.every == 0 or self.step == args.iters):
            record["validation_nll"] = self.winner.compare(self.run.model, self.step)
            now = time.perf_counter()  # that is no time of the next steps
        if RANK == 0:
            file.write(json.dumps(record) + "\n")
            file.flush()
        self.logged, self.logged_step = now, self.step
        left = duration((now - self.started) / (self.step - self.first) * (args.iters - self.step))
        shown = f"nll {loss:.1f}" if record["bpd"] is None else f"bpd {record['bpd']:.3f}"
        return f"{shown}  gamma {record['gamma']:.3g}  {speed:.0f} images/s  {left} left"


def train(args, images, out, device, split=None, validation=None):
    """Train on uint8 images [N, C, H, W] to args.iters, checkpointing to `out`; returns (model, config).

    Of `Tiles` each step draws its own. With `validation` images [M, C, H, W] the model is of the best step on them.
    `split` of own images goes into the checkpoints, good after a KeyboardInterrupt, or UserError for a loss not finite.
    """
    whole = images.pictures if isinstance(images, Tiles) else images
    config = {name: getattr(args, name) for name in CONFIG} | {
        "shape": list(images.shape[1:]), "images_crc32": crc32(whole), "images_digest": set_digest(whole)}
    if split:
        config |= {name: getattr(args, name) for name in OWN} | {"picture": args.tile and list(whole.shape[1:])}
    run = Training(args, images, device)
    loop, signals = Loop(run, out, config, split, validation), []
    handlers = {s: signal.signal(s, lambda number, frame: signals.append(number))
                for s in (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread()}
    try:
        if loop.step < args.iters:
            loop.expect()
        loop.go(signals)
        if loop.step == args.iters:
            run.settle_gamma()
        loop.save()
        stopped, = any_worker(bool(signals))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt(f"step {loop.step:,} is saved in {loop.ckpt}: the same command with --resume goes on")
    if loop.winner:
        settle(loop.winner, run, config, split)
    return run.model.eval().requires_grad_(False), config


def settle(winner, run, config, split):
    """Take the winner's weights, with the gamma that they ask for, write best.pt, and say which step's they are."""
    model, args = run.model, run.args
    last = validation_nll(model, winner.images, args)
    if winner.weights is None:  # best.pt has been deleted since the last step, or no comparison was finite
        winner.step, winner.weights = args.iters, model.state_dict()
    model.load_state_dict(winner.weights)
    run.settle_gamma()
    winner.weights, winner.nll = model.state_dict(), validation_nll(model, winner.images, args)
    winner.save(config, split)
    if winner.step == args.iters:
        print(f"NLL {last:.1f} nats on {len(winner.images):,} validation images, the best yet: more steps may help")
    else:
        print(f"stopped improving at step {winner.step:,} of {args.iters:,}, whose weights are kept as best.pt and "
              f"evaluated: NLL {winner.nll:.1f} nats on {len(winner.images):,} validation images, {last:.1f} at last")
