"""Session 10 without Jupyter: find the learning rates, train, test, write the results.

    python train.py                      quick without a GPU, full with one
    python train.py --profile full       the recipe: 50,000 images, 24 epochs
    python train.py --resume             continue where an interrupted run stopped

The notebook Session10.ipynb does the same step by step, with explanations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils import config as configs
from utils import runtime
from utils.dataset import load_dataset
from utils.engine import NonFiniteLossError
from utils.lr_finder import LRRange
from utils.runs import report
from utils.runs.checkpoint import CheckpointError
from utils.runs.door import run_door
from utils.runs.folder import RunLockedError
from utils.runs.job import Job
from utils.runs.machine import explain_failures
from utils.runs.ranks import join_ranks, leave_ranks

EPILOG = """\
examples:
  python train.py                             a run that fits this machine: full with a GPU, quick without
  python train.py --profile full --seed 1     the recipe with another seed
  python train.py --profile full --resume     continue after Ctrl-C, kill -9 or a lost machine
  python train.py --lr-min 5e-4 --lr-max 6e-3 your own cycle, without a range test
  torchrun --nproc-per-node 2 train.py        on two GPUs, each with half of every batch

Every epoch ends with a checkpoint in the run folder, and the previous one is kept; on a GPU, whose epochs take seconds,
a checkpoint is written every 10 seconds. If $S10_RUN_DIR names a folder, for example on a mounted Google Drive, each
checkpoint is also copied there, and fetched from there on a new machine.

