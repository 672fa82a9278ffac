"""Which runs there are, where each stands, and the loop that makes them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.variants import EMA_ALSO, EMA_DECAY, Variant
from utils import runtime
from utils.config import Config, changed_settings, full, quick
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.engine import NonFiniteLossError
from utils.lr_finder import LRRangeError
from utils.runs import machine
from utils.runs.folder import RunLockedError
from utils.runs.job import is_finished, run_job
from utils.runs.report import duration, read_metrics
from utils.runtime import ConfigError, Session10Error, say, write_json

VARIANT_NAME, FAILED_NAME, LOG_NAME = "variant.json", "failed.json", "log.txt"
FOLDS = 10  # seeds that differ by a multiple of it hold out the same images
WAIT_SECONDS = 10.0  # until runs that other processes hold are looked at again
# From metrics.json into a run's record.
RECORDED = (
    *("test_accuracy", "test_accuracy_tta", "test_loss", "per_class_accuracy", "lr_min", "lr_max", "weight_decay"),
    *("wall_seconds", "range_test_seconds", "device", "precision", "versions", "commit", "data"),
    *("train_images", "test_images", "averages"),
)


@dataclass(frozen=True)
class Stage:
    """One part of the campaign."""

    name: str  # in folders' names and on the command line
    width: int  # of the network's first layer
    holdout: int  # train images that are held out to test on; 0: the test set itself
    first_seed: int
    seeds: int  # how many
    changes: dict = dataclasses.field(default_factory=dict)  # further settings of all its runs


BEFORE = {"ema_decay": EMA_DECAY}  # besides the factors: so runs stay comparable, whatever is frozen later
STAGES = {
    stage.name: stage
    for stage in (
        Stage("screen", width=32, holdout=10_000, first_seed=0, seeds=1, changes=BEFORE | {"ema_also": EMA_ALSO}),
        Stage("confirm", width=64, holdout=5_000, first_seed=50, seeds=4, changes=BEFORE),
        Stage("seeds", width=64, holdout=0, first_seed=100, seeds=5),
        Stage("ablations", width=64, holdout=0, first_seed=100, seeds=3),
    )
}


@dataclass(frozen=True)
class Run:
    """One training."""

    stage: Stage
    variant: Variant
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """As ``key_of`` its record."""
        return self.stage.name, self.variant.name, self.seed

    def __str__(self) -> str:
        return f"{self.stage.name}, {self.variant.name}, seed {self.seed}"


def config_of(run: Run, small: bool = False) -> Config:
    """The run's settings. Only the runs of ``seeds``, one of which is published, are tested after every epoch."""
    changes = {"seed": run.seed, "width": run.stage.width, **run.stage.changes, **run.variant.changes}
    if small:
        tiny = dict(train_images=None, test_images=None, batch_size=16, epochs=3, peak_epoch=1, range_test_steps=40)
        return quick(**{**tiny, **changes, "width": 8, "eval_every": 3})
    config = full(**changes)
    return config if run.stage.name == "seeds" else dataclasses.replace(config, eval_every=config.epochs)


def is_current(record: dict, small: bool = False) -> bool:
    """False for a record whose settings, apart from its variant's changes and width, are not today's."""
    stage = dataclasses.replace(STAGES[record["stage"]], width=record["config"]["width"])
    run = Run(stage, Variant(record["variant"], record["shows"], record["changes"]), record["seed"])
    return not changed_settings(record["config"], config_of(run, small))


