"""Session 10 without Jupyter: find the learning rates, train, test, write the results.

    python train.py                            a run that fits this machine: full with a GPU, quick without
    python train.py --profile full --seed 1    the recipe (50,000 images, 24 epochs) with another seed
    python train.py --profile full --resume    continue after Ctrl-C, kill -9 or a lost machine
    torchrun --nproc-per-node 2 train.py       on two GPUs, each with half of every batch

Every epoch ends with a checkpoint in the run folder (on a GPU one is written every 10 seconds), and the one before it is
kept. If $S10_COPY_TO names a folder, for example on a mounted Google Drive, each checkpoint is also copied there, and
fetched from there on a new machine.

exit codes: 0 done, 1 failed (the message says what is kept), 2 wrong settings, 130 Ctrl-C, 143 SIGTERM
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

try:
    from utils import runtime
    from utils.dataset import load_dataset
    from utils.engine import NonFiniteLossError
    from utils.lr_finder import LRRangeError
    from utils.runs import machine, report
    from utils.runs.cli import add_arguments, from_arguments, run_command
    from utils.runs.job import Job
    from utils.runs.ranks import join_ranks
    from utils.sources import printable
except ModuleNotFoundError as missing:
    sys.exit(f"train.py: {missing}. `make run` sets up .venv; then use .venv/bin/python")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser("train.py", None, *__doc__.split("\n\n", 1), formatter_class=RawDescriptionHelpFormatter)
    run = parser.add_argument_group("the run")
    run.add_argument("--run-dir", type=Path, help="checkpoints and results (default: runs/PROFILE-seedN)")
    run.add_argument("--resume", action="store_true", help="continue the run in the run folder, if there is one")
    run.add_argument("--publish", action="store_true", help="put a full run into Results/, training_logs.md and README")
    run.add_argument("--note", default="", help="a sentence about this run, kept with its results")
    run.add_argument("--data-dir", help="a folder with CIFAR-10 (default: $CIFAR10_DIR, else data/, else download)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    run.add_argument("--threads", type=int, help="CPU threads (default: all cores); share them among processes")
    add_arguments(parser.add_argument_group("settings"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run with the given command line; returns the exit code."""
    job: Job | None = None

    def train() -> None:
        nonlocal job
        args = make_parser().parse_args(argv)
        ranks, device_name = join_ranks(args.device)
        device = runtime.pick_device(device_name)
        args.profile = args.profile or ("full" if device.type == "cuda" else "quick")
        config = from_arguments(args)
        if args.threads is not None:
            runtime.set_threads(args.threads)
        run_dir = args.run_dir or runtime.PROJECT_ROOT / "runs" / f"{config.profile}-seed{config.seed}"
        dataset = ranks.rank0_first(lambda: load_dataset(args.data_dir)).subset(config.train_images, config.test_images)
        if args.publish:
            report.check_publishable(config, dataset)
        job = Job(config, dataset, run_dir, device=device, ranks=ranks, resume=args.resume)
        processes = f", {ranks.world} processes" if ranks.world > 1 else ""
        ranks.say(
            f"{config.profile} profile, seed {config.seed}, {job.precision.name} on {machine.device_name(device)}{processes}\n"
            f"{dataset.description}: {len(dataset.train_labels):,} train, {len(dataset.test_labels):,} test images"
        )
        with job:
            run(job, args)

    def saved_message(error: BaseException) -> str:
        saved = job.saved_message() if job is not None else ""
        if isinstance(error, LRRangeError):
            return "the flags are --lr-min and --lr-max"
        if isinstance(error, NonFiniteLossError):  # the same epochs would diverge again
            low, high = job.lr_range.lr_min / 3, job.lr_range.lr_max / 3
            return f"{saved or 'it diverged'}: start again in another --run-dir with --lr-min {low:.1e} --lr-max {high:.1e}"
        return f"{saved}: add --resume to the same command to continue" if saved else ""

    return run_command("train.py", train, saved_message)


def run(job: Job, args: Namespace) -> None:
    """The whole job, with a line printed on each of its steps."""
    say = job.ranks.say
    if job.is_resumed:
        say(f"resuming after epoch {job.resumed_epochs} of {job.config.epochs}")
    elif args.resume:
        say("nothing to resume: starting with epoch 1")
    found = job.find_lr()
    say(f"one cycle: LRMIN {found.lr_min:.2e}, LRMAX {found.lr_max:.2e} ({found.rule})")
    job.fit()
    if not job.ranks.is_first:
        return
    results = job.finish(args.note)
    where = report.RESULTS if args.publish else job.folder.path
    if args.publish:
        report.publish(job.folder.path)
    say(
        f"done: test accuracy {report.accuracies(results.metrics)} after {job.config.epochs} epochs in "
        f"{report.duration(results.metrics['wall_seconds'])}; results in {printable(where)}"
    )


if __name__ == "__main__":
    sys.exit(main())
