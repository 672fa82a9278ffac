"""The one way to train: range test -> fit -> final test -> results, resumable at any moment.

``train.py`` and ``experiments`` train through this module; the notebook takes the same three steps one at a time:

    with Job(config, dataset, "runs/mine") as job:
        job.find_range()
        job.fit()
        job.finish()
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from models.packed import pack_small_maps
from models.variants import init_patches
from utils import engine, lr_finder, plotting, runtime
from utils.analysis import Predictions
from utils.config import Config, changed_settings, with_defaults
from utils.dataset import ImageDataset
from utils.loaders import make_loaders
from utils.lr_finder import LRRange
from utils.runs import figures, machine, report
from utils.runs.checkpoint import Checkpoint, CheckpointError, of_this_version
from utils.runs.folder import RunFolder, mirror_from_environment, reason_of
from utils.runs.ranks import Ranks
from utils.runs.weights import NETWORK_SETTINGS, WEIGHTS_NAME, save_weights
from utils.runtime import write_atomically
from utils.schedule import check_lengths
from utils.transforms import normalize

ALONE = Ranks()
PATCH_IMAGES = 5000  # train images whose patches become the first filters, if the config asks for that
# Settings that may change when a run is resumed: how the machine computes, not what.
OF_THE_MACHINE = ("num_workers", "compile")
SAVE_SECONDS_ON_GPU = 10.0  # between checkpoints, since an epoch takes less time than one; a CPU saves every epoch


@dataclass(frozen=True)
class Results:
    """What ``Job.finish`` found.

    Attributes:
        metrics: the content of metrics.json.
        plain, tta: predictions on the test images without and with flip TTA.
        history: with the shipped weights' figures in its last row.
    """

    metrics: dict
    plain: Predictions
    tta: Predictions
    history: engine.History


def _explained(step: Callable) -> Callable:
    """Explain the machine's failures in a step of a job (see ``machine.explain_failures``)."""

    @functools.wraps(step)
    def explained(self, *args, **kwargs):
        with machine.explain_failures(self.config.batch_size):
            return step(self, *args, **kwargs)

    return explained


