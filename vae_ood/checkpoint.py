"""Atomic save and safe load of checkpoints: plain tensors and plain values, never a pickled object."""

import csv
import io
import json
import os
import re
import socket
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from vae_ood import UserError
from vae_ood.cli import lock, make_folder, out_of_memory
from vae_ood.model import VAE
from vae_ood.parallel import from_first

VERSION = 1
FILES = {"checkpoint": "ckpt.pt", "detector": "detector.pt"}


class Damaged(UserError):
    """A file that is no whole checkpoint."""


def write_atomic(path, data, aside=None):
    """Write bytes to `path` so that it holds either its old content, which is moved to `aside` if that is given, or all
    of the new one, whoever else writes it at that moment. Raises UserError."""
    part = Path(f"{path}.{os.urandom(6).hex()}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if aside:
            os.replace(path, aside)
        os.replace(part, path)
    except OSError as error:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass
        kept = "; the one saved before is kept" if Path(path).exists() else ""
        raise UserError(f"cannot save {path} ({error.strerror}){kept}: free some space or choose another "
                        "--out") from None


class Lines:
    """A file to which csv.writer writes rows that end in \\n: told so itself, it would not quote a name with a \\r."""

    def __init__(self, file):
        self.file = file

    def write(self, row):
        """Write a row that ends in \\r\\n."""
        self.file.write(f"{row[:-2]}\n")


def write_csv(path, header, rows):
    """Write a table with its floats in full precision, atomically. Raises UserError."""
    text = io.StringIO()
    writer = csv.writer(Lines(text))
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))  # names of any bytes


def copied(state):
    """A copy of a state_dict, on the CPU, that what goes on meanwhile does not change; from CUDA the copies are on
    their way when this returns, and there when the present stream has come as far as now."""
    if isinstance(state, torch.Tensor):
        there = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return there.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state


def save(path, model, optimizer, step, config, seconds=0.0, before=None, keep=1, split=None):
    """Save the state_dicts after `step` training steps as `path`; `config` is a dict of plain values, `split` own
    images' groups and parts. Raises UserError.

    What `path` held, of the step `before`, is kept beside it as <stem>-<before>.pt, as far as there are to be `keep`
    checkpoints in all; older ones are removed.
    """
    path = Path(path)
    state = packed(model, optimizer, step, config, seconds, split)
    aside = before is not None and before < step and keep > 1 and path.exists()
    write_state(path, state, path.with_name(f"{path.stem}-{before}.pt") if aside else None)
    for number, old in earlier(path):
        if number < step and keep > 1:
            keep -= 1
        else:
            old.unlink(missing_ok=True)


def save_weights(path, weights, step, config, split=None, **more):
    """Save the weights alone, a state_dict after `step` training steps: enough to evaluate, not to resume. Raises
    UserError."""
    write_state(path, packed(weights, {}, step, config, 0.0, split, **more))


def packed(model, optimizer, step, config, seconds, split, **more):
    """What a checkpoint holds."""
    return {"version": VERSION, "model": model, "optimizer": optimizer, "step": step, "config": config,
            "seconds": seconds} | ({"split": split} if split else {}) | more


def earlier(path):
    """[(step, path)] of the checkpoints kept beside `path`, the newest first."""
    found = [(re.fullmatch(rf"{path.stem}-(\d+)\.pt", file.name), file) for file in path.parent.glob("*.pt")]
    return sorted(((int(match[1]), file) for match, file in found if match), reverse=True)


def load_newest(path):
    """(state, notes) of the newest good one of `path` and those kept beside it, or (None, []) where there is none at
    all; the notes name those that are damaged. Raises UserError if all are, or if one is of a newer version."""
    path, notes = Path(path), []
    for file in ([path] if path.exists() else []) + [old for _, old in earlier(path)]:
        try:
            return load(file), notes
        except Damaged as error:
            notes.append(str(error))
    if notes:
        raise UserError(notes[0])
    return None, []


