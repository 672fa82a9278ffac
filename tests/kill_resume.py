"""Kill runs of the full network with SIGKILL, resume them, and compare every bit with a run that was never killed.

    python -m tests.kill_resume --runs 20

Half of them are killed at a random moment, from the start of the LR range test to the last file of the results; the
other half while a checkpoint is being written. Each is then resumed and must end with the same weights, optimizer state,
LR schedule, weight average, random generators and history (except wall times) as the undisturbed run. The exit code is 1
if any differs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.small_runs import KILLED, RunProcess, identical, outcome
from utils.dataset import ImageDataset, load_dataset

EPOCHS = 4
FLAGS = (
    f"--profile quick --epochs {EPOCHS} --peak-epoch 1 --batch-size 16 --train-images 96 --test-images 40 "
    "--range-test-steps 40 --range-test-end 10 --device cpu --precision fp32 --threads 1"
).split()


def kill_in_save(process: RunProcess, run_dir: Path, number: int) -> None:
    """Kill it while it writes its ``number``th checkpoint, as soon as the temporary file exists."""
    seen, was_there = 0, False
    while process.is_alive and seen < number:
        is_there = any(run_dir.glob(".checkpoint.pt.*.s10part"))
        seen += is_there and not was_there
        was_there = is_there
        time.sleep(0.001)
    process.send(signal.SIGKILL)


def kill_after(process: RunProcess, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.is_alive and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send(signal.SIGKILL)


def finish(run_dir: Path, dataset: ImageDataset) -> dict:
    """Resume to the end and return the outcome; SystemExit with the run's output if it fails."""
    log = run_dir.with_suffix(".log")
    if RunProcess([*FLAGS, "--run-dir", str(run_dir), "--resume"], dataset, log=log, tiny=False).wait() != 0:
        raise SystemExit(f"kill_resume: a run failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return outcome(run_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    dataset = load_dataset(source="digits").subset(96, 40)
    moments, done, equal = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        expected = finish(Path(scratch) / "never-killed", dataset)
        seconds = time.monotonic() - began
        print(f"undisturbed: {seconds:.1f} s")
        run_dir = Path(scratch) / "run"
        while done < args.runs:
            shutil.rmtree(run_dir, ignore_errors=True)
            process = RunProcess([*FLAGS, "--run-dir", str(run_dir)], dataset, tiny=False)
            if done % 2:
                kill_in_save(process, run_dir, moments.randint(1, EPOCHS + 1))
            else:
                kill_after(process, moments.uniform(0, seconds))
            if process.wait() != KILLED:
                continue  # it was over before it could be killed
            done += 1
            is_equal = identical(finish(run_dir, dataset), expected)
            equal += is_equal
            print(f"run {done}: resumed, {'bit-identical' if is_equal else 'DIFFERENT'}", flush=True)
    print(f"{equal} of {done} killed and resumed runs ended bit-identical to the one that was never killed")
    return 0 if equal == done else 1


if __name__ == "__main__":
    sys.exit(main())
