"""The folder of one run: locked against other processes, always with an intact checkpoint, copied to a drive if wanted.

Every file is written under a temporary name, flushed to the disk and renamed, and the previous checkpoint is kept. So
an intact checkpoint exists at any moment, even in the middle of a write.
"""

from __future__ import annotations

import errno
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from utils.runs.checkpoint import Checkpoint, CheckpointError, DamagedError, Header, decode, read_header
from utils.runtime import Session10Error, remove_parts, say, write_atomically

COPY_ATTEMPTS = 3  # a mounted drive may be away for a moment
COPY_WAIT_SECONDS = 1.0  # between two attempts
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


class RunLockedError(Session10Error):
    """Another process is using the run folder."""


class RunFolder:
    """Where a run keeps its checkpoints. Use as a context manager.

    The lock belongs to the process: it is released however the process dies, and the process itself may enter again, as
    when a notebook cell is run twice. Entering also removes the half-written files of killed processes.

    Args:
        path: on a local disk; created on entering if missing.
        mirror: a second folder, such as one on a mounted Google Drive, to which each checkpoint is copied. A failing
            copy is retried and then only warned about. On entering, a newer checkpoint of the same run is fetched from
            there, and one of another run is refused.

    Attributes:
        saved_epochs: epochs in the checkpoint last saved or loaded here; None before that.
        mirror_is_stale: True if the last copy failed.
    """

    def __init__(self, path: str | os.PathLike, mirror: str | os.PathLike | None = None):
        self.path = Path(path)
        self.mirror = Path(mirror) if mirror is not None else None
        self.checkpoint = self.path / NEWEST
        self.previous = self.path / PREVIOUS
        self.saved_epochs: int | None = None
        self.mirror_is_stale = False
        self._newest_is_intact = True
        self._lock = FileLock(self.path / ".lock", is_singleton=True)
        self._lock_identity: tuple[int, int] | None = None

    @property
    def holds_checkpoint(self) -> bool:
        """True once a checkpoint was saved, even if the process died between the two renames of a save."""
        return self.checkpoint.exists() or self.previous.exists()

    def __enter__(self) -> RunFolder:
        """Lock the folder, clean it up, and fetch what the mirror holds of this run.

        Raises:
            RunLockedError: another process holds the folder.
            CheckpointError: the folder cannot be created or written, or the mirror is unreadable or holds another run.
        """
        self._acquire()
        try:
            for folder in filter(None, (self.path, self.mirror)):
                remove_parts(folder)
                for path in (folder / NEWEST, folder / PREVIOUS):
                    if os.path.exists(path) and not os.path.isfile(path):
                        raise CheckpointError(f"{path} is not a file, so no checkpoint can be kept there: move it away")
            if self.mirror is not None:
                self._fetch()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self._lock.release()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; the previous one becomes ``checkpoint.previous.pt``.

        Raises:
            RunLockedError: the lock was lost during the run, and another process may be using the folder.
            CheckpointError: it cannot be written; the newest checkpoint is untouched.
        """
        if _identity(self._lock.lock_file) != self._lock_identity:
            self._lock_again(checkpoint)
        content = checkpoint.encode()
        try:
            write_atomically(self.checkpoint, content, self.previous if self._newest_is_intact else None)
        except OSError as error:
            is_full = error.errno in OUT_OF_SPACE
            fix = f"free {math.ceil(len(content) / 1e6)} MB there" if is_full else "make it writable"
            kept = (
                f"the checkpoint of epoch {self.saved_epochs} is still there" if self.saved_epochs else "none is lost"
            )
            raise CheckpointError(
                f"{self.checkpoint} could not be written ({reason_of(error)}); {kept}. To continue, {fix} and resume"
            ) from error
        self._newest_is_intact = True
        self.saved_epochs = checkpoint.epochs
        if self.mirror is not None:
            self._copy_to_mirror(checkpoint, content)

    def load(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None if there is none; warns if the newest one is damaged.

        Raises:
            CheckpointError: none is intact, one cannot be read, or the one that was saved or loaded before is gone.
        """
        found, problems = newest_intact(self.path)
        if found is None:
            if problems:
                raise CheckpointError(
                    f"{'; '.join(problems)}. No intact checkpoint is left: delete {self.path} and start again"
                )
            if self.saved_epochs is not None:  # whoever asks again has trained meanwhile, and cannot start over
                raise CheckpointError(
                    f"the checkpoint of epoch {self.saved_epochs} in {self.path} was deleted during the run: start a new "
                    "process, or restart the notebook's kernel, to begin again"
                )
            return None
        self.saved_epochs = found.epochs
        if problems:
            self._newest_is_intact = False  # the next save must not replace this good one by the damaged one
            warnings.warn(f"{problems[0]}; continuing from {PREVIOUS}, which holds {found.epochs} epochs", stacklevel=2)
        return found

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._lock_identity = _identity(self._lock.lock_file)
        except Timeout:
            raise RunLockedError(
                f"{self.path} is in use by another process: wait for it, stop it, or choose another run folder"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise CheckpointError(
                f"{self.path} cannot be used as a run folder ({reason_of(error)}): choose another one, or make it "
                "writable"
            ) from error

    def _lock_again(self, checkpoint: Checkpoint) -> None:
        """Deleting the folder or its lock lets a second process in; if none has come, this run continues."""
        is_deleted = not self.path.exists()
        self._lock.release(force=True)
        try:
            self._acquire()
            there = newest_header(self.path)
            if there is not None and there.run_id != checkpoint.run_id:
                raise RunLockedError(f"{self.path} holds another run now")
        except RunLockedError as error:
            raise RunLockedError(
                f"{self.path} was deleted or unlocked during this run, and another process has started there: this run "
                f"stops without saving epoch {checkpoint.epochs}. Start it again in another run folder"
            ) from error
        if is_deleted:
            warnings.warn(
                f"{self.path} was deleted during the run: it is created again, with the checkpoint after epoch "
                f"{checkpoint.epochs}",
                stacklevel=3,
            )

    # --- the mirror ---------------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """Take the mirror's checkpoint if it is newer than the one here, or the only one."""
        try:
            here, there = newest_header(self.path), _retry(lambda: newest_header(self.mirror))
            if here is not None and there is not None and here.run_id != there.run_id:
                raise CheckpointError(
                    f"{self.mirror} holds another run than {self.path}: set $S10_RUN_DIR to another folder, or choose "
                    "another --run-dir"
                )
            epochs_here = -1 if here is None else here.epochs
            if there is None or there.epochs <= epochs_here:
                return
            found, _ = newest_intact(self.mirror)
            if found is None or found.epochs <= epochs_here:
                return
            write_atomically(self.checkpoint, found.encode())
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or self.mirror} could not be read or fetched ({reason_of(error)}): check that the drive "
                f"is mounted and {self.path} is writable, or unset $S10_RUN_DIR to run without the drive"
            ) from error
        say(f"fetched the checkpoint after epoch {found.epochs} from {self.mirror}")

    def _copy_to_mirror(self, checkpoint: Checkpoint, content: bytes) -> None:
        def copy() -> None:
            # At most two levels: if the drive is not mounted, its mount point must not be filled with folders.
            self.mirror.parent.mkdir(exist_ok=True)
            self.mirror.mkdir(exist_ok=True)
            there = newest_header(self.mirror)
            if there is not None and there.run_id != checkpoint.run_id:
                raise CheckpointError("another run's checkpoint is there")
            if there is not None and there.epochs > checkpoint.epochs:
                raise CheckpointError("a later checkpoint is there")
            write_atomically(self.mirror / NEWEST, content, self.mirror / PREVIOUS)

        try:
            _retry(copy)
            self.mirror_is_stale = False
        except (OSError, CheckpointError) as error:
            self.mirror_is_stale = True
            warnings.warn(
                f"the checkpoint of epoch {checkpoint.epochs} could not be copied to {self.mirror} ({reason_of(error)}); "
                f"the run continues, and the complete file is {self.checkpoint}",
                stacklevel=3,
            )