def resume(path, config, model, optimizer):
    """Put the newest good checkpoint into `model` and `optimizer`: (its step, its seconds, the step of what `path`
    holds, None where that is damaged); (0, 0.0, None) where there is none. Raises UserError where `config` differs."""
    state, notes = from_first(lambda: load_newest(path))
    if not state:
        return 0, 0.0, None
    for name, value in config.items():
        if name == "cache" or (name == "images_digest" and name not in state["config"]):
            continue  # determines nothing; a run from before there was one
        if name in ("images_crc32", "images_digest") and state["config"].get(name) != value:
            raise UserError(f"the training images have changed since {path} was written: give another --out")
        if state["config"].get(name) != value:
            raise UserError(f"{path} was trained with {name} = {state['config'].get(name)}, not {value}: resume with "
                            "the same flags, or give another --out")
    restore(state, path, model, optimizer)
    print(*notes, f"resuming {path.parent} at step {state['step']:,}", sep="\n")
    return state["step"], state["seconds"], None if notes else state["step"]


def write_state(path, state, aside=None):
    """Write tensors and plain values by `write_atomic`. Raises UserError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getbuffer(), aside)


def read_state(path, what="checkpoint"):
    """What torch.save wrote to `path`, on the CPU: tensors and plain values, whose checksums hold. Raises UserError if
    it is missing, Damaged for anything else; `what` names it."""
    try:
        data = Path(path).read_bytes()  # here, not in torch, whose OSErrors may mean a damaged file
    except FileNotFoundError:
        raise UserError(f"there is no {what} {path}: give the {FILES[what]} that run.py wrote") from None
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror}): give another {what}") from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.testzip():  # torch does not look at the checksums
                raise zipfile.BadZipFile
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign, damaged or malicious file makes torch raise
        if out_of_memory(error):
            raise
        reason = "it asks to run code" if "GLOBAL" in str(error) else "foreign or damaged"
        raise Damaged(f"{path} is not a {what} of run.py ({reason}): nothing in it was executed") from None


def load(path):
    """The dict that `save` wrote, on the CPU. Raises UserError if `path` is missing or too new, Damaged if it is no
    checkpoint or damaged."""
    state = read_state(path)
    check_version(path, state.get("version") if isinstance(state, dict) else None, VERSION)
    types = {"version": int, "model": dict, "optimizer": dict, "step": int, "config": dict, "seconds": float}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in types.items()):
        raise Damaged(f"{path} is not a checkpoint of run.py: give the ckpt.pt that run.py wrote")
    check_weights(path, state["model"])
    if "amp" in state["config"]:  # as it was called before there were three; on CUDA, without it, convolutions had TF32
        state["config"]["precision"] = "bfloat16" if state["config"].pop("amp") else "float32"
    if not good_split(state.get("split")):
        raise Damaged(f"{path} is damaged: its groups are unusable")
    return state


def check_version(path, version, newest):
    """UserError where a file's format is above the newest that is known."""
    if isinstance(version, int) and version > newest:
        raise UserError(f"{path} was written by a newer vae-ood (format {version}, this one reads up to {newest}): "
                        "update vae-ood")


def check_weights(path, weights):
    """Damaged unless a loaded model's weights are finite tensors; those in float16 become float32."""
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise Damaged(f"{path} is not a checkpoint of run.py: {name} is no tensor")
        if not value.isfinite().all():
            raise Damaged(f"{path} holds weights that are not finite: give an earlier checkpoint of the run")
        if value.dtype == torch.float16:  # as results/runs keeps them
            weights[name] = value.float()


def good_split(split):
    """Whether a loaded value is own images' groups and parts, or None."""
    if split is None:
        return True
    try:
        (group, part), n = (split["group"], split["part"]), len(split["group"])
        return ((group.dtype, part.dtype, group.shape, part.shape) == (torch.int32, torch.uint8, (n,), (n,))
                and isinstance(split["crc32"], int) and not (part > 2).any())
    except Exception:  # anything that a tampered file may hold
        return False


