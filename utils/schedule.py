"""The one-cycle policy: one linear ramp up to the peak, and one down again.

Smith, *A disciplined approach to neural network hyper-parameters* (2018), https://arxiv.org/abs/1803.09820, adds a last
phase in which the LR falls far below its start ("annihilation"). The assignment leaves it out: the cycle ends where it
began, at LRMIN.
"""

from __future__ import annotations

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from utils.config import Config
from utils.runtime import ConfigError

# fastai and torch cycle Adam's beta1 through this range, as the mirror image of the LR: low momentum at a high LR.
BETA1_RANGE = (0.85, 0.95)


def one_cycle(
    optimizer: Optimizer,
    lr_min: float,
    lr_max: float,
    epochs: int,
    peak_epoch: int,
    steps_per_epoch: int,
    *,
    cycle_beta1: bool = False,
    lr_first: float | None = None,
    lr_last: float | None = None,
) -> OneCycleLR:
    """The cycle as a torch scheduler; call its ``step()`` after every batch.

    Args:
        optimizer: its LR is set at once (and its beta1, with ``cycle_beta1``).
        lr_min: LR of the first and the last step.
        lr_max: LR of the last step of epoch ``peak_epoch``.
        epochs: length of the cycle.
        peak_epoch: the LR peaks at the last step of this epoch, counted from 1.
        steps_per_epoch: batches per epoch.
        cycle_beta1: move Adam's beta1 from 0.95 down to 0.85 at the peak and back. torch does this by default.
        lr_first, lr_last: LR of the first and the last step, for ablations; None: ``lr_min``.

    Raises:
        ConfigError: the LRs or lengths make no cycle.
    """
    _check_cycle(lr_min, lr_max, epochs, peak_epoch, steps_per_epoch)
    lr_first, lr_last = lr_first or lr_min, lr_last or lr_min
    return OneCycleLR(
        optimizer,
        max_lr=lr_max,
        total_steps=epochs * steps_per_epoch,
        pct_start=peak_epoch / epochs,
        anneal_strategy="linear",
        div_factor=lr_max / lr_first,  # the first LR is max_lr / div_factor
        final_div_factor=lr_first / lr_last,  # the last LR is the first one / final_div_factor; 1: no annihilation
        cycle_momentum=cycle_beta1,
        base_momentum=BETA1_RANGE[0],
        max_momentum=BETA1_RANGE[1],
    )


def one_cycle_lrs(lr_min: float, lr_max: float, epochs: int, peak_epoch: int, steps_per_epoch: int) -> np.ndarray:
    """The LR of every step, from the definition: (epochs * steps_per_epoch,) float64.

    Raises:
        ConfigError: the LRs or lengths make no cycle.
    """
    _check_cycle(lr_min, lr_max, epochs, peak_epoch, steps_per_epoch)
    return _ramps(lr_min, lr_max, epochs, peak_epoch, steps_per_epoch)


def one_cycle_beta1s(epochs: int, peak_epoch: int, steps_per_epoch: int) -> np.ndarray:
    """Adam's beta1 at every step if it cycles: (epochs * steps_per_epoch,) float64."""
    low, high = BETA1_RANGE
    return _ramps(high, low, epochs, peak_epoch, steps_per_epoch)


def _ramps(end: float, peak: float, epochs: int, peak_epoch: int, steps_per_epoch: int) -> np.ndarray:
    last = epochs * steps_per_epoch - 1
    return np.interp(np.arange(last + 1), [0, peak_epoch * steps_per_epoch - 1, last], [end, peak, end])


def scheduler_for(
    config: Config, optimizer: Optimizer, lr_min: float, lr_max: float, steps_per_epoch: int
) -> OneCycleLR:
    """The schedule that ``config`` names: one cycle, or an ablation's.

    "constant" stays at LRMAX, "no-warm-up" begins there, "annihilation" ends at LRMIN / 100.

    Raises:
        ConfigError: the LRs or lengths make no cycle.
    """
    ends = {
        "one-cycle": {},
        "constant": {"lr_first": lr_max, "lr_last": lr_max},
        "no-warm-up": {"lr_first": lr_max},
        "annihilation": {"lr_last": lr_min / 100},
    }[config.schedule]
    cycle = (lr_min, lr_max, config.epochs, config.peak_epoch, steps_per_epoch)
    return one_cycle(optimizer, *cycle, cycle_beta1=config.cycle_beta1, **ends)


def check_lengths(epochs: int, peak_epoch: int, steps_per_epoch: int) -> None:
    """Check that the lengths make a cycle.

    Raises:
        ConfigError: they do not; the message names the values and the fix.
    """
    if steps_per_epoch < 1:
        raise ConfigError(f"steps_per_epoch is {steps_per_epoch}: an epoch needs at least 1 batch")
    if not 1 <= peak_epoch < epochs:
        raise ConfigError(
            f"epochs is {epochs} and peak_epoch is {peak_epoch}: the peak must come in epoch 1 or later, and before "
            f"the last; train for at least {peak_epoch + 1} epochs or lower peak_epoch"
        )
    if peak_epoch * steps_per_epoch < 2:
        raise ConfigError(
            f"the LR would rise within a single step: with {steps_per_epoch} batch per epoch, use a smaller "
            "--batch-size or a later --peak-epoch"
        )


def _check_cycle(lr_min: float, lr_max: float, epochs: int, peak_epoch: int, steps_per_epoch: int) -> None:
    if not 0 < lr_min < lr_max:
        raise ConfigError(f"lr_min is {lr_min} and lr_max is {lr_max}: the cycle needs 0 < lr_min < lr_max")
    check_lengths(epochs, peak_epoch, steps_per_epoch)
