"""Train, evaluate, fit.

Read ``train_step`` and ``train_epoch`` first. They never wait for the device: logits and labels stay there, and the
metrics are read once a second for the progress bar and once at the end of the epoch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from models.custom_resnet import CustomResNet
from models.ghost_norm import GhostBatchNorm2d
from models.packed import PackedConv2d
from utils.averaging import WeightAverage
from utils.config import Config
from utils.metrics import History, Metrics, RunningMetrics, table_header, table_row
from utils.runtime import Precision, Session10Error, cpu_has, progress_bar
from utils.schedule import lrs_for, scheduler

BAR_SECONDS = 1.0  # between two readings of the metrics for the progress bar; each waits for the device
EMA_EVERY = 5  # steps between two updates of the weight average
SHORT_RUN = 200  # steps; in a shorter run, the recipe's averages would still hold much of the untrained network
MEMORY_SHARE = 20  # in a short run, averages span at most one 20th of the steps
# Test-time augmentation: the weights of an image's views.
TTA = {"none": (1,), "flip": (1 / 2, 1 / 2), "six views": (1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 8)}


class NonFiniteLossError(Session10Error):
    """The loss became NaN or infinite."""


@dataclass
class TrainState:
    """A run in progress.

    A checkpoint holds model, optimizer, scheduler, scaler, average and history. ``average`` (or else ``model``) is
    tested and shipped, ``parallel`` is ``model`` wrapped for several devices, ``step`` takes the place of
    ``train_step``, and ``last_lr`` is the LR of the latest step.
    """

    model: nn.Module
    optimizer: Optimizer
    criterion: nn.Module
    precision: Precision
    scaler: torch.amp.GradScaler
    scheduler: LRScheduler | None = None
    average: WeightAverage | None = None
    parallel: nn.Module | None = None
    step: Callable[[TrainState, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    history: History = field(default_factory=History)
    last_lr: float = float("nan")

    @property
    def tested_model(self) -> nn.Module:
        """The network that is tested and shipped."""
        return self.average.module if self.average else self.model


def train_step(state: TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward, Adam step; returns the (B, C) logits and the loss, from before the weights moved."""
    with state.precision.autocast():
        logits = (state.parallel or state.model)(images)
    loss = state.criterion(logits.float(), labels)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return logits.detach(), loss.detach()


def train_epoch(state: TrainState, loader: Iterable, description: str | None = None) -> Metrics:
    """One pass over ``loader``: for each batch, one step of Adam, of the LR schedule and of the weight average.

    Args:
        state: the run; changed in place.
        loader: batches of (B, 3, 32, 32) float images and (B,) int64 labels, on the device.
        description: the progress bar's text; None for no bar.

    Returns the mean cross-entropy per image (without label smoothing) and accuracy; NonFiniteLossError if that is NaN.
    """
    state.model.train()
    step = state.step if state.step and not state.parallel else train_step
    running = RunningMetrics()
    for number, (images, labels) in enumerate(with_progress_bar(loader, state, running, description)):
        logits, _ = step(state, images, labels)
        running.update(logits, labels)
        state.scheduler.step()
        if state.average:
            state.average.update(state.model, number)
    return running.read()


def evaluate(model: nn.Module, loader: Iterable, *, precision: Precision, tta: str = "none") -> Metrics:
    """Loss and accuracy in eval mode; ``tta``, test-time augmentation, is a key of ``TTA``."""
    running = RunningMetrics()
    for logits, labels in predict_views(model, loader, precision, count=len(TTA[tta])):
        running.update(mean_logits(logits, tta), labels)
    return running.read()


@torch.no_grad()
def predict_views(model: nn.Module, loader: Iterable, precision: Precision, count: int):
    """Yield (count, B, C) float32 logits of the first ``count`` ``views_of`` each batch, in eval mode, and (B,) labels."""
    was_training = model.training
    model.eval()
    try:
        for images, labels in loader:
            with precision.autocast():
                views = itertools.islice(views_of(images), count)
                yield torch.stack([model(view).float() for view in views]), labels
    finally:
        model.train(was_training)


def views_of(images: Tensor) -> Iterator[Tensor]:
    """The images, then the images moved by one pixel up and left, and down and right, each followed by its mirror image.

    The border is reflected (Jordan 2024, https://arxiv.org/abs/2404.00498).
    """
    yield from (images, images.flip(3))
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    for at in (2, 0):
        moved = padded[:, :, at : at + 32, at : at + 32]
        yield from (moved, moved.flip(3))


def mean_logits(logits: Tensor, tta: str) -> Tensor:
    """The mean over the views, (V, B, C) -> (B, C), with the weights of ``TTA``."""
    return sum(weight * view for weight, view in zip(TTA[tta], logits))


