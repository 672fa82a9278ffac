"""What training and testing measure: an epoch's metrics, a run's history, and its table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Over ``count`` images: ``loss``, the mean cross-entropy in nats, and ``correct``, the number of right answers."""

    loss: float
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100.0 * self.correct / self.count


class RunningMetrics:
    """The logits and labels of an epoch's batches, kept on the device so that no step waits for it."""

    def __init__(self):
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: (B, C) logits and (B,) labels."""
        self.logits.append(logits.to(torch.float32, copy=True))  # a copy: a CUDA graph reuses its output's memory
        self.labels.append(labels)

    def read(self) -> Metrics:
        """The metrics so far; waits for the device."""
        logits, labels = torch.cat(self.logits), torch.cat(self.labels)
        losses = F.cross_entropy(logits, labels, reduction="none").cpu().double()
        return Metrics(float(losses.mean()), int((logits.argmax(1) == labels).sum()), len(labels))

    def first_bad_step(self) -> int | None:
        """The first step, counted from 0, with logits that are not finite."""
        bad = (~torch.isfinite(torch.cat(self.logits))).any(1).nonzero()
        if not len(bad):
            return None
        ends = torch.tensor([len(logits) for logits in self.logits]).cumsum(0)
        return int(torch.searchsorted(ends, bad[0].cpu(), right=True))


@dataclass
class History:
    """One entry per epoch in every list; index 0 is epoch 1. Losses are means per image, without label smoothing."""

    lr: list[float] = field(default_factory=list)  # of the epoch's last step
    train_loss: list[float] = field(default_factory=list)  # on augmented images, while the weights were moving
    train_accuracy: list[float] = field(default_factory=list)  # percent
    test_loss: list[float | None] = field(default_factory=list)  # None: no test after this epoch
    test_accuracy: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # training and testing
    train_size: int = 0  # the number of images behind each mean
    test_size: int = 0

    @property
    def epochs(self) -> int:
        return len(self.lr)

    def append(self, lr: float, train: Metrics, test: Metrics | None, seconds: float) -> None:
        """Add an epoch; ``test`` is None if there was no test."""
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
    names = f"{'lr':>8} {'train loss':>11} {'train acc':>10} {'test loss':>10} {'test acc':>9} {'seconds':>8}"
    return f"{'epoch':>7} {names}"


def table_row(history: History, epoch: int, epochs: int) -> str:
    """The row of ``epoch``, counted from 0, of ``epochs``."""
    test = f"{'-':>10} {'-':>9}"
    if history.test_loss[epoch] is not None:
        test = f"{history.test_loss[epoch]:>10.4f} {history.test_accuracy[epoch]:>8.2f}%"
    return (
        f"{epoch + 1:>4}/{epochs:<2} {history.lr[epoch]:>8.1e} {history.train_loss[epoch]:>11.4f} "
        f"{history.train_accuracy[epoch]:>9.2f}% {test} {history.seconds[epoch]:>8.1f}"
    )
