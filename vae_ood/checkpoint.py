"""Atomic save and safe load of checkpoints: plain tensors and plain values, never a pickled object."""

import io
import os
from pathlib import Path

import torch

from vae_ood import UserError
from vae_ood.model import VAE

VERSION = 1


def write_atomic(path, data):
    """Write bytes to `path` so that it holds either its old content or all of the new one. Raises UserError."""
    part = Path(f"{path}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass
        kept = "; the one saved before is kept" if Path(path).exists() else ""
        raise UserError(f"cannot save {path} ({error.strerror}){kept}: free some space or choose another "
                        "--out") from None


def save(path, model, optimizer, step, config, seconds=0.0):
    """Save the state after `step` training steps; `config` is a dict of plain values. Raises UserError."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                "config": config, "seconds": seconds}, buffer)
    write_atomic(path, buffer.getbuffer())


def load(path, device="cpu"):
    """The dict that `save` wrote. Raises UserError if `path` is missing, no checkpoint, damaged or too new."""
    try:
        data = Path(path).read_bytes()  # here, not in torch, whose OSErrors may mean a damaged file
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: give the ckpt.pt that run.py wrote") from None
    try:
        state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception as error:  # whatever a foreign, damaged or malicious file makes torch raise
        reason = "it asks to run code" if "GLOBAL" in str(error) else "foreign or damaged"
        raise UserError(f"{path} is not a checkpoint of run.py ({reason}): nothing in it was executed") from None
    version = state.get("version") if isinstance(state, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{path} was written by a newer vae-ood (format {version}, this one reads up to {VERSION}): "
                        "update vae-ood")
    types = {"version": int, "model": dict, "optimizer": dict, "step": int, "config": dict, "seconds": float}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in types.items()):
        raise UserError(f"{path} is not a checkpoint of run.py: give the ckpt.pt that run.py wrote")
    return state


def restore(state, path, model, optimizer=None):
    """Put a loaded state into `model` and `optimizer`. Raises UserError where it does not fit."""
    try:
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # foreign tensors: torch raises RuntimeError, KeyError, ValueError, TypeError...
        raise UserError(f"{path} is damaged: its tensors do not fit its settings ({type(error).__name__})") from None


def load_model(path, device="cpu"):
    """(model, config) of a checkpoint, ready to evaluate on `device`. Raises UserError."""
    state = load(path, device)
    try:
        config = state["config"]
        types = {"data": str, "sprite_factors": int, "skip_bad": bool, "dequantize": bool, "seed": int}
        if not all(isinstance(config[name], kind) for name, kind in types.items()):
            raise TypeError
        model = VAE(config["shape"], config["alpha"], config["kappa"])
    except Exception as error:  # a config that was tampered with
        raise UserError(f"{path} is damaged: its settings are unusable ({type(error).__name__})") from None
    model = model.to(device, memory_format=torch.channels_last)
    restore(state, path, model)
    return model.eval().requires_grad_(False), config
