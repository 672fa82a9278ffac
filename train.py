"""Session 10 without Jupyter: find the learning rates, train, test, write the results.

    python train.py                      quick without a GPU, full with one
    python train.py --profile full       the recipe: 50,000 images, 24 epochs
    python train.py --resume             go on where an interrupted run stopped

The notebook Session10.ipynb does the same, step by step, and explains it.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from models import CustomResNet
from utils import config as configs
from utils import runtime
from utils.checkpoint import CheckpointError, RunFolder, RunLockedError, run_folder_from_environment
from utils.dataset import DatasetError, ImageDataset, load_dataset
from utils.engine import NonFiniteLossError, TrainState, find_range, fit, start
from utils.loaders import make_loaders
from utils.lr_finder import LRRange, LRRangeError
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
from utils.runtime import Precision

EXIT_FAILED = 1  # the run could not be finished; the message says why and what is kept
EXIT_USAGE = 2  # a wrong setting, as argparse has it
EXIT_SIGNAL = 128  # plus the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM

EPILOG = """\
examples:
  python train.py                             a run that fits this machine: full with a GPU, quick without
  python train.py --profile full --seed 1     the recipe with another seed
  python train.py --profile full --resume     go on after Ctrl-C, kill -9 or a lost machine
  python train.py --lr-min 5e-4 --lr-max 6e-3 a cycle of your own, without a range test

Every epoch ends with a checkpoint in the run folder, and the one before it is kept. Where $S10_RUN_DIR names a folder,
such as one on a mounted Google Drive, each checkpoint is copied there too, and fetched from there on a new machine.

exit codes: 0 done, 1 failed (the message says what is kept), 2 wrong settings, 130 Ctrl-C, 143 SIGTERM
"""


class ResultsError(RuntimeError):
    """The run is trained and tested, but its results could not be written."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train Session 10's ResNet on CIFAR-10 with Adam and one cycle.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    auto = "full" if torch.cuda.is_available() else "quick"
    parser.add_argument(
        "--profile",
        choices=configs.PROFILES,
        default=auto,
        help="full: all images, 24 epochs (about 75 min on a 2-core CPU with bf16); "
        f"quick: a few minutes on a CPU, its accuracy means nothing (default here: {auto})",
    )

    run = parser.add_argument_group("the run")
    run.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoint, if it holds one")
    run.add_argument("--run-dir", type=Path, help="checkpoints and results (default: runs/PROFILE-seedN)")
    run.add_argument(
        "--publish", action="store_true", help="a full run on CIFAR-10 replaces Results/, training_logs.md and README"
    )
    run.add_argument("--note", default="", help="a sentence about this run, kept with its results")
    run.add_argument("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="bit-identical reruns on a GPU, at a cost in speed not measured yet (a CPU has them anyway, at none)",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", help="a folder with CIFAR-10 (default: $CIFAR10_DIR, else data/, else download)")
    data.add_argument(
        "--train-images", type=int, help="a class-balanced subset of so many (default: all; quick: 2,500)"
    )
    data.add_argument("--test-images", type=int, help="likewise of the test set (default: all; quick: 1,000)")
    data.add_argument(
        "--pipeline",
        choices=("batched", "albumentations"),
        help="augment whole batches on the device (default), or image by image in loader processes",
    )
    data.add_argument("--num-workers", type=int, help="loader processes of the albumentations pipeline (default: 2)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, help="length of the cycle (default: 24; quick: 6)")
    recipe.add_argument("--peak-epoch", type=int, help="the LR peaks at the end of this epoch (default: 5; quick: 2)")
    recipe.add_argument("--batch-size", type=int, help="images a step (default: 512; quick: 64)")
    recipe.add_argument("--lr-min", type=float, help="with --lr-max: skip the range test (default: found by it)")
    recipe.add_argument("--lr-max", type=float, help="with --lr-min: the LR at the peak")
    recipe.add_argument("--range-test-steps", type=int, help="batches of the LR range test (default: 100; quick: 80)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    machine.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), help="default: auto, the fastest that is sound here"
    )
    machine.add_argument(
        "--compile",
        choices=configs.COMPILE_MODES,
        help="torch.compile's mode; reduce-overhead uses CUDA graphs (default: off; see the README's speed table)",
    )
    machine.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    return parser


def make_config(args: argparse.Namespace) -> configs.Config:
    """The profile with what the command line changes.

    Raises:
        ConfigError: a setting that cannot work.
    """
    settings = {name: value for name, value in vars(args).items() if name in configs.Config.__dataclass_fields__}
    changes = {name: value for name, value in settings.items() if name != "profile" and value is not None}
    return configs.from_profile(args.profile, **changes)


def run(
    args: argparse.Namespace, config: configs.Config, device: torch.device, precision: Precision, folder: RunFolder
) -> None:
    """The whole job, in a locked ``folder``. Raises one of the errors that ``main`` turns into a message."""
    if folder.holds_checkpoint and not args.resume:
        raise CheckpointError(
            f"{folder.path} already holds a run: add --resume to go on with it, or choose another --run-dir"
        )
    dataset = load_dataset(args.data_dir).subset(config.train_images, config.test_images)
    print(f"{dataset.description}: {len(dataset.train_labels):,} train, {len(dataset.test_labels):,} test images")
    fingerprint = dataset.fingerprint()

    runtime.seed_everything(config.seed, config.deterministic)
    with settings_errors():
        train_loader, test_loader = make_loaders(dataset, config, device, precision.dtype)
        model = CustomResNet(len(dataset.classes), config.dropout, config.logit_scale)
    model = model.to(device, memory_format=torch.channels_last)

    record = folder.read_record(config, fingerprint)
    if record is None:
        began = time.perf_counter()
        lr_range = find_range(model, train_loader, config, precision)
        record = run_record(config, lr_range, time.perf_counter() - began, dataset, precision)
        folder.write_record(record)
    lr_range = LRRange.from_dict(record["lr_range"])
    print(f"one cycle: LRMIN {lr_range.lr_min:.2e}, LRMAX {lr_range.lr_max:.2e} (rule {lr_range.rule})")

    with settings_errors():
        state = start(model, config, lr_range.lr_min, lr_range.lr_max, len(train_loader), precision)
    if folder.load(state, config, fingerprint):
        print(f"resuming after epoch {state.history.epochs} of {config.epochs}")
        report_move(record, precision)
    elif args.resume:
        print(f"nothing to resume in {folder.path}: starting with epoch 1")
    fit(
        state,
        train_loader,
        test_loader,
        config,
        precision=precision,
        after_epoch=lambda state: folder.save(state, config, fingerprint),
    )
    try:
        finish(args, config, record, state, dataset, device, folder)
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"the results could not be written: {error}. All {config.epochs} epochs are kept in {folder.checkpoint}: "
            "mend this, then run the same command with --resume, and only the test and the results are made again"
        ) from error


