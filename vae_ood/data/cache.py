"""The pictures that a model trains on: decoded once, into memory or into one file that the workers of a machine share.

The file is a .npy of uint8 [N, C, H, W]. Its name has a digest of what it was made of: the files' names, sizes and
times of change, and how they are read. Beside it lies a .json with the pictures' names, what there is to say of them
and a checksum, without which it counts for nothing.
"""

import hashlib
import io
import json
import math
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.cli import LOCAL_RANK, LOCAL_WORLD, Progress, duration
from vae_ood.data.decoding import version
from vae_ood.data.images import Images, Rows
from vae_ood.data.own import AUTO, WHOLE, Pictures, open_own, rule_of
from vae_ood.parallel import any_worker, crc32, from_first

FORMAT = 1
BLOCK, BLOCK_BYTES = 500, 2**26  # pictures, and bytes of them at most, that are read at once and sent to all workers
ABANDONED = 3600  # seconds after which a part that nobody goes on writing is removed


def read_own(path, folder=None, forced=False, size=AUTO, crop=None, skip_bad=False, levels=None, show=False):
    """(`Images` of all that is in `path`, size, crop), as `rule_of` wants them: in memory, or `Rows` of a file in
    `folder`, if there is a folder and the file is there already, is `forced`, or is needed, as the pictures would take
    more than half of the free memory. Worker 0 alone decodes. `show`: say what is done. Raises UserError."""
    sources = []  # worker 0's

    def begin():
        sources.append(Source(path, size, crop, skip_bad, levels, show))
        return json.dumps(sources[0].name)
    name = json.loads(from_first(begin))
    file = folder and Path(folder) / name
    found = file and opened(file)
    missing, = any_worker(found is None)
    plan = json.loads(from_first(lambda: json.dumps(sources[0].plan()))) if missing else found[1]
    if show and plan["said"]:
        print(plan["said"], flush=True)
    if missing:
        large = 2 * LOCAL_WORLD * math.prod(plan["shape"]) > free_memory()
        spilled = any_worker(bool(folder) and (forced or large))[0]
        found = filled(sources, plan, File(file) if spilled else Memory(), show)
    pixels, record = found
    if show:
        where = "memory" if isinstance(pixels, torch.Tensor) else str(file)
        shape = "x".join(map(str, pixels.shape[1:]))
        print(f"{len(pixels):,} pictures of {shape}: {amount(math.prod(pixels.shape))} in {where}", flush=True)
    return (Images(str(path), pixels, record["notes"], record["files"], given=record["given"]), record["size"],
            record["crop"])


class Source:
    """What is read, and by which rule: `size` and `crop` of `rule_of`, and its line. `name`: the file's."""

    def __init__(self, path, size, crop, skip_bad, levels, show):
        self.own, self.show, self.seen = open_own(path, skip_bad, levels), show, None
        if size in (AUTO, WHOLE) and self.own.files is None:
            size = None  # arrays stay as they are
        self.size, self.crop, self.said = rule_of(
            self.headers()[0] if size in (AUTO, WHOLE) else {}, size, crop)
        files = [(os.path.relpath(file, path.parent), *changed(file)) for file in self.own.paths()]
        made_of = [FORMAT, version(), files, self.size, self.crop, skip_bad, levels and list(levels)]
        digest = hashlib.blake2b(json.dumps(made_of).encode(), digest_size=8).hexdigest()
        self.name = f"{path.stem}-{digest}.npy"

    def headers(self):
        """What the headers say, which are looked at once."""
        if not self.seen:
            bar = Progress(len(self.own), label="header") if self.show else None
            self.seen = self.own.headers(bar)
            if bar:
                bar.close()
        return self.seen

    def plan(self):
        """What the record will hold, with the shape [N, C, H, W] that the headers promise. Raises UserError."""
        sizes, channels = self.headers()
        rule_of(sizes, self.size, self.crop)
        return {"shape": [len(self.own), channels, *(self.size or next(iter(sizes), (1, 1)))], "size": self.size,
                "crop": self.crop, "said": self.said, "given": self.own.given, "path": self.own.name}

    def block(self, start, stop, size):
        """The pictures from `start` to `stop`, as plain values."""
        if not start and isinstance(self.own, Pictures):
            self.own.forget()
        images = self.own.read(slice(start, stop), (None, *size), self.crop)
        return {"pixels": images.pixels, "files": json.dumps(images.files)}


