"""Train, evaluate, fit.

``train_epoch`` is the loop to read first. It never waits for the device: metrics add up where they are computed, and
are read once a second for the progress bar and once at the end of the epoch.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from utils.config import Config
from utils.lr_finder import LRRange, find_lr
from utils.runtime import Precision, clear_failures, keep_freed_memory
from utils.schedule import one_cycle

BAR_SECONDS = 1.0  # how often the progress bar reads the metrics; each reading waits for the device


@dataclass(frozen=True)
class Metrics:
    """Over ``count`` images: ``loss``, their mean cross-entropy in nats, and ``correct``, how many were right."""

    loss: float
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100.0 * self.correct / self.count


@dataclass
class History:
    """One entry an epoch in every list; index 0 is epoch 1.

    Attributes:
        lr: the LR of the epoch's last step.
        train_loss, test_loss: mean cross-entropy per image, without label smoothing, so that the two compare.
        train_accuracy, test_accuracy: percent. Train: on augmented images, while the weights were still moving.
        seconds: wall time of training and testing.
        train_size, test_size: how many images each is a mean over.
    """

    lr: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_size: int = 0
    test_size: int = 0

    @property
    def epochs(self) -> int:
        return len(self.lr)

    def append(self, lr: float, train: Metrics, test: Metrics, seconds: float) -> None:
        self.lr.append(lr)
        self.train_loss.append(train.loss)
        self.train_accuracy.append(train.accuracy)
        self.test_loss.append(test.loss)
        self.test_accuracy.append(test.accuracy)
        self.seconds.append(seconds)
        self.train_size, self.test_size = train.count, test.count

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; ``history`` holds the epochs before."""

    def __init__(self, message: str, history: History | None = None):
        super().__init__(message)
        self.history = history


