"""Data-parallel workers, as torchrun starts them, on torch.distributed. A process that torchrun did not start is the
only worker, and nothing here communicates.

Every worker holds all images and takes its slice of what is computed, so whatever the number of workers, the same is
computed of the same images with the same noise. Worker 0 alone reads and writes a run's files.
"""

import io
import math
import os
import re
import sys
import time
import zlib
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from vae_ood import UserError
from vae_ood.cli import RANK, WORLD


def lost(error):
    """Whether an exception says that another worker is gone or does not answer."""
    return bool(re.search("gloo|nccl|connection|socket|timed? ?out|TCPStore", str(error), re.IGNORECASE))


@contextmanager
def workers(device, timeout):
    """The group of all workers, NCCL for CUDA tensors and Gloo for the rest; of several, the end of it is that of the
    process. A worker that is lost, or that does not answer for `timeout` seconds, ends this one, for torchrun to start
    all of them again."""
    if WORLD == 1:
        yield
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=_store(timeout),
                                rank=RANK, world_size=WORLD, timeout=timedelta(seconds=timeout))
        yield
        dist.destroy_process_group()
        leave(0)  # a thread of Gloo that lets go of a tensor while the interpreter takes itself down would abort it
    except RuntimeError as error:
        if not lost(error):
            raise
        print(f"worker {RANK}: another worker is gone or hangs ({str(error).splitlines()[0][:200]}); torchrun starts "
              "all again if --max-restarts allows it, and they go on from the last checkpoint", file=sys.stderr)
        leave(1)  # a kernel of NCCL that waits for the lost worker would hold the interpreter's own end


def leave(code):
    """End this worker at once, with an exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _store(timeout):
    """The store through which these workers find each other: torchrun's outlives them, with the addresses of those that
    were lost, so they take a part of it that is named by all of them, as each finds when it has seen the others."""
    store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store.set(str(RANK), os.urandom(16).hex())
    joined, end = set(), time.monotonic() + timeout
    while time.monotonic() < end:
        name = b"".join(store.multi_get([str(rank) for rank in range(WORLD)])).decode()
        if store.add(name, name not in joined) == WORLD:
            return dist.PrefixStore(name, store)
        joined.add(name)
        time.sleep(0.02)
    raise RuntimeError(f"timed out: {WORLD} workers have not come together within {timeout:g} s")


def part(n):
    """The slice of n things that is this worker's: the first n % WORLD workers have one more."""
    size, more = divmod(n, WORLD)
    start = RANK * size + min(RANK, more)
    return slice(start, start + size + (more > RANK))


def total(values):
    """The sum of a tensor over the workers, in place."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def any_worker(*flags):
    """For each flag, whether it is up on some worker."""
    if WORLD == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return raised.bool().tolist()


def crc32(pixels, value=0):
    """The checksum of images [N, C, H, W], a tensor or what gives tensors, going on from a value."""
    step = max(1, 2**26 // max(1, math.prod(pixels.shape[1:])))
    for start in range(0, len(pixels), step):
        value = zlib.crc32(pixels[start:start + step].numpy(), value)
    return value


def agree(sets, settings):
    """UserError unless the sets {name: Images} and the settings are the same on every worker."""
    if WORLD == 1:
        return
    number = zlib.crc32(repr(settings).encode())
    for name, images in sets.items():
        number = crc32(images.pixels, zlib.crc32(f"{name} {images.pixels.shape}".encode(), number))
    ends = torch.tensor([number, -number])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise UserError("the workers do not have the same images and flags: give all machines the same")


def from_first(function):
    """What function() returns on worker 0, plain values and tensors, on every worker; or raises the UserError there."""
    if WORLD == 1:
        return function()
    buffer, size = io.BytesIO(), torch.zeros((), dtype=torch.int64)
    if RANK == 0:
        try:
            torch.save({"value": function()}, buffer)
        except UserError as error:
            torch.save({"error": str(error)}, buffer)
        size.fill_(buffer.tell())
    dist.broadcast(size, 0)
    data = torch.frombuffer(bytearray(buffer.getvalue() if RANK == 0 else size.item()), dtype=torch.uint8)
    dist.broadcast(data, 0)
    result = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
    if "error" in result:
        raise UserError(result["error"])
    return result["value"]


def spread(compute, n):
    """{name: array [n, ...]} from compute(a slice of the n), which gives a dict of numpy arrays of its length: each
    worker computes its part, and all have the whole."""
    if n < WORLD or WORLD == 1:
        return compute(slice(0, n))
    return {name: _gather(values, n) for name, values in compute(part(n)).items()}


def _gather(values, n):
    whole = torch.zeros(n, *values.shape[1:], dtype=torch.from_numpy(values).dtype)
    whole[part(n)] = torch.from_numpy(values)
    return total(whole).numpy()  # zeros elsewhere: the sum is exact
