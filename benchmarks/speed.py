"""How fast is it here? The baseline beside this project, on one machine in one run.

python -m benchmarks.speed                    the table, into runs/bench/
python -m benchmarks.speed --device cuda      with the rows that only a GPU has; --only PART... if time is short
python -m benchmarks.speed --operations       what a training step consists of, counted instead of timed
python -m benchmarks.speed --publish FILE...  measured files into benchmarks/results/ and benchmarks/README.md
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import reference
from models import ghost_norm
from utils import engine, lr_finder, runtime
from utils.config import Config
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.loaders import make_loaders
from utils.runs import report
from utils.runs.checkpoint import RunFolder
from utils.runs.cli import run_command
from utils.runs.files import write_json
from utils.runs.machine import code_commit, device_name, keep_freed_memory, versions
from utils.runtime import PROJECT_ROOT, ConfigError, say
from utils.transforms import test_transform, train_transform

HERE = PROJECT_ROOT / "benchmarks"
LRS = (1e-4, 1e-3)  # no range test: they do not change the speed
MANY_EPOCHS = 1000  # length of the LR cycle: more than are ever measured
PARTS = ("training", "step", "evaluation", "augmentation", "run", "checkpoint", "cold-start")


def random_images(train: int, test: int) -> ImageDataset:
    rng = np.random.default_rng(0)
    splits = [(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n)) for n in (train, test)]
    return ImageDataset(*splits[0], *splits[1], CIFAR10_CLASSES, "random", "random pixels")


def repeat_first(loader, device: torch.device) -> list:
    return [tuple(each.to(device) for each in next(iter(loader)))] * len(loader)


def prepare_baseline(part: str, args: argparse.Namespace) -> Callable[[], object]:
    """What makes one pass over the images of ``part``."""
    data, options = random_images(*args.sizes[part]), (args.batch_size, args.workers)
    train = reference.make_loader(data.train_images, data.train_labels, train_transform(), *options)
    test = reference.make_loader(data.test_images, data.test_labels, test_transform(), *options)
    model = reference.make_model(args.width).to(args.device)
    batches = repeat_first(train, args.device) if part == "step" else train
    train_epoch = partial(reference.train_epoch, model, batches, reference.make_optimizer(model), args.device)
    evaluate = partial(reference.evaluate, model, test, args.device)
    return {
        "training": train_epoch,
        "step": train_epoch,
        "evaluation": evaluate,
        "augmentation": lambda: deque(train, maxlen=0),
        "run": lambda: [(train_epoch(), evaluate()) for _ in range(args.epochs)],
    }[part]


def new_run(part: str, args: argparse.Namespace, **changes):
    """This project's state, train loader and test loader at the start of a run; ``changes`` are settings."""
    config = Config(**{"batch_size": args.batch_size, "width": args.width, "epochs": MANY_EPOCHS, **changes})
    precision = runtime.pick_precision(config.precision, args.device)
    runtime.seed_everything(0, config.deterministic)  # it also lets cuDNN choose its algorithms
    train, test = make_loaders(random_images(*args.sizes[part]), config, precision)
    model = engine.build_model(config, len(CIFAR10_CLASSES), precision)
    return engine.start(model, config, LRS, len(train), precision), train, test


def prepare_project(part: str, args: argparse.Namespace, tta: str = "none", **changes) -> Callable[[], object]:
    """The same for this project; ``changes`` are settings."""
    if part == "run":
        options = dict(eval_every=changes.get("eval_every", 1), show=None)
        return lambda: engine.fit(*new_run(part, args, epochs=args.epochs, **changes), args.epochs, **options)
    state, train, test = new_run(part, args, **changes)
    train_epoch = partial(engine.train_epoch, state, repeat_first(train, args.device) if part == "step" else train)
    if part == "checkpoint":
        train_epoch()
    folder = tempfile.TemporaryDirectory()
    return {
        "training": train_epoch,
        "step": train_epoch,
        "evaluation": partial(engine.evaluate, state.tested_model, test, precision=state.precision, tta=tta),
        "augmentation": lambda: deque(train, maxlen=0),
        "checkpoint": lambda: RunFolder(folder.name).save(state, {"folder": folder.name}),
    }[part]