def fit(
    state: TrainState,
    train_loader,
    test_loader: Iterable | None,
    epochs: int,
    *,
    eval_every: int = 1,
    after_epoch: Callable[[TrainState], None] | None = None,
    show: Callable[[str], None] | None = print,
    total: Callable[[Metrics], Metrics] = lambda metrics: metrics,
) -> History:
    """Train until the run has ``epochs`` epochs, and show a table with one row per epoch.

    Args:
        state: new, from ``start``, or restored from a checkpoint; changed in place. NonFiniteLossError leaves it with the
            history of the epochs before.
        train_loader: its ``epoch`` is set, so that a resumed run sees the same batches as an uninterrupted one.
        test_loader: for the curves only, no decision depends on it; None: no test.
        epochs: length of the whole run.
        eval_every: test after every ``eval_every`` epochs and after the last one.
        after_epoch: called with ``state`` after each epoch; saves a checkpoint.
        show: called with each line of the table; None: no table and no progress bar.
        total: combines the train metrics of several processes.
    """
    history = state.history
    if show:
        show(table_header())
        for epoch in range(history.epochs):  # a resumed run shows its earlier epochs too
            show(table_row(history, epoch, epochs))
    for epoch in range(history.epochs, epochs):
        began = time.perf_counter()
        train_loader.epoch = epoch
        train = total(train_epoch(state, train_loader, f"epoch {epoch + 1}/{epochs}" if show else None))
        is_tested = test_loader is not None and ((epoch + 1) % eval_every == 0 or epoch + 1 == epochs)
        test = evaluate(state.tested_model, test_loader, precision=state.precision) if is_tested else None
        history.append(state.last_lr, train, test, time.perf_counter() - began)
        if after_epoch is not None:
            after_epoch(state)
        if show:
            show(table_row(history, epoch, epochs))
    return history