@dataclass
class Campaign:
    """Makes runs, and knows those that were made here or, by their records, elsewhere."""

    load: Callable[[], ImageDataset]  # called when the first run needs the images
    runs: Path  # the folder of the runs' folders
    device: torch.device
    small: bool = False  # a trial of the machinery: 96 images, 3 epochs, a thin network; its figures mean nothing
    records: Sequence[dict] = ()  # of runs that were made elsewhere

    def __post_init__(self):
        self.split = functools.lru_cache(maxsize=1)(self._split)  # each is a copy of all images

    @functools.cached_property
    def dataset(self) -> ImageDataset:
        """All images that the campaign may use.

        Raises:
            ConfigError: digits instead of CIFAR-10.
        """
        dataset = self.load()
        if self.small:
            return dataset.subset(96 + 40, 40)
        if dataset.is_stand_in or dataset.classes != CIFAR10_CLASSES:
            raise ConfigError(f"these are {dataset.description}: experiments need CIFAR-10, or --small for a trial")
        return dataset

    def _split(self, holdout: int, fold: int) -> ImageDataset:
        return self.dataset.holdout(40 if self.small else holdout, seed=fold) if holdout else self.dataset

    def folder(self, run: Run) -> Path:
        """``RUNS/STAGE-WIDTH-VARIANT-seedN``."""
        return self.runs / f"{run.stage.name}-{run.stage.width}-{run.variant.name.replace(' ', '-')}-seed{run.seed}"

    def record(self, run: Run) -> dict | None:
        """What was measured, or how it failed; None for a run that is still to be made.

        Raises:
            Session10Error: its folder holds a run with other settings.
        """
        config, folder = config_of(run, self.small), self.folder(run)
        here = read_record(folder)
        if here is not None:
            if differing := changed_settings(here["config"], config):
                raise Session10Error(
                    f"{folder} holds a run with other settings ({'; '.join(differing)}): move it away, or choose "
                    "another --runs"
                )
            return here
        known = (record for record in self.records if key_of(record) == run.key)
        return next((record for record in known if not changed_settings(record["config"], config)), None)

    def make(self, run: Run) -> dict:
        """Train one run, or finish it; returns its record. What the job prints goes to ``log.txt`` in its folder.

        Raises:
            RunLockedError: another process works on it.
            Session10Error: the run could not be finished, for a reason such as a full disk that is no result.
        """
        folder, config = self.folder(run), config_of(run, self.small)
        folder.mkdir(parents=True, exist_ok=True)
        variant = {"stage": run.stage.name, "variant": run.variant.name, "shows": run.variant.shows, "seed": run.seed}
        variant |= {"changes": run.variant.changes, "split": "validation" if run.stage.holdout else "test"}
        write_json(folder / VARIANT_NAME, variant)
        with open(folder / LOG_NAME, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            try:
                dataset = self.split(run.stage.holdout, run.seed % FOLDS if run.stage.holdout else 0)
                run_job(config, dataset, folder, device=self.device)
            except (NonFiniteLossError, LRRangeError) as error:
                failed = {"reason": str(error), "config": config.to_dict(), "device": runtime.device_name(self.device)}
                failed |= {"versions": machine.versions(), "commit": machine.code_commit()}
                write_json(folder / FAILED_NAME, failed)
        return read_record(folder)

    def work(self, runs: Iterable[Run], deadline: float = math.inf) -> int:
        """Make the runs that are not made yet, in order; returns how many are left when the time is up.

        Runs that other processes work on are waited for at the end, and taken over if those processes die.

        Args:
            runs: the plan.
            deadline: no run begins after it; as ``time.monotonic``, in seconds.
        """
        pending = [run for run in runs if self.record(run) is None]
        say(f"{len(pending)} runs to make")
        while pending:
            locked = []
            for number, run in enumerate(pending):
                if self.record(run) is not None:
                    continue  # made by another process meanwhile
                if time.monotonic() >= deadline:
                    left = len(pending) - number + len(locked)
                    say(f"the time is up, {left} runs are left: the same command goes on with them")
                    return left
                try:
                    say(f"{run}: {describe(self.make(run))}")
                except RunLockedError:
                    locked.append(run)
            if len(locked) == len(pending):
                time.sleep(WAIT_SECONDS)
            pending = locked
        return 0


def read_record(folder: Path) -> dict | None:
    """The record of the run that was finished or failed in ``folder``; None while there is no such run.

    Raises:
        Session10Error: a file in it is damaged.
    """
    if is_finished(folder):
        metrics = read_metrics(folder)
        measured = {name: metrics[name] for name in RECORDED if name in metrics}
        measured |= {"train_accuracy": metrics["history"]["train_accuracy"][-1], "config": metrics["config"]}
        return {**read_json(folder / VARIANT_NAME), "status": "done", **measured}
    if (folder / FAILED_NAME).exists():
        return {**read_json(folder / VARIANT_NAME), "status": "failed", **read_json(folder / FAILED_NAME)}
    return None


def all_records(runs: Path, known: Sequence[dict]) -> list[dict]:
    """``known`` records, and those of every run folder in ``runs`` that no known one of equal settings stands for."""
    here = [read_record(path.parent) for path in sorted(runs.glob(f"*/{VARIANT_NAME}"))]
    found = {
        json.dumps([key_of(record), record["config"]], sort_keys=True): record
        for record in [*filter(None, here), *known]
    }
    stages = list(STAGES)
    return sorted(found.values(), key=lambda one: (stages.index(one["stage"]), one["variant"], one["seed"]))


def key_of(record: dict) -> tuple[str, str, int]:
    """Stage, variant and seed."""
    return record["stage"], record["variant"], record["seed"]


def describe(record: dict) -> str:
    """A run's result in a few words."""
    if record["status"] == "failed":
        return f"failed, {record['reason']}"
    return (
        f"{record['test_accuracy']:.2f}%, {record['test_accuracy_tta']:.2f}% with flip TTA, loss "
        f"{record['test_loss']:.4f}, LR {record['lr_min']:.1e} to {record['lr_max']:.1e}, "
        f"{duration(record['wall_seconds'])}"
    )


def read_json(path: Path):
    """The content of a JSON file.

    Raises:
        Session10Error: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Session10Error(f"{path} cannot be read ({error}): delete its folder, or get a fresh copy") from error