exit codes: 0 done, 1 failed (the message says what is kept), 2 wrong settings, 130 Ctrl-C, 143 SIGTERM
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train Session 10's ResNet on CIFAR-10 with Adam and one cycle.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    auto = "full" if runtime.pick_device().type == "cuda" else "quick"
    parser.add_argument(
        "--profile",
        choices=configs.PROFILES,
        default=auto,
        help="full: all images, 24 epochs (on two CPU cores with AMX about an hour, without it 3 hours to a night); "
        f"quick: a few minutes on a CPU, but its accuracy means nothing (default here: {auto})",
    )

    run = parser.add_argument_group("the run")
    run.add_argument("--resume", action="store_true", help="continue from the run folder's checkpoint, if there is one")
    run.add_argument("--run-dir", type=Path, help="checkpoints and results (default: runs/PROFILE-seedN)")
    run.add_argument(
        "--publish", action="store_true", help="a full run on CIFAR-10 replaces Results/, training_logs.md and README"
    )
    run.add_argument("--note", default="", help="a sentence about this run, kept with its results")
    run.add_argument("--seed", type=int, help="of weights, order and augmentation (default: 0)")
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="bit-identical reruns on a GPU, at some cost in speed (on a CPU they always are)",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", help="a folder with CIFAR-10 (default: $CIFAR10_DIR, else data/, else download)")
    data.add_argument("--train-images", type=int, help="size of a class-balanced subset (default: all; quick: 2,500)")
    data.add_argument("--test-images", type=int, help="the same for the test set (default: all; quick: 1,000)")
    data.add_argument(
        "--pipeline",
        choices=configs.choices("pipeline"),
        help="augment whole batches on the device (default), or image by image in loader processes",
    )
    data.add_argument("--num-workers", type=int, help="loader processes of the albumentations pipeline (default: 2)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, help="length of the cycle (default: 24; quick: 6)")
    recipe.add_argument("--peak-epoch", type=int, help="the LR peaks at the end of this epoch (default: 5; quick: 2)")
    recipe.add_argument("--batch-size", type=int, help="images per step (default: 512; quick: 64)")
    recipe.add_argument("--lr-min", type=float, help="with --lr-max: skip the range test (default: found by it)")
    recipe.add_argument("--lr-max", type=float, help="with --lr-min: the LR at the peak")
    recipe.add_argument(
        "--lr-rule", choices=configs.choices("lr_rule"), help="how LRMIN and LRMAX are read off the range test"
    )
    recipe.add_argument("--range-test-start", type=float, help="LR at which the range test begins (default: 1e-6)")
    recipe.add_argument("--range-test-end", type=float, help="LR at which it ends (default: 1)")
    recipe.add_argument("--range-test-steps", type=int, help="batches of the LR range test (default: 100; quick: 80)")
    recipe.add_argument("--width", type=int, help="channels of the first layer (default: 64; 32 halves every layer's)")
    recipe.add_argument("--eval-every", type=int, help="epochs between two tests (default: 1)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    machine.add_argument(
        "--precision",
        choices=configs.choices("precision"),
        help="default: auto, the fastest that is safe on this machine",
    )
    machine.add_argument(
        "--compile",
        choices=configs.choices("compile"),
        help="torch.compile's mode; reduce-overhead and max-autotune use CUDA graphs (default: off; not supported on a "
        "T4, and no gain on a CPU)",
    )
    machine.add_argument(
        "--packed",
        choices=configs.choices("packed"),
        help="small maps side by side in the convolutions (default: auto, on if the CPU has bf16 matrix units)",
    )
    machine.add_argument(
        "--threads",
        type=int,
        help="CPU threads (default: all cores). Two processes with two threads each on two cores slow each other down "
        "tenfold: give each of them --threads 1",
    )
    return parser


def make_config(args: argparse.Namespace) -> configs.Config:
    """The profile with the command line's changes.

    Raises:
        ConfigError: a setting that cannot work.
    """
    settings = configs.Config.__dataclass_fields__.keys() - {"profile"}
    changes = {name: value for name, value in vars(args).items() if name in settings and value is not None}
    return configs.from_profile(args.profile, **changes)


def main(argv: list[str] | None = None) -> int:
    """Run with the given command line; returns the exit code."""
    job: Job | None = None

    def train() -> None:
        nonlocal job
        args = make_parser().parse_args(argv)
        config = make_config(args)
        ranks, device_name = join_ranks(args.device)
        device = runtime.pick_device(device_name)
        if args.threads is not None:
            runtime.set_threads(args.threads)
        precision = runtime.pick_precision(config.precision, device)
        machine = runtime.device_name(device) + (f", {ranks.world} processes" if ranks.world > 1 else "")
        ranks.say(f"{config.profile} profile, seed {config.seed}, {precision.name} on {machine}")
        with explain_failures(config.batch_size):  # an error on rank 0 ends the wait of the others
            dataset = ranks.first_then_others(lambda: load_dataset(args.data_dir))
        dataset = dataset.subset(config.train_images, config.test_images)
        ranks.say(
            f"{dataset.description}: {len(dataset.train_labels):,} train, {len(dataset.test_labels):,} test images"
        )
        if args.publish:
            report.check_publishable(config, dataset)
        run_dir = args.run_dir or runtime.PROJECT_ROOT / "runs" / f"{config.profile}-seed{config.seed}"
        job = Job(config, dataset, run_dir, device=device, ranks=ranks, resume=args.resume)
        with job:
            run(job, args)

    def kept(error: BaseException) -> str:
        if job is None or not job.ranks.is_first:
            return ""
        has_begun = job.lr_range is not None
        if isinstance(error, RunLockedError) or (isinstance(error, CheckpointError) and not has_begun):
            return ""  # the folder is another run's, or none that can be used
        next_step = "add --resume to the same command to continue" if job.folder.holds_checkpoint else "run it again"
        if isinstance(error, NonFiniteLossError):  # the same epochs would diverge again
            next_step = f"start again in another --run-dir with {lower_lrs(job.lr_range)}"
        return f"{job.kept()}: {next_step}"

    try:
        return run_door("train.py", train, kept)
    finally:
        leave_ranks()


def lower_lrs(lr_range: LRRange) -> str:
    """The flags of a cycle with a third of the peak, and with the same LRMIN if it is below that."""
    peak = lr_range.lr_max / 3
    end = lr_range.lr_min if lr_range.lr_min < peak else lr_range.lr_min / 3
    return f"--lr-min {end:.2e} --lr-max {peak:.2e}"


def run(job: Job, args: argparse.Namespace) -> None:
    """The whole job, with a line printed on each of its steps."""
    say = job.ranks.say
    if args.resume and not job.is_resumed:
        say(f"nothing to resume in {job.folder.path}: starting with epoch 1")
    found = job.find_range()
    if job.resumed_epochs:
        say(f"resuming after epoch {job.resumed_epochs} of {job.config.epochs}")
    say(f"one cycle: LRMIN {found.lr_min:.2e}, LRMAX {found.lr_max:.2e} (rule {found.rule})")
    job.fit()
    if not job.ranks.is_first:
        return
    results = job.finish(args.note)
    where = job.folder.path
    if args.publish:
        report.publish(job.folder.path)
        where = report.RESULTS
    plain, tta = results.plain.accuracy, results.tta.accuracy
    say(
        f"done: test accuracy {plain:.2f}% ({tta:.2f}% with flip TTA) after {job.config.epochs} epochs in "
        f"{report.duration(results.metrics['wall_seconds'])}; results in {where}"
    )
    if job.folder.mirror_is_stale:
        say(f"the copy in {job.folder.mirror} is not up to date: see the warning above")


if __name__ == "__main__":
    sys.exit(main())