def changed(file):
    """(size, time of change) of a file. Raises UserError."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): allow it, or move it away") from None
    return found.st_size, found.st_mtime_ns


def filled(sources, plan, store, show):
    """(pixels, record) of what worker 0's source holds, kept in the `store`."""
    n, channels, *size = plan["shape"]
    step, begun = max(1, min(BLOCK, BLOCK_BYTES // (3 * math.prod(size)))), time.monotonic()
    bar, most = Progress(n, label="read") if show else None, None
    with store:
        while most != channels:  # once, unless the headers are wrong about colour
            channels, most, files = most or channels, 0, []
            store.begin([n, channels, *size])
            for start in range(0, n, step):
                part = from_first(lambda start=start: sources[0].block(start, start + step, size))
                pixels, names = part["pixels"], json.loads(part["files"])
                most = max(most, pixels.shape[1] if len(pixels) else 0)
                if most > channels:
                    break
                store.add(pixels.expand(-1, channels, -1, -1))
                files = None if names is None else files + names
                if bar:
                    read, seconds = min(start + step, n), time.monotonic() - begun
                    bar.update(read, f"{read / seconds:,.0f} pictures/s, {duration(seconds / read * (n - read))} left")
            if not most:
                raise UserError(f"not one of the {n:,} pictures in {plan['path']} can be decoded")
        if bar:
            bar.close()
        notes = json.loads(from_first(lambda: json.dumps(sources[0].own.notes())))
        return store.end(plan | {"files": files, "notes": notes})


class Memory:
    """Keeps pictures in memory."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def begin(self, shape):
        """Expect pictures of the shape [N, C, H, W], or fewer."""
        self.pixels, self.n = torch.empty(shape, dtype=torch.uint8), 0

    def add(self, pixels):
        """Keep these, the next ones."""
        self.pixels[self.n:self.n + len(pixels)] = pixels
        self.n += len(pixels)

    def end(self, record):
        """(all pixels, the record)."""
        return self.pixels[:self.n], record


class File:
    """Keeps pictures in a .npy, which the first worker of each machine writes: beside it first, so that it is whole
    whenever it is there."""

    def __init__(self, path):
        self.path, self.part, self.file = path, Path(f"{path}.{os.urandom(6).hex()}.part"), None

    def __enter__(self):
        if LOCAL_RANK == 0:
            with self.refusing():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                for old in self.path.parent.glob("*.npy.*.part"):
                    with suppress(FileNotFoundError):  # another machine is faster
                        if time.time() - old.stat().st_mtime > ABANDONED:
                            old.unlink()
                self.file = open(self.part, "wb")
        return self

    def __exit__(self, *error):
        if self.file:
            self.file.close()
            self.part.unlink(missing_ok=True)

    @contextmanager
    def refusing(self):
        """UserError for what the system refuses."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): free some space, or choose another place "
                            "with --cache DIR") from None

    def write(self, data):
        if self.file:
            with self.refusing():
                self.file.write(data)

    def begin(self, shape):
        """Expect pictures of the shape [N, C, H, W], or fewer."""
        self.shape, self.n, self.crc32 = shape, 0, 0
        if self.file:
            self.file.seek(0)
            self.file.truncate()
        self.write(npy_header(shape))

    def add(self, pixels):
        """Keep these, the next ones."""
        self.n, self.crc32 = self.n + len(pixels), crc32(pixels, self.crc32)
        self.write(pixels.numpy().tobytes())

    def end(self, record):
        """(`Rows` of all pixels, the record), on all workers."""
        record |= {"shape": [self.n, *self.shape[1:]], "crc32": self.crc32, "name": self.path.name}
        if self.file:
            with self.refusing():
                self.file.seek(0)
                self.file.write(npy_header(record["shape"]))  # as long as the first one: numpy leaves room
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.part, self.path)
                self.part.write_text(json.dumps(record))
                os.replace(self.part, self.path.with_suffix(".json"))
        any_worker(False)  # not before all machines have theirs
        found = opened(self.path)
        if not found:
            raise UserError(f"{self.path} does not hold what was written to it: choose another place with --cache DIR")
        return found


def npy_header(shape):
    """The first bytes of a .npy of uint8."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return out.getvalue()


def opened(path):
    """(`Rows`, record) of a file that `File` wrote, None where there is none, or another or a damaged one."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        pixels = np.load(path, mmap_mode="c", allow_pickle=False)  # read-only would do, but torch warns of that
        files, given = record["files"], record["given"]
        good = (record["name"] == path.name and pixels.dtype == np.uint8 and list(pixels.shape) == record["shape"]
                and (files is None or len(files) == len(pixels)) and {"notes", "said", "size", "crop"} <= set(record)
                and (given is None or 0 < given < len(pixels)))
        pixels = torch.from_numpy(pixels)
        return (Rows(pixels), record) if good and crc32(pixels) == record["crc32"] else None
    except Exception:  # whatever a damaged file makes numpy and json raise
        return None


def free_memory():
    """The bytes that programs can still take."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return math.inf


def amount(n):
    """A number of bytes for people: '151 MB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.{0 if n >= 10 * size else 1}f} {unit}"
    return f"{n / 1e3:.0f} kB"
