"""Everything that takes a GPU to see, in one command; it needs CIFAR-10 (``$CIFAR10_DIR``), and no network.

    python -m benchmarks.gpu --budget-minutes 9       about 15 minutes in all, into runs/bench/gpu.json

24 epochs, first and second time in a process, eager and with each of torch.compile's modes; the same with tests only at
the end, and bit-identical (``deterministic``); the usual way beside it; a checkpoint's cost; and what a step spends its
time on. Each row runs in a process of its own: one that fails says why and costs nothing but itself. Rows that the JSON
file holds already are not measured again, so the same command goes on where a time limit ended it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.reference import (
    make_reference_loader,
    make_reference_model,
    make_reference_optimizer,
    train_reference_epoch,
)
from benchmarks.speed import (
    COMPILE_MODES,
    Progress,
    add_machine_arguments,
    describe_machine,
    fill_in,
    markdown_table,
    write_json,
)
from benchmarks.workloads import RowError, Worker, Workload, prepare, profile_pass, timed
from utils import engine
from utils.config import Config, full
from utils.dataset import ImageDataset, load_dataset
from utils.loaders import make_loaders
from utils.runs.checkpoint import Checkpoint
from utils.runs.door import run_door
from utils.runtime import pick_device, pick_precision, say, seed_everything, write_atomically

LRS = (1e-3, 1e-2)  # no range test: a schedule's numbers do not change its speed
FILE_NAME = "gpu.json"


def config_of(quick: bool, **changes) -> Config:
    """The recipe, or with ``quick`` a trial of a few steps."""
    tiny = dict(train_images=64, test_images=20, batch_size=16, epochs=3, peak_epoch=1, width=8) if quick else {}
    return full(**{**tiny, "lr_min": LRS[0], "lr_max": LRS[1], **changes})


def new_run(config: Config, device: str) -> tuple[engine.TrainState, tuple]:
    """A fresh state and its loaders."""
    dataset = load_dataset().subset(config.train_images, config.test_images)
    precision = pick_precision("auto", torch.device(device))
    seed_everything(config.seed, config.deterministic)
    loaders = make_loaders(dataset, config, precision.device, precision.dtype)
    model = engine.build_model(config, len(dataset.classes))
    return engine.start(model, config, *LRS, len(loaders[0]), precision), loaders


def time_run(config: Config, device: str) -> dict:
    """A whole training, twice in this process: the first pays for what is compiled and chosen once."""
    seconds = []
    for _ in range(2):
        state, loaders = new_run(config, device)
        fit = partial(engine.fit, state, *loaders, config.epochs, eval_every=config.eval_every, show=None)
        seconds.append(timed(fit))
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1],
        "text": f"{seconds[1]:.1f} s (first time {seconds[0]:.1f} s), {state.history.test_accuracy[-1]:.2f}%",
    }


def time_usual_way(config: Config, device: str, num_workers: int) -> dict:
    """One epoch of the usual way with zero padding, after one that does not count, times the epochs."""
    dataset: ImageDataset = load_dataset().subset(config.train_images, config.test_images)
    loader = make_reference_loader(dataset, config.batch_size, num_workers, torch.device(device))
    model = make_reference_model("zeros", config.width).to(device)
    optimizer = make_reference_optimizer(model)
    epoch = partial(train_reference_epoch, model, loader, optimizer, torch.device(device))
    epoch()
    seconds = timed(epoch)
    text = f"{config.epochs * seconds:.1f} s ({config.epochs} times one epoch of {seconds:.2f} s, no tests)"
    return {"seconds": config.epochs * seconds, "text": text}


def time_checkpoint(config: Config, device: str) -> dict:
    """A checkpoint after one epoch: to the host, hashed, written and flushed to the disk."""
    state, loaders = new_run(config, device)
    engine.train_epoch(state, loaders[0])
    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            content = Checkpoint.of(state, {"run_id": "benchmark"}).encode()
            write_atomically(Path(folder) / "checkpoint.pt", content)

        save()
        seconds = timed(save)
    return {"seconds": seconds, "text": f"{seconds:.2f} s"}


def profile_step(workload: Workload) -> dict:
    """What a step spends its time on; the whole table goes into the JSON file."""
    prepare(workload)
    found = profile_pass(workload.images // workload.batch_size)
    launches = f", {found['launches_per_step']:.0f} launches" if "launches_per_step" in found else ""
    return {**found, "text": f"{found['ms_per_step']:.2f} ms{launches}"}


def make_rows(args: argparse.Namespace, device: torch.device) -> list[tuple[str, str, Callable]]:
    """(part, name, function) of every row, the most wanted first; each function runs in a process of its own."""
    precision = pick_precision("auto", device).name
    config, name = partial(config_of, args.quick), str(device)
    run = f"{config().epochs} epochs"
    steps = 2 if args.quick else 50
    step = Workload(
        "step",
        "step",
        images=steps * args.batch_size,
        batch_size=args.batch_size,
        device=name,
        precision=precision,
        width=args.width,
    )
    modes = () if args.quick else COMPILE_MODES[1:]
    return [
        (run, f"ours, {precision}", partial(time_run, config(), name)),
        (run, "usual way, fp32, zero padding", partial(time_usual_way, config(), name, args.num_workers)),
        (run, f"ours, {precision}, one test", partial(time_run, config(eval_every=config().epochs), name)),
        *((run, f"ours, compile {mode}", partial(time_run, config(compile=mode), name)) for mode in modes),
        (run, "ours, deterministic", partial(time_run, config(deterministic=True), name)),
        ("once", "a checkpoint", partial(time_checkpoint, config(), name)),
        ("once", "a step", partial(profile_step, step)),
    ]


def measure_all(args: argparse.Namespace) -> dict:
    """Measure what the file does not hold yet; returns its content."""
    began = time.monotonic()
    device = pick_device(args.device)
    fill_in(args, device)
    path = args.out / FILE_NAME
    machine = describe_machine(args, device)
    result = {"machine": machine, "how": "each row in a process of its own", "rows": []}
    if path.exists():
        stored = json.loads(path.read_text("utf-8"))
        if stored["machine"] == machine:
            result = stored
    known = {(row["part"], row["name"]) for row in result["rows"]}
    rows = make_rows(args, device)
    progress = Progress(len(rows))
    for part, name, function in rows:
        if (part, name) in known:
            progress(f"{name}: measured before")
            continue
        left = None if args.budget_minutes is None else 60 * args.budget_minutes - (time.monotonic() - began)
        if left is not None and left < 1:
            say("the time is up: the same command goes on with the other rows")
            break
        with Worker(str(device), args.threads) as worker:
            try:
                row = worker.call(function, timeout=left)
            except RowError as error:
                row = {"error": str(error)}
        progress(f"{name}: {row.get('text') or row['error']}")
        result["rows"].append({"part": part, "name": name, **row})
        write_json(path, result)
    usual, ours = (
        next((row.get("seconds") for row in result["rows"] if row["name"].startswith(start)), None)
        for start in ("usual way", "ours")
    )
    if usual and ours:
        result["ratio"] = usual / ours
        write_json(path, result)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_machine_arguments(parser)
    parser.add_argument("--budget-minutes", type=float, help="stop after so many minutes, in mid-row if need be")
    parser.set_defaults(batch_size=None, images=None, repeats=None)
    args = parser.parse_args(argv)

    def run() -> None:
        result = measure_all(args)
        say(markdown_table(result))
        if "ratio" in result:
            say(f"24 epochs: {result['ratio']:.1f} times the usual way's speed")

    return run_door("benchmarks.gpu", run)


if __name__ == "__main__":
    sys.exit(main())
