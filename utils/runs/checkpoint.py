"""A run's folder: locked against other processes, always with an intact checkpoint, copied to a drive if wanted.

A checkpoint is one file with everything that a run needs to continue exactly where it stopped: what ``torch.save`` writes,
then the SHA-256 of it. It is written under another name, flushed to the disk and renamed, and the one before it is kept,
so a kill at any moment leaves an intact one. Reading never unpickles code (``weights_only=True``).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from utils.engine import TrainState
from utils.metrics import History
from utils.runs.files import write_atomically
from utils.runtime import Session10Error, say

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
# What a folder may hold before its run begins: logs, notes and notebooks, but no results.
BESIDE_A_RUN = (".txt", ".log", ".ipynb", ".json")
DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointError(Session10Error):
    """A folder or checkpoint that cannot be used; the message names it, the reason and the fix."""


class RunLockedError(Session10Error):
    """Another process is using the run folder."""


class RunFolder:
    """Where a run keeps its checkpoints and results. Use as a context manager, or with ``open`` and ``close``.

    The lock is released however the process dies. The process itself may open the folder again, as when a notebook's cell
    runs twice.

    Args:
        path: new, empty but for logs, or the folder of a run.
        copy_to: a folder on a drive that outlives this machine: every checkpoint is copied there, and fetched from there
            if ``path`` has none. A copy that fails is only warned about.

    Attributes:
        saved_epochs: epochs in the checkpoint that was last saved or restored here; None before that.
    """

    def __init__(self, path: str | os.PathLike, copy_to: str | os.PathLike | None = None):
        self.path = Path(path)
        self.copy_to = Path(copy_to) if copy_to is not None else None
        self.saved_epochs: int | None = None
        self._lock = FileLock(self.path / ".lock", is_singleton=True)

    @property
    def holds_run(self) -> bool:
        return any((self.path / name).exists() for name in (NEWEST, PREVIOUS))

    def open(self) -> RunFolder:
        """Lock the folder, and fetch its copy if there is no checkpoint here.

        Raises CheckpointError if the folder holds something else than a run, RunLockedError if another process is using
        it, and OSError if it cannot be written, or the drive's folder is missing.
        """
        if self.path.is_dir() and not self.holds_run:
            foreign = [path.name for path in sorted(self.path.iterdir()) if _is_foreign(path)]
            if foreign:
                raise CheckpointError(
                    f"{self.path.resolve()} holds {foreign[0]!r} but no checkpoint of a run, and nothing there is "
                    "overwritten: choose a new --run-dir"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        if self.copy_to is not None:
            self.copy_to.parent.mkdir(exist_ok=True)  # not its parents: the drive may not be mounted
            self.copy_to.mkdir(exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunLockedError(
                f"{self.path} is in use by another process: wait for it, stop it, or choose another --run-dir"
            ) from None
        if self.copy_to is not None and not self.holds_run:
            self._fetch()
        return self

    def close(self, *exc) -> None:
        self._lock.release(force=True)  # however often it was opened

    __enter__, __exit__ = open, close

    def save(self, state: TrainState, record: dict) -> None:
        """Write a checkpoint: ``state``, the states of the random generators, and ``record``, plain JSON values.

        Raises OSError if it cannot be written; the ones before are kept.
        """
        content = {
            "record": record,
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "scaler": state.scaler.state_dict(),
            "average": state.average.state_dict() if state.average is not None else None,
            "history": state.history.to_dict(),
            "rng": rng_states(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getvalue()
        write_atomically(self.path / NEWEST, payload + hashlib.sha256(payload).digest(), self.path / PREVIOUS)
        self.saved_epochs = state.history.epochs
        self.copy(NEWEST)

    def load(self) -> dict | None:
        """The newest intact checkpoint, as ``save`` wrote it and on the CPU; None if there is none.

        Raises CheckpointError if there are only damaged ones.
        """
        damaged = []
        for path in (self.path / NEWEST, self.path / PREVIOUS):
            if path.exists():
                content = _read(path)
                if content is not None:
                    if damaged:
                        damaged[0].unlink()  # else it would replace this one when the next is saved
                        warnings.warn(f"{damaged[0]} is damaged: continuing from {path.name}", stacklevel=2)
                    return content
                damaged.append(path)
        if damaged:
            names = " and ".join(map(str, damaged))
            raise CheckpointError(
                f"{names}: damaged, or not of this version of the project; delete {self.path} and start again"
            )
        return None

    def restore(self, content: dict, state: TrainState) -> None:
        """Put a loaded checkpoint into ``state`` and the random generators."""
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.scheduler.load_state_dict(content["scheduler"])
        if content["scaler"]:  # empty if the run began in fp32 or bf16
            state.scaler.load_state_dict(content["scaler"])
        if state.average is not None:
            state.average.load_state_dict(content["average"])
        state.history = History(**content["history"])
        set_rng_states(content["rng"])
        self.saved_epochs = state.history.epochs

    def copy(self, name: str) -> None:
        """Copy a file of the folder to the drive, if there is one."""
        if self.copy_to is None:
            return
        keep = self.copy_to / PREVIOUS if name == NEWEST else None
        try:
            write_atomically(self.copy_to / name, (self.path / name).read_bytes(), keep)
        except OSError as error:
            warnings.warn(f"the run goes on, but is not copied: {error}", stacklevel=2)

    def finish(self) -> None:
        """Copy the results to the drive, and delete the checkpoint that a finished run no longer needs."""
        for folder in filter(None, (self.path, self.copy_to)):
            with contextlib.suppress(OSError):  # the drive may be gone
                (folder / PREVIOUS).unlink(missing_ok=True)
        for path in sorted(self.path.iterdir()):
            if path.is_file() and not path.name.startswith((".", NEWEST)):
                self.copy(path.name)

    def _fetch(self) -> None:
        for name in (PREVIOUS, NEWEST):
            if (self.copy_to / name).exists():
                write_atomically(self.path / name, (self.copy_to / name).read_bytes())
                say(f"fetched {name} from {self.copy_to}")


def rng_states() -> dict:
    """The states of torch's global generators: the CPU's, and the current GPU's or None."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_states(states: dict) -> None:
    """Restore what ``rng_states`` returned; the GPU's state only if there was a GPU then and is one now."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def copy_from_environment(run_dir: str | os.PathLike) -> Path | None:
    """Where ``$S10_COPY_TO`` wants the copy of ``run_dir``, such as /content/drive/MyDrive/session10/full-seed0."""
    folder, run_dir = os.environ.get("S10_COPY_TO"), Path(run_dir).resolve()
    if not folder or Path(folder).expanduser().resolve() == run_dir.parent:
        return None
    return Path(folder).expanduser() / run_dir.name


def _is_foreign(path: Path) -> bool:
    is_beside = path.name.startswith(".") or path.suffix in BESIDE_A_RUN
    return not is_beside or path.name == "metrics.json" or not path.is_file()


def _read(path: Path) -> dict | None:
    """A checkpoint's content; None if it is damaged or holds more than tensors and plain values."""
    content = path.read_bytes()
    payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception:  # a hostile file can make the unpickler fail in any way
        return None
