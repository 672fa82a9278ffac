"""The LR range test (Smith, 2015, https://arxiv.org/abs/1506.01186): raise the LR a little every batch, watch the loss.

torch-lr-finder runs the sweep; this module reads the curve. Named suggestions are taken from it, all shown side
by side, and a stated pair of them gives the cycle its two ends:

    rule "steepest-minimum":  LRMIN = where the loss falls fastest,  LRMAX = where it stops falling.
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
    warnings.simplefilter("ignore")  # tqdm announces that its notebook detection is experimental
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

# Which suggestion becomes LRMIN and which LRMAX.
RULES = {
    "steepest-minimum": ("steepest", "minimum"),
    "valley-minimum": ("valley", "minimum"),
    "tenth-minimum": ("minimum/10", "minimum"),
    "onset-minimum": ("onset", "minimum"),
}
ONSET = 0.05  # the share of the whole fall at which the loss counts as having begun to fall
SMOOTHING_WINDOW = 7  # sweep steps averaged around each point before any rule looks at the curve
DIVERGED = 3.0  # the sweep stops once the loss is this many times what it began with


class LRRangeError(Session10Error):
    """The curve has no answer; the message says why, and which setting to change."""


@dataclass(frozen=True)
class LRRange:
    """What the range test found.

    Attributes:
        lr_min, lr_max: the two ends of the cycle.
        lrs: (S,) float64, the LR of each sweep step.
        losses: (S,) float64, the mini-batch loss before the step at that LR; finite (a NaN ends the sweep).
        smoothed: (S,) float64, ``losses`` averaged over ``SMOOTHING_WINDOW`` neighbours.
        rule: the name in ``RULES`` that chose.
        suggestions: every suggestion by name, for comparison.
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
        """A range that was chosen instead of found: no curve, no suggestions."""
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
    start: float = 1e-6,
    end: float = 1.0,
    steps: int = 100,
    rule: str = "steepest-minimum",
) -> LRRange:
    """Sweep the LR from ``start`` to ``end`` and read LRMIN and LRMAX off the curve.

    The sweep trains copies: ``model``, ``optimizer``, the loader's epoch, every global random generator and the
    train/eval mode are as before when it returns.

    Args:
        model: the network, on ``precision.device``.
        loader: train batches; it is restarted when it runs out.
        optimizer: the optimizer that will train ``model``.
        criterion: the training loss, called as ``criterion(logits, labels)``.
        precision: as in training.
        start: low enough that the loss does not move yet.
        end: high enough that it diverges.
        steps: sweep steps, one batch each, equally spaced in log LR.
        rule: a name in ``RULES``.

    Raises:
        LRRangeError: the loss never fell, or never rose again.
        ConfigError: an unknown rule.
    """
    if rule not in RULES:
        raise ConfigError(f"rule is {rule!r}: choose one of {', '.join(RULES)}")
    lrs, losses = _sweep(model, loader, optimizer, criterion, precision, start, end, steps)
    return read_curve(lrs, losses, rule)


def find_range(model: nn.Module, train_loader: Iterable, config: Config, precision: Precision) -> LRRange:
    """Both ends of the cycle: those that ``config`` gives, else what the range test finds with its settings.

    Args:
        model: on ``precision.device``; it is not changed.
        train_loader: see ``find_lr``.
        config: the optimizer's, the loss's and the range test's settings; its two factors scale what the rule reads.
        precision: as in training.

    Raises:
        LRRangeError: the curve has no answer, or the factors turn the range around.
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


def read_curve(lrs: np.ndarray, losses: np.ndarray, rule: str = "steepest-minimum") -> LRRange:
    """Apply the rules to a finished sweep.

    Args:
        lrs: (S,) increasing.
        losses: (S,) the loss at each.
        rule: a name in ``RULES``.

    Raises:
        LRRangeError: no rule has an answer.
    """
    lrs, losses = np.asarray(lrs, dtype=float), np.asarray(losses, dtype=float)
    if len(lrs) < SMOOTHING_WINDOW:
        raise LRRangeError(
            f"the loss stopped being finite after {len(lrs)} steps of the range test: lower range_test_start "
            f"(it began at {lrs[0] if len(lrs) else math.nan:.1e}), and look at the data for NaN"
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


def smooth(losses: np.ndarray, window: int = SMOOTHING_WINDOW) -> np.ndarray:
    """Centred moving average, (S,) -> (S,); the ends average what there is. Centred: it does not shift the curve."""
    kernel = np.ones(window)
    return np.convolve(losses, kernel, "same") / np.convolve(np.ones_like(losses), kernel, "same")


def _onset(smoothed: np.ndarray, start_loss: float, lowest: int) -> int:
    """The first point from which the loss stays below its beginning by ``ONSET`` of its whole fall.

    Smith's base LR (2015, section 3.3): the LR at which the accuracy begins to rise.
    """
    level = start_loss - ONSET * (start_loss - smoothed[lowest])
    above = np.flatnonzero(smoothed[: lowest + 1] > level)
    return int(above[-1]) + 1 if len(above) else 0


def _steepest(lrs: np.ndarray, smoothed: np.ndarray, lowest: int) -> int:
    """Where the loss falls fastest per decade of LR, before its minimum (fastai's "steep", on the smoothed curve)."""
    slopes = np.gradient(smoothed, np.log10(lrs))
    return int(np.argmin(slopes[: lowest + 1]))


def _valley(smoothed: np.ndarray) -> int:
    """The middle of the longest decreasing subsequence (the idea of fastai's "valley", there halfway as well)."""
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


class _BatchIterator(TrainDataLoaderIter):
    """Lets torch-lr-finder iterate any loader of ``(images, labels)``, starting it anew at its end."""


class _Sweep(LRFinder):
    """torch-lr-finder's loop around our training step, keeping the LR that each step was really taken with."""

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
            return math.inf  # the library stops on any loss far above the best, but would step over a NaN for ever
        self.lrs.append(lr)
        self.losses.append(value)
        # The library stops at a multiple of the best loss it is told of. A small set is soon learned so well that single
        # batches exceed any multiple of that; so the best one told is the first.
        return max(value, self.losses[0])


def _sweep(model, loader, optimizer, criterion, precision, start, end, steps) -> tuple[np.ndarray, np.ndarray]:
    # One deepcopy for both, so that the copied optimizer holds the copied parameters.
    model, optimizer = copy.deepcopy((model, optimizer))
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # left by a scheduler on the original; the library would refuse it
    optimizer.zero_grad()
    epoch, states = getattr(loader, "epoch", None), rng_states()
    try:
        finder = _Sweep(TrainState(model, optimizer, criterion, precision, precision.grad_scaler()))
        with contextlib.redirect_stdout(io.StringIO()):  # it advertises its own plot; ours follows
            finder.range_test(
                _BatchIterator(loader), start_lr=start, end_lr=end, num_iter=steps, smooth_f=0, diverge_th=DIVERGED
            )
    finally:
        set_rng_states(states)
        if epoch is not None:
            loader.epoch = epoch
    return np.array(finder.lrs), np.array(finder.losses)
