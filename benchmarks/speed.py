"""How fast is it here? Our training beside the usual way's, on one machine in one run.

    python -m benchmarks.speed              the table (about 8 minutes on 2 cores), and benchmarks/results/speed-*.json
    python -m benchmarks.speed --scaling    time and memory against image count and batch size
    python -m benchmarks.speed --profile    what one pass of our training spends its time on

Every row runs in a process of its own; within a part the rows take turns, so that what else the machine does hits all
of them. Close other programs first, and trust ratios before absolute numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks.scaling import measure_scaling, plot_scaling
from benchmarks.workloads import MIB, WARM_UP_PASSES, Measurement, Worker, Workload, count_flop, measure
from utils.config import COMPILE_MODES, Config
from utils.report import replace_block
from utils.runtime import PROJECT_ROOT, code_commit, device_name, pick_device, pick_precision, versions

# The processes that measure inherit both. What an earlier run compiled must not shorten a first pass.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
EPOCH_IMAGES = 50_000  # CIFAR-10's train images: what "an epoch" is extrapolated to

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
NOTE = """\
Median (min-max) over the repeats; speedups against the first row of each part, repeat by repeat.
Ratios are fp32 to fp32: an fp32 row compares like with like. Lower precision comes on top.
"s/epoch" is extrapolated to 50,000 images. Memory leaves out the processes of the DataLoader."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--scaling", action="store_true", help="time and memory against image count and batch size")
    mode.add_argument("--profile", action="store_true", help="print the operations that our training spends time in")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--batch-size", type=int, help="images a training step (default: 512)")
    parser.add_argument("--images", type=int, help="images a training pass (default: CUDA 50,000; CPU one batch)")
    parser.add_argument("--repeats", type=int, help="passes of every row (default: CUDA 5, CPU 3)")
    parser.add_argument("--num-workers", type=int, default=Config().num_workers, help="processes of the DataLoader")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the numbers mean nothing")
    parser.add_argument("--publish", action="store_true", help="put the table into the README")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/speed-<device>.json)")
    args = parser.parse_args(argv)
    on_cuda = pick_device(args.device).type == "cuda"
    args.batch_size = args.batch_size or (16 if args.quick else Config().batch_size)
    args.images = args.images or (EPOCH_IMAGES if on_cuda and not args.quick else args.batch_size)
    args.repeats = args.repeats or (2 if args.quick else 5 if on_cuda else 3)
    for name in ("batch_size", "images", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if args.batch_size > args.images:
        parser.error(f"--batch-size is {args.batch_size}, more than the --images {args.images}: lower it")
    return args


# --- the rows ---------------------------------------------------------------------------------------------------------


def make_parts(args: argparse.Namespace, device: torch.device, precision: str) -> dict[str, list[Workload]]:
    """The rows of each part; the first is what the others are compared with.

    Args:
        args: sizes.
        device: where to run.
        precision: what "auto" comes to here.
    """
    on_cuda = device.type == "cuda"
    make = partial(Workload, device=str(device), threads=args.threads)

    ours = [dict(name="ours, fp32")]
    if precision != "fp32":
        ours.append(dict(name=f"ours, {precision}", precision=precision))
    usual = dict(name="usual way, fp32", reference=True, num_workers=args.num_workers)
    compiled = []
    if not args.quick and (on_cuda or shutil.which("g++")):  # what torch.compile needs on a CPU
        modes = COMPILE_MODES[1:] if on_cuda else COMPILE_MODES[1:2]  # without a GPU there are no CUDA graphs
        compiled = [dict(ours[-1], name=f"{ours[-1]['name']}, compile {mode}", compile=mode) for mode in modes]

    train = partial(make, images=args.images, batch_size=args.batch_size)
    test_images = 20 if args.quick else 10_000 if on_cuda else 1000
    test = partial(make, "evaluation", images=test_images, batch_size=min(Config().eval_batch_size, test_images))
    loaded_images = max(args.batch_size, 100 if args.quick else 50_000 if on_cuda else 10_000)
    augment = partial(make, "augmentation", images=loaded_images, batch_size=args.batch_size)
    multiply = partial(
        make, "matmul", images=50 if on_cuda else 1, batch_size=256 if args.quick else 8192 if on_cuda else 4096
    )
    return {
        "training": [train("training", **row) for row in [usual, *ours]],
        "step": [train("step", **row) for row in [usual, *ours, *compiled]]
        + [multiply("matmul", precision=row.get("precision", "fp32")) for row in ours],
        "evaluation": [test(**row) for row in [*ours, dict(ours[-1], name=f"{ours[-1]['name']}, flip TTA", tta=True)]],
        "augmentation": [
            augment("Albumentations, DataLoader", reference=True, num_workers=args.num_workers),
            augment("Albumentations, in process", reference=True),
            augment("ours"),
        ],
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def summarize(workload: Workload, measured: list[Measurement], baseline: list[float]) -> dict:
    """A row of the JSON. ``baseline``: the rates of the part's first row, one a repeat."""
    flop = count_flop(workload.part) * (2 if workload.tta else 1)
    images = workload.images
    row = {
        **asdict(workload),
        "repeats": len(measured),
        "images_per_second": spread([images / each.seconds for each in measured]),
        "first_pass_seconds": measured[0].first_seconds,
        "peak_memory_mib": max(each.peak_bytes for each in measured) / MIB,
        "speedup": spread([rate / base for rate, base in zip(compared_rates(workload, measured), baseline)]),
    }
    if workload.part == "augmentation":
        row["images_per_core_second"] = spread([images / each.cpu_seconds for each in measured])
    else:
        row["gflop_per_second"] = spread([flop * images / each.seconds / 1e9 for each in measured])
    if workload.part in ("training", "step"):
        row["seconds_per_epoch"] = spread([each.seconds * EPOCH_IMAGES / images for each in measured])
    return row


def compared_rates(workload: Workload, measured: list[Measurement]) -> list[float]:
    """Images a second, one a repeat: of wall time, but per core where rows use different numbers of cores."""
    per_core = workload.part == "augmentation" and workload.device == "cpu"
    return [workload.images / (each.cpu_seconds if per_core else each.seconds) for each in measured]


def compare(args: argparse.Namespace, device: torch.device, precision: str) -> dict:
    """Measure every part; returns what goes into the JSON file."""
    rows, matmul = [], {}
    for part, workloads in make_parts(args, device, precision).items():
        print(f"measuring {part} ...", flush=True)
        measured = measure(workloads, args.repeats)
        baseline = compared_rates(workloads[0], measured[0])
        for workload, each in zip(workloads, measured):
            if workload.part == "matmul":
                flop = 2 * workload.batch_size**3 * workload.images
                matmul[workload.precision] = spread([flop / one.seconds / 1e9 for one in each])
            else:
                rows.append(summarize(workload, each, baseline))
    for row in rows:
        if "gflop_per_second" in row:
            row["matmul_fraction"] = row["gflop_per_second"]["median"] / matmul[row["precision"]]["median"]
    return {
        "flop_per_image": {part: count_flop(part) for part in ("training", "evaluation")},
        "matmul_gflop_per_second": matmul,
        "units": UNITS,
        "rows": rows,
    }


def describe_machine(args: argparse.Namespace, device: torch.device) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
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


# --- what is printed --------------------------------------------------------------------------------------------------


def format_spread(values: dict[str, float] | None, digits: int = 0) -> str:
    if values is None:
        return "-"
    return f"{values['median']:,.{digits}f} ({values['min']:,.{digits}f}-{values['max']:,.{digits}f})"


def row_name(row: dict) -> str:
    """The row's name; where it was compiled, with what that cost once."""
    cold = "" if row["compile"] == "off" else f" (first {row['images']:,} images: {row['first_pass_seconds']:.0f} s)"
    return row["name"] + cold


def format_table(result: dict) -> str:
    header = f"{'':46} {'images/s':>24} {'per core':>24} {'s/epoch':>22} {'of matmul':>9} {'MiB':>7} {'speedup':>22}"
    lines = [header]
    part = None
    for row in result["rows"]:
        if row["part"] != part:
            part = row["part"]
            lines.append(part)
        fraction = f"{row['matmul_fraction']:.0%}" if "matmul_fraction" in row else "-"
        lines.append(
            f"  {row_name(row):44} {format_spread(row['images_per_second']):>24} "
            f"{format_spread(row.get('images_per_core_second')):>24} {format_spread(row.get('seconds_per_epoch')):>22} "
            f"{fraction:>9} {row['peak_memory_mib']:>7,.0f} {format_spread(row['speedup'], 2):>22}"
        )
    flop = result["flop_per_image"]
    lines.append(f"GFLOP an image: {flop['training'] / 1e9:.2f} training, {flop['evaluation'] / 1e9:.2f} evaluation")
    for precision, rate in result["matmul_gflop_per_second"].items():
        lines.append(f"matrix product, {precision}: {format_spread(rate)} GFLOP/s")
    return "\n".join([*lines, NOTE])


def markdown_table(stored: dict) -> str:
    """The README's table, from the content of a JSON file."""
    machine, rows = stored["machine"], stored["rows"]
    matmul = ", ".join(
        f"{rate['median']:,.0f} GFLOP/s in {name}" for name, rate in stored["matmul_gflop_per_second"].items()
    )
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"Measured alone on {machine['device']}, {machine['loader_processes']} loader processes; batch "
        f"{rows[0]['batch_size']}, median of {rows[0]['repeats']} interleaved repeats with their range, each after "
        f"{machine['warm_up_passes']} passes to warm up; matrix products run at {matmul} there (a share above 100%: "
        f"convolutions outrun them). {packages}.",
        "",
        "| | images / s | of the matrix-product rate | peak memory | times the first row |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    part = None
    for row in rows:
        if row["part"] != part:
            part = row["part"]
            core = ", a core" if "images_per_core_second" in row else ""
            lines.append(f"| **{part}**{core} | | | | |")
        rate = row.get("images_per_core_second", row["images_per_second"])
        fraction = f"{row['matmul_fraction']:.0%}" if "matmul_fraction" in row else ""
        lines.append(
            f"| {row_name(row)} | {format_spread(rate)} | {fraction} | {row['peak_memory_mib']:,.0f} MiB | "
            f"{format_spread(row['speedup'], 1)} |"
        )
    return "\n".join(lines)


def print_profile(args: argparse.Namespace, device: torch.device, precision: str) -> None:
    ours = [row for row in make_parts(args, device, precision)["training"] if not row.reference]
    with Worker(ours[-1]) as worker:
        print(f"{ours[-1].name}: {args.images:,} images in batches of {args.batch_size}\n{worker.profile(rows=20)}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = pick_device(args.device)
    precision = pick_precision("auto", device).name
    machine = describe_machine(args, device)
    print(", ".join(f"{name} {value}" for name, value in {"device": machine["device"], **machine["versions"]}.items()))
    if args.profile:
        print_profile(args, device, precision)
        return
    if args.scaling:
        result = measure_scaling(args, device, precision)
    else:
        result = compare(args, device, precision)
        print(format_table(result))
    out = args.out or PROJECT_ROOT / f"benchmarks/results/{'scaling' if args.scaling else 'speed'}-{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
    print(f"written: {out}")
    if args.scaling:
        plot_scaling(result, out.with_suffix(".png"))
    elif args.publish:
        readme = PROJECT_ROOT / "README.md"
        readme.write_text(replace_block(readme.read_text(), "speed", markdown_table(json.loads(out.read_text()))))


if __name__ == "__main__":
    main()