class RunningMetrics:
    """Loss and accuracy summed on the device, so that no step waits for the host to read them."""

    def __init__(self, device: torch.device):
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.all_finite = torch.ones((), dtype=torch.bool, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)  # those before the first bad one
        self.count = 0
        self.steps = 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: (B, C) logits and (B,) labels."""
        logits = logits.detach().float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self.loss_sum += loss
        self.correct += (logits.argmax(1) == labels).sum()
        self.all_finite &= torch.isfinite(loss)
        self.finite_steps += self.all_finite
        self.count += len(labels)
        self.steps += 1

    def read(self) -> Metrics:
        """Wait for the device and return the metrics so far."""
        return Metrics(self.loss_sum.item() / self.count, int(self.correct.item()), self.count)

    def first_bad_step(self) -> int | None:
        """The first step, from 0, whose loss was not finite."""
        step = int(self.finite_steps.item())
        return step if step < self.steps else None


class WeightAverage(nn.Module):
    """An exponential moving average (EMA) of a network's weights and batch-norm statistics.

    Each update moves the average towards the network by 1 - decay. The first updates move it further: update t, from 0,
    uses min(decay, (1 + t) / (10 + t)) instead (TensorFlow's ``num_updates``), so that the untrained weights it begins
    with are soon forgotten. Like torch's ``AveragedModel``, but for that, and it never makes a GPU wait.

    Args:
        model: what to average; copied, so later changes to it count from ``update_parameters`` on.
        decay: an update's, from 0 to below 1.

    Attributes:
        module: the averaged network.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the present state of ``model``, the network given first, on the same device."""
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight)
            else:
                average.copy_(value)  # batch norm's counter

    def get_extra_state(self) -> int:
        """For ``state_dict``: how many updates there were."""
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def train_epoch(
    model: nn.Module,
    loader: Iterable,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    criterion: nn.Module,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    ema: WeightAverage | None = None,
    ema_every: int = 5,
    description: str = "train",
) -> tuple[Metrics, list[float]]:
    """One pass over ``loader``: forward, loss, backward, Adam step, LR step.

    Args:
        model: the network, left in train mode.
        loader: (B, 3, 32, 32) float images and (B,) int64 labels.
        optimizer: updates ``model``.
        scheduler: stepped after every batch.
        criterion: the loss to minimize, called as ``criterion(logits, labels)``.
        precision: the forward pass runs under its autocast.
        scaler: from ``precision.grad_scaler()``; does nothing unless the precision is fp16.
        ema: running average of the weights, updated every ``ema_every`` steps.
        description: what the progress bar says.

    Returns:
        Mean cross-entropy (without label smoothing) and accuracy over the epoch, and the LR of every step.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
    """
    model.train()
    device = precision.device
    running = RunningMetrics(device)
    lrs = []
    bar_read = time.monotonic()

    with tqdm(loader, desc=description, leave=False, unit="batch") as bar:  # an error must not leave half a bar
        for step, (images, labels) in enumerate(bar):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(device, non_blocking=True)

            with precision.autocast():
                logits = model(images)
            loss = criterion(logits.float(), labels)

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            lrs.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step()
            if ema is not None and (step + 1) % ema_every == 0:
                ema.update_parameters(model)

            running.update(logits, labels)
            if time.monotonic() - bar_read > BAR_SECONDS:
                _check_finite(running, lrs)
                metrics = running.read()
                bar.set_postfix(loss=f"{metrics.loss:.4f}", accuracy=f"{metrics.accuracy:.2f}%", lr=f"{lrs[-1]:.5f}")
                bar_read = time.monotonic()
    _check_finite(running, lrs)
    return running.read(), lrs


def _check_finite(running: RunningMetrics, lrs: list[float]) -> None:
    step = running.first_bad_step()
    if step is not None:
        raise NonFiniteLossError(
            f"the loss is not finite at step {step + 1} of this epoch, where the LR was {lrs[step]:.2e}: "
            "lower lr_max (a third of it is a good next try), or check the images and labels for NaN"
        )


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, *, precision: Precision, tta: bool = False) -> Metrics:
    """Loss and accuracy without augmentation, in eval mode; the model's own mode is put back.

    Args:
        model: the network.
        loader: (B, 3, 32, 32) float images and (B,) int64 labels.
        precision: the forward pass runs under its autocast.
        tta: test-time augmentation: average the logits of each image and of its mirror image.
    """
    running = RunningMetrics(precision.device)
    for logits, labels in predict_batches(model, loader, precision=precision, tta=tta):
        running.update(logits, labels)
    return running.read()


@torch.no_grad()
def predict_batches(model: nn.Module, loader: Iterable, *, precision: Precision, tta: bool = False):
    """Yield (B, C) float32 logits and (B,) labels for each batch, in eval mode."""
    was_training = model.training
    model.eval()
    try:
        for images, labels in loader:
            images = images.to(precision.device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(precision.device, non_blocking=True)
            with precision.autocast():
                logits = model(images).float()
                if tta:
                    logits = (logits + model(images.flip(3)).float()) / 2
            yield logits, labels
    finally:
        model.train(was_training)


def make_optimizer(model: nn.Module, config: Config, lr_max: float | None = None) -> Adam:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101).

    Args:
        model: its parameters are optimized.
        config: betas, eps and ``decay_at_peak``.
        lr_max: the cycle's peak, from which weight_decay = decay_at_peak / lr_max follows. None, before it is known
            (in the range test): no decay.
    """
    return Adam(
        model.parameters(),
        lr=lr_max or 1e-3,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.decay_at_peak / lr_max if lr_max else 0.0,
        decoupled_weight_decay=True,
        fused=True,  # one kernel for all parameters, and no wait for the device
    )


def make_criterion(config: Config) -> nn.CrossEntropyLoss:
    """Cross-entropy on logits (the softmax is in here), with the recipe's label smoothing."""
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)


def find_range(model: nn.Module, train_loader: Iterable, config: Config, precision: Precision) -> LRRange:
    """Both ends of the cycle: those that ``config`` gives, else what the LR range test finds with its settings.

    ``model`` is on ``precision.device``; it is not changed.

    Raises:
        LRRangeError: the range test's curve has no answer.
    """
    if precision.device.type == "cpu":
        keep_freed_memory()
    if config.lr_min is not None:
        return LRRange.given(config.lr_min, config.lr_max)
    return find_lr(
        model,
        train_loader,
        make_optimizer(model, config),
        make_criterion(config),
        precision=precision,
        start=config.range_test_start,
        end=config.range_test_end,
        steps=config.range_test_steps,
        rule=config.lr_rule,
    )


