"""Runs of train.py that take a moment: a tiny network on a few images, in this process or in one that may be killed."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from utils.checkpoint import RunFolder, decode

import train
from benchmarks.kill_resume import RunProcess
from utils import checkpoint, engine
from utils.config import Config
from utils.dataset import ImageDataset, make_loaders
from utils.engine import TrainState, start
from utils.runtime import Precision, seed_everything

EPOCHS = 4
STEPS = 4  # an epoch
FP32 = Precision("fp32", torch.device("cpu"))


class TinyNet(nn.Module):
    """CustomResNet's stand-in: batch norm for its buffers, dropout because it draws from the global generator."""

    def __init__(self, num_classes: int = 10, dropout: float = 0.0, logit_scale: float = 0.125):
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
    settings = dict(profile="quick", batch_size=20, epochs=4, peak_epoch=1, ema_every=1, precision="fp32")
    return Config(**{**settings, **changes})


def tiny_state(dataset: ImageDataset, config: Config) -> tuple[TrainState, object, object]:
    """A fresh state with its train and test loader."""
    seed_everything(config.seed)
    loaders = make_loaders(dataset, config, FP32.device)
    return start(TinyNet(len(dataset.classes)), config, 1e-3, 1e-2, len(loaders[0]), FP32), *loaders


def arguments(run_dir: Path, *more: str) -> list[str]:
    """train.py's command line for ``EPOCHS`` epochs of ``STEPS`` steps."""
    text = (
        f"--profile quick --train-images 40 --test-images 20 --batch-size 10 --epochs {EPOCHS} --peak-epoch 1 "
        "--lr-min 1e-3 --lr-max 1e-2 --precision fp32 --device cpu --threads 1"
    )
    return [*text.split(), "--run-dir", str(run_dir), *more]


def shrink(dataset: ImageDataset, replace: Callable = setattr) -> None:
    """Let train.py use ``TinyNet`` and ``dataset``, and draw no figures."""
    replace(train, "CustomResNet", TinyNet)
    replace(train, "load_dataset", lambda root: dataset)
    replace(train, "make_figures", lambda *args: {})


def epochs_kept(run_dir: Path) -> int:
    """How many epochs the newest checkpoint holds."""
    return len(decode(run_dir / "checkpoint.pt")["history"]["lr"])


# --- a process of its own -------------------------------------------------------------------------------------------


def child(argv: list[str], dataset: ImageDataset, sabotage: Callable[[], None] | None = None) -> RunProcess:
    """``train.main(argv)`` in another process, shrunk; ``sabotage()`` is called in it first."""
    return RunProcess(argv, dataset, functools.partial(_prepare, dataset, sabotage))


def _prepare(dataset: ImageDataset, sabotage: Callable[[], None] | None) -> None:
    shrink(dataset)
    if sabotage is not None:
        sabotage()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(number: int, action: Callable[[], None], replace: Callable = setattr) -> None:
    """Call ``action`` when ``number`` batches, of training and testing together, have been counted."""
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
    write_atomically, fsync, replace = checkpoint.write_atomically, os.fsync, os.replace
    count = 0

    def half_written(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        fsync(descriptor)
        die()

    def between(source, target):
        replace(source, target)
        if str(target).endswith(RunFolder(".").previous.name):
            die()

    def counting(path, content, keep=None):
        nonlocal count
        count += keep is not None
        if count == number and keep is not None:
            if moment == "half-written":
                os.fsync = half_written
            else:
                os.replace = between if moment == "between-renames" else lambda *names: die()
        write_atomically(path, content, keep)

    checkpoint.write_atomically = counting


def after_save(number: int, action: Callable[[RunFolder, TrainState], None], replace: Callable = setattr) -> None:
    """Call ``action`` once the ``number``th checkpoint is written."""
    save = RunFolder.save
    count = 0

    def counting(self, state, config, data_fingerprint):
        nonlocal count
        save(self, state, config, data_fingerprint)
        count += 1
        if count == number:
            action(self, state)

    replace(RunFolder, "save", counting)
