"""Very short runs of train.py: a tiny network on a few images, in this process or in one that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import train
from utils import engine
from utils.config import Config
from utils.dataset import ImageDataset
from utils.runs import figures, folder
from utils.runs.checkpoint import Checkpoint, CheckpointError, decode
from utils.runs.folder import NEWEST, PREVIOUS, RunFolder
from utils.runs.weights import WEIGHTS_NAME

EPOCHS = 4
STEPS = 4  # per epoch
KILLED = -signal.SIGKILL
GIVEN_LRS = ("--lr-min", "1e-3", "--lr-max", "1e-2")


class TinyNet(nn.Module):
    """CustomResNet's stand-in: batch norm for its buffers, dropout because it draws from the global generator."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel_size=3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(8 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.fc(self.dropout(x))


def tiny_config(**changes) -> Config:
    """``EPOCHS`` epochs of ``STEPS`` steps on 40 images."""
    settings = dict(profile="quick", train_images=40, test_images=20, batch_size=10, epochs=EPOCHS, peak_epoch=1)
    return Config(**{**settings, "precision": "fp32", "lr_min": 1e-3, "lr_max": 1e-2, **changes})


def arguments(run_dir: Path, *more: str) -> list[str]:
    """train.py's command line for ``tiny_config``."""
    text = (
        f"--profile quick --train-images 40 --test-images 20 --batch-size 10 --epochs {EPOCHS} --peak-epoch 1 "
        "--precision fp32 --device cpu --threads 1"
    )
    return [*text.split(), *GIVEN_LRS, "--run-dir", str(run_dir), *more]


def shrink(dataset: ImageDataset, replace: Callable = setattr) -> None:
    """Make runs use ``TinyNet`` and draw no figures, and train.py use ``dataset``."""
    replace(engine, "build_model", lambda config, num_classes: TinyNet(num_classes))
    replace(train, "load_dataset", lambda root: dataset)
    replace(figures, "draw_all", lambda inputs: {})


# --- what a run leaves ------------------------------------------------------------------------------------------------


def epochs_kept(run_dir: Path) -> int:
    """How many epochs the newest checkpoint holds, also while it is being replaced."""
    try:
        return decode(run_dir / NEWEST).epochs
    except CheckpointError:  # between the two renames of a save
        return decode(run_dir / PREVIOUS).epochs


def outcome(run_dir: Path) -> dict:
    """Everything a finished run leaves except wall times: it must not depend on where the run was stopped."""
    state = decode(run_dir / NEWEST).state
    del state["history"]["seconds"]
    return {**state, "weights": (run_dir / WEIGHTS_NAME).read_bytes()}


def identical(a: object, b: object) -> bool:
    """True if bit for bit equal: tensors, plain values and containers of them."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and a == b


def small_checkpoint(epochs: int, run_id: str = "this-run") -> Checkpoint:
    """A checkpoint without a network."""
    record = {"run_id": run_id, "lr_range": {"lr_max": 0.0125}}
    return Checkpoint(run_id, epochs, record, {"weights": torch.full((50,), float(epochs))})


class Payload:
    """Pickles into a call that leaves a trace, a folder."""

    def __init__(self, trace: str | Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


# --- in another process ---------------------------------------------------------------------------------------------


class RunProcess:
    """``train.main(argv)`` on ``dataset`` in another process, which leads its own process group.

    It is forked from a server that has imported everything and computed nothing, so it starts at once.

    Args:
        argv: train.py's command line.
        dataset: what its ``load_dataset`` returns; small, since it is sent to the process.
        sabotage: called there first.
        log: where its output goes.
        tiny: False for the full network.
    """

    def __init__(
        self,
        argv: list[str],
        dataset: ImageDataset,
        sabotage: Callable[[], None] | None = None,
        log: str | os.PathLike = os.devnull,
        tiny: bool = True,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([train.__name__, __name__])
        self._process = context.Process(target=_train, args=(argv, dataset, sabotage, log, tiny))
        self._process.start()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; minus the signal's number if a signal ended it."""
        self._process.join()
        return self._process.exitcode


def _train(argv: list[str], dataset: ImageDataset, sabotage: Callable[[], None] | None, log: str, tiny: bool) -> None:
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(descriptor, number)
        setattr(sys, stream, open(number, "w", encoding="utf-8", buffering=1, closefd=False))
    multiprocessing.set_start_method(None, force=True)  # loader processes start as they do in any other process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train.load_dataset = lambda root: dataset
    if tiny:
        shrink(dataset)
    if sabotage is not None:
        sabotage()
    sys.exit(train.main(argv))


# --- sabotage ---------------------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(number: int, action: Callable[[], None], replace: Callable = setattr) -> None:
    """Call ``action`` after ``number`` batches, counting those of training and testing."""
    update = engine.RunningMetrics.update
    count = 0

    def counting(self, logits, labels):
        nonlocal count
        update(self, logits, labels)
        count += 1
        if count == number:
            action()

    replace(engine.RunningMetrics, "update", counting)


def in_save(number: int, moment: str) -> None:
    """Die while writing the ``number``th checkpoint: "half-written", "before-renames" or "between-renames"."""
    write_atomically, fsync, replace = folder.write_atomically, os.fsync, os.replace
    count = 0

    def half_written(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        fsync(descriptor)
        die()

    def between(source, target):
        replace(source, target)
        if Path(target).name == PREVIOUS:
            die()

    def counting(path, content, keep=None):
        nonlocal count
        count += 1
        if count == number:
            if moment == "half-written":
                os.fsync = half_written
            else:
                os.replace = between if moment == "between-renames" else lambda *names: die()
        write_atomically(path, content, keep)

    folder.write_atomically = counting


def after_save(number: int, action: Callable[[RunFolder], None], replace: Callable = setattr) -> None:
    """Call ``action`` once the ``number``th checkpoint is written; the first is the one before epoch 1."""
    save = RunFolder.save
    count = 0

    def counting(self, checkpoint):
        nonlocal count
        save(self, checkpoint)
        count += 1
        if count == number:
            action(self)

    replace(RunFolder, "save", counting)