def report_move(record: dict, precision: Precision) -> None:
    """Say so when the run began elsewhere: it goes on correctly, but no longer bit for bit."""
    here = (runtime.device_name(precision.device), precision.name, f"torch {runtime.versions()['torch']}")
    there = (record["device"], record["precision"], f"torch {record['versions']['torch']}")
    moved = [f"{old} then, {new} now" for old, new in zip(there, here) if old != new]
    if moved:
        print(
            f"the run began elsewhere ({'; '.join(moved)}): its end is as good, but not bit-identical to staying there"
        )


def finish(
    args: argparse.Namespace,
    config: configs.Config,
    record: dict,
    state: TrainState,
    dataset: ImageDataset,
    device: torch.device,
    folder: RunFolder,
) -> None:
    """The final test, the figures, the files, and the one line that sums up."""
    plain, mirrored = final_test(state.tested_model, dataset, device)
    close_history(state.history, plain)
    metrics = build_metrics(record, config, state.history, plain, mirrored, dataset.classes)
    results = results_folder(config, dataset, folder.path) if args.publish else folder.path
    figures = make_figures(dataset, config, LRRange.from_dict(record["lr_range"]), state.history, plain)
    write_results(results, metrics, state.tested_model, figures, note=args.note)
    print(
        f"done: test accuracy {plain.accuracy:.2f}% ({mirrored.accuracy:.2f}% with flip TTA) after "
        f"{state.history.epochs} epochs in {duration(metrics['wall_seconds'])}; results in {results}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run with the given command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    with warnings.catch_warnings(), sigterm_like_ctrl_c():
        warnings.showwarning = lambda message, *_: print(f"train.py: warning: {message}", file=sys.stderr)
        try:
            with settings_errors():
                config = make_config(args)
                device = runtime.pick_device(args.device)
                precision = runtime.pick_precision(config.precision, device)
                if args.threads is not None:
                    runtime.set_threads(args.threads)
        except configs.ConfigError as error:
            return fail(error, EXIT_USAGE)

        print(f"{config.profile} profile, seed {config.seed}, {precision.name} on {runtime.device_name(device)}")
        folder = run_folder_from_environment(
            args.run_dir or runtime.PROJECT_ROOT / "runs" / f"{config.profile}-seed{config.seed}"
        )
        try:
            with runtime.clear_failures(config.batch_size), folder:
                run(args, config, device, precision, folder)
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0] if interrupt.args else signal.SIGINT
            how = (
                "add --resume to the same command to go on" if folder.holds_checkpoint else "run the same command again"
            )
            return fail(f"interrupted; {kept(folder, config)}: {how}", EXIT_SIGNAL + number)
        except configs.ConfigError as error:
            return fail(error, EXIT_USAGE)
        except NonFiniteLossError as error:
            advice = "lower LRs are set with --lr-min and --lr-max, in another --run-dir"
            return fail(f"{error}; {kept(folder, config)}; {advice}", EXIT_FAILED)
        except (runtime.OutOfMemoryError, runtime.LoaderError, runtime.CompileError) as error:
            return fail(f"{error}; {kept(folder, config)}", EXIT_FAILED)
        except (DatasetError, CheckpointError, RunLockedError, LRRangeError, ResultsError, OSError) as error:
            return fail(error, EXIT_FAILED)
    return 0


def fail(message: object, code: int) -> int:
    print(f"train.py: {message}", file=sys.stderr)
    return code


def kept(folder: RunFolder, config: configs.Config) -> str:
    """What a run that ends early leaves behind."""
    if folder.saved_epochs:
        return f"{folder.saved_epochs} of {config.epochs} epochs are kept in {folder.path}"
    if folder.holds_checkpoint:
        return f"the checkpoint in {folder.path} is as it was"
    return "no epoch was finished yet"


@contextlib.contextmanager
def settings_errors():
    """Within it, a ValueError is a wrong setting."""
    try:
        yield
    except ValueError as error:
        raise configs.ConfigError(str(error)) from error


@contextlib.contextmanager
def sigterm_like_ctrl_c():
    """Within it, SIGTERM (a shutdown, a cluster's time limit) ends the run as Ctrl-C does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
