"""A checkpoint: one file with everything a run needs to continue exactly where it stopped.

The file is a line of text (format, SHA-256, run, epochs), then what ``torch.save`` writes. Reading checks the digest
first and never unpickles code (``weights_only=True``). The run's record, all that was known before its first epoch, is
in the same file, so the two cannot come from different runs.

Resumed on the same machine with the same number of threads, a run ends bit for bit like one that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.engine import TrainState
from utils.metrics import History
from utils.runtime import Session10Error, rng_states, set_rng_states

MAGIC, FORMAT = b"session10-checkpoint", 2


class CheckpointError(Session10Error):
    """A file that cannot be used; the message names it, the reason and the fix."""


class DamagedError(CheckpointError):
    """A file that is not an intact checkpoint; the previous one may still be one."""


class Header(NamedTuple):
    """The first line of a checkpoint."""

    digest: str
    run_id: str
    epochs: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A run after ``epochs`` epochs, on the CPU.

    Attributes:
        run_id: drawn when the run began; unique.
        epochs: finished epochs; 0 after the LR range test.
        record: what was known before the first epoch (see ``report.run_record``).
        state: tensors and plain values.
    """

    run_id: str
    epochs: int
    record: dict
    state: dict

    @classmethod
    def of(cls, state: TrainState, record: dict) -> Checkpoint:
        """Everything in ``state``, and the state of every global random generator."""
        content = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "scaler": state.scaler.state_dict(),
            "averages": [average.state_dict() for average in state.averages],
            "history": state.history.to_dict(),
            "rng": rng_states(),
        }
        return cls(record["run_id"], state.history.epochs, record, content)

    def encode(self) -> bytes:
        """The file's bytes."""
        buffer = io.BytesIO()
        torch.save(vars(self), buffer)
        payload = buffer.getvalue()
        header = f" {FORMAT} {hashlib.sha256(payload).hexdigest()} {self.run_id} {self.epochs}\n"
        return MAGIC + header.encode() + payload

    def restore(self, path: Path, state: TrainState) -> None:
        """Load this into ``state`` and the global random generators; ``path`` is named in errors.

        Raises:
            CheckpointError: it was written for another model or by another version of this project.
        """
        content = self.state
        with of_this_version(path):
            differing = model_differences(content["model"], state.model)
            if differing:
                raise CheckpointError(f"{path} is of {differing}: choose another run folder")
            state.model.load_state_dict(content["model"])
            state.optimizer.load_state_dict(content["optimizer"])
            state.scheduler.load_state_dict(content["scheduler"])
            if content["scaler"] and state.scaler.is_enabled():  # empty if the run began in fp32 or bf16
                state.scaler.load_state_dict(content["scaler"])
            for average, saved in zip(state.averages, content["averages"], strict=True):
                average.load_state_dict(saved)
            state.history = History(**content["history"])
            set_rng_states(content["rng"])


@contextlib.contextmanager
def of_this_version(path: Path) -> Iterator[None]:
    """Turn the errors of reading an unknown layout into a ``CheckpointError`` about ``path``."""
    try:
        yield
    except Session10Error:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was written by another version of this project ({error!r}): finish the run with that version, "
            "or choose another run folder"
        ) from error


def read_header(path: Path) -> Header:
    """The first line of a checkpoint file, without reading the rest.

    Raises:
        DamagedError: it is not a checkpoint.
        CheckpointError: it was written by a later version.
        OSError: the file is missing or cannot be read.
    """
    with open(path, "rb") as file:
        return _parse_header(path, file.readline(256))


def decode(path: Path) -> Checkpoint:
    """Read and check a checkpoint file.

    Raises:
        DamagedError: it is not a checkpoint, is damaged, or holds more than tensors and plain values.
        CheckpointError: it cannot be read, or was written by a later version.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}), but it may be intact: make it readable for this user, or check "
            "that its disk is there"
        ) from error
    line, _, payload = raw.partition(b"\n")
    header = _parse_header(path, line)
    if hashlib.sha256(payload).hexdigest() != header.digest:
        raise DamagedError(f"{path} is damaged: its content does not match its checksum")
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a malicious file can make the unpickler fail in any way
        raise DamagedError(
            f"{path} is refused: it holds more than tensors and plain values, so loading it could run code"
        ) from error
    parts = {field.name for field in dataclasses.fields(Checkpoint)}
    if not isinstance(content, dict) or content.keys() != parts:
        raise DamagedError(f"{path} is not a Session 10 checkpoint: its parts are different")
    if (content["run_id"], content["epochs"]) != (header.run_id, header.epochs):
        raise DamagedError(f"{path} is damaged: its first line belongs to another checkpoint")
    return Checkpoint(**content)


def _parse_header(path: Path, line: bytes) -> Header:
    magic, *fields = line.strip().split(b" ")
    if magic != MAGIC:
        raise DamagedError(f"{path} is not a Session 10 checkpoint, or its beginning is damaged")
    try:
        version, *fields = fields
        if int(version) > FORMAT:
            raise CheckpointError(
                f"{path} was written by a later version of this project (format {int(version)}; this version reads "
                f"{FORMAT}): continue with that version, or choose another run folder"
            )
        digest, run_id, epochs = fields
        return Header(digest.decode("ascii"), run_id.decode("ascii"), int(epochs))
    except ValueError as error:  # also for a missing field
        raise DamagedError(f"{path} is damaged: its first line is incomplete") from error


def model_differences(weights: dict[str, Tensor], model: nn.Module) -> str:
    """The first tensor in ``weights`` that does not fit ``model``, in words; empty if all fit."""
    there = {name: tuple(value.shape) for name, value in weights.items()}
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            return f"another model ({name} is {there.get(name, 'missing')} there, {here.get(name, 'missing')} here)"
    return ""
