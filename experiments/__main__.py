"""``python -m experiments tune|seeds|ablations|all|table``: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # one line a run says enough

from experiments import __doc__ as description
from experiments.runner import FIRST_SEED, FULL, SMALL, Budget, LogError, Run, Runner
from experiments.tables import markdown, write_tables
from experiments.variants import RECIPE, Variant, ablations, constant_variants, tuning
from models import CustomResNet
from utils import runtime
from utils.analysis import Predictions
from utils.checkpoint import CheckpointError, RunFolder, RunLockedError, load_weights
from utils.dataset import DatasetError, load_dataset
from utils.engine import History
from utils.lr_finder import LRRange
from utils.report import build_metrics, final_test, make_figures, results_folder, write_results

DEFAULT_SEEDS = {"tune": 2, "seeds": 5, "ablations": 3}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def plan(split: str, variants: Sequence[Variant], seeds: int) -> list[Run]:
    """Every variant with one seed, then every variant with the next: what the budget cuts off is a seed of all."""
    first = FIRST_SEED[split]
    return [Run(split, variant, seed) for seed in range(first, first + seeds) for variant in variants]


def tuning_runs(runner: Runner, seeds: int) -> list[Run]:
    """The recipe with every seed, for the noise that all else is compared with; then the variants."""
    return plan("validation", [RECIPE], seeds) + plan("validation", tuning(runner.scale.recipe), seeds)


def constant_runs() -> list[Run]:
    """The search for the best constant LR, on validation; ``tuning_runs`` has these runs too."""
    return plan("validation", list(constant_variants().values()), 1)


def best_constant(runner: Runner) -> Variant:
    """The constant LR with the best validation accuracy in ``constant_runs``.

    Raises:
        LogError: none of them has finished.
    """
    records = [(runner.find(run), run.variant) for run in constant_runs()]
    done = [(record["accuracy"], variant) for record, variant in records if record and record["status"] == "done"]
    if not done:
        raise LogError(
            "no run with a constant LR has finished, so the best one is unknown: allow more --budget-minutes"
        )
    return max(done, key=lambda pair: pair[0])[1]


def tune(runner: Runner, seeds: int, budget: Budget, reserve: int = 0) -> int:
    """Everything in ``variants.tuning``, on validation; returns how many runs are left (see ``Runner.execute``)."""
    return runner.execute(tuning_runs(runner, seeds), budget, reserve)


def ablate(runner: Runner, seeds: int, budget: Budget) -> int:
    """The recipe and everything in ``variants.ablations``, on test; returns how many runs are left."""
    left = runner.execute(constant_runs(), budget)
    if left:
        return left
    variants = [RECIPE, *ablations(runner.scale.recipe, best_constant(runner))]
    return runner.execute(plan("test", variants, seeds), budget)


def train_seeds(runner: Runner, seeds: int, budget: Budget) -> int:
    """The recipe with fresh seeds, on test; returns how many runs are left."""
    return runner.execute(plan("test", [RECIPE], seeds), budget)


def publish(runner: Runner, seeds: int, note: str = "") -> Path:
    """Write what readers see, from the first seed's weights and all seeds' accuracies; returns the folder.

    Raises:
        LogError: a run has not finished, or has failed.
        CheckpointError: the first seed's weights are gone.
    """
    runs = plan("test", [RECIPE], seeds)
    records = [runner.find(run) for run in runs]
    missing = [run.seed for run, record in zip(runs, records) if record is None or record["status"] != "done"]
    if missing:
        raise LogError(f"seeds {missing} have no result: run `seeds` until they have one, or publish fewer --seeds")
    shown, dataset, config = records[0], runner.test.dataset, runner.config(runs[0])
    model = CustomResNet(len(dataset.classes), config.dropout, config.logit_scale)
    model = load_weights(model, runner.weights_path(runs[0])).to(runner.device)
    plain, mirrored = final_test(model, dataset, runner.device)
    _check_same(shown, plain)
    history, lr_range = History(**shown["history"]), LRRange.from_dict(shown["lr_range"])
    accuracies = {record["seed"]: (record["accuracy"], record["accuracy_tta"]) for record in records}
    metrics = build_metrics(shown, config, history, plain, mirrored, dataset.classes, accuracies)
    folder = results_folder(config, dataset, runner.folder / "published")
    write_results(folder, metrics, model, make_figures(dataset, config, lr_range, history, plain), note)
    return folder


def _check_same(record: dict, plain: Predictions) -> None:
    if plain.accuracy != record["accuracy"]:
        raise LogError(
            f"seed {record['seed']}'s weights score {plain.accuracy:.2f}% here and {record['accuracy']:.2f}% in the log: "
            "publish on the machine that trained them, or delete that line and its weights and train again"
        )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("tune", "seeds", "ablations", "all", "table"))
    defaults = ", ".join(f"{name} {count}" for name, count in DEFAULT_SEEDS.items())
    parser.add_argument("--seeds", type=int, help=f"seeds a variant (default: {defaults})")
    parser.add_argument("--budget-minutes", type=float, help="start no run that would end later (default: no limit)")
    parser.add_argument(
        "--out", type=Path, default=runtime.PROJECT_ROOT / "experiments" / "results", help="log and tables"
    )
    parser.add_argument("--small", action="store_true", help="few images, 3 epochs: tries the commands on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--data-dir", help="a folder with CIFAR-10 (default: $CIFAR10_DIR, else data/, else download)")
    parser.add_argument(
        "--publish", action="store_true", help="with seeds or all: write Results/ and the README's tables"
    )
    parser.add_argument("--note", default="", help="with --publish: a sentence kept with the results")
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}: it must be at least 1")
    if args.publish and args.command not in ("seeds", "all"):
        parser.error(f"--publish goes with seeds or all, not with {args.command}")
    return args


def run(args: argparse.Namespace) -> None:
    """The whole command. Raises one of the errors that ``main`` turns into a message."""
    budget = Budget(args.budget_minutes)
    seeds = {name: args.seeds or count for name, count in DEFAULT_SEEDS.items()}
    if args.command != "table":
        runner = Runner(
            load_dataset(args.data_dir), SMALL if args.small else FULL, args.out, runtime.pick_device(args.device)
        )
        print(f"{runner.dataset.description}; {runner.precision.name} on {runtime.device_name(runner.device)}")
        try:
            left = execute(args.command, runner, seeds, budget)
        finally:
            write_tables(args.out)  # also of what an interrupted or failed command has finished
        if args.publish and not left:
            print(f"published in {publish(runner, seeds['seeds'], args.note)}")
    for section in write_tables(args.out):
        print(f"\n{markdown(section)}")
    print(f"log, tables and figures: {args.out}")


def execute(command: str, runner: Runner, seeds: dict[str, int], budget: Budget) -> int:
    """Run ``command``'s stages; returns how many runs of the last ones are left."""
    if command == "tune":
        return tune(runner, seeds["tune"], budget)
    if command == "seeds":
        return train_seeds(runner, seeds["seeds"], budget)
    if command == "ablations":
        return ablate(runner, seeds["ablations"], budget)
    # `all`: tuning first, in the time that the rest leaves; its answer is for people to read before the next freeze.
    stand_in = next(iter(constant_variants().values()))
    variants = len(ablations(runner.scale.recipe, stand_in))
    reserve = len(constant_runs()) + seeds["seeds"] + (variants + 1) * seeds["ablations"]
    tune(runner, seeds["tune"], budget, reserve)
    return train_seeds(runner, seeds["seeds"], budget) + ablate(runner, seeds["ablations"], budget)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with RunFolder(args.out):
            run(args)
    except KeyboardInterrupt:
        print("\ninterrupted; every finished run is logged: the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ValueError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (DatasetError, LogError, CheckpointError, RunLockedError, OSError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
