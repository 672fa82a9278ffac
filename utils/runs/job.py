"""The one way to train: range test -> fit -> final test -> results, resumable at any moment.

``train.py`` and ``experiments`` train through this module; the notebook takes the same steps one at a time.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import NamedTuple

import pandas
import torch

from models.patches import init_patches
from utils import engine, lr_finder, plotting, runtime
from utils.analysis import Predictions
from utils.config import Config, changed_settings
from utils.dataset import ImageDataset
from utils.loaders import make_loaders
from utils.metrics import History
from utils.runs import figures, report
from utils.runs.checkpoint import CheckpointError, RunFolder, copy_from_environment
from utils.runs.files import write_atomically, write_json
from utils.runs.machine import keep_freed_memory
from utils.runs.ranks import Ranks
from utils.runs.weights import WEIGHTS_NAME, save_weights
from utils.schedule import one_cycle_lrs
from utils.transforms import normalize

FEW_STEPS = 10  # per epoch: with fewer, a run on some hundred pictures hardly learns
PATCH_IMAGES = 5000  # train images whose patches become the first filters, if the config asks for that
MACHINE_SETTINGS = ("compile", "recorded")  # may change when a run is resumed: how it is computed
SAVE_SECONDS_ON_GPU = 10.0  # between checkpoints, since an epoch takes less time than one; a CPU saves every epoch


class Results(NamedTuple):
    """What ``Job.finish`` found: metrics.json's content, predictions by TTA, and a history that ends in their figures."""

    metrics: dict
    predictions: dict[str, Predictions]
    history: History