def restore(state, path, model, optimizer=None, assign=False):
    """Put a loaded state into `model`, whose parameters become the state's own where `assign`, and `optimizer`. Raises
    UserError where it does not fit."""
    if optimizer is not None and not state["optimizer"]:
        raise UserError(f"{path} holds weights alone, to evaluate and not to go on with: give another --out")
    try:
        if any(state["model"][name].dtype != value.dtype for name, value in model.state_dict().items()):
            raise TypeError
        model.load_state_dict(state["model"], assign=assign)
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # foreign tensors: torch raises RuntimeError, KeyError, ValueError, TypeError...
        raise UserError(f"{path} is damaged: its tensors do not fit its settings ({type(error).__name__})") from None


def load_model(path, device="cpu"):
    """(model, config, split) of a checkpoint, the model ready to evaluate on `device`; the split of own images,
    {"group", "part"} [N], else None. Raises UserError."""
    state = from_first(lambda: load(path))
    config = state["config"]
    types = {"data": str, "sprite_factors": int, "skip_bad": bool, "dequantize": bool, "seed": int}
    if not all(isinstance(config.get(name), kind) for name, kind in types.items()):
        raise UserError(f"{path} is damaged: its settings are unusable (TypeError)")
    return rebuilt(path, config, state, device), config, state.get("split")


def rebuilt(path, config, state, device):
    """The model of a config with the weights of a loaded state, ready to evaluate on `device`. Raises UserError."""
    try:
        with torch.device("meta"):  # what a damaged config asks for may be too large
            model = VAE(config["shape"], config["alpha"], config["kappa"])
    except Exception as error:  # a config that was tampered with
        raise UserError(f"{path} is damaged: its settings are unusable ({type(error).__name__})") from None
    restore(state, path, model, assign=True)
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def launch_name():
    """(what tells this launch of torchrun from others, whether its workers surely start for the first time): its
    number; with static rendezvous, which has none, the process that starts them again; without torchrun, empty."""
    number, again = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return (number, False) if number != "none" else (f"{socket.gethostname()} {os.getppid()}", not again)


@contextmanager
def folder_of_run(out, resume):
    """The folder of a run, made and held by worker 0 alone; UserError where it holds a run that is not to go on.

    Workers that torchrun starts again go on with the run that they had begun: the file .torchrun names its launch.
    """
    def claim():
        make_folder(out)
        try:
            held.enter_context(lock(out, wait=False))
        except BlockingIOError:
            raise UserError(f"another run is writing to {out}: wait for its end, or give another --out") from None
        for left in out.glob("*.pt.*.part"):  # by a process that was killed; it held the lock, as this one does
            left.unlink()
        (launch, starting), begun = launch_name(), out / ".torchrun"
        again = launch and not starting and begun.exists() and begun.read_bytes() == launch.encode()
        if ((out / "ckpt.pt").exists() or earlier(out / "ckpt.pt")) and not (resume or again):
            raise UserError(f"{out} already holds a run: add --resume to go on with it, or give another --out")
        if launch:
            write_atomic(begun, launch.encode())

    with ExitStack() as held:
        from_first(claim)
        yield


def to_evaluate(path):
    """The checkpoints that --ckpt names: those of a run's folder or of its folds, best.pt where there is one in place
    of ckpt.pt, which is for going on."""
    path = Path(path)
    if path.is_dir():
        folds = sorted(path.glob("fold-*"), key=lambda fold: (len(fold.name), fold.name))
        if folds:
            return [found for fold in folds for found in to_evaluate(fold / "ckpt.pt")]
        path /= "ckpt.pt"
    best = path.with_name("best.pt")
    return [best if path.name == "ckpt.pt" and best.exists() else path]


def open_log(path, step):
    """log.jsonl open for appending, without the lines after `step` and without a half-written last one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            pass
    write_atomic(path, b"".join(kept))
    return path.open("a")
