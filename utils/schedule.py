"""The one-cycle policy: one linear ramp up to the peak, and one down again.

Smith, *A disciplined approach to neural network hyper-parameters* (2018), https://arxiv.org/abs/1803.09820, adds a last
phase in which the LR falls far below its start ("annihilation"). The assignment leaves it out: the cycle ends where it
began, at LRMIN.
"""

from __future__ import annotations

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from utils.config import Config
from utils.runtime import ConfigError

ANNIHILATION = 0.1  # share of the run for the last phase, in the ablation that has one


def ramps(steps: list[float], lrs: list[float]) -> np.ndarray:
    """Straight lines from (steps[0], lrs[0]) to (steps[1], lrs[1]) and on: the LR of every step, float64."""
    step = np.arange(steps[-1] + 1)
    corner = np.searchsorted(steps, step).clip(1)  # the first at or after each step
    begin, end = np.array(steps)[corner - 1], np.array(steps)[corner]
    low, high = np.array(lrs)[corner - 1], np.array(lrs)[corner]
    return (high - low) * ((step - begin) / (end - begin)) + low


def one_cycle_lrs(lr_min: float, lr_max: float, epochs: int, peak_epoch: int, steps_per_epoch: int) -> np.ndarray:
    """The LR of every step: LRMIN at both ends, LRMAX at the last step of epoch ``peak_epoch``, counted from 1.

    Returns (epochs * steps_per_epoch,) float64. Raises ConfigError if the LRs or lengths make no cycle.
    """
    if not 0 < lr_min < lr_max:
        raise ConfigError(f"lr_min is {lr_min} and lr_max is {lr_max}: the cycle needs 0 < lr_min < lr_max")
    if not 1 <= peak_epoch < epochs:
        raise ConfigError(f"peak_epoch is {peak_epoch} of {epochs} epochs: the peak must come before the last epoch")
    if peak_epoch * steps_per_epoch < 2:
        raise ConfigError("the LR would rise within a single step: use a smaller batch_size or a later peak_epoch")
    return ramps([0, peak_epoch * steps_per_epoch - 1, epochs * steps_per_epoch - 1], [lr_min, lr_max, lr_min])


def lrs_for(config: Config, lr_min: float, lr_max: float, steps_per_epoch: int) -> np.ndarray:
    """The LR of every step of the schedule that ``config`` names: one cycle, or an ablation's.

    "constant" stays at LRMAX, "no-warm-up" begins there, "low-end" comes down to LRMIN / 100, and "annihilation" comes
    down to LRMIN a tenth of the run earlier, then goes on to LRMIN / 100.
    """
    cycle = one_cycle_lrs(lr_min, lr_max, config.epochs, config.peak_epoch, steps_per_epoch)
    last = len(cycle) - 1
    peak = config.peak_epoch * steps_per_epoch - 1
    return {
        "one-cycle": cycle,
        "constant": np.full(len(cycle), lr_max),
        "no-warm-up": ramps([0, peak, last], [lr_max, lr_max, lr_min]),
        "low-end": ramps([0, peak, last], [lr_min, lr_max, lr_min / 100]),
        "annihilation": ramps(
            [0, peak, max((1 - ANNIHILATION) * last, (peak + last) / 2), last], [lr_min, lr_max, lr_min, lr_min / 100]
        ),
    }[config.schedule]


def scheduler(optimizer: Optimizer, lrs: np.ndarray) -> LambdaLR:
    """``lrs`` as a torch scheduler: it sets the optimizer's LR at once, and the next one at every ``step()``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1.0  # LambdaLR multiplies it
    return LambdaLR(optimizer, lambda step: float(lrs[min(step, len(lrs) - 1)]))


def one_cycle(
    optimizer: Optimizer, lr_min: float, lr_max: float, epochs: int, peak_epoch: int, steps_per_epoch: int
) -> LambdaLR:
    """The cycle as a torch scheduler; see ``one_cycle_lrs`` and ``scheduler``."""
    return scheduler(optimizer, one_cycle_lrs(lr_min, lr_max, epochs, peak_epoch, steps_per_epoch))
