"""How fast is it here? Our training beside the usual way's, on one machine in one run.

    python -m benchmarks.speed                       the table (about 15 minutes on 2 cores), into runs/bench/
    python -m benchmarks.speed --compile default     with a compiled row
    python -m benchmarks.speed --scaling             time and memory against image count and batch size
    python -m benchmarks.speed --publish FILE...     put measured files into benchmarks/results/ and the README

Every row runs in its own process. On a CPU the rows of a part take turns; on a GPU, which may lack the memory for all
of them, each is finished before the next begins. A row that fails says why, and the others go on. Close other programs
first, and trust ratios more than absolute numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks.workloads import MIB, WARM_UP_PASSES, Measurement, Workload, count_flop, measure
from utils import plotting
from utils.config import Config, choices
from utils.runs import report
from utils.runs.door import run_door
from utils.runs.machine import code_commit, versions
from utils.runtime import (
    PROJECT_ROOT,
    ConfigError,
    device_name,
    pick_device,
    pick_precision,
    say,
    set_threads,
    write_json,
)

# The measuring processes inherit both. Results cached by an earlier run must not shorten a first pass that compiles.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
STORED = PROJECT_ROOT / "benchmarks" / "results"
MEASURED = PROJECT_ROOT / "runs" / "bench"
TABLES = ("speed-cpu.json", "speed-cuda.json", "gpu.json")  # the files in STORED that the README shows, in this order
COMPILE_MODES = choices("compile")[1:]  # without "off"
EPOCH_IMAGES = 50_000  # CIFAR-10's train images: what "an epoch" is extrapolated to
IMAGE_BYTES = 32 * 32 * 3
QUICK_WIDTH = 8  # a network with a 64th of the work

UNITS = {
    "images_per_second": "images / s, wall clock",
    "images_per_core_second": "images / s of CPU time, loader processes included",
    "seconds_per_epoch": f"s, extrapolated to {EPOCH_IMAGES:,} images",
    "gflop_per_second": "10^9 floating-point operations / s",
    "matmul_fraction": "share of this machine's rate for matrix products of the same precision",
    "first_pass_seconds": "s, a process's first pass over the images: where torch.compile compiles",
    "peak_memory_mib": "MiB; CUDA: allocated on the GPU; CPU: resident in the process, loader processes not counted",
    "speedup": "times the first row of the part; augmentation on a CPU: by images_per_core_second",
}


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--num-workers", type=int, help="processes of the usual way's DataLoader (default: 2; GPU: 8)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and network: the numbers mean nothing")
    parser.add_argument("--out", type=Path, default=MEASURED, help="folder of the JSON file (default: runs/bench)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--scaling", action="store_true", help="time and memory against image count and batch size")
    mode.add_argument("--publish", type=Path, nargs="+", metavar="FILE", help="measure nothing; publish these files")
    add_machine_arguments(parser)
    parser.add_argument("--batch-size", type=int, help="images a training step (default: 512)")
    parser.add_argument("--images", type=int, help="images a training pass (default: GPU 50,000; CPU one batch)")
    parser.add_argument("--repeats", type=int, help="passes of every row (default: GPU 5, CPU 3)")
    parser.add_argument("--compile", nargs="+", default=[], choices=COMPILE_MODES, help="add a row for each mode")
    args = parser.parse_args(argv)
    for name in ("batch_size", "images", "repeats"):
        if (getattr(args, name) or 1) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    return args


def fill_in(args: argparse.Namespace, device: torch.device) -> None:
    """Set the sizes that the command line left open to what suits ``device``."""
    on_cpu = device.type == "cpu"
    args.batch_size = args.batch_size or (8 if args.quick else Config().batch_size)
    args.images = args.images or (args.batch_size if on_cpu or args.quick else EPOCH_IMAGES)
    args.repeats = args.repeats or (2 if args.quick else 3 if on_cpu else 5)
    if args.num_workers is None:
        args.num_workers = 2 if on_cpu else min(8, os.cpu_count())
    args.width = QUICK_WIDTH if args.quick else Config().width
    if args.batch_size > args.images:
        raise ConfigError(f"--batch-size is {args.batch_size}, more than the --images {args.images}: lower it")


def describe_machine(args: argparse.Namespace, device: torch.device) -> dict:
    if args.threads:
        set_threads(args.threads)
    packages = {name: version(name) for name in ("albumentations", "torchvision")}
    return {
        "device": device_name(device),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "loader_processes": args.num_workers,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions() | packages,
        "commit": code_commit(),
        "warm_up_passes": WARM_UP_PASSES[device.type],
        "quick": args.quick,
    }


class Progress:
    """Prints a line for each thing that is done, with its number, the total and the time so far."""

    def __init__(self, total: int):
        self.total, self.count, self.began = total, 0, time.monotonic()

    def __call__(self, what: str) -> None:
        self.count += 1
        say(f"[{self.count:>2}/{self.total}, {time.monotonic() - self.began:>4.0f} s] {what}")


# --- the rows ---------------------------------------------------------------------------------------------------------


def make_parts(args: argparse.Namespace, device: torch.device, precision: str) -> dict[str, list[Workload]]:
    """The rows of each part; the others are compared with the first. ``precision`` is what "auto" picks here."""
    on_cpu = device.type == "cpu"
    make = partial(Workload, device=str(device), threads=args.threads, width=args.width)
    usual = [
        dict(name=f"usual way, fp32, {words}", reference=True, num_workers=args.num_workers, padding=padding)
        for words, padding in (("replicated borders", "replicate"), ("zero padding", "zeros"))
    ]
    ours = [dict(name="ours, fp32")]
    if precision != "fp32":
        ours.append(dict(name=f"ours, {precision}", precision=precision))
    if on_cpu and precision == "bf16":
        ours.append(dict(ours[-1], name="ours, bf16, packed", packed=True))
    default = ours[-1]  # what train.py does here
    others = [dict(default, name=f"{default['name']}, compile {mode}", compile=mode) for mode in args.compile]
    if device.type == "cuda" and precision != "fp16":
        others.append(dict(name="ours, fp16", precision="fp16"))

    train = partial(make, "training", images=args.images, batch_size=args.batch_size)
    step = partial(make, "step", images=args.images // args.batch_size * args.batch_size, batch_size=args.batch_size)
    test_images = 20 if args.quick else 1000 if on_cpu else 10_000
    test = partial(make, "evaluation", images=test_images, batch_size=min(Config().eval_batch_size, test_images))
    loaded_images = max(args.batch_size, 100 if args.quick else 10_000 if on_cpu else EPOCH_IMAGES)
    augment = partial(make, "augmentation", images=loaded_images, batch_size=args.batch_size)
    side = 256 if args.quick else 4096 if on_cpu else 8192
    multiply = partial(make, "matmul", images=1 if on_cpu else 50, batch_size=side)
    precisions = dict.fromkeys(row.get("precision", "fp32") for row in [*ours, *others])
    return {
        "training": [train(**row) for row in [*usual, *ours]],
        "step": [
            *(step(**row) for row in [*usual, *ours, *others]),
            *(multiply(f"matrix products, {name}", precision=name) for name in precisions),
        ],
        "evaluation": [test(**row) for row in [*ours, dict(default, name=f"{default['name']}, flip TTA", tta=True)]],
        "augmentation": [
            augment("Albumentations, DataLoader", reference=True, num_workers=args.num_workers),
            augment("Albumentations, in process", reference=True),
            augment("ours"),
        ],
    }


def compare(args: argparse.Namespace, device: torch.device, precision: str) -> dict:
    """Measure every part; returns the content of the JSON file, except for ``machine``."""
    parts = make_parts(args, device, precision)
    progress = Progress(sum(len(workloads) for workloads in parts.values()) * (args.repeats + 1))
    rows, matmul = [], {}
    for part, workloads in parts.items():
        measured = measure(workloads, args.repeats, lambda what: progress(f"{part}: {what}"))  # noqa: B023
        baseline = compared_rates(workloads[0], measured[0])
        for workload, each in zip(workloads, measured):
            if workload.part != "matmul":
                rows.append(summarize(workload, each, baseline))
            elif not isinstance(each, str):
                flop = 2 * workload.batch_size**3 * workload.images
                matmul[workload.precision] = median_and_range([flop / one.seconds / 1e9 for one in each])
    for row in rows:
        if "gflop_per_second" in row and row["precision"] in matmul:
            row["matmul_fraction"] = row["gflop_per_second"]["median"] / matmul[row["precision"]]["median"]
    return {
        "flop_per_image": {part: count_flop(part, args.width) for part in ("training", "evaluation")},
        "matmul_gflop_per_second": matmul,
        "units": UNITS,
        "rows": rows,
    }


def summarize(workload: Workload, measured: list[Measurement] | str, baseline: list[float] | None) -> dict:
    """A row of the JSON file, from its repeats (or why there are none) and the ``compared_rates`` of the first row."""
    row = asdict(workload)
    if isinstance(measured, str):
        return {**row, "error": measured}
    rates = [workload.images / each.seconds for each in measured]
    row |= {
        "repeats": len(measured),
        "images_per_second": median_and_range(rates),
        "first_pass_seconds": measured[0].first_seconds,
        "peak_memory_mib": max(each.peak_bytes for each in measured) / MIB,
    }
    if baseline:
        row["speedup"] = median_and_range(
            [rate / base for rate, base in zip(compared_rates(workload, measured), baseline)]
        )
    if workload.part == "augmentation":
        row["images_per_core_second"] = median_and_range([workload.images / each.cpu_seconds for each in measured])
    else:
        flop = count_flop(workload.part, workload.width) * (2 if workload.tta else 1)
        row["gflop_per_second"] = median_and_range([flop * rate / 1e9 for rate in rates])
    if workload.part in ("training", "step"):
        row["seconds_per_epoch"] = median_and_range([EPOCH_IMAGES / rate for rate in rates])
    return row


def compared_rates(workload: Workload, measured: list[Measurement] | str) -> list[float] | None:
    """Images per second of each repeat, or per core-second where rows differ in cores; None if the row failed."""
    if isinstance(measured, str):
        return None
    per_core = workload.part == "augmentation" and workload.device == "cpu"
    return [workload.images / (each.cpu_seconds if per_core else each.seconds) for each in measured]


def median_and_range(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


# --- how cost grows ---------------------------------------------------------------------------------------------------


def make_curves(args: argparse.Namespace, device: torch.device, precision: str) -> dict[str, list[Workload]]:
    """The points of each curve, smallest first; a CPU gets sizes that it finishes within minutes.

    Time should grow in proportion. Memory should stay flat except for the images, or for a batch's activations.
    """
    on_cpu = device.type == "cpu"
    batch = 8 if args.quick else 128 if on_cpu else 512
    training = 4 * batch if on_cpu or args.quick else EPOCH_IMAGES
    loading = 100 * batch if args.quick else 100_000
    passes = 1 if on_cpu else 20
    batches = [batch * factor // 2 for factor in (1, 2, 4, 8, 16)]
    curves = {  # part, images and batch size of each point
        "training, by image count": [("training", training * factor // 4, batch) for factor in (1, 2, 4, 8)],
        "loading and augmentation, by image count": [
            ("augmentation", loading * factor // 8, batch) for factor in (1, 2, 4, 8)
        ],
        "step, by batch size": [("step", size * passes, size) for size in batches],
    }
    common = dict(device=str(device), precision=precision, threads=args.threads, width=args.width)
    common["packed"] = on_cpu and precision == "bf16"
    return {
        title: [Workload(part, f"{part} of {images:,}", images, size, **common) for part, images, size in points]
        for title, points in curves.items()
    }


def measure_scaling(args: argparse.Namespace, device: torch.device, precision: str) -> dict:
    """Measure every curve, without points that fail; returns the content of the JSON file, except for ``machine``."""
    curves = make_curves(args, device, precision)
    progress = Progress(sum(len(workloads) for workloads in curves.values()) * (args.repeats + 1))
    return {
        "precision": precision,
        "repeats": args.repeats,
        "curves": {
            title: [
                {
                    "images": workload.images,
                    "batch_size": workload.batch_size,
                    "seconds": median(each.seconds for each in measured),
                    "peak_memory_mib": max(each.peak_bytes for each in measured) / MIB,
                    "images_mib": workload.images * IMAGE_BYTES / MIB,
                }
                for workload, measured in zip(workloads, measure(workloads, args.repeats, progress))
                if not isinstance(measured, str)
            ]
            for title, workloads in curves.items()
        },
    }


def scaling_table(stored: dict) -> str:
    """Every curve's points."""
    rows = []
    for title, points in stored["curves"].items():
        rows.append((f"**{title}**", "", "", "", ""))
        for point in points:
            images, seconds = point["images"], point["seconds"]
            sizes = f"{images:,}", f"{point['batch_size']:,}"
            memory = f"{point['peak_memory_mib']:,.0f} MiB"
            rows.append((*sizes, f"{seconds:.3f}", f"{1000 * seconds / images:.3f}", memory))
    return aligned_table(("images", "batch", "seconds", "ms an image", "peak memory"), rows)