def with_progress_bar(
    loader: Iterable, state: TrainState, running: RunningMetrics, description: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``loader``'s batches, keep ``state.last_lr`` up to date, and show ``running`` on the bar.

    A loss that is not finite is noticed when the bar is updated, or at the end.
    """
    lrs = []

    def check() -> None:
        step = running.first_bad_step()
        if step is not None:
            raise NonFiniteLossError(
                f"{description or 'training'}: the loss is not finite at step {step + 1}, where the LR was "
                f"{lrs[step]:.2e}: lower lr_max (try a third of it next), or check the images and labels for NaN"
            )

    bar_read = time.monotonic()
    with progress_bar(loader, description, unit="batch") as bar:  # errors leave no half bar
        for batch in bar:
            state.last_lr = float(state.optimizer.param_groups[0]["lr"])
            lrs.append(state.last_lr)
            yield batch
            if description is not None and time.monotonic() - bar_read > BAR_SECONDS:
                check()
                metrics = running.read()
                bar.set_postfix(loss=f"{metrics.loss:.4f}", accuracy=f"{metrics.accuracy:.2f}%", lr=f"{lrs[-1]:.5f}")
                bar_read = time.monotonic()
    check()


# --- what a run begins with -------------------------------------------------------------------------------------------


def build_model(config: Config, num_classes: int, precision: Precision | None = None, steps: int | None = None):
    """The untrained ``CustomResNet`` that ``config`` describes, on the CPU; ``init_patches`` is up to the caller.

    ``precision`` decides about packed convolutions. In a short run, one of few ``steps``, batch norm's running statistics
    span fewer of them.
    """
    in_bf16_on_cpu = precision is not None and precision.name == "bf16" and precision.device.type == "cpu"
    has_amx = in_bf16_on_cpu and cpu_has("amx_bf16", "amx_tile")
    is_packed = config.packed == "on" or (config.packed == "auto" and has_amx)
    momentum = max(0.1, 1 / memory_of(steps)) if steps else 0.1
    norm = functools.partial(nn.BatchNorm2d, momentum=momentum)
    if config.ghost_batch:
        norm = functools.partial(GhostBatchNorm2d, group=config.ghost_batch, momentum=momentum)
    conv = PackedConv2d if is_packed else nn.Conv2d
    options = dict(width=config.width, dropout=config.dropout, skip=config.residual, conv=conv, norm=norm)
    return CustomResNet(num_classes, **options)


def start(model: nn.Module, config: Config, ends: tuple[float, float], steps_per_epoch: int, precision: Precision):
    """A new run: ``model`` moved to the device, with Adam, the weight average, and a cycle between ``ends``.

    Raises ConfigError if the LRs or lengths make no cycle.
    """
    model = model.to(precision.device, memory_format=torch.channels_last)
    optimizer, lrs = make_optimizer(model, config, lr_max=ends[1]), lrs_for(config, *ends, steps_per_epoch)
    is_recorded = precision.device.type == "cuda" and config.recorded == "auto"
    if is_recorded:
        lrs = lrs.astype(np.float32)  # as the recorded step holds it, so that its eager steps take the same
    schedule = scheduler(optimizer, lrs)
    average = None
    if config.ema_decay:
        steps = config.epochs * steps_per_epoch
        every = 1 if steps < SHORT_RUN else min(EMA_EVERY, steps_per_epoch)  # counted within an epoch
        average = WeightAverage(model, min(config.ema_decay, 1 - 1 / memory_of(steps)), every)
    if config.compile != "off":
        model.compile(mode=config.compile, dynamic=False)
    state = TrainState(model, optimizer, make_criterion(config), precision, precision.grad_scaler(), schedule, average)
    state.step = RecordedStep(is_compiled=config.compile != "off") if is_recorded else None
    return state


def memory_of(steps: int) -> float:
    """How many steps an average may span in a run of ``steps``: all it wants, unless the run is short."""
    return max(1.0, steps / MEMORY_SHARE) if steps < SHORT_RUN else float("inf")


def make_optimizer(model: nn.Module, config: Config, lr_max: float | None = None) -> Adam:
    """Adam with decoupled weight decay, known as AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101).

    weight_decay = decay_at_peak / lr_max; there is none in the range test, which has yet to find LRMAX.
    """
    decay = config.decay_at_peak / lr_max if lr_max else 0.0
    return Adam(
        model.parameters(),
        lr=lr_max or 1e-3,
        betas=(config.beta1, config.beta2),
        weight_decay=config.coupled_decay or decay,
        decoupled_weight_decay=not config.coupled_decay,
        fused=True,  # one kernel for all parameters, and no waiting for the device
    )


def make_criterion(config: Config) -> nn.CrossEntropyLoss:
    """Cross-entropy on logits (it includes the softmax), with label smoothing."""
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)


# --- the step on a GPU ------------------------------------------------------------------------------------------------


class RecordedStep:
    """``train_step``, recorded once as a CUDA graph and replayed: one launch per step instead of some 300.

    The first steps run eagerly, while cuDNN chooses its algorithms and Adam makes its state. Then the whole step is
    recorded. A replay computes on the recorded memory, so each batch is copied there, and so is the LR. Batches of
    another size, like an epoch's last one, run eagerly. If a GPU refuses the recording, all steps do, after a warning.

    Args:
        is_compiled: the model is; a smaller batch is not worth another compilation.
        capture: called with the step as a function without arguments; returns what replays it, and its result.
    """

    def __init__(self, is_compiled: bool = False, capture: Callable | None = None):
        self.is_compiled = is_compiled
        self.capture = capture or cuda_graph
        self.eager_steps = 3  # still to be made
        self.images: Tensor | None = None  # the recorded memory, of the size of the first batch
        self.replay: Callable[[], None] | None = None

    def __call__(self, state: TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.images is None:
            self.images, self.labels = images.clone(), labels.clone()
        is_smaller = images.shape != self.images.shape
        if self.replay is None and self.eager_steps == 0 and not is_smaller:
            self._record(state)
        if self.replay is None or is_smaller:
            self.eager_steps -= not is_smaller
            is_plain = is_smaller and self.is_compiled
            with torch.compiler.set_stance("force_eager") if is_plain else contextlib.nullcontext():
                return train_step(state, images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        for lr, group in zip(self.lrs, state.optimizer.param_groups):
            lr.fill_(group["lr"])
        self.replay()
        return self.result

    def _record(self, state: TrainState) -> None:
        groups, scale = state.optimizer.param_groups, state.scaler.state_dict()
        self.lrs = [torch.tensor(group["lr"], device=self.images.device) for group in groups]
        floats = [group["lr"] for group in groups]
        for group, lr in zip(groups, self.lrs):
            group.update(lr=lr, capturable=True)  # while recording only: checkpoints hold Python floats
        try:
            self.replay, self.result = self.capture(lambda: train_step(state, self.images, self.labels))
        except RuntimeError as error:
            reason = str(error.__context__ or error).partition("\n")[0]  # ending a broken recording fails, too
            warnings.warn(f"the training step could not be recorded ({reason}): training goes on without", stacklevel=2)
            state.optimizer.zero_grad()
            vars(state.optimizer).pop("grad_scale", None)  # the scaler's, if Adam was interrupted
            state.scaler = state.precision.grad_scaler()
            state.scaler.load_state_dict(scale)
        finally:
            for group, lr in zip(groups, floats):
                group.update(lr=lr, capturable=False)


def cuda_graph(step: Callable[[], tuple[Tensor, Tensor]]):
    """``step`` as a CUDA graph: ``(replay, result)``. Recording computes nothing; each replay refills ``result``."""
    graph, stream, usual = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    # A failed recording would leave its own stream in use. Other threads, such as loaders', may go on meanwhile.
    with torch.cuda.stream(usual), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = step()
    return graph.replay, result
