"""Train, evaluate, fit.

``train_epoch`` is the loop to read first. It never waits for the device: what the metrics need is kept where it was
computed, and read once a second for the progress bar and once at the end of the epoch.
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

from models import CustomResNet, variants
from utils.config import Config
from utils.runtime import Precision, Session10Error, keep_freed_memory
from utils.schedule import scheduler_for

BAR_SECONDS = 1.0  # how often the progress bar reads the metrics; each reading waits for the device
SHORT_RUN = 200  # steps: below, averages that span the recipe's number of steps would still hold the untrained network
MEMORY_SHARE = 20  # in a short run, no average looks back further than this part of it


def train_epoch(state: TrainState, loader: Iterable, description: str | None = None) -> Metrics:
    """One pass over ``loader``: a step of Adam, of the LR and of the weight average for each batch.

    Args:
        state: the run; changed in place.
        loader: (B, 3, 32, 32) float images and (B,) int64 labels, on the device.
        description: what the progress bar says; None for no bar.

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
    """Forward, loss, backward, Adam step: also what the LR range test repeats.

    Returns:
        The (B, C) logits and the loss, both from before the step, without gradients.
    """
    with state.precision.autocast():
        logits = state.network(images)
    loss = state.criterion(logits.float(), labels)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    return logits.detach(), loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, *, precision: Precision, tta: bool = False) -> Metrics:
    """Loss and accuracy without augmentation, in eval mode; the model's own mode is put back.

    Args:
        model: the network.
        loader: (B, 3, 32, 32) float images and (B,) int64 labels, on the device.
        precision: the forward pass runs under its autocast.
        tta: test-time augmentation: average the logits of each image and of its mirror image.
    """
    running = RunningMetrics()
    for logits, labels in predict_batches(model, loader, precision=precision, tta=tta):
        running.update(logits, labels)
    return running.read()


