"""What run.py and eval.py share on the command line: arguments, one-line errors, progress. Imports no torch."""

import argparse
import ctypes
import importlib.util
import os
import re
import sys
import time
from contextlib import contextmanager, suppress

from vae_ood import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))  # as torchrun sets them
NAMED = ("sprites", "fashionmnist", "mnist", "cifar10", "svhn", "celeba")  # to train on, with a test part of their own


RECIPES = {  # the paper's section 4; and ours, tuned on training and inlier test bits per dimension alone
    "paper": {"gamma": "learn", "lr": 1e-4, "schedule": "constant", "iters": 200_000},
    "fast": {"gamma": "homotopy", "lr": 1e-3, "schedule": "cosine", "iters": 10_000},
}
GRAY = ("sprites", "fashionmnist", "mnist")  # take twice the learning rate, at which CIFAR-10 diverges at alpha = 1


def complete(args):
    """Set what the recipe says where the arguments of a training do not."""
    args.recipe = args.recipe or ("fast" if args.data == "sprites" else "paper")
    defaults = RECIPES[args.recipe] | {"alpha": 1.0, "kappa": 32}
    if args.recipe == "fast" and args.data in GRAY:
        defaults["lr"] = 2e-3
    if args.data == "sprites":
        defaults |= {"alpha": 0.25, "kappa": 4 * args.sprite_factors}
        if args.recipe == "fast":
            defaults["iters"] = 3000
    if args.recipe == "fast":  # wider layers bear less of it: 1e-3 diverged on CIFAR-10 at alpha = 2
        defaults["lr"] /= max(1, args.alpha or 1)
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def out_of_memory(error):
    """Whether an exception, Python's or torch's, says that there is not enough memory."""
    return isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error))


@contextmanager
def one_line_errors():
    """Exit codes of a command: 2 a user's mistake, told in one line on stderr; 130 interrupted; 141 where nobody reads
    what it prints any more. Of several workers, the first alone prints, and the first of each machine tells the
    mistakes."""
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # names of any bytes on terminals of any encoding
    try:
        yield
    except UserError as error:
        if LOCAL_RANK == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print("error: out of memory: choose a smaller --alpha, --kappa or --batch-size, or smaller images",
              file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be flushed
        sys.exit(141)
    except OSError as error:  # a full disk, an unreadable file
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if RANK == 0:
            print(f"interrupted{'; ' if str(interrupt) else ''}{interrupt}", file=sys.stderr)
        sys.exit(130)


def add_evaluation_arguments(parser):
    """The flags of an evaluation, the same in run.py and eval.py."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--outliers", nargs="+", metavar="NAME|PATH", help="outlier sets: data set names, noise, "
                       "constant, two_blobs, discs, cut_out, the test images blurred, noisy, faded or patched, or "
                       "paths (default: the paper's for the data set)")
    group.add_argument("--scores", nargs="+", metavar="NAME",
                       help="outlier scores; all: all but the slow regret (default: default, nll and the control pca; "
                       "with --score: default)")
    group.add_argument("--iw-samples", type=positive_int, default=16, metavar="K",
                       help="samples of z an image, for every estimate (default 16)")
    group.add_argument("--max-images", type=positive_int, metavar="N",
                       help="use the first N images of a set (default: 10,000 training images, and 30,000 to fit "
                       "scores to, all others; fewer for a large model on a CPU)")
    group = parser.add_argument_group("machine")
    group.add_argument("--data-root", metavar="DIR", help="folder of the official files; what is missing is downloaded "
                       "there (default $VAE_OOD_DATA, else ~/.cache/vae_ood)")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument("--timeout", type=positive_float, default=600, metavar="S", help="under torchrun: a worker that "
                       "does not answer for S seconds is lost (default 600)")


def positive_int(text):
    """argparse type: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def positive_float(text):
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


def printable(name):
    """A file's name, or another object, as text of one line."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(name))


def rate(text):
    """argparse type: a number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return value


def keep_freed_memory():
    """Have glibc keep the memory that tensors free: given back to the system, each of its pages faults again when the
    next step takes it, which was a fifth of a training step at alpha = 1 and a quarter at 1/4."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def pick_device(name):
    """The torch device of --device, made deterministic; UserError where cuda, or a kernel, is asked for and there is
    none."""
    import torch

    from vae_ood.kernels import cuda
    torch.backends.cudnn.deterministic = True  # a resumed run repeats an uninterrupted one bit for bit
    keep_freed_memory()
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu, or install a CUDA build")
    device = torch.device("cpu")
    if name != "cpu" and torch.cuda.is_available():
        if torch.cuda.device_count() < LOCAL_WORLD:
            raise UserError(f"{LOCAL_WORLD} workers on a machine of {torch.cuda.device_count()} GPUs: give torchrun a "
                            "smaller --nproc-per-node, or --device cpu")
        torch.cuda.set_device(LOCAL_RANK)
        device = torch.device("cuda", LOCAL_RANK)
    try:
        cuda.prepare(device)
    except cuda.Unavailable as error:
        raise UserError(str(error)) from None
    return device


def make_folder(path):
    """Create `path` and its parents; UserError unless files can be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write in the folder {path} ({error.strerror}): choose another --out") from None


@contextmanager
def lock(folder, wait):
    """Hold `folder` alone: where another process holds it, wait for it to end, or raise BlockingIOError. However the
    process ends, nothing stays locked."""
    if fcntl is None:
        yield
        return
    path = os.path.join(folder, ".lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks nothing that is open for reading alone
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break  # else the one that held it has removed it
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            print(f"note: no locks on {folder} ({error.strerror}): let nothing else write there", file=sys.stderr)
            break
        os.close(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder itself is gone
            os.unlink(path)
        os.close(descriptor)


def duration(seconds):
    """A duration for people: '48 s', '12 min', '3.4 h', '2.1 days'."""
    for unit, size in (("days", 86400), ("h", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


class Progress:
    """A tqdm bar where tqdm is installed and stderr is a terminal, else a line now and then."""

    def __init__(self, total, initial=0, label="step"):
        self.total, self.initial, self.label, self.shown, self.bar = total, initial, label, time.monotonic(), None

    def update(self, done, text="", seconds=5.0):
        """Show that `done` of the total are done; a plain line at most every `seconds`, and at the end if it has a
        text. Worker 0 alone shows it."""
        if RANK:
            return
        if self.bar is None and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm
            self.bar = tqdm(total=self.total, initial=self.initial, unit=self.label, leave=False, dynamic_ncols=True)
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.shown > seconds or (text and done == self.total):
            print(f"{self.label} {done:>{len(str(self.total))}}/{self.total}  {text}".rstrip(), flush=True)
            self.shown = time.monotonic()

    def close(self):
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
