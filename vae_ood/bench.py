"""Throughput of training and of the importance-weighted NLL, against the machine's own float32 matrix-product rate.

    python -m vae_ood.bench > results/bench.md          both shapes, alpha = 1/4, 1 and 4: 20 minutes on two cores
    python -m vae_ood.bench --alpha 1 --shapes cifar10
    python -m vae_ood.bench --pythae VENV/bin/python    pythae's too, where `pip install pythae` was done there

Each thing that is timed has a process of its own, and they take turns, so a noisy machine is noisy for all of them; a
figure is the median over the rounds. `plain` is the same model and loss as most repositories write them, as it comes
(eager, contiguous), with channels-last memory, and compiled. Its processes do not keep freed memory (cli.py).
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood import UserError
from vae_ood.cli import Parser, one_line_errors, pick_device, positive_float, positive_int
from vae_ood.likelihood import evaluate
from vae_ood.model import VAE, flops
from vae_ood.reproduce.runs import SHAPES
from vae_ood.training import CONFIG, train

DATA = "fashionmnist", "cifar10"
KAPPA, BATCH, IW_SAMPLES = 32, 64, 16
PYTHAE_SAMPLES = 100  # which its get_nll decodes at once, by default
PLAIN = {"eager": (False, False), "eager channels-last": (False, True), "compiled": (True, False),
         "compiled channels-last": (True, True)}  # whether it is compiled, and channels-last
SIZES = 512, 1024, 2048, 4096  # of the matrix products


def plain_loss(model, x, eps):
    """The mean negative ELBO in nats of x [B, C, H, W] in [0, 1], in plain torch, without what model.py adds."""
    h = x
    for conv in model.encoder:
        h = F.leaky_relu(conv(h), 0.2)
    mu, log_sigma = model.mu(h.flatten(1)), model.log_sigma(h.flatten(1))
    h = F.relu(model.expand(mu + log_sigma.exp() * eps)).unflatten(1, model.code_shape)
    *inner, last = model.decoder
    for conv in inner:
        h = F.relu(conv(h))
    error = (x - last(h).sigmoid()).square().flatten(1).sum(1)
    log_likelihood = -0.5 * (error / model.log_gamma.exp() + x[0].numel() * (math.log(2 * math.pi) + model.log_gamma))
    kl = 0.5 * (mu.square() + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(1)
    return (kl - log_likelihood).mean()


def step_flops(shape, alpha):
    """Floating-point operations of the network in a training step, for an image: three forward passes (two are the
    backward), less the first layer's gradient by the image, which nothing asks for."""
    with torch.device("meta"):
        first = VAE(shape, alpha, KAPPA).encoder[0]
        by_the_image = 2 * first.weight[0].numel() * first(torch.empty(shape)).numel()
    return 3 * sum(flops(shape, alpha, KAPPA)) - by_the_image