@torch.no_grad()
def predict_batches(
    model: nn.Module, loader: Iterable, *, precision: Precision, tta: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (B, C) float32 logits and (B,) labels for each batch, in eval mode."""
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
    """Train from where ``state`` stands to the last epoch, showing one row an epoch.

    Args:
        state: fresh from ``start``, or read from a checkpoint; changed in place.
        train_loader: its ``epoch`` is set, so that a resumed run sees what the uninterrupted one would have.
        test_loader: tested for the curves; no decision depends on it. None: no test.
        epochs: length of the whole run.
        eval_every: test after every so many epochs, and after the last one.
        after_epoch: called with ``state`` after each epoch, to save it, before the epoch's row is shown.
        show: called with each line of the table; None for no table and no progress bar.
        total: adds up the train metrics of several processes.

    Returns:
        ``state.history``.

    Raises:
        NonFiniteLossError: the epochs before are in ``state.history``.
    """
    history = state.history
    if show:
        show(table_header())
        for epoch in range(history.epochs):  # those of a resumed run, so that the table is whole
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
    """A run in progress: ``model``, what moves it, and what it has reached.

    Attributes:
        model, optimizer, scheduler, scaler, averages, history: what changes, and so what a checkpoint must hold.
        criterion: the loss to minimize, called as ``criterion(logits, labels)``.
        precision: the forward pass runs under its autocast.
        averages: running averages of the weights; the first is the one tested, others ride along for comparison.
        parallel: ``model`` wrapped for training on several devices, or None.
        last_lr: of the step before.
    """

    model: nn.Module
    optimizer: Optimizer
    criterion: nn.Module
    precision: Precision
    scaler: torch.amp.GradScaler
    scheduler: LRScheduler | None = None
    averages: list[WeightAverage] = field(default_factory=list)
    parallel: nn.Module | None = None
    history: History = field(default_factory=lambda: History())
    last_lr: float = float("nan")

    @property
    def network(self) -> nn.Module:
        """What a training step calls."""
        return self.parallel if self.parallel is not None else self.model

    @property
    def tested_model(self) -> nn.Module:
        """The weights that are tested and shipped: the running average where there is one."""
        return self.averages[0].module if self.averages else self.model

    @property
    def lr(self) -> float:
        """Of the step to come."""
        return float(self.optimizer.param_groups[0]["lr"])


def start(model: nn.Module, config: Config, lr_min: float, lr_max: float, steps_per_epoch: int, precision: Precision):
    """A fresh ``TrainState``: ``model`` moved to the device, with Adam, the LR's cycle and the weight average around it.

    In a run of few steps the averages, of weights and of batch norm's statistics, are shortened to fit it.

    Raises:
        ConfigError: LRs or lengths that make no cycle.
    """
    if precision.device.type == "cpu":
        keep_freed_memory()
    model = model.to(precision.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config, lr_max)
    scheduler = scheduler_for(config, optimizer, lr_min, lr_max, steps_per_epoch)
    decays, every = (config.ema_decay, *config.ema_also) if config.ema_decay else (), config.ema_every
    if config.epochs * steps_per_epoch < SHORT_RUN:
        memory = max(1.0, config.epochs * steps_per_epoch / MEMORY_SHARE)  # steps
        variants.set_norm_momentum(model, max(config.norm_momentum, 1 / memory))
        decays, every = [min(decay, 1 - 1 / memory) for decay in decays], 1
    averages = [WeightAverage(model, decay, every) for decay in decays]
    if config.compile != "off":
        model.compile(mode=config.compile, dynamic=False)  # dynamic=False: the last batch, if smaller, has its own code
    criterion, scaler = make_criterion(config), precision.grad_scaler()
    return TrainState(model, optimizer, criterion, precision, scaler, scheduler, averages)


def build_model(config: Config, num_classes: int, images: Tensor | None = None) -> nn.Module:
    """The untrained network that ``config`` describes: ``CustomResNet``, with the recipe's departures from it, if any.

    Args:
        config: ``width``, ``dropout``, ``logit_scale``, and what ``models/variants.py`` changes.
        num_classes: size of the output.
        images: (N, 3, 32, 32) float32 normalized train images, for ``init="patches"`` alone.
    """
    model = CustomResNet(num_classes, config.dropout, config.logit_scale, config.width)
    if not config.residual:
        variants.remove_skips(model)
    if config.conv_padding == "replicate":
        variants.pad_by_replication(model)
    variants.set_norm_momentum(model, config.norm_momentum)
    if config.ghost_batch:
        variants.ghost_batch_norm(model, config.ghost_batch)
    if config.init == "patches":
        variants.init_patches(model, images)
    return model


def make_optimizer(model: nn.Module, config: Config, lr_max: float | None = None) -> Adam:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101).

    Args:
        model: its parameters are optimized.
        config: betas, eps and the decay.
        lr_max: the cycle's peak, from which weight_decay = decay_at_peak / lr_max follows. None, before it is known
            (in the range test): no decay.
    """
    decay = config.decay_at_peak / lr_max if lr_max else 0.0
    groups = [{"params": list(model.parameters())}]
    if not config.decay_norm_and_bias:  # vectors are batch norm's weights and all biases
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
        fused=True,  # one kernel for all parameters, and no wait for the device
    )


def make_criterion(config: Config) -> nn.CrossEntropyLoss:
    """Cross-entropy on logits (the softmax is in here), with the recipe's label smoothing."""
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)


class WeightAverage(nn.Module):
    """An exponential moving average (EMA) of a network's weights and batch-norm statistics.

    Each update moves the average towards the network by 1 - decay. The first updates move it further: update t, from 0,
    uses min(decay, (1 + t) / (10 + t)) instead (TensorFlow's ``num_updates``), so that the untrained weights it begins
    with are soon forgotten. torch's ``AveragedModel`` has no such beginning, and makes a GPU wait.

    Args:
        model: what to average; copied, so later changes to it count from ``update`` on.
        decay: a training step's, from 0 to below 1.
        every: update at every so many steps of an epoch, with ``decay ** every``.

    Attributes:
        module: the averaged network.
        updates: how many there were.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.decay = decay**every
        self.every = every
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the state of ``model``, the network given first, after step ``step`` (from 0) of an epoch."""
        if (step + 1) % self.every:
            return
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        moving = [(average, value) for average, value in pairs if average.is_floating_point()]
        torch._foreach_lerp_(*(list(side) for side in zip(*moving)), weight)  # all tensors in a few launches
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)  # batch norm's counter

    def get_extra_state(self) -> int:
        """For ``state_dict``: how many updates there were."""
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


# --- metrics ----------------------------------------------------------------------------------------------------------


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


class NonFiniteLossError(Session10Error):
    """The loss became NaN or infinite."""


