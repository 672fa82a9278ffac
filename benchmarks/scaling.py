"""How cost grows: time and peak memory against image count and against batch size.

Time should grow linearly. Memory should stay flat but for the images themselves, 3 KiB each, or for a batch's activations.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.workloads import MIB, Workload, measure
from utils import plotting

IMAGE_BYTES = 32 * 32 * 3


def make_curves(args: argparse.Namespace, device: torch.device, precision: str) -> dict[str, list[Workload]]:
    """The points of each curve, smallest first; a CPU gets sizes that it finishes within minutes."""
    on_cuda = device.type == "cuda"
    batch = 8 if args.quick else 512 if on_cuda else 128
    training = 50_000 if on_cuda and not args.quick else 4 * batch
    loading = 100 * batch if args.quick else 100_000
    passes = 20 if on_cuda else 1
    make = partial(Workload, name="ours", device=str(device), precision=precision, threads=args.threads)
    return {
        "training, by image count": [
            make("training", images=training * factor // 4, batch_size=batch) for factor in (1, 2, 4, 8)
        ],
        "loading and augmentation, by image count": [
            make("augmentation", images=loading * factor // 8, batch_size=batch) for factor in (1, 2, 4, 8)
        ],
        "step, by batch size": [
            make("step", images=batch * factor // 2 * passes, batch_size=batch * factor // 2)
            for factor in (1, 2, 4, 8, 16)
        ],
    }


def measure_scaling(args: argparse.Namespace, device: torch.device, precision: str) -> dict:
    """Measure every curve and print it as a table; returns what goes into the JSON file."""
    curves = {}
    for title, workloads in make_curves(args, device, precision).items():
        print(
            f"\n{title} ({precision})\n{'images':>9} {'batch':>6} {'seconds':>9} {'ms/image':>9} {'MiB':>8} {'images, MiB':>12}"
        )
        curves[title] = []
        for workload, measured in zip(workloads, measure(workloads, args.repeats)):
            point = {
                "images": workload.images,
                "batch_size": workload.batch_size,
                "seconds": median(each.seconds for each in measured),
                "peak_memory_mib": max(each.peak_bytes for each in measured) / MIB,
                "images_mib": workload.images * IMAGE_BYTES / MIB,
            }
            curves[title].append(point)
            print(
                f"{point['images']:>9,} {point['batch_size']:>6,} {point['seconds']:>9.3f} "
                f"{1000 * point['seconds'] / point['images']:>9.3f} {point['peak_memory_mib']:>8,.0f} "
                f"{point['images_mib']:>12.1f}"
            )
    return {"precision": precision, "repeats": args.repeats, "curves": curves}


def plot_scaling(result: dict, path: Path) -> None:
    """Draw what ``measure_scaling`` returned into a PNG file."""
    print(f"written: {plotting.save_figure(plotting.scaling(result['curves']), path)}")
