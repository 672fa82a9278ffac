"""Save after every epoch, resume exactly, never lose the last good file.

A checkpoint is one file: a line of magic and SHA-256, then what ``torch.save`` writes. It is written to a temporary
file, flushed to the disk and renamed, with the one before kept beside it; so at any moment, also in the middle of a
write, at least one whole checkpoint exists. Loading checks the digest first and never unpickles code
(``weights_only=True``). Weights to keep or share are safetensors, which cannot hold code at all.

A run resumed on the same machine with the same number of threads ends bit for bit like one that was never stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from utils.config import Config
from utils.engine import History, TrainState
from utils.runtime import write_atomically

MAGIC = b"session10-checkpoint-1"
COPY_ATTEMPTS = 3  # at a mounted drive, which may be away for a moment
COPY_WAIT_SECONDS = 1.0  # between two attempts
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A file that cannot be used; the message names it, the reason and the fix."""


class RunLockedError(RuntimeError):
    """Another living process works in the same run folder."""


# --- the run folder -------------------------------------------------------------------------------------------------


class RunFolder:
    """The folder of one run: its checkpoints, and a lock against a second process.

    Use as a context manager. The lock belongs to the process: if that dies in any way, the lock is free, and the
    process itself may enter again, as a notebook's cell does when it is run twice. What a killed process left half
    written is removed on entering.

    Args:
        path: on a local disk; created on entering if missing.
        mirror: a second folder, such as one on a mounted Google Drive, to which every file is copied once it is whole
            in ``path``. The copy is retried, and when it fails the run goes on with a warning. Where ``path`` holds no
            run yet but ``mirror`` does, that one is fetched on entering. Where both do, ``path`` counts.

    Attributes:
        checkpoint, previous: the newest checkpoint and the one before.
        record: what is known before the first epoch, as JSON.
        saved_epochs: how many epochs the checkpoint holds that was last saved or loaded here; 0 before that.
    """

    def __init__(self, path: str | os.PathLike, mirror: str | os.PathLike | None = None):
        self.path = Path(path)
        self.mirror = Path(mirror) if mirror is not None else None
        self.checkpoint = self.path / "checkpoint.pt"
        self.previous = self.path / "checkpoint.previous.pt"
        self.record = self.path / "run.json"
        self.saved_epochs = 0
        self._newest_is_whole = True
        self._record_bytes: bytes | None = None
        self._lock = FileLock(self.path / ".lock", is_singleton=True)

    @property
    def holds_checkpoint(self) -> bool:
        """True once an epoch was finished, also if the process died between the two renames of a save."""
        return self.checkpoint.exists() or self.previous.exists()

    def __enter__(self) -> RunFolder:
        """Lock the folder, clean it up, and fetch the mirror's run if there is none.

        Raises:
            RunLockedError: another process holds the folder.
            CheckpointError: the folder cannot be made or written, or the mirror's run cannot be fetched.
        """
        self._acquire()
        try:
            for folder in filter(None, (self.path, self.mirror)):
                _remove_parts(folder)
            self._fetch()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self._lock.release()

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunLockedError(
                f"{self.path} is in use by another process: wait for it, stop it, or choose another run folder"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise CheckpointError(
                f"{self.path} cannot be used as a run folder ({_reason(error)}): choose another one, or make it writable"
            ) from error

    def save(self, state: TrainState, config: Config, data_fingerprint: str) -> None:
        """Write a checkpoint of ``state``; the one before becomes ``checkpoint.previous.pt``.

        Raises:
            CheckpointError: it cannot be written; the checkpoints that were there still are.
        """
        content = encode(state, config, data_fingerprint)
        if not self.path.exists():
            self._lock.release(force=True)  # the old lock went with the old folder
            self._acquire()
            self._newest_is_whole = True
            warnings.warn(
                f"{self.path} was deleted while the run was going: it is made anew, with the checkpoint after epoch "
                f"{state.history.epochs}",
                stacklevel=2,
            )
        if self._record_bytes is not None and not self.record.exists():
            self._write(self.record, self._record_bytes)
        self._write(self.checkpoint, content, keep=self.previous if self._newest_is_whole else None)
        self._newest_is_whole = True
        self.saved_epochs = state.history.epochs

    def load(self, state: TrainState, config: Config, data_fingerprint: str) -> bool:
        """Put the newest whole checkpoint into ``state``; warns when the newest one is damaged.

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
            restore(content, path, state, config, data_fingerprint)
            self.saved_epochs = state.history.epochs
            if problems:
                # The next save must not put the damaged file in the place of this good one.
                self._newest_is_whole = False
                warnings.warn(
                    f"{problems[0]}; going on from {path.name}, which holds epoch {self.saved_epochs}", stacklevel=2
                )
            return True
        if problems:
            raise CheckpointError(
                f"{'; '.join(problems)}. No whole checkpoint is left: delete {self.path}, start again"
            )
        return False

    def write_record(self, record: dict) -> None:
        """Keep what is known before the first epoch (the LR range test, the machine) as ``run.json``.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._record_bytes = json.dumps({**record, "sha256": _json_digest(record)}, indent=1).encode()
        self._write(self.record, self._record_bytes)

    def read_record(self, config: Config | None = None, data_fingerprint: str | None = None) -> dict | None:
        """What ``write_record`` kept, or None before that.

        Args:
            config: if given, the record must be of this config. One that is not, and has no checkpoint beside it, is as
                good as none: it is the rest of a run that stopped before its first epoch was over.
            data_fingerprint: likewise of the dataset.

        Raises:
            CheckpointError: the file is damaged, or belongs to another config or dataset.
        """
        try:
            content = self.record.read_bytes()
            record = json.loads(content)
            digest = record.pop("sha256", None)  # records of earlier versions have none
            if digest not in (None, _json_digest(record)):
                raise ValueError("its content does not match its checksum")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.record} is damaged ({error}): delete this file alone, and the LR range test is repeated"
            ) from error
        differing = differences(record.get("config", {}), config) if config is not None else []
        if data_fingerprint is not None and record.get("fingerprint", data_fingerprint) != data_fingerprint:
            differing.append("other images")
        if differing and not self.holds_checkpoint:
            return None
        if differing:
            raise _another_run(self.record, differing)
        self._record_bytes = content
        return record

    def _write(self, path: Path, content: bytes, keep: Path | None = None) -> None:
        """Write one of the run's files, then its copy in the mirror."""
        try:
            write_atomically(path, content, keep)
        except OSError as error:
            fix = (
                f"free {math.ceil(len(content) / 1e6)} MB there" if error.errno in OUT_OF_SPACE else "make it writable"
            )
            kept = (
                f"the checkpoint of epoch {self.saved_epochs} is still there"
                if self.saved_epochs
                else "no epoch is lost"
            )
            raise CheckpointError(
                f"{path} could not be written ({_reason(error)}); {kept}. To go on, {fix} and resume"
            ) from error
        if self.mirror is None:
            return
        try:
            _retry(lambda: self._copy_to_mirror(path.name, content, keep.name if keep else None))
        except OSError as error:
            warnings.warn(
                f"{path.name} could not be copied to {self.mirror} ({_reason(error)}); the run goes on, and the whole "
                f"file is {path}",
                stacklevel=3,
            )

    def _copy_to_mirror(self, name: str, content: bytes, keep: str | None) -> None:
        # Two levels and no more: where the drive is not mounted, its mount point must not be filled with folders.
        self.mirror.parent.mkdir(exist_ok=True)
        self.mirror.mkdir(exist_ok=True)
        record = self.mirror / self.record.name
        if self._record_bytes is not None and name != record.name and not record.exists():
            write_atomically(record, self._record_bytes)  # its own copy had failed
        write_atomically(self.mirror / name, content, self.mirror / keep if keep else None)

    def _fetch(self) -> None:
        """Copy the mirror's run here, unless there is one here already."""
        if self.mirror is None or self.holds_checkpoint:
            return
        for path in (self.checkpoint, self.previous, self.record):  # newest first, should this be interrupted
            try:
                write_atomically(path, _retry((self.mirror / path.name).read_bytes))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise CheckpointError(
                    f"{self.mirror / path.name} could not be fetched ({_reason(error)}): see that the drive is mounted "
                    f"and {self.path} is writable, or unset $S10_RUN_DIR to run without the drive"
                ) from error
            print(f"fetched {path.name} from {self.mirror}")