class RunningMetrics:
    """The logits and labels of an epoch's batches, kept on the device so that no step waits for the host."""

    def __init__(self):
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: (B, C) logits and (B,) labels."""
        self.logits.append(logits.float().clone())  # a copy: a CUDA graph writes its next output over this one
        self.labels.append(labels)

    def read(self) -> Metrics:
        """Wait for the device and return the metrics so far."""
        logits, labels = torch.cat(self.logits), torch.cat(self.labels)
        losses = F.cross_entropy(logits, labels, reduction="none").cpu().double()
        return Metrics(float(losses.mean()), int((logits.argmax(1) == labels).sum()), len(labels))

    def first_bad_step(self) -> int | None:
        """The first step, from 0, whose logits were not all finite."""
        finite = torch.stack([torch.isfinite(logits).all() for logits in self.logits]).tolist()
        return None if all(finite) else finite.index(False)


def with_progress_bar(
    loader: Iterable, state: TrainState, running: RunningMetrics, description: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``loader``'s batches, keep ``state.last_lr``, and read ``running`` for the bar now and then.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite; noticed when the bar is read, at the latest at the end.
    """
    lrs = []

    def check() -> None:
        step = running.first_bad_step()
        if step is not None:
            raise NonFiniteLossError(
                f"{description or 'training'}: the loss is not finite at step {step + 1}, where the LR was {lrs[step]:.2e}: lower "
                "lr_max (a third of it is a good next try), or check the images and labels for NaN"
            )

    bar_read = time.monotonic()
    hidden = {"disable": True} if description is None else {}  # else $TQDM_DISABLE decides
    with tqdm(loader, desc=description, leave=False, unit="batch", **hidden) as bar:  # an error leaves no half bar
        for batch in bar:
            lrs.append(state.lr)
            state.last_lr = lrs[-1]
            if state.precision.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # the last step's CUDA graphs may be written over
            yield batch
            if description is not None and time.monotonic() - bar_read > BAR_SECONDS:
                check()
                metrics = running.read()
                bar.set_postfix(loss=f"{metrics.loss:.4f}", accuracy=f"{metrics.accuracy:.2f}%", lr=f"{lrs[-1]:.5f}")
                bar_read = time.monotonic()
    check()


@dataclass
class History:
    """One entry an epoch in every list; index 0 is epoch 1.

    Attributes:
        lr: the LR of the epoch's last step.
        train_loss, test_loss: mean cross-entropy per image, without label smoothing, so that the two compare.
        train_accuracy, test_accuracy: percent. Train: on augmented images, while the weights were still moving.
            Test: None for epochs after which there was no test.
        seconds: wall time of training, and of testing where there was a test.
        train_size, test_size: how many images each is a mean over.
    """

    lr: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float | None] = field(default_factory=list)
    test_accuracy: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_size: int = 0
    test_size: int = 0

    @property
    def epochs(self) -> int:
        return len(self.lr)

    def append(self, lr: float, train: Metrics, test: Metrics | None, seconds: float) -> None:
        """Add an epoch; ``test`` is None where there was none."""
        self.lr.append(lr)
        self.train_loss.append(train.loss)
        self.train_accuracy.append(train.accuracy)
        self.test_loss.append(test and test.loss)
        self.test_accuracy.append(test and test.accuracy)
        self.seconds.append(seconds)
        self.train_size = train.count
        self.test_size = test.count if test else self.test_size

    def to_dict(self) -> dict:
        """Plain JSON values; ``History(**values)`` is the inverse."""
        return dataclasses.asdict(self)


def table_header() -> str:
    return (
        f"{'epoch':>5} {'lr':>9} {'train loss':>11} {'train acc':>10} {'test loss':>10} {'test acc':>9} {'seconds':>8}"
    )


def table_row(history: History, epoch: int) -> str:
    """One epoch's row (``epoch`` from 0), as wide as the header."""
    tested = history.test_loss[epoch] is not None
    test = (
        f"{history.test_loss[epoch]:>10.4f} {history.test_accuracy[epoch]:>8.2f}%" if tested else f"{'-':>10} {'-':>9}"
    )
    return (
        f"{epoch + 1:>5} {history.lr[epoch]:>9.6f} {history.train_loss[epoch]:>11.4f} "
        f"{history.train_accuracy[epoch]:>9.2f}% {test} {history.seconds[epoch]:>8.1f}"
    )
