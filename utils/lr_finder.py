"""The LR range test (Smith, 2015, https://arxiv.org/abs/1506.01186): raise the LR with every batch and watch the loss.

torch-lr-finder runs the sweep; this module reads several suggestions off the curve. A rule names the two that become
the ends of the cycle:

    rule "onset-minimum":  LRMIN = where the loss begins to fall,  LRMAX = where it stops falling.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.optim import Optimizer

from utils.config import Config
from utils.engine import TrainState, make_criterion, make_optimizer, train_step
from utils.runtime import ConfigError, Precision, Session10Error, keep_freed_memory, rng_states, set_rng_states

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tqdm warns that its notebook detection is experimental
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

# The suggestions that become LRMIN and LRMAX.
RULES = {
    "steepest-minimum": ("steepest", "minimum"),
    "valley-minimum": ("valley", "minimum"),
    "tenth-minimum": ("minimum/10", "minimum"),
    "onset-minimum": ("onset", "minimum"),
}
ONSET = 0.05  # the loss has begun to fall once it has covered this share of its whole fall
SMOOTHING_WINDOW = 7  # the rules read the curve averaged over this many steps
DIVERGED = 3.0  # the sweep stops once the loss exceeds this multiple of the first loss


class LRRangeError(Session10Error):
    """The curve does not show both ends; the message says why, and which setting to change."""


@dataclass(frozen=True)
class LRRange:
    """The result of a range test.

    Attributes:
        lr_min, lr_max: the ends of the cycle.
        lrs: (S,) float64, the LR of each step of the sweep.
        losses: (S,) float64, the batch's loss before the step at that LR; all finite, since a NaN ends the sweep.
        smoothed: (S,) float64, the losses as the rules read them.
        rule: the key of ``RULES`` that was used.
        suggestions: the LR of every suggestion, by name.
    """

    lr_min: float
    lr_max: float
    lrs: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    rule: str
    suggestions: dict[str, float]

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @classmethod
    def given(cls, lr_min: float, lr_max: float) -> LRRange:
        """A range set by hand: no curve, no suggestions."""
        return cls(lr_min, lr_max, np.array([]), np.array([]), np.array([]), "given", {})

    @classmethod
    def from_dict(cls, values: dict) -> LRRange:
        """The inverse of ``to_dict``."""
        return cls(**{name: np.array(value) if isinstance(value, list) else value for name, value in values.items()})


def find_lr(
    model: nn.Module,
    loader: Iterable,
    optimizer: Optimizer,
    criterion: nn.Module,
    *,
    precision: Precision,
    start: float,
    end: float,
    steps: int,
    rule: str,
) -> LRRange:
    """Sweep the LR from ``start`` to ``end`` and read LRMIN and LRMAX off the curve.

    The sweep trains copies. The model, the optimizer, the loader's epoch and the global random generators stay as they
    were.

    Args:
        model: the network, on ``precision.device``.
        loader: train batches; restarted when it runs out.
        optimizer: the optimizer that will train ``model``.
        criterion: the training loss, called as ``criterion(logits, labels)``.
        precision: as in training.
        start: low enough that the loss does not change yet.
        end: high enough that the loss diverges.
        steps: one batch each, equally spaced in log LR.
        rule: a key of ``RULES``.

    Raises:
        LRRangeError: the loss never fell, or never rose again.
        ConfigError: an unknown rule.
    """
    if rule not in RULES:
        raise ConfigError(f"rule is {rule!r}: choose one of {', '.join(RULES)}")
    model, optimizer = copy.deepcopy((model, optimizer))  # together: the copied optimizer holds the copied parameters
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # set by a scheduler; torch-lr-finder would refuse the optimizer
    optimizer.zero_grad()
    epoch, states = getattr(loader, "epoch", None), rng_states()
    finder = _Sweep(TrainState(model, optimizer, criterion, precision, precision.grad_scaler()))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torch-lr-finder advertises its plot
            finder.range_test(
                TrainDataLoaderIter(loader), start_lr=start, end_lr=end, num_iter=steps, smooth_f=0, diverge_th=DIVERGED
            )
    finally:
        set_rng_states(states)
        if epoch is not None:
            loader.epoch = epoch
    return read_curve(np.array(finder.lrs), np.array(finder.losses), rule)


class _Sweep(LRFinder):
    """torch-lr-finder's sweep around our training step."""

    def __init__(self, state: TrainState):
        super().__init__(state.model, state.optimizer, state.criterion, device=state.precision.device)
        self.state = state
        self.lrs: list[float] = []
        self.losses: list[float] = []

    def _train_batch(self, train_iter, accumulation_steps, non_blocking_transfer=True) -> float:
        self.model.train()
        lr = self.state.lr
        _, loss = train_step(self.state, *next(train_iter))
        value = loss.item()
        if not math.isfinite(value):
            return math.inf  # ends the sweep; the library would ignore a NaN
        self.lrs.append(lr)
        self.losses.append(value)
        # The library stops at a multiple of the lowest loss it sees. Once a small set is learned by heart, one batch may
        # exceed any multiple of that. So it sees no loss below the first.
        return max(value, self.losses[0])


