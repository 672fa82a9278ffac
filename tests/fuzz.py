"""Feed damaged files to everything that reads a file, and send signals to runs, until the time is up.

    python -m tests.fuzz --minutes 10

Pictures, checkpoints, weights files and metrics have bytes changed, cut off, inserted or repeated: each must either be
read as the whole file was, or be refused with one of our errors. (Pictures and metrics hold no checksum of ours: what can
still be read may differ there, and only its form is checked.) Runs, some of them together with their loader processes, get
SIGKILL, SIGTERM and Ctrl-C at random moments, up to three times, and must then end bit for bit like an undisturbed run.
Prints the number of trials and every wrong one; the exit code is 1 if there were any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models import CustomResNet
from tests.small_runs import RunProcess, arguments, identical, outcome, small_checkpoint
from utils.analysis import classify_file
from utils.dataset import load_dataset
from utils.runs import report
from utils.runs.checkpoint import decode
from utils.runs.folder import NEWEST
from utils.runs.weights import load_model, save_weights
from utils.runtime import Session10Error

CLASSES = ("a", "b", "c")
RUNS = {"runs": (), "runs with loaders": ("--pipeline", "albumentations", "--num-workers", "2")}  # and further flags
ENDS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}  # the exit code that each signal leads to


class WrongError(Exception):
    """A trial in which damage went unnoticed, or a run ended wrongly."""


def damaged(content: bytes, draw: random.Random) -> bytes:
    """``content`` with one to four random injuries."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(changed) + 1) if draw.random() < 0.5 else draw.randrange(min(len(changed), 300) + 1)
        kind = draw.choice(("flip", "cut", "insert", "zero", "repeat"))
        if kind == "flip" and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del changed[place : place + draw.choice((1, 8, len(changed)))]
        elif kind == "insert":
            changed[place:place] = draw.randbytes(draw.randint(1, 16))
        elif kind == "zero":
            changed[place : place + 64] = bytes(len(changed[place : place + 64]))
        elif kind == "repeat":
            changed[place:place] = changed[place : place + 256]
    return bytes(changed)


# --- files ------------------------------------------------------------------------------------------------------------


def picture(suffix: str, folder: Path) -> tuple[Path, Callable]:
    """A picture: if it can be decoded, its probabilities add up to 1."""
    path = folder / f"picture.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    model = CustomResNet(len(CLASSES), width=2)

    def read(path: Path):
        answers = classify_file(model, path, CLASSES)
        if not (len(answers) == 3 and abs(sum(share for _, share in answers) - 1) < 1e-3):
            raise WrongError(f"answers {answers}")
        return  # a changed pixel may change the answer

    return path, read


def checkpoint(folder: Path) -> tuple[Path, Callable]:
    path = folder / NEWEST
    path.write_bytes(small_checkpoint(3).encode())
    return path, lambda path: vars(decode(path))


def weights(folder: Path) -> tuple[Path, Callable]:
    path = folder / "weights.safetensors"
    save_weights(CustomResNet(len(CLASSES), width=2), path, {"classes": list(CLASSES), "width": 2})

    def read(path: Path) -> dict:
        model, about = load_model(path)
        return {**model.state_dict(), "about": about}

    return path, read


def metrics(folder: Path) -> tuple[Path, Callable]:
    """JSON has no checksum, so a changed number is not noticed; any error must be one of ours."""
    report.write_metrics(folder, {"test_accuracy": 94.2, "history": {"lr": [1e-3]}, "config": {"seed": 0}})

    def read(path: Path) -> None:
        report.read_metrics(path.parent)

    return folder / report.METRICS_NAME, read


FILES = {
    **{f"{suffix} pictures": partial(picture, suffix) for suffix in ("png", "jpg", "webp", "bmp")},
    "checkpoints": checkpoint,
    "weights files": weights,
    "metrics": metrics,
}


