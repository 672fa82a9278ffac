"""Very short runs of train.py: a narrow network on a few images, in this process or in one that may be killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import train
from utils.config import Config, from_profile
from utils.dataset import ImageDataset
from utils.runs import figures, job
from utils.runs.checkpoint import RunFolder
from utils.runs.weights import WEIGHTS_NAME

EPOCHS = 4
STEPS = 4  # per epoch
GIVEN_LRS = ("--lr-min", "1e-3", "--lr-max", "1e-2")
SETTINGS = dict(train_images=40, test_images=20, batch_size=10, epochs=EPOCHS, peak_epoch=1, width=4, precision="fp32")


def tiny_config(**changes) -> Config:
    """``EPOCHS`` epochs of ``STEPS`` steps on 40 images, which the caller cuts out."""
    return from_profile("quick", **{**SETTINGS, "lr_min": 1e-3, "lr_max": 1e-2, **changes})


def arguments(run_dir: Path, *more: str, lrs: tuple[str, ...] = GIVEN_LRS) -> list[str]:
    """train.py's command line for ``tiny_config``."""
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["--profile", "quick", *flags, "--device", "cpu", *lrs, "--run-dir", str(run_dir), *more]


def shrink(dataset: ImageDataset, replace: Callable = setattr) -> None:
    """Make runs draw no figures and accept few steps per epoch, and train.py use ``dataset``."""
    replace(job, "FEW_STEPS", STEPS)
    replace(train, "load_dataset", lambda root: dataset)
    replace(figures, "draw_all", lambda *inputs: {})


def at_call(owner: object, name: str, number: int, action: Callable, replace: Callable = setattr) -> None:
    """Call ``action`` just before the ``number``th call of ``owner.name``."""
    original, count = getattr(owner, name), itertools.count(1)

    def counting(*args, **kwargs):
        if next(count) == number:
            action()
        return original(*args, **kwargs)

    replace(owner, name, counting)


def at_step(number: int, action: Callable, replace: Callable = setattr) -> None:
    """Call ``action`` in the ``number``th training step, counted from 1."""
    at_call(torch.Tensor, "backward", number, action, replace)


def outcome(run_dir: Path) -> dict:
    """All that a finished run leaves but wall times: it must not depend on where the run was stopped."""
    content = RunFolder(run_dir).load()
    del content["record"], content["history"]["seconds"]
    return {**content, "weights": (run_dir / WEIGHTS_NAME).read_bytes()}


def identical(a: object, b: object) -> bool:
    """True if bit for bit equal: tensors, plain values and containers of them."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and a == b


def start_process(target: Callable, *args) -> multiprocessing.Process:
    """``target(*args)`` in a process forked from a server that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__name__, __name__])
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def start_run(argv: list[str], dataset: ImageDataset, sabotage: Callable | None = None, log: str | Path = os.devnull):
    """train.py on ``dataset`` in another process; ``sabotage`` is called there first, and ``log`` takes its output."""
    return start_process(_train, argv, dataset, sabotage, log)


def _train(argv: list[str], dataset: ImageDataset, sabotage: Callable | None, log: str | Path) -> None:
    multiprocessing.set_start_method(None, force=True)  # loader processes start as they do in any other process
    sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")
    torch.set_num_threads(1)
    shrink(dataset)
    if sabotage is not None:
        sabotage()
    sys.exit(train.main(argv))


def exit_code(process: multiprocessing.Process) -> int:
    """Waits for the process; minus the signal's number if a signal ended it."""
    process.join(300)
    return process.exitcode
