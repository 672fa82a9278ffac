"""The folder of one run: a lock against a second process, whole files only, and a copy elsewhere if one is wanted.

Every file is written beside its final name, flushed to the disk and renamed, and the checkpoint before is kept; so at
any moment, also in the middle of a write, at least one whole checkpoint exists.
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

COPY_ATTEMPTS = 3  # at a mounted drive, which may be away for a moment
COPY_WAIT_SECONDS = 1.0  # between two attempts
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


class RunLockedError(Session10Error):
    """Another living process works in the same run folder."""


class RunFolder:
    """Where a run keeps its checkpoints. Use as a context manager.

    The lock belongs to the process: if that dies in any way, the lock is free, and the process itself may enter again,
    as a notebook's cell does when it is run twice. What a killed process left half written is removed on entering.

    Args:
        path: on a local disk; created on entering if missing.
        mirror: a second folder, such as one on a mounted Google Drive, to which each checkpoint is copied once it is
            whole in ``path``. The copy is retried, and when it fails the run goes on with a warning. On entering, a
            newer checkpoint of the same run there is fetched, and one of another run is refused.

    Attributes:
        saved_epochs: how many epochs the checkpoint holds that was last saved or loaded here; None before that.
        mirror_is_stale: the last copy failed: the mirror lags behind.
    """

    def __init__(self, path: str | os.PathLike, mirror: str | os.PathLike | None = None):
        self.path = Path(path)
        self.mirror = Path(mirror) if mirror is not None else None
        self.checkpoint = self.path / NEWEST
        self.previous = self.path / PREVIOUS
        self.saved_epochs: int | None = None
        self.mirror_is_stale = False
        self._newest_is_whole = True
        self._lock = FileLock(self.path / ".lock", is_singleton=True)
        self._lock_identity: tuple[int, int] | None = None

    @property
    def holds_checkpoint(self) -> bool:
        """True once a checkpoint was saved, also if the process died between the two renames of a save."""
        return self.checkpoint.exists() or self.previous.exists()

    def __enter__(self) -> RunFolder:
        """Lock the folder, clean it up, and fetch what the mirror holds of this run.

        Raises:
            RunLockedError: another process holds the folder.
            CheckpointError: the folder cannot be made or written, or the mirror's run is another one or unreadable.
        """
        self._acquire()
        try:
            for folder in filter(None, (self.path, self.mirror)):
                remove_parts(folder)
                for path in (folder / NEWEST, folder / PREVIOUS):
                    if os.path.exists(path) and not os.path.isfile(path):
                        raise CheckpointError(f"{path} is no file, so no checkpoint can be kept there: move it away")
            if self.mirror is not None:
                self._fetch()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self._lock.release()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; the one before becomes ``checkpoint.previous.pt``.

        Raises:
            RunLockedError: the lock was taken away while the run was going, so that another process may be at work here.
            CheckpointError: it cannot be written; the checkpoints that were there still are.
        """
        if _identity(self._lock.lock_file) != self._lock_identity:
            self._lock_again(checkpoint)
        content = checkpoint.encode()
        try:
            write_atomically(self.checkpoint, content, self.previous if self._newest_is_whole else None)
        except OSError as error:
            fix = (
                f"free {math.ceil(len(content) / 1e6)} MB there" if error.errno in OUT_OF_SPACE else "make it writable"
            )
            kept = (
                f"the checkpoint of epoch {self.saved_epochs} is still there" if self.saved_epochs else "none is lost"
            )
            raise CheckpointError(
                f"{self.checkpoint} could not be written ({reason_of(error)}); {kept}. To go on, {fix} and resume"
            ) from error
        self._newest_is_whole = True
        self.saved_epochs = checkpoint.epochs
        if self.mirror is not None:
            self._copy_to_mirror(checkpoint, content)

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None when there is none; warns when the newest one is damaged.

        Raises:
            CheckpointError: none is whole, or one cannot be read.
        """
        found, problems = newest_whole(self.path)
        if found is None and problems:
            raise CheckpointError(
                f"{'; '.join(problems)}. No whole checkpoint is left: delete {self.path} and start again"
            )
        if found is None:
            return None
        self.saved_epochs = found.epochs
        if problems:
            # The next save must not put the damaged file in the place of this good one.
            self._newest_is_whole = False
            warnings.warn(f"{problems[0]}; going on from {PREVIOUS}, which holds {found.epochs} epochs", stacklevel=2)
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
        """Whoever deletes the folder, or the lock alone, lets a second process in; if none has come, the run goes on."""
        is_deleted = not self.path.exists()
        self._lock.release(force=True)
        try:
            self._acquire()
            there = newest_header(self.path)
            if there is not None and there.run_id != checkpoint.run_id:
                raise RunLockedError(f"{self.path} holds another run now")
        except RunLockedError as error:
            raise RunLockedError(
                f"{self.path} was deleted or unlocked while this run was going, and another process has begun there: this "
                f"run stops without saving epoch {checkpoint.epochs}. Start it again in another run folder"
            ) from error
        if is_deleted:
            warnings.warn(
                f"{self.path} was deleted while the run was going: it is made anew, with the checkpoint after epoch "
                f"{checkpoint.epochs}",
                stacklevel=3,
            )

    # --- the mirror ---------------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """Take the mirror's checkpoint where it is newer than the one here, or the only one."""
        try:
            here, there = newest_header(self.path), _retry(lambda: newest_header(self.mirror))
            if here is not None and there is not None and here.run_id != there.run_id:
                raise CheckpointError(
                    f"{self.mirror} holds another run than {self.path}: set $S10_RUN_DIR to another folder, or choose "
                    "another --run-dir"
                )
            if there is None or (here is not None and here.epochs >= there.epochs):
                return
            found, _ = newest_whole(self.mirror)
            if found is None or (here is not None and here.epochs >= found.epochs):
                return
            write_atomically(self.checkpoint, found.encode())
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or self.mirror} could not be read or fetched ({reason_of(error)}): see that the drive is "
                f"mounted and {self.path} is writable, or unset $S10_RUN_DIR to run without the drive"
            ) from error
        say(f"fetched the checkpoint after epoch {found.epochs} from {self.mirror}")

    def _copy_to_mirror(self, checkpoint: Checkpoint, content: bytes) -> None:
        def copy() -> None:
            # Two levels and no more: where the drive is not mounted, its mount point must not be filled with folders.
            self.mirror.parent.mkdir(exist_ok=True)
            self.mirror.mkdir(exist_ok=True)
            there = newest_header(self.mirror)
            if there is not None and (there.run_id != checkpoint.run_id or there.epochs > checkpoint.epochs):
                whose = "another run's" if there.run_id != checkpoint.run_id else "a later"
                raise CheckpointError(f"{whose} checkpoint is there")
            write_atomically(self.mirror / NEWEST, content, self.mirror / PREVIOUS)

        try:
            _retry(copy)
            self.mirror_is_stale = False
        except (OSError, CheckpointError) as error:
            self.mirror_is_stale = True
            warnings.warn(
                f"the checkpoint of epoch {checkpoint.epochs} could not be copied to {self.mirror} ({reason_of(error)}); "
                f"the run goes on, and the whole file is {self.checkpoint}",
                stacklevel=3,
            )


def mirror_from_environment(run_dir: str | os.PathLike) -> Path | None:
    """The folder on the drive that ``$S10_RUN_DIR`` names in which ``run_dir`` is mirrored; None where it names none.

    On Colab, mount Drive and set it to a folder there: runs/full-seed0 is then copied to $S10_RUN_DIR/full-seed0 as it
    grows (two checkpoints of 105 MB), and a new machine goes on from that copy.
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


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint in ``folder``, or None, and what is wrong with those that are not.

    Raises:
        CheckpointError: one cannot be read, or is of a later version of this project.
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
    """``action()``, tried again when a drive fails for a moment; that a file is missing is an answer, not a failure."""
    for _ in range(COPY_ATTEMPTS - 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(COPY_WAIT_SECONDS)
    return action()


def _identity(path: str | os.PathLike) -> tuple[int, int] | None:
    """Device and inode of a file, or None where there is none: a file made anew under the same name is another one."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def reason_of(error: Exception) -> str:
    """The operating system's words for an ``OSError``, without the path, which the message names anyway."""
    return getattr(error, "strerror", None) or str(error)