@dataclass
class TrainState:
    """Everything that changes during a run, and so everything that a checkpoint must hold."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    ema: WeightAverage | None
    history: History

    @property
    def tested_model(self) -> nn.Module:
        """The weights that are tested and shipped: the running average where there is one."""
        return self.ema.module if self.ema is not None else self.model


def start(model: nn.Module, config: Config, lr_min: float, lr_max: float, steps_per_epoch: int, precision: Precision):
    """A fresh ``TrainState``: ``model`` moved to the device, with Adam, one cycle and the weight average around it."""
    if precision.device.type == "cpu":
        keep_freed_memory()
    model = model.to(precision.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config, lr_max)
    scheduler = one_cycle(
        optimizer, lr_min, lr_max, config.epochs, config.peak_epoch, steps_per_epoch, cycle_beta1=config.cycle_beta1
    )
    ema = WeightAverage(model, config.ema_decay**config.ema_every) if config.ema_decay else None
    if config.compile != "off":
        model.compile(mode=config.compile, dynamic=False)  # dynamic=False: the last batch, if smaller, has its own code
    return TrainState(model, optimizer, scheduler, precision.grad_scaler(), ema, History())


def advance(
    state: TrainState, loader, epoch: int, config: Config, criterion: nn.Module, *, precision: Precision
) -> tuple[Metrics, list[float]]:
    """Train ``state`` for epoch ``epoch`` (from 0), with the order and augmentations of that epoch.

    Returns:
        What ``train_epoch`` returns.
    """
    loader.epoch = epoch
    return train_epoch(
        state.model,
        loader,
        state.optimizer,
        state.scheduler,
        criterion,
        precision=precision,
        scaler=state.scaler,
        ema=state.ema,
        ema_every=config.ema_every,
        description=f"epoch {epoch + 1}/{config.epochs}",
    )


def fit(
    state: TrainState,
    train_loader,
    test_loader: Iterable,
    config: Config,
    *,
    precision: Precision,
    after_epoch: Callable[[TrainState], None] | None = None,
) -> History:
    """Train from where ``state`` stands to the last epoch, printing one row an epoch.

    Args:
        state: fresh from ``start``, or read from a checkpoint; changed in place.
        train_loader: its ``epoch`` is set, so that a resumed run sees what the uninterrupted one would have.
        test_loader: tested after every epoch for the curves; no decision depends on it.
        config: ``epochs``, ``label_smoothing`` and ``ema_every`` are read.
        precision: of the forward pass.
        after_epoch: called with ``state`` after each epoch, to save it.

    Returns:
        ``state.history``.

    Raises:
        NonFiniteLossError: with the history up to the epoch before.
        OutOfMemoryError, LoaderError: the epoch in progress is lost, those before it are in ``state.history``.
    """
    criterion = make_criterion(config)
    print(table_header())
    for epoch in range(state.history.epochs):  # those of a resumed run, so that the table is whole
        print(table_row(state.history, epoch))
    for epoch in range(state.history.epochs, config.epochs):
        began = time.perf_counter()
        try:
            with clear_failures(config.batch_size):
                train, lrs = advance(state, train_loader, epoch, config, criterion, precision=precision)
                test = evaluate(state.tested_model, test_loader, precision=precision)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"epoch {epoch + 1}: {error}", state.history) from None
        state.history.append(lrs[-1], train, test, time.perf_counter() - began)
        print(table_row(state.history, epoch), flush=True)
        if after_epoch is not None:
            after_epoch(state)
    return state.history


def table_header() -> str:
    return (
        f"{'epoch':>5} {'lr':>9} {'train loss':>11} {'train acc':>10} {'test loss':>10} {'test acc':>9} {'seconds':>8}"
    )


def table_row(history: History, epoch: int) -> str:
    """One epoch's row (``epoch`` from 0), as wide as the header."""
    return (
        f"{epoch + 1:>5} {history.lr[epoch]:>9.6f} {history.train_loss[epoch]:>11.4f} "
        f"{history.train_accuracy[epoch]:>9.2f}% {history.test_loss[epoch]:>10.4f} "
        f"{history.test_accuracy[epoch]:>8.2f}% {history.seconds[epoch]:>8.1f}"
    )
