"""Runs variants, one after the other, and logs each as it finishes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from experiments.variants import RECIPE, Variant
from models import CustomResNet
from utils import runtime
from utils.analysis import per_class_accuracy
from utils.checkpoint import save_weights, write_atomically
from utils.config import Config, full, quick
from utils.dataset import ImageDataset
from utils.engine import NonFiniteLossError, TrainState, advance, find_range, fit, make_criterion, start
from utils.loaders import make_loaders
from utils.lr_finder import LRRange, LRRangeError
from utils.report import close_history, duration, final_test, run_record
from utils.transforms import BatchAugment

FIRST_SEED = {"validation": 0, "test": 100}  # far apart: no seed that tuning saw gives a result
MARGIN = 1.25  # some variants take longer than the recipe, by which time is estimated


@dataclass(frozen=True)
class Scale:
    """How large the runs are: the recipe, and how many images train and validate it."""

    recipe: Config
    holdout: int


FULL = Scale(full(), holdout=5000)
SMALL = Scale(
    quick(
        train_images=96,
        test_images=40,
        batch_size=16,
        epochs=3,
        peak_epoch=1,
        range_test_start=1e-5,
        range_test_steps=40,
    ),
    holdout=40,
)


@dataclass(frozen=True)
class Run:
    """One training: ``split`` is "validation" (a part of train is held out) or "test" (all of train, the real test)."""

    split: str
    variant: Variant
    seed: int


class LogError(RuntimeError):
    """The log cannot be used as it is; the message says why and what to do."""


class Log:
    """``runs.jsonl``: every finished run, replaced as a whole so that no line is ever half written.

    Raises:
        LogError: a line is no JSON.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / "runs.jsonl"
        self.records: list[dict] = []
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                self.records.append(json.loads(line))
            except ValueError as error:
                raise LogError(f"{self.path}, line {number} is damaged ({error}): delete that line") from None

    def find(self, key: str) -> dict | None:
        """The record of the run with this key, or None."""
        return next((record for record in self.records if record["key"] == key), None)

    def add(self, record: dict) -> None:
        self.records.append(record)
        lines = "".join(json.dumps(each) + "\n" for each in self.records)
        write_atomically(self.path, lines.encode())


class Budget:
    """Wall time since it was made, against a limit.

    Args:
        minutes: the limit; None for none.
    """

    def __init__(self, minutes: float | None = None):
        self.began = time.monotonic()
        self.limit = math.inf if minutes is None else 60 * minutes
        self.durations: list[float] = []  # of runs, seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.limit - (time.monotonic() - self.began)

    def estimate(self, runs: int) -> float:
        """Seconds that so many runs will take; 0 before the first one was measured."""
        return runs * statistics.median(self.durations) if self.durations else 0.0


class Split:
    """One split of the data: uploaded to the device once, when first used, for all runs."""

    def __init__(self, dataset: ImageDataset, config: Config, device: torch.device, dtype: torch.dtype):
        self.dataset = dataset
        self.fingerprint = dataset.fingerprint()
        self.train_loader, self.test_loader = make_loaders(dataset, config, device, dtype)

    def new_train_loader(self, config: Config):
        """The loader that ``make_loaders`` would give for ``config``, around the images already on the device."""
        loader = copy.copy(self.train_loader)
        loader.batch_size = config.batch_size
        loader.augment = BatchAugment(config.pad, config.pad_mode, config.flip, config.cutout)
        loader.alternate_flip = config.alternate_flip
        loader.seed = config.seed
        return loader


