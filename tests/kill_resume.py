"""Kill runs with SIGKILL, resume them, and compare every bit with a run that was never killed.

    python -m benchmarks.kill_resume --runs 20

Each run trains the full network on a few images. Half of them are killed at a random moment, from the start of the LR
range test to the last file of the results; the other half while a checkpoint is being written. Each is then resumed
and must end with the same weights, optimizer state, LR schedule, weight average, random generators and history (but
for wall times) as the run that was left alone. Exits with 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import train
from utils import runtime
from utils.checkpoint import RunFolder, decode, write_atomically
from utils.dataset import DatasetError, ImageDataset, load_dataset
from utils.report import WEIGHTS_NAME

RESULT = Path(__file__).parent / "results" / "kill_resume.json"
EPOCHS = 4
TRAIN_IMAGES, TEST_IMAGES, BATCH_SIZE, RANGE_TEST_STEPS = 96, 40, 16, 40
LATEST = 0.95  # of the undisturbed run's time: a random kill comes before that
KILLED = -9


# --- a process that may be killed ---------------------------------------------------------------------------------------


class RunProcess:
    """``train.main(argv)`` on ``dataset`` in a process of its own.

    Forked from a server that has imported everything and computed nothing: it starts in no time.

    Args:
        argv: train.py's command line.
        dataset: what its ``load_dataset`` returns; small, since it is sent to the process.
        prepare: called there first.
        log: where its output goes; None: nowhere.
    """

    def __init__(
        self,
        argv: list[str],
        dataset: ImageDataset,
        prepare: Callable[[], None] | None = None,
        log: str | os.PathLike = os.devnull,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([train.__name__])
        self._process = context.Process(target=_train, args=(argv, dataset, prepare, log))
        self._process.start()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL: nothing in the process runs after it."""
        self._process.kill()

    def wait(self) -> int:
        """The exit code; minus the signal's number when a signal ended it."""
        self._process.join()
        return self._process.exitcode


def _train(argv: list[str], dataset: ImageDataset, prepare: Callable[[], None] | None, log: str) -> None:
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    multiprocessing.set_start_method(None, force=True)  # loader processes start as they do in any other process
    train.load_dataset = lambda root: dataset
    if prepare is not None:
        prepare()
    sys.exit(train.main(argv))


# --- comparing ----------------------------------------------------------------------------------------------------------


def outcome(run_dir: Path) -> dict:
    """All that a finished run leaves and that must not depend on where it was stopped: everything but wall times."""
    content = decode(RunFolder(run_dir).checkpoint)
    del content["history"]["seconds"]
    return {**content, "weights": (run_dir / WEIGHTS_NAME).read_bytes()}


def identical(a: object, b: object) -> bool:
    """Bit for bit, tensors and containers alike."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and a == b


# --- killing ------------------------------------------------------------------------------------------------------------


def kill_at(process: RunProcess, seconds: float) -> None:
    """Kill it so many seconds from now."""
    deadline = time.monotonic() + seconds
    while process.is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()


def kill_in_save(process: RunProcess, run_dir: Path, number: int) -> None:
    """Kill it while it writes its ``number``th checkpoint, as soon as the temporary file is there."""
    pattern, seen = f"{RunFolder(run_dir).checkpoint.name}.*.part", 0
    was_there = False
    while process.is_alive:
        is_there = any(run_dir.glob(pattern))
        seen += is_there and not was_there
        if seen == number:
            break
        was_there = is_there
        time.sleep(0.001)
    process.kill()


def killed_run(run_dir: Path, argv: list[str], dataset: ImageDataset, moments: random.Random, seconds: float | None):
    """Start a run and kill it: within ``seconds`` at random, or (None) while it writes one of its checkpoints.

    Returns:
        What was found afterwards, as JSON values, or None when the run was over before the blow fell.
    """
    process = RunProcess([*argv, "--run-dir", str(run_dir)], dataset)
    if seconds is None:
        kill_in_save(process, run_dir, moments.randint(1, EPOCHS))
    else:
        kill_at(process, moments.uniform(0, seconds))
    if process.wait() != KILLED:
        return None
    folder = RunFolder(run_dir)
    newest = next((path for path in (folder.checkpoint, folder.previous) if path.exists()), None)
    return {
        "epochs_saved": len(decode(newest)["history"]["lr"]) if newest else 0,
        "while_writing_a_checkpoint": any(run_dir.glob(f"{folder.checkpoint.name}.*.part")),
    }


# --- the table ----------------------------------------------------------------------------------------------------------


def measure(runs: int, dataset: ImageDataset, seed: int, threads: int, scratch: Path) -> dict:
    """Kill and resume ``runs`` runs in ``scratch``; the counts and every single kill, as JSON values."""
    argv = (
        f"--profile quick --epochs {EPOCHS} --peak-epoch 1 --batch-size {BATCH_SIZE} --train-images {TRAIN_IMAGES} "
        f"--test-images {TEST_IMAGES} --range-test-steps {RANGE_TEST_STEPS} --device cpu --precision fp32 "
        f"--threads {threads}"
    ).split()

    def finish(run_dir: Path) -> dict:
        log = scratch / "log.txt"
        if RunProcess([*argv, "--run-dir", str(run_dir), "--resume"], dataset, log=log).wait() != 0:
            raise SystemExit(f"kill_resume: a run failed:\n{log.read_text()[-2000:]}")
        return outcome(run_dir)

    began = time.monotonic()
    expected = finish(scratch / "never-killed")
    undisturbed_seconds = time.monotonic() - began
    print(f"undisturbed: {undisturbed_seconds:.1f} s")

    moments, kills, run_dir = random.Random(seed), [], scratch / "run"
    while len(kills) < runs:
        shutil.rmtree(run_dir, ignore_errors=True)
        seconds = LATEST * undisturbed_seconds if len(kills) % 2 == 0 else None
        kill = killed_run(run_dir, argv, dataset, moments, seconds)
        if kill is None:
            continue
        kill["identical"] = identical(finish(run_dir), expected)
        kills.append(kill)
        where = "while writing a checkpoint" if kill["while_writing_a_checkpoint"] else "elsewhere"
        verdict = "bit-identical" if kill["identical"] else "DIFFERENT"
        print(f"run {len(kills)}: killed {where}, {kill['epochs_saved']} epochs saved; resumed, {verdict}", flush=True)
    return {
        "runs": runs,
        "identical": sum(kill["identical"] for kill in kills),
        "killed_while_writing_a_checkpoint": sum(kill["while_writing_a_checkpoint"] for kill in kills),
        "undisturbed_seconds": undisturbed_seconds,
        "seed": seed,
        "command": " ".join(["train.py", *argv]),
        "data": dataset.description,
        "threads": threads,
        "versions": runtime.versions(),
        "kills": kills,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each run")
    parser.add_argument("--data-dir", help="CIFAR-10 (default: $CIFAR10_DIR; without either, scikit-learn's digits)")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    try:
        named = args.data_dir or os.environ.get("CIFAR10_DIR")
        dataset = (load_dataset(named) if named else load_dataset(source="digits")).subset(TRAIN_IMAGES, TEST_IMAGES)
    except DatasetError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(args.runs, dataset, args.seed, args.threads, Path(scratch))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, (json.dumps(result, indent=1) + "\n").encode())
    print(
        f"{result['identical']} of {result['runs']} killed and resumed runs ended bit-identical to the one that was "
        f"never killed; {result['killed_while_writing_a_checkpoint']} of them were killed while writing a checkpoint"
    )
    return 0 if result["identical"] == result["runs"] else 1


if __name__ == "__main__":
    sys.exit(main())