# --- what is printed and published ------------------------------------------------------------------------------------


def results_table(stored: dict) -> str:
    """The README's table, from the content of a JSON file; a row that failed says so."""
    lines, part = [], None
    for row in stored["rows"]:
        if row["part"] != part:
            part = row["part"]
            core = ", a core" if "images_per_core_second" in row else ""
            lines.append((f"**{part}**{core}", "", "", "", ""))
        if "error" in row or "text" in row:
            lines.append((row["name"], row.get("text") or f"failed: {row['error']}".replace("|", "/"), "", "", ""))
            continue
        lines.append(
            (
                row_name(row),
                format_spread(row.get("images_per_core_second", row["images_per_second"])),
                f"{row['matmul_fraction']:.0%}" if "matmul_fraction" in row else "",
                f"{row['peak_memory_mib']:,.0f} MiB",
                format_spread(row["speedup"], 1) if "speedup" in row else "",
            )
        )
    columns = ("images / s", "of the matrix-product rate", "peak memory", "times the first row")
    if all("images_per_second" not in row for row in stored["rows"]):
        columns, lines = ("measured",), [line[:2] for line in lines]
    return f"{how_measured(stored)}\n\n{aligned_table(('', *columns), lines)}"


def how_measured(stored: dict) -> str:
    """On which machine and how, in a sentence or two."""
    machine = stored["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    on = f"Measured alone on {machine['device']}, {machine['loader_processes']} loader processes; "
    if "how" in stored:
        return f"{on}{stored['how']}. {packages}."
    matmul = ", ".join(
        f"{rate['median']:,.0f} GFLOP/s in {name}" for name, rate in stored["matmul_gflop_per_second"].items()
    )
    repeats = next((row["repeats"] for row in stored["rows"] if "repeats" in row), 0)
    turns = "repeats with their range"
    if machine["warm_up_passes"]:  # on a CPU, where the rows take turns
        turns = f"interleaved {turns}, each after {machine['warm_up_passes']} passes to warm up"
    outrun = any(row.get("matmul_fraction", 0) > 1 for row in stored["rows"])
    return (
        f"{on}batch {stored['rows'][0]['batch_size']}, median of {repeats} {turns}; matrix products run at {matmul} "
        f"there{' (a share above 100%: convolutions outrun them)' if outrun else ''}. {packages}."
    )


def row_name(row: dict) -> str:
    """The row's name; for a compiled row, with the time of the pass that compiled."""
    if row["compile"] == "off":
        return row["name"]
    return f"{row['name']} (first {row['images']:,} images: {row['first_pass_seconds']:.0f} s)"


def format_spread(values: dict[str, float], digits: int = 0) -> str:
    middle, low, high = (f"{values[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low}-{high})"


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as text: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    header, *rows = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        for row in (header, *rows)
    )
    return report.markdown_table(header, rows, align="l" + "r" * (len(header) - 1))


def readme_part() -> str:
    """The README's generated part "speed": the tables of all stored files."""
    paths = [STORED / name for name in TABLES]
    return "\n\n".join(results_table(json.loads(path.read_text("utf-8"))) for path in paths if path.exists())


def publish(files: Sequence[Path], readme: Path = PROJECT_ROOT / "README.md") -> None:
    """Put measured files into benchmarks/results/, and redraw what is made from them.

    Raises:
        ConfigError: a file was not written by a benchmark, or was measured with ``--quick``.
    """
    for path in files:
        try:
            stored = json.loads(path.read_text("utf-8"))
            is_quick = stored["machine"]["quick"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is not what a benchmark writes ({error!r})") from None
        if is_quick:
            raise ConfigError(f"{path} was measured with --quick, so its numbers mean nothing: measure without")
        target = STORED / path.name
        write_json(target, stored)
        if "curves" in stored:
            plotting.save_figure(plotting.scaling(stored["curves"]), target.with_suffix(".png"))
        say(f"published: {target}")
    report.write_block(readme, "speed", readme_part())


def run(args: argparse.Namespace) -> None:
    """The whole command."""
    if args.publish:
        publish(args.publish)
        return
    device = pick_device(args.device)
    precision = pick_precision("auto", device).name
    fill_in(args, device)
    machine = describe_machine(args, device)
    say(", ".join(f"{name} {value}" for name, value in {"device": machine["device"], **machine["versions"]}.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{'scaling' if args.scaling else 'speed'}-{device.type}.json"
    result = {"machine": machine, **(measure_scaling if args.scaling else compare)(args, device, precision)}
    write_json(path, result)
    if args.scaling:
        say(scaling_table(result))
        plotting.save_figure(plotting.scaling(result["curves"]), path.with_suffix(".png"))
    else:
        say(results_table(result))
    say(f"written: {path}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_door("benchmarks.speed", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
