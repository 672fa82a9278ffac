"""Save after every epoch, resume exactly, never lose the last good file.

A checkpoint is one file: a line of magic and SHA-256, then what ``torch.save`` writes. It is written to a temporary
file, flushed to the disk and renamed, with the one before kept beside it; so at any moment, also in the middle of a
write, at least one whole checkpoint exists. Loading checks the digest first and never unpickles code
(``weights_only=True``). Weights to keep or share are safetensors, which cannot hold code at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from utils.config import Config
from utils.engine import History, TrainState

MAGIC = b"session10-checkpoint-1"


class CheckpointError(RuntimeError):
    """A file that cannot be used; the message names it, the reason and the fix."""


class RunLockedError(RuntimeError):
    """Another living process works in the same run folder."""


# --- the run folder -------------------------------------------------------------------------------------------------


class RunFolder:
    """The folder of one run: its checkpoints, and a lock against a second process.

    Use as a context manager. The lock belongs to the process: if that dies in any way, the lock is free.

    Args:
        path: created if missing.

    Raises:
        RunLockedError: another process holds the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.pt"
        self.previous = self.path / "checkpoint.previous.pt"
        self.record = self.path / "run.json"
        self._lock = FileLock(self.path / ".lock")

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunLockedError(
                f"{self.path} is in use by another process: wait for it, stop it, or choose another run folder"
            ) from None
        return self

    def __exit__(self, *exc) -> None:
        self._lock.release()

    def save(self, state: TrainState, config: Config, data_fingerprint: str) -> None:
        """Write a checkpoint of ``state``; the one before becomes ``checkpoint.previous.pt``."""
        self.path.mkdir(parents=True, exist_ok=True)  # it may have been deleted in mid-run
        content = encode(state, config, data_fingerprint)
        write_atomically(self.checkpoint, content, keep=self.previous)

    def load(self, state: TrainState, config: Config, data_fingerprint: str) -> bool:
        """Put the newest whole checkpoint into ``state``.

        Returns:
            False when the folder holds none yet.

        Raises:
            CheckpointError: none is whole, or the newest whole one belongs to another config, dataset or model.
        """
        problems = []
        for path in (self.checkpoint, self.previous):
            if not path.exists():
                continue
            try:
                content = decode(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem}; going on from {path.name}, one epoch earlier", stacklevel=2)
            restore(content, path, state, config, data_fingerprint)
            return True
        if problems:
            raise CheckpointError("; ".join(problems) + f": delete {self.path} to start again")
        return False

    def write_record(self, record: dict) -> None:
        """Keep what is known before the first epoch (the LR range test, the machine) as ``run.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.record, json.dumps(record, indent=1).encode())

    def read_record(self) -> dict | None:
        """What ``write_record`` kept, or None before that.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return json.loads(self.record.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(f"{self.record} is damaged ({error}): delete {self.path} to start again") from error


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace ``path`` by ``content`` in one step that a crash or a full disk cannot split.

    Args:
        path: the file to write.
        content: its new bytes.
        keep: where the file that was there goes, instead of being lost.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def encode(state: TrainState, config: Config, data_fingerprint: str) -> bytes:
    """A checkpoint's bytes: everything in ``state``, and the state of every global random generator."""
    content = {
        "config": config.to_dict(),
        "data": data_fingerprint,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": state.ema.state_dict() if state.ema is not None else None,
        "history": state.history.to_dict(),
        "rng": _rng_states(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    return MAGIC + b" " + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def decode(path: Path) -> dict:
    """Read and check a checkpoint file.

    Raises:
        CheckpointError: it is no checkpoint, damaged, or holds more than plain tensors and values.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    header, _, payload = raw.partition(b"\n")
    magic, _, digest = header.partition(b" ")
    if magic != MAGIC:
        raise CheckpointError(f"{path} is not a Session 10 checkpoint, or its beginning is damaged")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is refused: it does not hold plain tensors and values only ({error})") from error


def restore(content: dict, path: Path, state: TrainState, config: Config, data_fingerprint: str) -> None:
    """Put a decoded checkpoint into ``state`` and the global random generators.

    Raises:
        CheckpointError: it comes from another config, dataset or model; the message lists what differs.
    """
    here = config.to_dict()
    saved = {**Config().to_dict(), **content["config"]}
    differing = [f"{name} {saved[name]!r} there, {here[name]!r} here" for name in here if saved[name] != here[name]]
    if content["data"] != data_fingerprint:
        differing.append("trained on other images")
    saved_shapes = {name: tuple(value.shape) for name, value in content["model"].items()}
    shapes = {name: tuple(value.shape) for name, value in state.model.state_dict().items()}
    if saved_shapes != shapes:
        names = [name for name in {**saved_shapes, **shapes} if saved_shapes.get(name) != shapes.get(name)]
        differing.append(
            f"another model ({names[0]} is {saved_shapes.get(names[0])} there, {shapes.get(names[0])} here)"
        )
    if differing:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(differing)}. Choose another run folder, or delete this one"
        )
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    state.scaler.load_state_dict(content["scaler"])
    if state.ema is not None:
        state.ema.load_state_dict(content["ema"])
    state.history = History(**content["history"])
    _set_rng_states(content["rng"])


def _rng_states() -> dict:
    """Python's, NumPy's and torch's generators as plain values (loaders and Albumentations are seeded per epoch)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_states(states: dict) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


# --- weights --------------------------------------------------------------------------------------------------------


def rounded_to_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors rounded to what float16 can hold, on the CPU; others as they are."""
    return {
        name: value.detach().cpu().half() if value.is_floating_point() else value.detach().cpu().clone()
        for name, value in weights.items()
    }


def save_weights(model: nn.Module, path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
    """Write the weights as float16 safetensors, 13 MB, atomically.

    Args:
        model: its ``state_dict`` is written.
        path: ends in ``.safetensors``.
        metadata: strings to keep in the file's header, such as the class names.

    Raises:
        ValueError: a weight is too large for float16.
    """
    half = {name: value.contiguous() for name, value in rounded_to_half(model.state_dict()).items()}
    for name, value in half.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} does not fit float16 (largest finite value 65504): has the run diverged?")
    write_atomically(Path(path), save(half, metadata=metadata))


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Read safetensors into ``model`` (in float32) and return it.

    Raises:
        CheckpointError: the file is missing, damaged, no safetensors, or made for another model.
    """
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"no weights at {path}: train first, or check the path") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): get a fresh copy. Pickled weights (.pt, .pth) are "
            "refused, since they can run code"
        ) from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} was made for another model: {error}") from error
    return model