def try_file(path: Path, whole: bytes, read: Callable, draw: random.Random) -> str:
    """Read one damaged file; returns what happened, or raises WrongError if the damage went unnoticed."""
    path.write_bytes(whole)
    expected = read(path)
    path.write_bytes(damaged(whole, draw))
    try:
        found = read(path)
    except (Session10Error, OSError):
        return "refused"
    if not identical(found, expected):
        raise WrongError("a damaged file was read as a whole one")
    return "read" if expected is None else "as before"


# --- runs -------------------------------------------------------------------------------------------------------------


def try_run(folder: Path, flags: tuple[str, ...], dataset, expected: dict, seconds: float, draw: random.Random) -> str:
    """Interrupt a run up to three times; if ``flags`` give it loader processes, these get the signals too.

    Raises:
        WrongError: it cannot be resumed, prints a traceback, or ends with other bits than an undisturbed run.
    """
    run_dir, log = folder / "run", folder / "log"
    shutil.rmtree(run_dir, ignore_errors=True)
    signals = draw.choices(list(ENDS), k=draw.randint(1, 3))
    for number in signals:
        log.write_bytes(b"")
        process = RunProcess(arguments(run_dir, *flags, "--resume"), dataset, log=log)
        while process.is_alive and not log.stat().st_size:  # before its first line it has no signal handlers yet
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 1.2 * seconds))
        with contextlib.suppress(ProcessLookupError):  # it had already ended
            (os.killpg if flags else os.kill)(process.pid, number)
        code, said = process.wait(), log.read_text(encoding="utf-8")
        is_over = code == -number and "done: " in said  # killed while exiting, with everything written
        if code not in (0, ENDS[number]) and not is_over:
            raise WrongError(f"exit code {code} after {number!r}:\n{said[-2000:]}")
        if "Traceback" in said and "done: " not in said:
            raise WrongError(f"a traceback after {number!r}:\n{said[-2000:]}")
    log.write_bytes(b"")
    if RunProcess(arguments(run_dir, *flags, "--resume"), dataset, log=log).wait() != 0:
        raise WrongError(f"cannot be resumed after {signals}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    if not identical(outcome(run_dir), expected):
        raise WrongError(f"other bits after {signals}")
    return "bit-identical"


# --- all of it --------------------------------------------------------------------------------------------------------


def fuzz(seconds: float, seed: int = 0, kinds: tuple[str, ...] = (*FILES, *RUNS), say: Callable = print) -> int:
    """Try ``kinds`` in turn for ``seconds``; returns how many trials went wrong."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trials = {}
        for kind in kinds:
            folder = Path(scratch) / kind
            folder.mkdir()
            if kind in RUNS:
                dataset = load_dataset(source="digits").subset(40, 20)
                for _ in range(2):  # the first one also imports
                    shutil.rmtree(folder / "whole", ignore_errors=True)
                    began = time.monotonic()
                    RunProcess(arguments(folder / "whole", *RUNS[kind]), dataset).wait()
                took = time.monotonic() - began
                trials[kind] = partial(try_run, folder, RUNS[kind], dataset, outcome(folder / "whole"), took)
            else:
                path, read = FILES[kind](folder)
                trials[kind] = partial(try_file, path, path.read_bytes(), read)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for kind, trial in trials.items():
                until = time.monotonic() + 0.5  # files are many thousand times as fast as runs
                while time.monotonic() < min(until, deadline):
                    number = draw.getrandbits(32)
                    try:
                        counts[kind][trial(random.Random(number))] += 1
                    except Exception:
                        counts[kind]["WRONG"] += 1
                        say(f"{kind}, trial {number}:\n{traceback.format_exc()}")
    for kind, found in counts.items():
        say(f"{found.total():,} {kind}: " + ", ".join(f"{count:,} {what}" for what, count in found.items()))
    return sum(found["WRONG"] for found in counts.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed tries the same things, as far as time allows"
    )
    parser.add_argument("--only", choices=(*FILES, *RUNS), action="append", help="instead of everything")
    args = parser.parse_args(argv)
    wrong = fuzz(60 * args.minutes, args.seed, tuple(args.only or (*FILES, *RUNS)))
    print("nothing went wrong" if not wrong else f"{wrong} trials went wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