class Runner:
    """Trains variants of a recipe on one dataset.

    Args:
        dataset: its test part is only touched by runs on the split "test".
        scale: recipe and sizes.
        folder: of the log.
        device: to train on.
    """

    def __init__(self, dataset: ImageDataset, scale: Scale, folder: Path, device: torch.device):
        self.dataset = dataset
        self.scale = scale
        self.folder = Path(folder)
        self.device = device
        self.precision = runtime.pick_precision(scale.recipe.precision, device)
        self.log = Log(folder)

    @cached_property
    def validation(self) -> Split:
        config = self.scale.recipe
        wanted = None if config.train_images is None else config.train_images + self.scale.holdout
        return self._split(self.dataset.subset(wanted).holdout(self.scale.holdout))

    @cached_property
    def test(self) -> Split:
        config = self.scale.recipe
        return self._split(self.dataset.subset(config.train_images, config.test_images))

    def _split(self, dataset: ImageDataset) -> Split:
        return Split(dataset, self.scale.recipe, self.device, self.precision.dtype)

    def split(self, name: str) -> Split:
        return {"validation": lambda: self.validation, "test": lambda: self.test}[name]()

    def config(self, run: Run) -> Config:
        return dataclasses.replace(self.scale.recipe, **run.variant.changes, seed=run.seed)

    def key(self, run: Run) -> str:
        """Names the run in the log: equal for equal variant, settings, seed and data."""
        return _digest([run.split, run.variant.name, self.config(run).to_dict(), self.split(run.split).fingerprint])

    def find(self, run: Run) -> dict | None:
        """The run's record, or None before it has finished."""
        return self.log.find(self.key(run))

    def weights_path(self, run: Run) -> Path:
        return self.folder / f"{self.key(run)}.safetensors"

    def is_shown(self, run: Run) -> bool:
        """True for the run that ``--publish`` shows: the recipe's first seed. The first, never the best."""
        return run == Run("test", RECIPE, FIRST_SEED["test"])

    def execute(self, runs: Sequence[Run], budget: Budget, reserve: int = 0) -> int:
        """Train what is not in the log yet, in order, as long as the budget lasts.

        Args:
            runs: in order of importance.
            budget: what is left of it, less ``reserve`` more runs, is spent here.
            reserve: runs that come later and must fit in too.

        Returns:
            How many runs are left.
        """
        pending = [run for run in runs if self.find(run) is None]
        print(f"{len(runs)} runs, of which {len(runs) - len(pending)} are in {self.log.path.name} already")
        for number, run in enumerate(pending):
            left = len(pending) - number
            if budget.left < budget.estimate(1) + MARGIN * budget.estimate(reserve):
                later = f" ({reserve} runs to come get the rest of the time)" if reserve else ""
                print(f"the time is up: {left} runs are left{later}; the same command goes on with them")
                return left
            began = time.monotonic()
            record = self.train(run)
            record["total_seconds"] = time.monotonic() - began
            budget.durations.append(record["total_seconds"])
            self.log.add(record)
            print(f"[{number + 1}/{len(pending)}] {describe(record)}", flush=True)
            if number == 0 and left > 1:
                seconds = budget.estimate(left - 1)
                limit = "" if math.isinf(budget.limit) else f" of {duration(max(0, budget.left))} in the budget"
                print(f"at {duration(budget.estimate(1))} a run, the {left - 1} to go take {duration(seconds)}{limit}")
        return 0

    def train(self, run: Run) -> dict:
        """Range test, training, one evaluation after the last epoch; the record for the log, all but its total time.

        A run that diverges, or whose range test has no answer, gives a record too: that is its result.
        """
        config, split, precision = self.config(run), self.split(run.split), self.precision
        runtime.seed_everything(config.seed, config.deterministic)
        loader = split.new_train_loader(config)
        model = CustomResNet(len(split.dataset.classes), config.dropout, config.logit_scale)
        if run.variant.edit_model is not None:
            run.variant.edit_model(model)
        model = model.to(self.device, memory_format=torch.channels_last)

        description = {
            "key": self.key(run),
            "split": run.split,
            "variant": run.variant.name,
            "shows": run.variant.shows,
            "seed": run.seed,
            "recipe": _digest(dataclasses.replace(self.scale.recipe, seed=0).to_dict()),
            "train_images": len(split.dataset.train_labels),
            "eval_images": len(split.dataset.test_labels),
        }
        try:
            began = time.perf_counter()
            lr_range = find_range(model, loader, config, self.precision)
            range_test_seconds = time.perf_counter() - began
            lr_min, lr_max = run.variant.lr_min_factor * lr_range.lr_min, run.variant.lr_max_factor * lr_range.lr_max
            if not lr_min < lr_max:
                raise LRRangeError(f"LRMIN {lr_min:.1e} is not below LRMAX {lr_max:.1e}")
            state = start(model, config, lr_min, lr_max, len(loader), precision)
            (group,) = state.optimizer.param_groups
            if run.variant.edit_group is not None:
                run.variant.edit_group(group)

            began = time.perf_counter()
            if self.is_shown(run):
                fit(state, loader, split.test_loader, config, precision=precision)
            else:
                train_metrics = _train_untested(state, loader, config, precision)
            seconds = time.perf_counter() - began
        except (NonFiniteLossError, LRRangeError) as error:
            empty = LRRange(math.nan, math.nan, *[np.array([])] * 3, config.lr_rule, {})
            record = run_record(config, empty, 0.0, split.dataset, precision)
            return {**record, "lr_range": None, **description, "status": "failed", "error": str(error)}

        plain, mirrored = final_test(state.tested_model, split.dataset, self.device)
        record = run_record(config, lr_range, range_test_seconds, split.dataset, precision)
        if self.is_shown(run):
            close_history(state.history, plain)
            save_weights(state.tested_model, self.weights_path(run))
            record["history"] = state.history.to_dict()
            train_accuracy = state.history.train_accuracy[-1]
        else:
            train_accuracy = train_metrics.accuracy
            for curve in ("lrs", "losses", "smoothed"):  # a hundred numbers each, in every line of the log
                del record["lr_range"][curve]
        return {
            **record,
            **description,
            "status": "done",
            "accuracy": plain.accuracy,
            "accuracy_tta": mirrored.accuracy,
            "loss": plain.loss,
            "train_accuracy": train_accuracy,
            "per_class_accuracy": dict(zip(split.dataset.classes, per_class_accuracy(plain).tolist())),
            "lr_first": float(group["initial_lr"]),
            "lr_peak": float(group["max_lr"]),
            "lr_last": float(group["min_lr"]),
            "weight_decay": float(group["weight_decay"]),
            "seconds": seconds,
        }


def _train_untested(state: TrainState, loader, config: Config, precision: runtime.Precision):
    """All epochs, with no look at the evaluation images in between; the last epoch's train metrics."""
    criterion = make_criterion(config)
    for epoch in range(config.epochs):
        metrics, _ = advance(state, loader, epoch, config, criterion, precision=precision)
    return metrics


def describe(record: dict) -> str:
    """A finished run in one line."""
    name = f"{record['variant']}, seed {record['seed']}"
    if record["status"] == "failed":
        return f"{name}: failed, {record['error']}"
    return (
        f"{name}: {record['accuracy']:.2f}% {record['split']} accuracy, {record['accuracy_tta']:.2f}% with flip TTA, "
        f"LR {record['lr_first']:.1e}, {record['lr_peak']:.1e}, {record['lr_last']:.1e}, {duration(record['total_seconds'])}"
    )


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