def images(n, shape):
    """Random uint8 images."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8))


def matrix_product(device, shape, alpha):
    """Seconds an operation of the fastest of some float32 matrix products (inverse of the rate)."""
    pairs = [torch.rand(2, n, n, device=device) for n in SIZES]

    def measure(count):
        best = math.inf
        for a, b in pairs:
            repeats, started = max(1, int(2e10 * count / len(a) ** 3 / 2)), clock(device)
            for _ in range(repeats):
                torch.mm(a, b)
            best = min(best, (clock(device) - started) / repeats / (2 * len(a) ** 3))
        return best
    return measure


def training(device, shape, alpha, precision="float32"):
    """Seconds a step of run.py's own loop, logging included."""
    pixels = images(2048, shape)
    args = SimpleNamespace(**dict.fromkeys(CONFIG) | {
        "alpha": alpha, "kappa": KAPPA, "gamma": "learn", "schedule": "constant", "batch_size": BATCH, "lr": 1e-4,
        "seed": 0, "precision": precision, "recipe": "fast", "keep": 1, "keep_at": [], "compile": None,
        "checkpoint_seconds": math.inf})

    def measure(steps):
        args.iters = steps
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            train(args, pixels, Path(folder), device)
            lines = Path(folder, "log.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["seconds"] / steps
    return measure


def network(device, shape, alpha):
    """Seconds of the network alone in such a step: encode and decode, forward and backward."""
    model = VAE(shape, alpha, KAPPA).to(device, memory_format=torch.channels_last)
    x = torch.rand(BATCH, *shape, device=device).contiguous(memory_format=torch.channels_last)

    def step():
        mu, log_sigma = model.encode(x)
        decoded = model.decode(mu)
        torch.autograd.backward((decoded, log_sigma), (decoded.detach(), log_sigma.detach()))
        model.zero_grad()
    return repeated(step, device)


def likelihood(device, shape, alpha):
    """Seconds of the importance-weighted NLL of BATCH images, of IW_SAMPLES codes each."""
    model = VAE(shape, alpha, KAPPA).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def measure(steps):
        pixels = images(steps * BATCH, shape)
        started = time.perf_counter()
        evaluate(model, pixels, IW_SAMPLES)
        return (time.perf_counter() - started) / steps
    return measure


def plain(device, shape, alpha, variant):
    """Seconds a step of the plain formulation."""
    compiled, channels_last = PLAIN[variant]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = VAE(shape, alpha, KAPPA, learn_gamma=True).to(device, memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loss = torch.compile(plain_loss) if compiled else plain_loss
    data = images(2048, shape).float() / 255

    def step():
        x = data[torch.randint(len(data), (BATCH,))].to(device).contiguous(memory_format=layout)
        optimizer.zero_grad()
        loss(model, x, torch.randn(BATCH, KAPPA, device=device)).backward()
        optimizer.step()
    return repeated(step, device)


def clock(device):
    """The time, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def repeated(step, device):
    """A function of a number of steps that gives the seconds of one."""
    def measure(steps):
        started = clock(device)
        for _ in range(steps):
            step()
        return (clock(device) - started) / steps
    return measure


def serve(connection, threads, device_name, make, *arguments):
    """In a process of its own: answer each number of steps by what `make`'s function measures, or by why it cannot."""
    try:
        device = torch.device(device_name) if make is plain else pick_device(device_name)
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 everywhere, as in run.py
        measure = make(device, *arguments)
        while steps := connection.recv():
            connection.send(measure(steps))
    except Exception as error:  # torch.compile without a compiler, say
        connection.send(f"{type(error).__name__}: {str(error)[:200]}")


def ask(connection, what, steps):
    """The seconds of a step from the process that times `what`; UserError where it failed."""
    try:
        connection.send(steps)
        value = connection.recv()
    except (EOFError, ConnectionError):
        value = "its process was killed: is there enough memory?"
    if isinstance(value, str):
        raise UserError(f"timing the {what} failed ({value})")
    return value


class Beside:
    """The process of bench_pythae.py that times `what`, as a connection."""

    def __init__(self, python, what, shape, alpha):
        self.process = subprocess.Popen(
            [python, "-m", "vae_ood.bench_pythae", what, *map(str, (KAPPA, BATCH, PYTHAE_SAMPLES, *shape, alpha))],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parent.parent)

    def send(self, steps):
        """Ask for so many steps; 0 ends it."""
        if steps:
            print(steps, file=self.process.stdin, flush=True)
        else:
            self.process.stdin.close()

    def recv(self):
        """The seconds of a step, or why there are none."""
        if not (line := self.process.stdout.readline()):
            return f"its process ended with exit code {self.process.wait()}"
        return float(line)


def connections(shape, alpha, args, device):
    """{what: a connection to its process} of everything at one shape and alpha."""
    jobs = {"matrix product": (matrix_product,), "training": (training,), "bfloat16": (training, "bfloat16"),
            "network": (network,), "likelihood": (likelihood,)} | {variant: (plain, variant) for variant in PLAIN}
    context, workers = multiprocessing.get_context("spawn"), {}
    for what, (make, *rest) in jobs.items():
        workers[what], theirs = context.Pipe()
        context.Process(target=serve, daemon=True, args=(
            theirs, torch.get_num_threads(), device.type, make, shape, alpha, *rest)).start()
        theirs.close()  # so that the end of the process is noticed
    return workers | {f"pythae {what}": Beside(args.pythae, what, shape, alpha)
                      for what in (("training", "likelihood") if args.pythae else ())}


def timings(shape, alpha, args, device):
    """{what: median seconds} of everything at one shape and alpha; compiled variants that could not run are left
    out."""
    workers = connections(shape, alpha, args, device)
    for what in list(workers):
        try:
            ask(workers[what], what, 3)  # compiles, and warms up
        except UserError as error:
            if "compiled" not in what:
                raise
            print(f"{error}\n", file=sys.stderr)
            del workers[what]
    seconds = {what: [] for what in workers}
    for number in range(args.rounds):
        for what, connection in workers.items():
            steps = 3 if number == 0 or what == "matrix product" else max(1, int(args.seconds / seconds[what][0]))
            seconds[what].append(ask(connection, what, steps))
            time.sleep(0.2)  # until the threads of this one have stopped spinning
    for connection in workers.values():
        connection.send(0)
    return {what: statistics.median(values[1:] or values) for what, values in seconds.items()}


def executable(path):
    """argparse type: a program."""
    if not shutil.which(path):
        raise argparse.ArgumentTypeError(f"there is no program {path}")
    return path


def main():
    """The command."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", nargs="+", type=positive_float, default=[0.25, 1, 4])
    parser.add_argument("--shapes", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--rounds", type=positive_int, default=6, help="of everything in turn; the first only warms up")
    parser.add_argument("--seconds", type=positive_float, default=2, help="of each thing in a round (default 2)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--pythae", type=executable, metavar="PYTHON", help="of a virtual environment with pythae, "
                        "timed on the CPU")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.pythae and device.type != "cpu":
        raise UserError("--pythae is timed on the CPU: give --device cpu with it")
    if args.pythae and subprocess.run([args.pythae, "-c", "import pythae"], capture_output=True).returncode:
        raise UserError(f"--pythae {args.pythae}: no Python with pythae; make a virtual environment, and pip install "
                        "pythae there")
    where = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()})")
    print(f"{where}; torch {torch.__version__}, float32 where no other is named, batches of {BATCH}, K = {IW_SAMPLES}, "
          f"kappa = {KAPPA}; medians of {args.rounds - 1} rounds. Share: of the matrix-product rate (the best of the "
          f"sizes {', '.join(map(str, SIZES))}, in the same rounds). Outside: the share of a training step that is not "
          "the network's forward and backward pass (data, noise, loss, optimiser, logging).\n")
    titles = ["shape", "alpha", "matrix product GFLOP/s", "training images/s", "GFLOP/s", "share", "outside",
              "IW-NLL decodes/s", "GFLOP/s", "share", *(f"plain {variant} ms" for variant in PLAIN), "ours ms",
              "plain eager / ours", "best plain / ours", "bfloat16 ms", "ours / bfloat16",
              *(["pythae ms", "pythae / ours", "pythae decodes/s", "ours / pythae"] if args.pythae else [])]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for name in args.shapes:
        for alpha in args.alpha:
            t = timings(SHAPES[name], alpha, args, device)
            of_step, of_decode = step_flops(SHAPES[name], alpha), flops(SHAPES[name], alpha, KAPPA)[1]
            rate, step, decodes = 1 / t["matrix product"], t["training"], IW_SAMPLES * BATCH / t["likelihood"]
            best = min(t[variant] for variant in PLAIN if variant in t)
            print("| " + " | ".join([
                name, f"{alpha:g}", f"{rate / 1e9:.0f}", f"{BATCH / step:,.0f}", f"{of_step * BATCH / step / 1e9:.0f}",
                f"{of_step * BATCH / step / rate:.0%}", f"{max(0, 1 - t['network'] / step):.1%}",
                f"{decodes:,.0f}", f"{of_decode * decodes / 1e9:.0f}", f"{of_decode * decodes / rate:.0%}",
                *(f"{1e3 * t[variant]:.1f}" if variant in t else "" for variant in PLAIN), f"{1e3 * step:.1f}",
                f"{t['eager'] / step:.2f}", f"{best / step:.2f}", f"{1e3 * t['bfloat16']:.1f}",
                f"{step / t['bfloat16']:.2f}", *beside(t, step, decodes)]) + " |", flush=True)


def beside(t, step, decodes):
    """The cells of pythae beside ours."""
    if "pythae training" not in t:
        return []
    theirs = PYTHAE_SAMPLES / t["pythae likelihood"]
    return [f"{1e3 * t['pythae training']:.1f}", f"{t['pythae training'] / step:.2f}", f"{theirs:,.0f}",
            f"{decodes / theirs:.2f}"]


if __name__ == "__main__":
    with one_line_errors():
        main()
