"""Train, evaluate, fit.

Read ``train_epoch`` first. It never waits for the device: logits and labels stay there, and the metrics are read once
a second for the progress bar and once at the end of the epoch.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from models import CustomResNet, variants
from utils.config import Config
from utils.metrics import History, Metrics, RunningMetrics, table_header, table_row
from utils.runtime import Precision, Session10Error, keep_freed_memory
from utils.schedule import scheduler_for

BAR_SECONDS = 1.0  # between two readings of the metrics for the progress bar; each waits for the device
SHORT_RUN = 200  # steps; in a shorter run, the recipe's averages would still hold much of the untrained network
MEMORY_SHARE = 20  # in a short run, averages span at most one 20th of the steps


def train_epoch(state: TrainState, loader: Iterable, description: str | None = None) -> Metrics:
    """One pass over ``loader``: for each batch, one step of Adam, of the LR schedule and of the weight averages.

    Args:
        state: the run; changed in place.
        loader: batches of (B, 3, 32, 32) float images and (B,) int64 labels, on the device.
        description: the progress bar's text; None for no bar.

    Returns:
        Mean cross-entropy (without label smoothing) and accuracy over the epoch.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    state.model.train()
    running = RunningMetrics()
    for step, (images, labels) in enumerate(with_progress_bar(loader, state, running, description)):
        logits, _ = train_step(state, images, labels)
        running.update(logits, labels)
        state.scheduler.step()
        for average in state.averages:
            average.update(state.model, step)
    return running.read()


def train_step(state: TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward, Adam step. The LR range test uses it too.

    Returns:
        The (B, C) logits and the loss, computed before the weights moved; both detached.
    """
    with state.precision.autocast():
        logits = state.network(images)
    loss = state.criterion(logits.float(), labels)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return logits.detach(), loss.detach()


def evaluate(model: nn.Module, loader: Iterable, *, precision: Precision, tta: bool = False) -> Metrics:
    """Loss and accuracy in eval mode; the model's mode is restored afterwards.

    Args:
        model: the network.
        loader: batches of (B, 3, 32, 32) float images and (B,) int64 labels, on the device.
        precision: the forward pass runs under its autocast.
        tta: test-time augmentation: average the logits of each image and its mirror image.
    """
    running = RunningMetrics()
    for logits, labels in predict_batches(model, loader, precision=precision, tta=tta):
        running.update(logits, labels)
    return running.read()


@torch.no_grad()
def predict_batches(
    model: nn.Module, loader: Iterable, *, precision: Precision, tta: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (B, C) float32 logits and (B,) labels for each batch; see ``evaluate``."""
    was_training = model.training
    model.eval()
    try:
        for images, labels in loader:
            with precision.autocast():
                logits = model(images).float()
                if tta:
                    logits = (logits + model(images.flip(3)).float()) / 2
            yield logits, labels
    finally:
        model.train(was_training)


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
        state: new, from ``start``, or restored from a checkpoint; changed in place.
        train_loader: its ``epoch`` is set, so that a resumed run sees the same batches as an uninterrupted one.
        test_loader: for the curves only, no decision depends on it; None: no test.
        epochs: length of the whole run.
        eval_every: test after every ``eval_every`` epochs and after the last one.
        after_epoch: called with ``state`` after each epoch, before its row is shown; saves a checkpoint.
        show: called with each line of the table; None: no table and no progress bar.
        total: combines the train metrics of several processes.

    Returns:
        ``state.history``.

    Raises:
        NonFiniteLossError: ``state.history`` holds the epochs before.
    """
    history = state.history
    if show:
        show(table_header())
        for epoch in range(history.epochs):  # a resumed run shows its earlier epochs too
            show(table_row(history, epoch))
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
            show(table_row(history, epoch))
    return history


# --- the run's state --------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """A run in progress.

    Attributes:
        model, optimizer, scheduler, scaler, averages, history: change during training; a checkpoint holds them.
        criterion: the loss to minimize, called as ``criterion(logits, labels)``.
        precision: the forward pass runs under its autocast.
        averages: running averages of the weights; the first is tested, the others are kept for comparison.
        parallel: ``model`` wrapped for training on several devices, or None.
        is_compiled: ``model`` was given to ``torch.compile``.
        last_lr: the LR of the latest step.
    """

    model: nn.Module
    optimizer: Optimizer
    criterion: nn.Module
    precision: Precision
    scaler: torch.amp.GradScaler
    scheduler: LRScheduler | None = None
    averages: list[WeightAverage] = field(default_factory=list)
    parallel: nn.Module | None = None
    is_compiled: bool = False
    history: History = field(default_factory=History)
    last_lr: float = float("nan")

    @property
    def network(self) -> nn.Module:
        """The module that a training step calls."""
        return self.parallel if self.parallel is not None else self.model

    @property
    def tested_model(self) -> nn.Module:
        """The network that is tested and shipped: the first running average, if there is one."""
        return self.averages[0].module if self.averages else self.model

    @property
    def lr(self) -> float:
        """The LR of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])


