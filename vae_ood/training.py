"""The training of one VAE: the weights that win on validation images, and the loop, which resumes, checkpoints and
stops. A step is vae_ood/step.py's."""

import copy
import json
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import current_thread, main_thread

import torch

from vae_ood import UserError, checkpoint
from vae_ood.cli import RANK, WORLD, Progress, duration
from vae_ood.data.likeness import set_digest
from vae_ood.data.tiles import Tiles
from vae_ood.likelihood import bits_per_dim, evaluate
from vae_ood.metrics import ACTIVE_NATS
from vae_ood.parallel import any_worker, crc32, from_first, total
from vae_ood.step import Training, default_precision

CONFIG = ("data", "sprite_factors", "skip_bad", "dequantize", "alpha", "kappa", "gamma", "schedule", "iters",
          "batch_size", "lr", "seed", "precision")  # what determines the result; a resumed run must agree in all of it
OWN = ("group_by", "folds", "range", "size", "crop", "tile", "cache")  # of own pictures; the last determines nothing
LOG_EVERY = 50  # steps
VALIDATED = 1_000  # images, a hundred times in a run: some twentieth of its time


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
        self.writer, self.writing = ThreadPoolExecutor(1), None
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
        where, about = f"{device} x {WORLD}" if WORLD > 1 else device, "at most" if self.run.graphed else "about"
        where += f" in {args.precision}" * (args.precision != "float32")
        print(f"{sum(p.numel() for p in self.run.model.parameters()):,} parameters, {len(self.run.batches.images):,} "
              f"training images, {left:,} steps of {args.batch_size} on {where}: {about} {duration(expected)}",
              flush=True)
        if expected > 3600:
            ways = "a GPU, " * (device == "cpu") + "--recipe fast, " * (args.recipe == "paper")
            print(f"shorter with {ways}a smaller {'--size, ' * bool(self.split)}--alpha or --iters", flush=True)

    def check(self):
        """UserError if one of the losses since the last check, or a parameter, is not finite."""
        if self.writing and self.writing.done():
            self.written()
        values, self.losses = total(torch.stack(self.losses)).tolist(), []
        bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if bad or not torch.stack([p.isfinite().all() for p in self.run.trained]).all():
            what = f"the loss is {values[bad[0]]}" if bad else "a parameter is not finite"
            where = self.step - len(values) + 1 + bad[0] if bad else self.step
            self.written()
            kept = f" ({self.ckpt} keeps the last good state)" if self.saved_step is not None else ""
            raise UserError(f"training diverged: {what} at step {where}; try a smaller --lr{kept}")

    def save(self):
        """Write ckpt.pt, and best.pt, as they are now, while the training goes on."""
        self.written()
        if RANK == 0:
            run, seconds = self.run, self.seconds + time.perf_counter() - self.started
            states = checkpoint.copied([run.model.state_dict(), run.optimizer.state_dict()])
            arrived = torch.cuda.current_stream().record_event() if run.device.type == "cuda" else None
            self.writing = self.writer.submit(self.write, states, arrived, copy.copy(self.winner), self.step, seconds,
                                              self.saved_step)
        self.saved_step, self.saved = self.step, time.perf_counter()

    def write(self, states, arrived, winner, step, seconds, before):
        """Write the states, when they have arrived, and the winner of then."""
        if arrived:
            arrived.synchronize()
        if winner:
            winner.save(self.config, self.split)
        checkpoint.save(self.ckpt, *states, step, self.config, seconds, before, self.args.keep, self.split)

    def written(self):
        """Wait for what is being written. Raises UserError if that has failed."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def go(self, signals):
        """Step until the end, or until a signal has come."""
        args, run, text, stopped = self.args, self.run, "", False
        self.first = self.logged_step = self.step
        self.started = self.saved = self.logged = time.perf_counter()
        bar = Progress(args.iters, self.step)
        try:
            with nullcontext() if RANK else checkpoint.open_log(self.out / "log.jsonl", self.step) as log:
                while self.step < args.iters and not stopped:
                    terms = run.step(self.step)
                    self.losses.append(terms.loss)
                    self.step += 1
                    logging = self.step % LOG_EVERY == 0 or self.step in (1, args.iters)
                    overdue = time.perf_counter() - self.saved > args.checkpoint_seconds
                    stopped, saving = any_worker(bool(signals), RANK == 0 and overdue)
                    if logging or saving or self.step in args.keep_at:
                        self.check()
                    if logging:
                        text = self.log(log, terms)
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

    def log(self, file, terms):
        """Write the line of a step, whose `Terms` are given; gives what the progress bar says."""
        args, d = self.args, math.prod(self.config["shape"])
        shares = torch.stack([terms.loss, terms.probe.grad.norm(dim=1).sum() / WORLD])
        loss, grad_z_norm, *kl = total(torch.cat([shares, terms.kl.sum(0) / args.batch_size])).tolist()
        gamma, now = terms.gamma.item(), time.perf_counter()
        speed = (self.step - self.logged_step) * args.batch_size / (now - self.logged)
        record = {"step": self.step, "seconds": round(self.seconds + now - self.started, 3),
                  "images_per_second": round(speed, 1), "loss": loss,
                  "bpd": bits_per_dim(loss, d, gamma, args.dequantize), "mse": terms.mse.item(), "gamma": gamma,
                  "kl": sum(kl), "grad_norm": self.run.gradient_norm().item(), "grad_z_norm": grad_z_norm,
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


def choose_precision(args, out, device):
    """--precision, or that of the run in `out` which goes on, or `default_precision`; the same for all workers."""
    def choose():
        state, _ = checkpoint.load_newest(out / "ckpt.pt")
        return state["config"].get("precision") if state else default_precision(args, device)
    precision = args.precision or from_first(choose)
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs an NVIDIA GPU: give float32 or bfloat16" if args.precision else
                        f"the run in {out} was trained in tf32: go on with it on an NVIDIA GPU, or give another --out")
    return precision


def train(args, images, out, device, split=None, validation=None):
    """Train on uint8 images [N, C, H, W] to args.iters, checkpointing to `out`; returns (model, config).

    Of `Tiles` each step draws its own. With `validation` images, as `images`, the model is that of the best step on
    them. `split` goes into the checkpoints, good after a KeyboardInterrupt, or UserError for a loss not finite.
    """
    args.precision = choose_precision(args, out, device)
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
        run.optimizer.zero_grad()  # or the model would keep its gradients for good
        if loop.step == args.iters:
            run.settle_gamma()
        loop.save()
        loop.written()
        stopped, = any_worker(bool(signals))
    finally:
        loop.writer.shutdown()
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