def find_range(model: nn.Module, train_loader: Iterable, config: Config, precision: Precision) -> LRRange:
    """The ends of the cycle: those set in ``config``, or else found by a range test and scaled by its two factors.

    Args:
        model: on ``precision.device``; not changed.
        train_loader: see ``find_lr``.
        config: the settings of optimizer, loss and range test.
        precision: as in training.

    Raises:
        LRRangeError: the curve does not show both ends, or the factors swap them.
    """
    if precision.device.type == "cpu":
        keep_freed_memory()
    if config.lr_min is not None:
        return LRRange.given(config.lr_min, config.lr_max)
    found = find_lr(
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
    low, high = config.lr_min_factor * found.lr_min, config.lr_max_factor * found.lr_max
    if not low < high:
        raise LRRangeError(
            f"lr_min_factor {config.lr_min_factor} and lr_max_factor {config.lr_max_factor} put LRMIN at {low:.1e} and "
            f"LRMAX at {high:.1e}: choose factors that leave LRMIN below LRMAX"
        )
    return dataclasses.replace(found, lr_min=low, lr_max=high)


def read_curve(lrs: np.ndarray, losses: np.ndarray, rule: str = "onset-minimum") -> LRRange:
    """Read the suggestions off a finished sweep.

    Args:
        lrs: (S,) increasing.
        losses: (S,) the loss at each LR.
        rule: a key of ``RULES``.

    Raises:
        LRRangeError: the curve is too short, never falls, or never rises again; or the rule puts LRMIN above LRMAX.
    """
    lrs, losses = np.asarray(lrs, dtype=float), np.asarray(losses, dtype=float)
    if len(lrs) < SMOOTHING_WINDOW:
        raise LRRangeError(
            f"the range test ended after {len(lrs)} steps, because the loss stopped being finite or exceeded "
            f"{DIVERGED:g} times the first: lower range_test_start (it began at "
            f"{lrs[0] if len(lrs) else math.nan:.1e}), and look at the data for NaN"
        )
    smoothed = smooth(losses)
    lowest = int(np.argmin(smoothed))
    beginning = max(3, len(losses) // 10)
    start_loss = float(np.median(losses[:beginning]))
    fallen = start_loss - smoothed[lowest]
    if lowest < beginning or fallen < 0.05 * abs(start_loss):
        raise LRRangeError(
            f"the loss never fell: {start_loss:.3f} at LR {lrs[0]:.1e}, at best {smoothed[lowest]:.3f}. If it rose at "
            "once, lower range_test_start; if it stayed flat, raise range_test_end or range_test_steps"
        )
    if smoothed[lowest:].max() - smoothed[lowest] < 0.05 * fallen:
        raise LRRangeError(
            f"the loss was still falling at LR {lrs[-1]:.1e}, the end of the range test, so its minimum is unknown: "
            "raise range_test_end"
        )
    suggestions = {
        "onset": float(lrs[_onset(smoothed, start_loss, lowest)]),
        "steepest": float(lrs[_steepest(lrs, smoothed, lowest)]),
        "valley": float(lrs[_valley(smoothed)]),
        "minimum/10": float(lrs[lowest] / 10),
        "minimum": float(lrs[lowest]),
    }
    low, high = (suggestions[name] for name in RULES[rule])
    if not low < high:
        raise LRRangeError(
            f"rule {rule!r} puts LRMIN at {low:.1e} and LRMAX at {high:.1e}: the curve falls too abruptly to tell them "
            f"apart; raise range_test_steps or choose another of {', '.join(RULES)}"
        )
    return LRRange(low, high, lrs, losses, smoothed, rule, suggestions)


def smooth(losses: np.ndarray) -> np.ndarray:
    """A moving average, (S,) -> (S,): centred, so that it does not shift the curve, and shorter at the ends."""
    kernel = np.ones(SMOOTHING_WINDOW)
    return np.convolve(losses, kernel, "same") / np.convolve(np.ones_like(losses), kernel, "same")


def _onset(smoothed: np.ndarray, start_loss: float, lowest: int) -> int:
    """The first step from which the loss stays lower by ``ONSET`` of its whole fall.

    Smith's base LR (2015, section 3.3): the LR at which the accuracy begins to rise.
    """
    level = start_loss - ONSET * (start_loss - smoothed[lowest])
    above = np.flatnonzero(smoothed[: lowest + 1] > level)
    return int(above[-1]) + 1 if len(above) else 0


def _steepest(lrs: np.ndarray, smoothed: np.ndarray, lowest: int) -> int:
    """The step before the minimum where the loss falls fastest per decade of LR (fastai's "steep")."""
    slopes = np.gradient(smoothed, np.log10(lrs))
    return int(np.argmin(slopes[: lowest + 1]))


def _valley(smoothed: np.ndarray) -> int:
    """The middle of the longest decreasing subsequence (as in fastai's "valley")."""
    length = np.ones(len(smoothed), dtype=int)
    previous = np.full(len(smoothed), -1)
    for i in range(1, len(smoothed)):
        candidates = np.flatnonzero(smoothed[:i] > smoothed[i])
        if len(candidates):
            best = candidates[np.argmax(length[candidates])]
            length[i], previous[i] = length[best] + 1, best
    end = int(np.argmax(length))
    start = end
    while previous[start] >= 0:
        start = int(previous[start])
    return (start + end) // 2