def run_folder_from_environment(default: str | os.PathLike) -> RunFolder:
    """The run folder ``default``, on a local disk, with a copy on the drive that ``$S10_RUN_DIR`` names, if any.

    On Colab, mount Drive and set it to a folder there: runs/full-seed0 is then copied to $S10_RUN_DIR/full-seed0 after
    every epoch (two checkpoints of 105 MB), and a new machine goes on from that copy.
    """
    default = Path(default)
    drive = os.environ.get("S10_RUN_DIR")
    if not drive:
        return RunFolder(default)
    mirror = Path(drive).expanduser() / default.resolve().name
    return RunFolder(default, mirror if mirror.resolve() != default.resolve() else None)


def _remove_parts(folder: Path) -> None:
    """Remove what a killed process left half written."""
    with contextlib.suppress(OSError):
        for part in folder.glob(".*.s10part"):
            part.unlink()


def _retry(action: Callable):
    """``action()``, tried again when a drive fails for a moment; that a file is missing is an answer, not a failure."""
    for _ in range(COPY_ATTEMPTS - 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(COPY_WAIT_SECONDS)
    return action()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _json_digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


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
        raise CheckpointError(f"{path} cannot be read ({_reason(error)})") from error
    header, _, payload = raw.partition(b"\n")
    magic, _, digest = header.partition(b" ")
    if magic != MAGIC:
        raise CheckpointError(f"{path} is not a Session 10 checkpoint, or its beginning is damaged")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a file made to do harm can make the unpickler fail in any way
        raise CheckpointError(
            f"{path} is refused: it does not hold plain tensors and values only, so that loading it could run code"
        ) from error


def restore(content: dict, path: Path, state: TrainState, config: Config, data_fingerprint: str) -> None:
    """Put a decoded checkpoint into ``state`` and the global random generators.

    Raises:
        CheckpointError: it comes from another config, dataset or model; the message lists what differs.
    """
    try:
        differing = differences(content["config"], config)
        if content["data"] != data_fingerprint:
            differing.append("trained on other images")
        differing += model_differences(content["model"], state.model)
        if not differing:
            state.model.load_state_dict(content["model"])
            state.optimizer.load_state_dict(content["optimizer"])
            state.scheduler.load_state_dict(content["scheduler"])
            if content["scaler"] and state.scaler.is_enabled():  # empty where the run began in fp32 or bf16
                state.scaler.load_state_dict(content["scaler"])
            if state.ema is not None:
                state.ema.load_state_dict(content["ema"])
            state.history = History(**content["history"])
            _set_rng_states(content["rng"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was written by another version of this project ({error!r}): finish the run with that version, or "
            "choose another run folder"
        ) from error
    if differing:
        raise _another_run(path, differing)


def differences(saved: dict, config: Config) -> list[str]:
    """Where ``saved``, from an earlier ``Config.to_dict()``, differs from ``config``, in words.

    A setting that ``saved`` does not have yet had its default.
    """
    saved, here = {**Config().to_dict(), **saved}, config.to_dict()
    return [f"{name} {saved[name]!r} there, {here[name]!r} here" for name in here if saved[name] != here[name]]


def model_differences(weights: dict[str, Tensor], model: nn.Module) -> list[str]:
    """The first tensor in ``weights`` that does not fit ``model``, in words; empty when all fit."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    for name in {**saved, **shapes}:
        if saved.get(name) != shapes.get(name):
            return [f"another model ({name} is {saved.get(name, 'missing')} there, {shapes.get(name, 'missing')} here)"]
    return []


def _another_run(path: Path, differing: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} belongs to another run: {'; '.join(differing)}. Choose another run folder, or delete this one"
    )


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
    """Write the weights as float16 safetensors, 13 MB, atomically, with a checksum in the file's header.

    Args:
        model: its ``state_dict`` is written.
        path: ends in ``.safetensors``.
        metadata: strings to keep in the file's header, such as the class names; as JSON, under the key "session10".

    Raises:
        ValueError: a weight is too large for float16.
    """
    half = {name: value.contiguous() for name, value in rounded_to_half(model.state_dict()).items()}
    for name, value in half.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} does not fit float16 (largest finite value 65504): has the run diverged?")
    # One key only: safetensors writes several in an order that changes from call to call, and the bytes with it.
    header = json.dumps({**(metadata or {}), "sha256": _weights_digest(half)}, sort_keys=True)
    write_atomically(Path(path), save(half, metadata={"session10": header}))


def load_weights(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Read safetensors into ``model`` (in float32) and return it.

    Raises:
        CheckpointError: the file is missing, damaged, no safetensors, or made for another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = json.loads((file.metadata() or {}).get("session10", "{}"))  # files written elsewhere have none
    except FileNotFoundError:
        raise CheckpointError(f"no weights at {path}: train first, or check the path") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}): get a fresh copy. Pickled weights (.pt, .pth) are "
            "refused, since they can run code"
        ) from error
    if header.get("sha256") not in (None, _weights_digest(weights)):
        raise CheckpointError(f"{path} is damaged: its weights do not match their checksum; get a fresh copy")
    differing = model_differences(weights, model)
    if differing:
        raise CheckpointError(f"{path} was made for {differing[0]}: build the model that it was made for")
    model.load_state_dict(weights)
    return model


def _weights_digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