class Job:
    """One run in its folder. Use as a context manager, or with ``open`` and ``close``.

    Entering locks the folder and loads its checkpoint, if there is one.

    Args:
        config: the run's settings.
        dataset: its images, already cut to the subset that ``config`` names; ``ImageDataset.holdout`` makes a
            validation run of it.
        run_dir: where checkpoints and results go.
        device: from ``runtime.pick_device``; None picks the best.
        ranks: this process among those that train together (see utils/runs/ranks.py).
        resume: False refuses a folder that holds a run.

    Attributes:
        is_resumed: True if the folder already held this run.
        resumed_epochs: epochs in the checkpoint that the run continues from; 0 for a new run.
        lr_range: after ``find_range``; None before.
        state: the run in progress, likewise.

    Raises (on entering):
        ConfigError: settings that do not fit these images.
        RunLockedError: another process is using the folder.
        CheckpointError: the folder cannot be used, or holds another run.
    """

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        run_dir: str | os.PathLike,
        *,
        device: torch.device | None = None,
        ranks: Ranks = ALONE,
        resume: bool = True,
    ):
        self.config = config
        self.dataset = dataset
        self.device = device if device is not None else runtime.pick_device()
        self.precision = runtime.pick_precision(config.precision, self.device)
        self.folder = RunFolder(run_dir, mirror_from_environment(run_dir))
        self.ranks = ranks
        self.resume = resume
        self.is_resumed = False
        self.resumed_epochs = 0
        self.lr_range: LRRange | None = None
        self.state: engine.TrainState | None = None
        self._record: dict | None = None
        self._checkpoint: Checkpoint | None = None
        self._stack = ExitStack()

    @_explained
    def open(self) -> Job:
        with ExitStack() as stack:
            if self.ranks.is_first:
                stack.enter_context(self.folder)
            if self.ranks.share(self.folder.holds_checkpoint) and not self.resume:
                raise CheckpointError(
                    f"{self.folder.path} already holds a run: add --resume to continue it, or choose another --run-dir"
                )
            self._prepare()
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Unlock the folder."""
        self._stack.close()

    __enter__ = open

    def __exit__(self, *exc) -> None:
        self.close()

    def _prepare(self) -> None:
        config, dataset = self.config, self.dataset
        machine.check_compile(config.compile, self.device)
        runtime.seed_everything(config.seed, config.deterministic)
        self.train_loader, self.test_loader = make_loaders(
            dataset, config, self.device, self.precision.dtype, self.ranks.rank, self.ranks.world
        )
        check_lengths(config.epochs, config.peak_epoch, len(self.train_loader))
        model = engine.build_model(config, len(dataset.classes))
        if config.init == "patches":
            init_patches(model, normalize(torch.from_numpy(dataset.train_images[:PATCH_IMAGES])))
        if config.packed == "on" or (config.packed == "auto" and machine.packing_pays(self.precision)):
            pack_small_maps(model)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self._checkpoint = self.ranks.share(self.folder.load() if self.ranks.is_first else None)
        if self._checkpoint is not None:
            self.is_resumed = True
            self._record = self._checkpoint.record
            with of_this_version(self.folder.checkpoint):
                self._check_same_run()
                self._say_if_moved()
                LRRange.from_dict(self._record["lr_range"])  # a malformed one is refused before any work

    def _check_same_run(self) -> None:
        here = {name: getattr(self.config, name) for name in OF_THE_MACHINE}
        differing = changed_settings({**self._record["config"], **here}, self.config)
        if self._record["fingerprint"] != self.dataset.fingerprint:
            differing.append("other images")
        if differing:
            copy = f" and its copy, {self.folder.mirror}" if self.folder.mirror else ""
            raise CheckpointError(
                f"{self.folder.path} belongs to another run: {'; '.join(differing)}. Choose another run folder, or delete "
                f"this one{copy}"
            )

    def _say_if_moved(self) -> None:
        """A run that began on another machine, or computing differently, continues correctly, but not bit for bit."""
        record = self._record
        here = (runtime.device_name(self.device), self.precision.name, f"torch {machine.versions()['torch']}")
        there = (record["device"], record["precision"], f"torch {record['versions']['torch']}")
        moved = [f"{old} then, {new} now" for old, new in zip(there, here) if old != new]
        if record["world"] != self.ranks.world:
            moved.append(f"{record['world']} processes then, {self.ranks.world} now")
        config, here = with_defaults(record["config"]), self.config.to_dict()
        # The batched pipeline has no workers whose number could matter.
        names = OF_THE_MACHINE if self.config.pipeline == "albumentations" else ("compile",)
        moved += [f"{name} {config[name]} then, {here[name]} now" for name in names if config[name] != here[name]]
        if moved:
            self.ranks.say(
                f"the run began differently ({'; '.join(moved)}): its result will be just as valid, but not "
                "bit-identical to what it would have been"
            )

    @_explained
    def find_range(self) -> LRRange:
        """Both ends of the cycle: given, found by the range test, or known from the checkpoint. Makes ``state``.

        Called again, it only returns them.

        Raises:
            LRRangeError: the range test's curve has no answer.
        """
        if self.state is not None:
            return self.lr_range
        if self._record is not None and self._checkpoint is None:  # `fit` was interrupted
            self._checkpoint = self.ranks.share(self.folder.load() if self.ranks.is_first else None)
        if self._record is None:
            if self.ranks.is_first:
                began = time.perf_counter()
                loader = self.train_loader
                if self.ranks.world > 1:  # rank 0 alone runs the range test, on whole batches
                    loader, _ = make_loaders(self.dataset, self.config, self.device, self.precision.dtype)
                found = lr_finder.find_range(self.model, loader, self.config, self.precision)
                seconds = time.perf_counter() - began
                self._record = report.run_record(
                    self.config, found, seconds, self.dataset, self.precision, self.ranks.world
                )
            self._record = self.ranks.share(self._record)
        self.lr_range = LRRange.from_dict(self._record["lr_range"])
        ends = (self.lr_range.lr_min, self.lr_range.lr_max)
        state = engine.start(self.model, self.config, *ends, len(self.train_loader), self.precision)
        state.criterion = self.ranks.weigh(state.criterion)
        if self._checkpoint is None:
            self._save(state)
        else:
            self._checkpoint.restore(self.folder.checkpoint, state)
            self.resumed_epochs = state.history.epochs
            self._checkpoint = None
        state.parallel = self.ranks.parallel(self.model, self.device)
        self._saved_at = time.monotonic()
        self.state = state  # last: `fit` trains no state that was not saved
        return self.lr_range

    @_explained
    def fit(self) -> engine.History:
        """Train from where ``find_range`` left ``state`` to the last epoch, saving a checkpoint after each epoch.

        On a GPU, where an epoch takes less time than a checkpoint, it saves every 10 seconds and at the end. Called again
        after an interrupt, as in a notebook, it continues from the newest checkpoint.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; the epochs before are kept.
        """
        self.find_range()
        try:
            return engine.fit(
                self.state,
                self.train_loader,
                self.test_loader if self.ranks.is_first else None,
                self.config.epochs,
                eval_every=self.config.eval_every,
                after_epoch=self._save_if_due,
                show=runtime.say if self.ranks.is_first else None,
                total=self.ranks.total,
            )
        except BaseException:
            self.state = None  # in the middle of an epoch, which cannot be continued
            raise

    def _save_if_due(self, state: engine.TrainState) -> None:
        is_due = self.device.type == "cpu" or time.monotonic() - self._saved_at >= SAVE_SECONDS_ON_GPU
        if is_due or state.history.epochs == self.config.epochs:
            self._save(state)
            self._saved_at = time.monotonic()

    def _save(self, state: engine.TrainState) -> None:
        if self.ranks.is_first:
            self.folder.save(Checkpoint.of(state, self._record))

    @_explained
    def finish(self, note: str = "") -> Results:
        """The final test, then the results in the run's folder: weights, log, figures, and last metrics.json.

        A figure that cannot be drawn is only a warning. With several ranks, call this on the first.

        Raises:
            ResultsError: training is not complete; or the results cannot be written: then every epoch is kept, and only
                this step need be repeated.
        """
        if self.state is None or self.state.history.epochs < self.config.epochs:
            raise report.ResultsError(f"the run is not finished: {self.kept()}; call fit() first")
        state, dataset, folder = self.state, self.dataset, self.folder.path
        plain, tta = report.final_test(state.tested_model, dataset)
        history = report.closed_history(state.history, plain)
        decay = float(state.optimizer.param_groups[0]["weight_decay"])
        metrics = report.build_metrics(self._record, self.config, history, decay, plain, tta, dataset.classes, note)
        if len(state.averages) > 1:
            metrics["averages"] = self._test_averages(plain, tta)
        results = Results(metrics, plain, tta, history)
        about = {"classes": list(dataset.classes), "data": dataset.description}
        about |= {name: getattr(self.config, name) for name in NETWORK_SETTINGS}
        try:
            save_weights(state.tested_model, folder / WEIGHTS_NAME, about)
            write_atomically(folder / report.LOG_NAME, report.training_log(metrics).encode())
            self._draw_figures(results)
            report.write_metrics(folder, metrics)
        except OSError as error:
            raise report.ResultsError(
                f"the results could not be written ({reason_of(error)}: {error.filename}). All {self.config.epochs} epochs "
                f"are kept in {self.folder.checkpoint}: fix this, then resume; only the test and the results are repeated"
            ) from error
        return results

    def _draw_figures(self, results: Results) -> None:
        model, history, plain = self.state.tested_model, results.history, results.plain
        inputs = figures.FigureInputs(self.config, self.dataset, model, self.lr_range, history, plain)
        for name, figure in figures.draw_all(inputs).items():
            try:
                plotting.save_figure(figure, self.folder.path / name)
            except Exception as error:  # whatever a drawing library may run into
                warnings.warn(
                    f"{name} could not be written ({reason_of(error)}): resume to draw it again", stacklevel=2
                )

    def _test_averages(self, plain: Predictions, tta: Predictions) -> dict[str, dict[str, float]]:
        """Accuracy and loss of each weight average, by its decay; the first is the tested one."""
        decays = (self.config.ema_decay, *self.config.ema_also)
        tested = [(plain, tta)]
        for average in self.state.averages[1:]:
            tested.append(report.final_test(average.module, self.dataset))
        return {
            str(decay): {
                "accuracy": one.accuracy,
                "accuracy_tta": both.accuracy,
                "loss": one.loss,
                "loss_tta": both.loss,
            }
            for decay, (one, both) in zip(decays, tested)
        }

    def kept(self) -> str:
        """What a run that ends now leaves behind, in words."""
        epochs = self.folder.saved_epochs
        if epochs:
            return f"{epochs} of {self.config.epochs} epochs are kept in {self.folder.path}"
        if epochs == 0:
            return f"the start of the run is kept in {self.folder.path}, but no epoch yet"
        if self.folder.holds_checkpoint:
            return f"the checkpoint in {self.folder.path} is unchanged"
        return "no epoch was finished yet"


def is_finished(run_dir: str | os.PathLike) -> bool:
    """True for the folder of a run that wrote its results."""
    return (Path(run_dir) / report.METRICS_NAME).exists()


def run_job(
    config: Config, dataset: ImageDataset, run_dir: str | os.PathLike, *, device: torch.device | None = None
) -> dict:
    """Begin or continue a whole run in ``run_dir``; returns its metrics.

    Raises:
        Session10Error: see ``Job`` and its three steps.
    """
    with Job(config, dataset, run_dir, device=device) as job:
        job.find_range()
        job.fit()
        return job.finish().metrics