def make_rows(args: argparse.Namespace) -> Iterator[tuple[dict, Callable]]:
    """Part, name and images per pass of each row, with what prepares it; the baseline's are the first of their part."""
    plain = f"this project, {runtime.pick_precision('auto', args.device).name}"
    name = f"{plain}, recorded" if args.device.type == "cuda" else plain
    both, variants = {"this project, fp32": dict(precision="fp32"), name: {}}, {}
    if args.has_gpu_rows:
        variants = {f"{plain}, eager": dict(recorded="off"), f"{plain}, deterministic": dict(deterministic=True)}
    if args.device.type == "cuda":
        variants[f"{plain}, compiled and recorded"] = dict(compile="default")
        variants["this project, fp16, recorded"] = dict(precision="fp16")
    rows = {"training": both, "step": both | variants, "augmentation": {"this project": {}}}
    rows["evaluation"] = both | {f"{name}, {tta}": dict(tta=tta) for tta in ("flip", "six views")}
    if args.has_gpu_rows:
        rows["run"] = {name: {}} | variants | {f"{name}, one test at the end": dict(eval_every=args.epochs)}
        rows["checkpoint"] = {"this project": {}}
    for part in rows:
        train, test = args.sizes[part]
        images = {"evaluation": test, "run": args.epochs * train, "checkpoint": 0}.get(part, train)
        if part != "checkpoint":
            usual = "baseline, loader processes" if part == "augmentation" else "baseline, fp32"
            yield dict(part=part, name=usual, images=images), partial(prepare_baseline, part, args)
        for name, changes in rows[part].items():
            yield dict(part=part, name=name, images=images), partial(prepare_project, part, args, **changes)


