"""Everything that takes a GPU to see, in one command. It needs CIFAR-10 (``$CIFAR10_DIR``), but no network.

    python -m benchmarks.gpu --budget-minutes 9       about 15 minutes in all, into runs/bench/gpu.json

Times 24 epochs, the first and the second time in a process: as they are, bit-identical (``deterministic``), in fp16,
with a test only at the end, with each of torch.compile's modes, and the usual way beside them. Also measures what a
checkpoint costs and what a step spends its time on. Each row runs in its own process: one that fails says why, and the
others go on. Rows that the JSON file already holds are not measured again, so the same command goes on after a time
limit.
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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import (
    COMPILE_MODES,
    EPOCH_IMAGES,
    Progress,
    add_machine_arguments,
    describe_machine,
    fill_in,
    results_table,
)
from benchmarks.workloads import RowError, Worker, Workload, make_pass, timed
from utils import engine
from utils.config import Config, full
from utils.dataset import load_dataset
from utils.loaders import make_loaders
from utils.runs.checkpoint import Checkpoint
from utils.runs.door import run_door
from utils.runtime import ConfigError, pick_device, pick_precision, say, seed_everything, write_atomically, write_json

LRS = (1e-3, 1e-2)  # no range test: the LRs do not change the speed
FILE_NAME = "gpu.json"
TIME_IS_UP = "the time is up: the same command goes on with the other rows"


def config_of(quick: bool, **changes) -> Config:
    """The recipe, or with ``quick`` a trial of a few steps."""
    tiny = dict(train_images=64, test_images=20, batch_size=16, epochs=3, peak_epoch=1, width=8) if quick else {}
    return full(**{**tiny, "lr_min": LRS[0], "lr_max": LRS[1], **changes})


def new_run(config: Config, device: str) -> tuple[engine.TrainState, tuple]:
    """A fresh state and its loaders."""
    dataset = load_dataset().subset(config.train_images, config.test_images)
    precision = pick_precision(config.precision, torch.device(device))
    seed_everything(config.seed, config.deterministic)
    loaders = make_loaders(dataset, config, precision.device, precision.dtype)
    model = engine.build_model(config, len(dataset.classes))
    return engine.start(model, config, *LRS, len(loaders[0]), precision), loaders


# --- the rows: each returns what goes into the JSON file, with a ``text`` for the table -------------------------------


def time_run(config: Config, device: str) -> dict:
    """A whole training, twice in this process: the first one pays for what is compiled and chosen once."""
    seconds = []
    for _ in range(2):
        state, loaders = new_run(config, device)
        fit = partial(engine.fit, state, *loaders, config.epochs, eval_every=config.eval_every, show=None)
        seconds.append(timed(fit))
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1],
        "text": f"{seconds[1]:.1f} s (first time {seconds[0]:.1f} s)",
    }


def time_usual_way(workload: Workload, epochs: int) -> dict:
    """``epochs`` times the second epoch of the usual way."""
    epoch = make_pass(workload)
    epoch()
    seconds = timed(epoch)
    text = f"{epochs * seconds:.1f} s ({epochs} times one epoch of {seconds:.2f} s, no tests)"
    return {"seconds": epochs * seconds, "text": text}


def time_checkpoint(config: Config, device: str) -> dict:
    """A checkpoint after one epoch: copied to the host, hashed, written and flushed to the disk."""
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
    """What a step spends its time on.

    Returns:
        ``table`` (the 20 operations that take most time), ``ms_per_step`` (without the profiler) and, on a GPU,
        ``gpu_ms_per_step`` (sum of its kernels' times) and ``launches_per_step``.
    """
    on_cuda = torch.device(workload.device).type == "cuda"
    steps = workload.images // workload.batch_size
    run_pass = make_pass(workload)
    run_pass()
    seconds = timed(run_pass)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        timed(run_pass)
    events = profiler.key_averages()
    sort_by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    found = {
        "table": events.table(sort_by=sort_by, row_limit=20, max_name_column_width=60),
        "ms_per_step": 1000 * seconds / steps,
    }
    text = f"{found['ms_per_step']:.2f} ms"
    if on_cuda:
        on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
        kernels = [event for event in on_gpu if not getattr(event, "is_user_annotation", False)]
        found["gpu_ms_per_step"] = sum(event.self_device_time_total for event in kernels) / 1000 / steps
        found["launches_per_step"] = sum(event.count for event in events if "LaunchKernel" in event.key) / steps
        text += f", {found['launches_per_step']:.0f} launches"
    return {**found, "text": text}


def make_rows(args: argparse.Namespace, device: torch.device) -> list[tuple[str, str, Callable]]:
    """(part, name, function) of every row, the most wanted first; each function runs in its own process."""
    precision = pick_precision("auto", device).name
    config, name = partial(config_of, args.quick), str(device)
    recipe = config()
    part = f"{recipe.epochs} epochs"
    make = partial(Workload, device=name, batch_size=recipe.batch_size, width=recipe.width)
    images, steps = recipe.train_images or EPOCH_IMAGES, 2 if args.quick else 50
    usual = make("training", "usual way", images=images, reference=True, num_workers=args.num_workers)
    step = make("step", "a step", images=steps * recipe.batch_size, precision=precision)
    modes = () if args.quick else COMPILE_MODES
    others = ("fp16",) if precision == "bf16" and device.type == "cuda" else ()
    return [
        (part, f"ours, {precision}", partial(time_run, recipe, name)),
        (part, "usual way, fp32, zero padding", partial(time_usual_way, usual, recipe.epochs)),
        (part, "ours, deterministic", partial(time_run, config(deterministic=True), name)),
        *((part, f"ours, {other}", partial(time_run, config(precision=other), name)) for other in others),
        ("once", "a checkpoint", partial(time_checkpoint, recipe, name)),
        ("once", "a step", partial(profile_step, step)),
        (part, f"ours, {precision}, one test", partial(time_run, config(eval_every=recipe.epochs), name)),
        *((part, f"ours, compile {mode}", partial(time_run, config(compile=mode), name)) for mode in modes),
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace) -> dict:
    """Measure the rows that the file does not hold yet; returns its content.

    Raises:
        ConfigError: the file's rows were measured under other circumstances, or CIFAR-10 is not here.
    """
    began = time.monotonic()
    device = pick_device(args.device)
    dataset = load_dataset()
    if not args.quick and (dataset.is_stand_in or len(dataset.train_labels) != EPOCH_IMAGES):
        raise ConfigError(
            f"the times are those of {EPOCH_IMAGES:,} images, but these are {dataset.description}: set CIFAR10_DIR to "
            "CIFAR-10, or try the command with --quick"
        )
    fill_in(args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / FILE_NAME
    machine = describe_machine(args, device)
    result = {"machine": machine, "data": dataset.description, "how": "each row in a process of its own", "rows": []}
    if path.exists():
        stored = json.loads(path.read_text("utf-8"))
        if stored["machine"] != machine:
            raise ConfigError(
                f"{path} holds rows of another machine, of other versions or of another commit: move it away, or choose "
                "another folder with --out"
            )
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
            say(TIME_IS_UP)
            break
        with Worker(str(device), args.threads) as worker:
            try:
                row = worker.call(function, timeout=left)
            except RowError as error:
                row = {"error": str(error)}
        had_less = left is not None and left < 0.9 * 60 * args.budget_minutes
        if "error" in row and had_less and time.monotonic() - began >= 60 * args.budget_minutes:
            say(TIME_IS_UP)  # the row may well fit into a whole call
            break
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
    parser.add_argument("--budget-minutes", type=float, help="stop after so many minutes, even within a row")
    parser.set_defaults(batch_size=None, images=None, repeats=None)
    args = parser.parse_args(argv)

    def run() -> None:
        result = measure_all(args)
        say(results_table(result))
        if "ratio" in result:
            say(f"24 epochs: {result['ratio']:.1f} times the usual way's speed")

    return run_door("benchmarks.gpu", run)


if __name__ == "__main__":
    sys.exit(main())