def mirror_from_environment(run_dir: str | os.PathLike) -> Path | None:
    """The folder in ``$S10_RUN_DIR`` that mirrors ``run_dir``; None if the variable is not set.

    On Colab, mount Drive and set it to a folder there: runs/full-seed0 is then copied to $S10_RUN_DIR/full-seed0 as it
    grows (two checkpoints of 105 MB), and a new machine continues from that copy.
    """
    drive = os.environ.get("S10_RUN_DIR")
    if not drive:
        return None
    mirror = Path(os.path.expanduser(drive)) / Path(run_dir).resolve().name
    return None if mirror.resolve() == Path(run_dir).resolve() else mirror


def newest_header(folder: Path) -> Header | None:
    """The header of the newest checkpoint in ``folder`` whose header can be read, or None."""
    for name in (NEWEST, PREVIOUS):
        try:
            return read_header(folder / name)
        except (FileNotFoundError, DamagedError):
            continue
    return None


def newest_intact(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint in ``folder``, or None, and what is wrong with the damaged ones.

    Raises:
        CheckpointError: one cannot be read, or was written by a later version of this project.
    """
    problems = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        if path.exists():
            try:
                return decode(path), problems
            except DamagedError as error:
                problems.append(str(error))
    return None, problems


def _retry(action: Callable):
    """``action()``, repeated while a drive fails for a moment; a missing file is an answer and not retried."""
    for _ in range(COPY_ATTEMPTS - 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(COPY_WAIT_SECONDS)
    return action()


def _identity(path: str | os.PathLike) -> tuple[int, int] | None:
    """Device and inode of a file, which a new file of the same name does not share; None if it is missing."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def reason_of(error: Exception) -> str:
    """The operating system's words for an ``OSError``, without the path, which our messages name anyway."""
    return getattr(error, "strerror", None) or str(error)
