"""The average of the weights, which is tested and shipped."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage(nn.Module):
    """An exponential moving average (EMA) of a network's weights and batch-norm statistics.

    Each update moves the average towards the network by a share of 1 - decay. The first updates have lower decays than
    the given one, (1 + updates) / (10 + updates) as in TensorFlow, so that the untrained weights are soon forgotten;
    torch's ``AveragedModel`` lacks this and makes a GPU wait.

    Args:
        model: the network; the average, ``module``, starts as a copy of it.
        decay: per training step, from 0 to below 1.
        every: update every ``every`` steps of an epoch, with ``decay ** every``.
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
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, values = [], []
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)  # batch norm's counter
        torch._foreach_lerp_(averages, values, 1 - decay)  # all tensors in a few kernel launches

    def get_extra_state(self) -> int:
        """The part of ``state_dict`` that is not a tensor."""
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = state


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