class Job:
    """One run in its folder: ``find_lr``, ``fit``, ``finish``. Use as a context manager, or with ``open`` and ``close``.

    Args:
        config: the run's settings.
        dataset: its images, already cut to the subset that ``config`` names; with ``holdout``, a validation run.
        run_dir: where checkpoints and results go.
        device: from ``runtime.pick_device``; None picks the best.
        ranks: this process among those that train together, from ``join_ranks``.
        resume: False refuses a folder that holds a run.

    Attributes:
        is_resumed, resumed_epochs: whether the folder already held this run, and how many epochs of it.
        lr_range, state: known after ``find_lr``, None before.
    """

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        run_dir: str | os.PathLike,
        *,
        device: torch.device | None = None,
        ranks: Ranks | None = None,
        resume: bool = True,
    ):
        self.config = config
        self.dataset = dataset
        self.device = device if device is not None else runtime.pick_device()
        self.precision = runtime.pick_precision(config.precision, self.device)
        self.folder = RunFolder(run_dir, copy_from_environment(run_dir))
        self.ranks = ranks or Ranks()
        self.resume = resume
        self.lr_range: lr_finder.LRRange | None = None
        self.state: engine.TrainState | None = None

    def open(self) -> Job:
        """Lock the folder, and make the network and its batches.

        Raises ConfigError, or CheckpointError, RunLockedError or OSError if the folder cannot be used for this run.
        """
        if self.ranks.is_first:
            self.folder.open()
        if self.device.type == "cpu":
            keep_freed_memory()
        self._prepare()
        return self

    def close(self, *exc) -> None:
        """Unlock the folder."""
        self.folder.close()

    __enter__, __exit__ = open, close

    def _prepare(self) -> None:
        config, dataset, ranks = self.config, self.dataset, self.ranks
        ranks.check_rows(config.batch_size, len(dataset.train_labels))
        self._checkpoint = ranks.broadcast(self._load() if ranks.is_first else None)
        self._saved_at = float("-inf")
        self.is_resumed = self._checkpoint is not None
        self.resumed_epochs = len(self._checkpoint["history"]["lr"]) if self.is_resumed else 0
        runtime.seed_everything(config.seed, config.deterministic)
        self.train_loader, self.test_loader = make_loaders(dataset, config, self.precision, ranks.rank, ranks.world)
        steps = len(self.train_loader)
        one_cycle_lrs(1e-3, 1.0, config.epochs, config.peak_epoch, steps)  # fails before any work if there is no cycle
        if steps < FEW_STEPS and ranks.is_first:
            warnings.warn(f"an epoch has only {steps} steps: a smaller batch_size would train better", stacklevel=3)
        model = engine.build_model(config, len(dataset.classes), self.precision, config.epochs * steps)
        if config.init == "patches":
            init_patches(model, normalize(torch.from_numpy(dataset.train_images[:PATCH_IMAGES])))
        self.model = model.to(self.device, memory_format=torch.channels_last)

    def _load(self) -> dict | None:
        """The newest checkpoint, if it is of this run."""
        if self.folder.holds_run and not self.resume:
            raise CheckpointError(f"{self.folder.path} holds a run: add --resume, or choose another --run-dir")
        checkpoint = self.folder.load()
        if checkpoint is None:
            return None
        now = {name: getattr(self.config, name) for name in MACHINE_SETTINGS}
        differing = changed_settings({**checkpoint["record"]["config"], **now}, self.config)
        if checkpoint["record"]["fingerprint"] != self.dataset.fingerprint:
            differing.append("other images")
        if differing:
            copy = f" and its copy, {self.folder.copy_to}" if self.folder.copy_to else ""
            raise CheckpointError(
                f"{self.folder.path} is of another run: {'; '.join(differing)}. Choose another run folder (make run: ARGS=--new), or delete it{copy}"
            )
        return checkpoint

    def find_lr(self) -> lr_finder.LRRange:
        """Both ends of the cycle: given, known from the checkpoint, or found by the range test. Makes ``state``.

        Raises LRRangeError if the range test's curve has no answer.
        """
        if self.state is not None:
            return self.lr_range
        if self.model is None:  # `fit` was interrupted
            self._prepare()
        known = self._checkpoint["record"] if self._checkpoint else None
        self._record = known or self.ranks.broadcast(self._begin() if self.ranks.is_first else None)
        self.lr_range = lr_finder.LRRange.from_dict(self._record["lr_range"])
        ends = (self.lr_range.lr_min, self.lr_range.lr_max)
        state = engine.start(self.model, self.config, ends, len(self.train_loader), self.precision)
        if self._checkpoint is None:
            self._save(state)
        else:
            self.folder.restore(self._checkpoint, state)
            self._checkpoint = None  # as large as the run's state
        state.parallel = self.ranks.parallel(self.model)
        self.state = state  # last: `fit` trains no state that was not saved
        return self.lr_range

    def _begin(self) -> dict:
        """The range test, and all else that is known of the run before its first epoch."""
        config, dataset, precision, world = self.config, self.dataset, self.precision, self.ranks.world
        began = time.perf_counter()
        # Rank 0 alone tests the range, and so on whole batches.
        loader = self.train_loader if world == 1 else make_loaders(dataset, config, precision)[0]
        found = lr_finder.find_lr(self.model, loader, config, precision)
        return report.run_record(config, found, time.perf_counter() - began, dataset, precision, world)

    def fit(self) -> History:
        """Train to the last epoch, saving a checkpoint after each epoch (on a GPU every 10 seconds, and at the end).

        Called again after an interrupt, as in a notebook, it continues from the newest checkpoint.
        Raises NonFiniteLossError if the loss became NaN or infinite; the epochs before are kept.
        """
        self.find_lr()
        try:
            return engine.fit(
                self.state,
                self.train_loader,
                self.test_loader if self.ranks.is_first else None,
                self.config.epochs,
                eval_every=self.config.eval_every,
                after_epoch=self._save,
                show=runtime.say if self.ranks.is_first else None,
                total=self.ranks.total,
            )
        except BaseException:
            self.state = self.model = None  # in the middle of an epoch, which cannot be continued
            raise

    def _save(self, state: engine.TrainState) -> None:
        is_last = state.history.epochs == self.config.epochs
        is_due = self.device.type == "cpu" or is_last or time.monotonic() - self._saved_at >= SAVE_SECONDS_ON_GPU
        if is_due and self.ranks.is_first:
            self.folder.save(state, self._record)
            self._saved_at = time.monotonic()

    def finish(self, note: str = "") -> Results:
        """The final test, then the results in the run's folder: weights, log, history, figures, and last metrics.json.

        With several ranks, call this on the first.
        """
        if self.state is None or self.state.history.epochs < self.config.epochs:
            raise report.ResultsError("the run is not finished: call fit() first")
        config, dataset, state, folder = self.config, self.dataset, self.state, self.folder.path
        predictions = report.final_test(state.tested_model, dataset)
        history = report.with_final_test(state.history, predictions["none"])
        metrics = report.build_metrics(self._record, history, predictions, dataset.classes, note)
        about = {"classes": list(dataset.classes), "data": dataset.description, "split": dataset.split}
        save_weights(state.tested_model, folder / WEIGHTS_NAME, about)
        write_atomically(folder / report.LOG_NAME, report.training_log(metrics).encode())
        epochs = pandas.DataFrame({name: values for name, values in vars(history).items() if isinstance(values, list)})
        epochs.set_index(epochs.index + 1).to_csv(folder / "history.csv", index_label="epoch")
        drawn = figures.draw_all(config, dataset, state.tested_model, self.lr_range, history, predictions["none"])
        for name, figure in drawn.items():
            plotting.save_figure(figure, folder / name)
        write_json(folder / report.METRICS_NAME, metrics)
        self.folder.finish()
        return Results(metrics, predictions, history)

    def saved_message(self) -> str:
        """What a run that ends now leaves behind; empty if that is nothing."""
        epochs = self.folder.saved_epochs
        return "" if epochs is None else f"{epochs} of {self.config.epochs} epochs are kept in {self.folder.path}"


def run_job(
    config: Config, dataset: ImageDataset, run_dir: str | os.PathLike, device: torch.device | None = None
) -> dict:
    """Begin or continue a whole run in ``run_dir``; returns its metrics."""
    with Job(config, dataset, run_dir, device=device) as job:
        job.fit()
        return job.finish().metrics
