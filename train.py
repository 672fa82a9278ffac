"""Session 10 without Jupyter: find the learning rates, train, test, write the results.

    python train.py                      quick without a GPU, full with one
    python train.py --profile full       the recipe: 50,000 images, 24 epochs
    python train.py --resume             go on where an interrupted run stopped

The notebook Session10.ipynb does the same, step by step, and explains it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from models import CustomResNet
from utils import config as configs
from utils import runtime
from utils.checkpoint import CheckpointError, RunFolder, RunLockedError
from utils.dataset import DatasetError, load_dataset, make_loaders
from utils.engine import NonFiniteLossError, fit, make_criterion, make_optimizer, start
from utils.lr_finder import LRRange, LRRangeError, find_lr
from utils.report import (
    build_metrics,
    close_history,
    duration,
    final_test,
    make_figures,
    results_folder,
    run_record,
    write_results,
)

EXIT_FAILED = 1  # the run could not be finished; the message says why and what is kept
EXIT_USAGE = 2  # a wrong setting, as argparse has it
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells have it


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train Session 10's ResNet on CIFAR-10 with Adam and one cycle.",
        epilog="exit codes: 0 done, 1 failed (the message says what is kept), 2 wrong settings, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    auto = "full" if torch.cuda.is_available() else "quick"
    parser.add_argument(
        "--profile",
        choices=configs.PROFILES,
        default=auto,
        help="full: all images, 24 epochs (about 80 min on a 2-core CPU with bf16, seconds on a modern GPU); "
        f"quick: a few minutes on a CPU, its accuracy means nothing (default here: {auto})",
    )
    parser.add_argument("--data-dir", help="a folder with CIFAR-10 (default: $CIFAR10_DIR, else data/, else download)")
    parser.add_argument("--epochs", type=int, help="length of the cycle (default: 24 in full, 6 in quick)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: 512 in full, 64 in quick)")
    parser.add_argument("--run-dir", type=Path, help="checkpoints and results (default: runs/PROFILE-seedN)")
    parser.add_argument(
        "--publish", action="store_true", help="a full run on CIFAR-10 replaces Results/, training_logs.md and README"
    )
    parser.add_argument("--note", default="", help="a sentence about this run, kept with its results")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    parser.add_argument(
        "--pipeline",
        choices=("batched", "albumentations"),
        default="batched",
        help="augment whole batches on the device (default), or image by image in loader processes",
    )
    parser.add_argument("--num-workers", type=int, default=2, help="loader processes of the albumentations pipeline")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--deterministic", action="store_true", help="bit-identical reruns on a GPU, at some speed (a CPU has them)"
    )
    return parser.parse_args(argv)


def make_config(args: argparse.Namespace) -> configs.Config:
    changes = {name: getattr(args, name) for name in ("epochs", "batch_size") if getattr(args, name) is not None}
    changes |= {name: getattr(args, name) for name in ("seed", "pipeline", "num_workers", "precision", "deterministic")}
    return configs.from_profile(args.profile, **changes)


def run(args: argparse.Namespace) -> None:
    """The whole job. Raises one of the errors that ``main`` turns into a message."""
    if args.threads:
        torch.set_num_threads(args.threads)
    config = make_config(args)
    device = runtime.pick_device(args.device)
    precision = runtime.pick_precision(config.precision, device)
    run_dir = args.run_dir or runtime.PROJECT_ROOT / "runs" / f"{config.profile}-seed{config.seed}"
    print(f"{config.profile} profile, seed {config.seed}, {precision.name} on {runtime.device_name(device)}")

    dataset = load_dataset(args.data_dir).subset(config.train_images, config.test_images)
    print(f"{dataset.description}: {len(dataset.train_labels):,} train, {len(dataset.test_labels):,} test images")
    fingerprint = dataset.fingerprint()

    with RunFolder(run_dir) as folder:
        if folder.checkpoint.exists() and not args.resume:
            raise CheckpointError(
                f"{run_dir} already holds a run: add --resume to go on with it, or choose another --run-dir"
            )
        runtime.seed_everything(config.seed, config.deterministic)
        train_loader, test_loader = make_loaders(dataset, config, device, precision.dtype)
        model = CustomResNet(len(dataset.classes), config.dropout, config.logit_scale)
        model = model.to(device, memory_format=torch.channels_last)

        record = folder.read_record()
        if record is None:
            began = time.perf_counter()
            lr_range = find_lr(
                model,
                train_loader,
                make_optimizer(model, config),
                make_criterion(config),
                precision=precision,
                start=config.range_test_start,
                end=config.range_test_end,
                steps=config.range_test_steps,
                rule=config.lr_rule,
            )
            record = run_record(config, lr_range, time.perf_counter() - began, dataset, precision)
            folder.write_record(record)
        lr_range = LRRange.from_dict(record["lr_range"])
        print(f"LR range test: LRMIN {lr_range.lr_min:.2e}, LRMAX {lr_range.lr_max:.2e} (rule {lr_range.rule})")

        state = start(model, config, lr_range.lr_min, lr_range.lr_max, len(train_loader), precision)
        if folder.load(state, config, fingerprint):
            print(f"resuming after epoch {state.history.epochs} of {config.epochs}")
        fit(
            state,
            train_loader,
            test_loader,
            config,
            precision=precision,
            after_epoch=lambda state: folder.save(state, config, fingerprint),
        )
        plain, mirrored = final_test(state.tested_model, dataset, device)
        close_history(state.history, plain)
        metrics = build_metrics(record, config, state.history, plain, mirrored, dataset.classes)
        results = results_folder(config, dataset, run_dir) if args.publish else run_dir
        figures = make_figures(dataset, config, lr_range, state.history, plain)
        write_results(results, metrics, state.tested_model, figures, note=args.note)
        print(
            f"done: test accuracy {plain.accuracy:.2f}% ({mirrored.accuracy:.2f}% with flip TTA) after "
            f"{state.history.epochs} epochs in {duration(metrics['wall_seconds'])}; results in {results}"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; every finished epoch is kept: go on with the same command and --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (configs.ConfigError, ValueError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (DatasetError, CheckpointError, RunLockedError, LRRangeError, NonFiniteLossError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