def timed(action: Callable[[], object]) -> float:
    """Seconds that ``action`` takes, including the work it gives the GPU."""
    began = time.perf_counter()
    action()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def measure(rows: Sequence[tuple[dict, Callable]], args: argparse.Namespace) -> list[dict]:
    """One pass of each row to warm up, then the others in turns: ``seconds`` is their median; or ``error`` says why not."""
    found, prepare = zip(*rows)
    try:
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        passes = [each() for each in prepare]
        first = [timed(run) for run in passes]
        repeats = 1 if found[0]["part"] == "run" else args.repeats
        seconds = [[timed(run) for run in passes] for _ in range(repeats)]
    except RuntimeError as error:  # too little memory, or a GPU that the compiler does not support
        return [{**row, "error": str(error).partition("\n")[0]} for row in found]
    for row, run, first_seconds, *each in zip(found, passes, first, *seconds):
        row |= {"seconds": median(each), "repeats": each}
        if first_seconds > 2 * row["seconds"]:  # it compiled, recorded or chose algorithms
            row["first_seconds"] = first_seconds
        if args.device.type == "cuda":
            row["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
            if row["part"] == "step":
                row |= profile_steps(run, row["images"] // args.batch_size)
    return list(found)


def profile_steps(run: Callable[[], object], steps: int) -> dict:
    """Launches and milliseconds of the GPU per step, and the ten kernels that take most of them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        timed(run)
    launches = sum(event.count for event in profiler.key_averages() if "Launch" in event.key) / steps
    on_gpu = (event for event in profiler.key_averages() if event.device_type.name == "CUDA")
    # An annotation, such as the one of Adam's step, spans kernels that are counted themselves.
    times = {each.key: each.self_device_time_total / 1000 / steps for each in on_gpu if not each.is_user_annotation}
    top = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {"launches": launches, "gpu_ms": sum(times.values()), "kernels": top}


def cold_start(args: argparse.Namespace) -> Iterator[dict]:
    """The stages of a first run; nothing else may have used the device in this process."""
    yield dict(part="cold-start", name="the device's start", images=0, seconds=args.device_seconds)
    made = []  # the state and its loaders
    stages = {
        "images, network": lambda: made.extend(new_run("cold-start", args)),
        "range test": lambda: lr_finder.sweep(made[0].model, made[1], Config(), made[0].precision),
        "first epoch": lambda: engine.train_epoch(*made[:2]),
        "second epoch": lambda: engine.train_epoch(*made[:2]),
    }
    for name, action in stages.items():
        yield dict(part="cold-start", name=name, images=0, seconds=timed(action))


class OperationCounter(TorchDispatchMode):
    """Counts the operations that are no views, and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not (function.is_view or name == "_unsafe_view" or "record_function" in name):
            tensors = {id(each): each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)}
            self.calls[name] += 1
            self.bytes[name] += sum(each.nbytes for each in tensors.values())
        return result


def count_operations(**changes) -> OperationCounter:
    """One training step in bf16 with a GPU's form of ghost norm, on CPU tensors; ``changes`` are settings."""
    config = Config(packed="off", **changes)
    precision = runtime.Precision("bf16", torch.device("cpu"))
    state = engine.start(engine.build_model(config, 10, precision), config, LRS, 98, precision)
    images = torch.randn(config.batch_size, 3, 32, 32).to(precision.dtype, memory_format=torch.channels_last)
    labels = torch.randint(10, (config.batch_size,))
    with mock.patch.object(ghost_norm, "prefers_small_calls", return_value=False):
        engine.train_step(state, images, labels)  # Adam makes its state
        with OperationCounter() as counter:
            engine.train_step(state, images, labels)
    return counter


def operations_table(counter: OperationCounter) -> str:
    rows = [("all that are no views", counter.calls.total(), f"{counter.bytes.total() / 1e6:,.0f}")]
    rows += [(name, counter.calls[name], f"{size / 1e6:,.0f}") for name, size in counter.bytes.most_common(12)]
    return report.markdown_table(("operations of a step", "calls", "MB read and written"), rows, "lrr")


def results_table(stored: dict) -> str:
    """A measured file as Markdown. The speed-up is over the first row of a part."""
    notes = dict(launches="{:.0f} launches", gpu_ms="{:.1f} ms of GPU time", peak_memory_mib="{:,.0f} MiB")
    notes |= dict(first_seconds="first pass {:.3g} s", error="failed: {}")
    lines, part = [], None
    for row in stored["rows"]:
        seconds = row.get("seconds")
        rate = row["images"] / seconds if seconds else 0
        if row["part"] != part:
            part, base = row["part"], rate
            lines.append((f"**{part}**", "", "", "", ""))
        values = {"{:.3g}": seconds, "{:,.0f}": rate, "{:.1f}": base and rate / base}
        numbers = [text.format(value) if value else "" for text, value in values.items()]
        also = ", ".join(text.format(row[key]) for key, text in notes.items() if key in row)
        lines.append((row.get("label", row["name"]), *numbers, also))
    machine = stored["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    how = f"{machine['device']}, {machine['loader_processes']} loader processes; {packages}. {stored['note']}".strip()
    return f"{how}\n\n" + report.markdown_table(("", "seconds", "images / s", "speed-up", ""), lines, "lrrrl")


def readme_block() -> str:
    paths = sorted((HERE / "results").glob("*.json"), reverse=True)  # speed-cpu.json, gpu.json
    return "\n\n".join(results_table(json.loads(path.read_text("utf-8"))) for path in paths)


def publish(files: Sequence[Path]) -> None:
    """Put measured files into benchmarks/results/ and all that are there into benchmarks/README.md."""
    for path in files:
        stored = json.loads(path.read_text("utf-8"))
        if stored["machine"]["quick"]:
            raise ConfigError(f"{path} was measured with --quick, so its numbers mean nothing: measure without")
        write_json(HERE / "results" / path.name, stored)
    readme = HERE / "README.md"
    readme.write_text(report.replace_block(readme.read_text("utf-8"), "speed", readme_block()), "utf-8")


def run(args: argparse.Namespace) -> None:
    """Measure what ``args`` ask for, and write the file after every part."""
    began = time.perf_counter()
    args.device = runtime.pick_device(args.device)
    args.device_seconds = time.perf_counter() - began
    keep_freed_memory()
    on_cuda = args.device.type == "cuda"
    args.has_gpu_rows = on_cuda or args.quick
    args.workers = min(8, os.cpu_count()) if on_cuda else 2
    args.batch_size, args.width, args.epochs = (8, 8, 6) if args.quick else (512, 64, 24)
    sizes = (16, 10) if args.quick else (50_000, 10_000) if on_cuda else (512, 1000)
    args.sizes = dict.fromkeys(PARTS, sizes)
    if not args.quick:
        args.sizes |= {"step": (50 * 512, 1)} if on_cuda else {"augmentation": (10_000, 1)}
    machine = dict(device=device_name(args.device), loader_processes=args.workers, quick=args.quick)
    machine |= dict(versions=versions(), commit=code_commit())
    path, parts = args.out / ("gpu.json" if on_cuda else f"speed-{args.device.type}.json"), args.only or PARTS
    stored = dict(machine=machine, note=args.note, rows=[])
    if args.only and path.exists():
        stored["rows"] = [row for row in json.loads(path.read_text("utf-8"))["rows"] if row["part"] not in parts]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.has_gpu_rows and "cold-start" in parts:
        stored["rows"] += cold_start(args)
    for part, group in groupby(make_rows(args), key=lambda row: row[0]["part"]):
        rows = list(group) if part in parts else []
        # On a CPU they take turns, so that whatever else runs slows all alike; a GPU's memory is freed after each.
        for together in [[row] for row in rows] if on_cuda else filter(None, [rows]):
            say(f"{time.strftime('%H:%M:%S')}  {part}: {'; '.join(row['name'] for row, _ in together)}")
            stored["rows"] += measure(together, args)
            write_json(path, stored)
    say(f"\n{results_table(stored)}\n\nwritten: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--publish", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts; the file keeps the others")
    parser.add_argument("--repeats", type=int, default=5, help="passes of every row (default: 5)")
    parser.add_argument("--note", default="", help="a sentence about the circumstances, shown with the table")
    parser.add_argument("--quick", action="store_true", help="a trial of every row; its numbers mean nothing")
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "runs" / "bench", help="folder of the JSON file")
    args = parser.parse_args(argv)
    if args.operations:
        return run_command(parser.prog, lambda: say(operations_table(count_operations())))
    return run_command(parser.prog, lambda: publish(args.publish) if args.publish else run(args))


if __name__ == "__main__":
    sys.exit(main())