def start(model: nn.Module, config: Config, lr_min: float, lr_max: float, steps_per_epoch: int, precision: Precision):
    """A new run: ``model`` moved to the device, with Adam, the LR schedule and the weight averages.

    In a short run, the averages of the weights and of batch norm's statistics span fewer steps than ``config`` says.

    Raises:
        ConfigError: the LRs or lengths make no cycle.
    """
    if precision.device.type == "cpu":
        keep_freed_memory()
    model = model.to(precision.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config, lr_max)
    scheduler = scheduler_for(config, optimizer, lr_min, lr_max, steps_per_epoch)
    decays = (config.ema_decay, *config.ema_also) if config.ema_decay else ()
    every = min(config.ema_every, steps_per_epoch)  # counted within an epoch
    if config.epochs * steps_per_epoch < SHORT_RUN:
        memory = max(1.0, config.epochs * steps_per_epoch / MEMORY_SHARE)  # in steps
        variants.set_norm_momentum(model, max(config.norm_momentum, 1 / memory))
        decays = [min(decay, 1 - 1 / memory) for decay in decays]
        every = 1
    averages = [WeightAverage(model, decay, every) for decay in decays]
    is_compiled = config.compile != "off"
    if is_compiled:
        model.compile(mode=config.compile, dynamic=False)  # a smaller last batch gets its own code
    criterion, scaler = make_criterion(config), precision.grad_scaler()
    return TrainState(model, optimizer, criterion, precision, scaler, scheduler, averages, is_compiled=is_compiled)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The untrained ``CustomResNet`` that ``config`` describes, with its variants (models/variants.py).

    Its weights are drawn at random; ``init="patches"``, which needs images, is up to the caller.
    """
    model = CustomResNet(num_classes, config.dropout, config.logit_scale, config.width)
    if not config.residual:
        variants.remove_skips(model)
    if config.conv_padding == "replicate":
        variants.pad_by_replication(model)
    variants.set_norm_momentum(model, config.norm_momentum)
    if config.ghost_batch:
        variants.ghost_batch_norm(model, config.ghost_batch)
    return model


def make_optimizer(model: nn.Module, config: Config, lr_max: float | None = None) -> Adam:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101).

    Args:
        model: the network whose parameters are optimized.
        config: betas, eps and decay.
        lr_max: the peak of the cycle; weight_decay = decay_at_peak / lr_max. None, in the range test, which has yet to
            find it: no decay.
    """
    decay = config.decay_at_peak / lr_max if lr_max else 0.0
    groups = [{"params": list(model.parameters())}]
    if not config.decay_norm_and_bias:  # these are the parameters with one dimension
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return Adam(
        groups,
        lr=lr_max or 1e-3,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.coupled_decay or decay,
        decoupled_weight_decay=not config.coupled_decay,
        fused=True,  # one kernel for all parameters, and no waiting for the device
    )


def make_criterion(config: Config) -> nn.CrossEntropyLoss:
    """Cross-entropy on logits (it includes the softmax), with label smoothing."""
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)


class WeightAverage(nn.Module):
    """An exponential moving average (EMA) of a network's weights and batch-norm statistics.

    Each update moves the average towards the network by a share of 1 - decay. The first updates have lower decays than
    the given one (see ``highest_decay``), so that the untrained weights are soon forgotten; torch's ``AveragedModel``
    lacks this and makes a GPU wait. A decay too high for the run's length is never reached.

    Args:
        model: the network; the average starts as a copy of it.
        decay: per training step, from 0 to below 1.
        every: update every ``every`` steps of an epoch, with ``decay ** every``.

    Attributes:
        module: the averaged network.
        updates: the number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.decay = decay**every
        self.every = every
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after step ``step`` of an epoch, counted from 0."""
        if (step + 1) % self.every:
            return
        weight = 1 - min(self.decay, highest_decay(self.updates))
        self.updates += 1
        averages, values = [], []
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)  # batch norm's counter
        torch._foreach_lerp_(averages, values, weight)  # all tensors in a few kernel launches

    def get_extra_state(self) -> int:
        """The part of ``state_dict`` that is not a tensor."""
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state


def highest_decay(updates: int) -> float:
    """The highest decay that an average may have after ``updates`` updates (TensorFlow's ``num_updates``)."""
    return (1 + updates) / (10 + updates)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


# --- progress ---------------------------------------------------------------------------------------------------------


class NonFiniteLossError(Session10Error):
    """The loss became NaN or infinite."""


def with_progress_bar(
    loader: Iterable, state: TrainState, running: RunningMetrics, description: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``loader``'s batches, keep ``state.last_lr`` up to date, and show ``running`` on the bar.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; noticed when the bar is updated, or at the end.
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
    hidden = {"disable": True} if description is None else {}  # otherwise $TQDM_DISABLE decides
    with tqdm(loader, desc=description, leave=False, unit="batch", **hidden) as bar:  # errors leave no half bar
        for batch in bar:
            state.last_lr = state.lr
            lrs.append(state.last_lr)
            if state.is_compiled:
                torch.compiler.cudagraph_mark_step_begin()  # the last step's CUDA graphs may be overwritten
            yield batch
            if description is not None and time.monotonic() - bar_read > BAR_SECONDS:
                check()
                metrics = running.read()
                bar.set_postfix(loss=f"{metrics.loss:.4f}", accuracy=f"{metrics.accuracy:.2f}%", lr=f"{lrs[-1]:.5f}")
                bar_read = time.monotonic()
    check()
