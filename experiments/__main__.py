"""Make the runs behind the recipe's figures, and compare runs.

    python -m experiments seeds              the recipe with ten fresh seeds, at full width
    python -m experiments ablations          the recipe without one of its parts at a time, at half width
    python -m experiments table              tables and figures again, from the records of all runs
    python -m experiments compare RUN RUN    two run folders: settings that differ, results, curves

After Ctrl-C or a lost machine, the same command goes on. A run that fails (it diverges, or its range test has no answer)
is a result too. Commands that run side by side share the work: on two cores, two of them with ``--threads 1`` are faster
than one with two threads. Runs that experiments/results/runs.json has are not made again, but for ``seeds --publish``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # one line per run says enough

import torch

from experiments import tables
from experiments.compare import compare
from experiments.variants import RECIPE, WIDTHS, Run, is_current, plan
from utils import runtime
from utils.dataset import CIFAR10_CLASSES, ImageDataset, load_dataset
from utils.engine import NonFiniteLossError
from utils.lr_finder import LRRangeError
from utils.runs import report
from utils.runs.checkpoint import RunLockedError
from utils.runs.cli import run_command
from utils.runs.files import write_atomically, write_json
from utils.runs.job import run_job
from utils.runs.machine import device_name
from utils.runtime import ConfigError, say

README = runtime.PROJECT_ROOT / "README.md"
WAIT_SECONDS = 10.0  # until runs that other processes hold are looked at again


def load_images(args: argparse.Namespace) -> ImageDataset:
    """All of CIFAR-10; for a trial a few images of any kind."""
    dataset = load_dataset(args.data_dir)
    if args.small:
        return dataset.subset(96, 40)
    if dataset.classes != CIFAR10_CLASSES or len(dataset.train_labels) != report.RECIPE_TRAIN_IMAGES:
        raise ConfigError(f"these are {dataset.description}: experiments need all of CIFAR-10, or --small for a trial")
    return dataset


def make(run: Run, folder: Path, dataset: ImageDataset, device: torch.device) -> dict:
    """Train one run, or finish it; stores and returns its record. What the job prints goes to ``log.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    config, variant = run.config, run.variant
    record = {"stage": "seeds" if variant == RECIPE else "ablations", "variant": variant.name, "seed": run.seed}
    record |= {"purpose": variant.purpose, "changes": variant.changes, "split": "test", "config": config.to_dict()}
    with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            metrics = run_job(config, dataset, folder, device=device)
            record |= {"status": "done", **{name: metrics[name] for name in tables.RECORDED if name in metrics}}
            record["train_accuracy"] = metrics["history"]["train_accuracy"][-1]
        except (NonFiniteLossError, LRRangeError) as error:
            record |= {"status": "failed", "reason": str(error), "device": device_name(device)}
    write_json(folder / tables.RECORD_NAME, record)
    return record


def work(args: argparse.Namespace, wanted: list[Run], dataset: ImageDataset) -> bool:
    """Make the runs that are not made yet, last those that other processes hold; False if the time is up before."""
    device, began = runtime.pick_device(args.device), time.monotonic()
    alone = args.small or (args.publish and args.command == "seeds")  # Results/ needs the weights of every run

    def left() -> list[Run]:
        made = [tables.key_of(record) for record in tables.all_records(args.runs, alone) if is_current(record)]
        return [run for run in wanted if run.key not in made]

    say(f"{len(left())} runs to make")
    while pending := left():
        if time.monotonic() - began >= 60 * args.budget_minutes:
            say(f"the time is up, {len(pending)} runs are left: the same command goes on")
            return False
        for run in pending:
            with contextlib.suppress(RunLockedError):
                record = make(run, args.runs / run.folder, dataset, device)
                say(f"{run.folder}: {report.accuracies(record) or 'failed, ' + record['reason']}")
                break
        else:
            time.sleep(WAIT_SECONDS)
    return True


def show(args: argparse.Namespace) -> None:
    """Print the tables and write all files."""
    records = tables.all_records(args.runs, args.small)
    if records:
        folder = tables.RESULTS if args.publish else args.runs / "results"
        data = tables.write_results(folder, records)
        say(f"\n{tables.seeds_section(data)}\n\n{tables.ablations_section(data)}\n\nwritten to {folder}")
        if args.publish:
            text = report.replace_block(README.read_text(encoding="utf-8"), "experiments", tables.readme_part(data))
            write_atomically(README, text.encode())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("seeds", "ablations", "table"):
        add = commands.add_parser(name).add_argument
        add("--runs", type=Path, metavar="DIR", help="folder of the runs (default: runs/experiments)")
        add("--small", action="store_true", help="96 images, 3 epochs: a trial, never published")
        add("--publish", action="store_true", help="write experiments/results and the README; seeds: Results/ too")
        if name == "table":
            continue
        add("--width", type=int, metavar="W", help=f"channels of the first layer (default: {WIDTHS[name]})")
        add("--seeds", type=int, metavar="N", help="runs per variant (default: 10 of the main ones, 3 of the others)")
        add("--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
        add("--budget-minutes", type=float, default=math.inf, metavar="M", help="start no run after M minutes")
        add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
        add("--data-dir", help="a folder with CIFAR-10 (default: $CIFAR10_DIR, else data/)")
    add = commands.add_parser("compare").add_argument
    add("run", type=Path, nargs=2, metavar="RUN", help="folder of a finished run")
    add("--out", type=Path, metavar="FILE", help="of the figure (default: compare.png in the first folder)")
    args = parser.parse_args(argv)
    if args.command != "compare":
        if args.publish and (args.small or (args.command == "seeds" and args.width not in (None, WIDTHS["seeds"]))):
            parser.error("--publish is for the recipe at full width and for all images")
        args.runs = args.runs or runtime.PROJECT_ROOT / "runs" / ("experiments-small" if args.small else "experiments")
    return args


def run(args: argparse.Namespace) -> None:
    if args.command == "compare":
        compare(*args.run, args.out)
        return
    if args.command == "table":
        show(args)
        return
    if args.threads is not None:
        runtime.set_threads(args.threads)
    wanted, dataset = plan(args.command, args.width, args.seeds, args.small), load_images(args)
    try:
        is_done = work(args, wanted, dataset)
    finally:
        show(args)  # also after an interruption: what is made is shown
    if is_done and args.publish and args.command == "seeds":
        folders = [args.runs / run.folder for run in wanted]
        report.publish(folders[0], folders[1:])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command("experiments", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
