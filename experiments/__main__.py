"""``python -m experiments screen|confirm|seeds|ablations|all|table``: see the package's docstring."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # one line a run says enough

from experiments import __doc__ as description
from experiments import page, variants
from experiments.campaign import FOLDS, STAGES, Campaign, Run, Stage, all_records, config_of, key_of, read_record
from utils import runtime
from utils.dataset import load_dataset
from utils.runs import report
from utils.runs.door import run_door
from utils.runs.job import is_finished
from utils.runtime import ConfigError, Session10Error, say

README = runtime.PROJECT_ROOT / "README.md"


def plan(stages: dict[str, Stage], name: str, current: Sequence[dict]) -> list[Run]:
    """The runs of one stage, seed by seed, so that a time limit cuts the last seeds.

    Args:
        stages: by name.
        name: of the stage.
        current: the records so far, from which ``confirm`` takes what the screen proposes.

    Raises:
        Session10Error: ``confirm`` before the runs of the usual screen, that of ``STAGES``, are made.
    """
    stage = stages[name]
    seeds = range(stage.first_seed, stage.first_seed + stage.seeds)
    if name == "screen":
        again = [Run(stage, variants.BASE, seed + FOLDS * n) for seed in seeds for n in range(1, variants.BASE_RUNS)]
        return [Run(stage, variant, seed) for seed in seeds for variant in variants.screen_design()] + again
    recipe = dataclasses.replace(stages["seeds"], width=stage.width), variants.RECIPE  # shared by seeds and ablations
    if name == "confirm":
        made = {key_of(record): record["status"] for record in current}
        screen = plan(STAGES, "screen", current)
        if missing := [run for run in screen if run.key not in made]:
            raise Session10Error(f"{len(missing)} runs of the screen are still to be made: run `screen` first")
        try:
            effects = page.screen_effects(current)
        except ValueError as error:  # runs failed, and that is their result
            failed = ", ".join(run.variant.name for run in screen if made[run.key] == "failed")
            raise Session10Error(
                f"the screen has no answer ({error}), because these runs failed: {failed}. `screen --seeds 2` repeats the "
                "design on other images"
            ) from None
        chosen = [(stage, variant) for variant in variants.confirm(effects)]
    elif name == "seeds":
        chosen = [recipe]
    else:
        chosen = [recipe, *((stage, variant) for variant in variants.ablations())]
    return [Run(*one, seed) for seed in seeds for one in chosen]


def check_images(count: int, data: str) -> None:
    """Only runs on the whole of CIFAR-10 are published.

    Args:
        count: of the train images, those that are held out included.
        data: their description.

    Raises:
        ConfigError: the count is another one.
    """
    if count != report.RECIPE_TRAIN_IMAGES:
        raise ConfigError(
            f"runs on {data} cannot be published, because it has {count:,} train images, not "
            f"{report.RECIPE_TRAIN_IMAGES:,}: leave out --publish, or choose other --runs and all of CIFAR-10"
        )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    seeds = ", ".join(f"{stage.name} {stage.seeds}" for stage in STAGES.values())
    widths = ", ".join(f"{stage.name} {stage.width}" for stage in STAGES.values())
    parser.add_argument("command", choices=(*STAGES, "all", "table"))
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder of the runs (default: runs/experiments)")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"seeds per variant (default: {seeds})")
    parser.add_argument("--width", type=int, metavar="W", help=f"channels of the first layer (default: {widths})")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="start no run after this many minutes")
    parser.add_argument("--small", action="store_true", help="96 images, 3 epochs: tries the command; never published")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--data-dir", help="a folder with CIFAR-10 (default: $CIFAR10_DIR, else data/, else download)")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write experiments/results and its part of the README; with seeds and all, once every seed is there, also Results/",
    )
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}: it must be at least 1")
    if args.small and args.publish:
        parser.error("--small cannot be combined with --publish: its figures mean nothing")
    if args.runs is None:
        args.runs = runtime.PROJECT_ROOT / "runs" / ("experiments-small" if args.small else "experiments")
    return args


def run(args: argparse.Namespace) -> None:
    """The whole command."""
    if args.threads is not None:
        runtime.set_threads(args.threads)
    given = {"width": args.width, "seeds": args.seeds}
    given = {name: value for name, value in given.items() if value is not None}
    stages = {name: dataclasses.replace(stage, **given) for name, stage in STAGES.items()}
    device = runtime.pick_device(args.device)

    def known() -> list[dict]:
        return [] if args.small else page.published()

    campaign = Campaign(lambda: load_dataset(args.data_dir), args.runs, device, small=args.small, records=known())
    results = page.RESULTS if args.publish else args.runs / "results"

    def records() -> list[dict]:
        return all_records(args.runs, known())  # read again each time: others may publish meanwhile

    publishes_result = args.publish and args.command in ("seeds", "all")
    if publishes_result:
        report.check_publishable(config_of(plan(stages, "seeds", [])[0]), campaign.dataset)
    elif args.publish and args.command != "table":
        check_images(len(campaign.dataset.train_labels), campaign.dataset.description)
    if args.publish:
        for record in all_records(args.runs, []):
            if record["status"] == "done":
                held_out = record["test_images"] if record["split"] == "validation" else 0
                check_images(record["train_images"] + held_out, record["data"])
    deadline = math.inf if args.budget_minutes is None else time.monotonic() + 60 * args.budget_minutes
    left = 0
    try:
        for name in {"all": list(STAGES), "table": []}.get(args.command, [args.command]):
            say(f"{name}, width {stages[name].width}:")
            current = page.comparable(records(), args.small)
            left = left or campaign.work(plan(stages, name, current), deadline)
    finally:
        made = records()  # also after an interruption: what is made is shown
        page.write_results(results, made, args.small)
        if args.publish:
            report.write_block(README, "experiments", page.readme_part(page.comparable(made)))
    say(f"tables and figures: {results / page.PAGE_NAME}")
    if publishes_result and not left:
        folders = [campaign.folder(one) for one in plan(stages, "seeds", [])]
        # Results/ must show the runs that are on record: another machine may have published first.
        if absent := [folder.name for folder in folders if not is_finished(folder) or read_record(folder) not in made]:
            raise ConfigError(
                f"Results/ stays as it is, for want of the weights and curves of {', '.join(absent)}: that run failed, or it "
                "was made on another machine, where this command must run"
            )
        report.publish(folders[0], folders[1:])
        say(f"published in {report.RESULTS}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_door("experiments", lambda: run(args), lambda _: "the same command goes on with the runs that are left")


if __name__ == "__main__":
    sys.exit(main())
