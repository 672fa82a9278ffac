"""The LR range test (Smith, 2015, https://arxiv.org/abs/1506.01186): raise the LR with every batch and watch the loss.

torch-lr-finder runs the sweep; this module reads several suggestions off the curve. A rule names the two that become
the ends of the cycle:

    rule "onset-minimum":  LRMIN = where the loss begins to fall,  LRMAX = where it stops falling.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from utils.config import Config
from utils.engine import make_criterion, make_optimizer
from utils.runtime import Precision, Session10Error, progress_bar

with warnings.catch_warnings(action="ignore"):  # tqdm warns that its notebook detection is experimental
    from torch_lr_finder import LRFinder, TrainDataLoaderIter
    from torch_lr_finder import lr_finder as library

# Its own bar has no name and is a widget in notebooks, and it prints how to plot the curve with it.
library.tqdm, library.print = functools.partial(progress_bar, description="LR range test"), lambda *_: None

ONSET = 0.05  # the loss has begun to fall once it has covered this share of its whole fall
SMOOTHING_WINDOW = 7  # the rules read the curve averaged over this many steps
DIVERGED = 3.0  # the curve ends once the loss exceeds this multiple of the first loss
OWN_LRS = "or set lr_min and lr_max yourself"
_none = functools.partial(np.zeros, 0)


class LRRangeError(Session10Error):
    """The curve does not show both ends; the message says why, and which setting to change."""


@dataclass(frozen=True)
class LRRange:
    """The result of a range test of S steps; without curve and suggestions if the range was given by hand."""

    lr_min: float  # the ends of the cycle
    lr_max: float
    lrs: np.ndarray = field(default_factory=_none)  # (S,) float64
    losses: np.ndarray = field(default_factory=_none)  # (S,) float64, before the step at that LR, with label smoothing
    smoothed: np.ndarray = field(default_factory=_none)  # (S,) float64, as the rules read them
    rule: str = "given"  # or the two suggestions that became LRMIN and LRMAX
    suggestions: dict[str, float] = field(default_factory=dict)  # the LR of each, by name

    def to_dict(self) -> dict:
        """Plain JSON values."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> LRRange:
        """The inverse of ``to_dict``."""
        return cls(**{name: np.array(value) if isinstance(value, list) else value for name, value in values.items()})


def find_lr(model: nn.Module, train_loader: Iterable, config: Config, precision: Precision) -> LRRange:
    """The ends of the cycle: those set in ``config``, or else found by a range test, times ``config.lr_scale``.

    The model, the loader's epoch and torch's random generators stay as they were.

    Args:
        model: on ``precision.device``.
        train_loader: batches of (B, 3, 32, 32) float images and (B,) int64 labels; restarted when it runs out.
        config, precision: as in training.

    Raises LRRangeError if the curve does not show both ends.
    """
    if config.lr_min is not None:
        return LRRange(config.lr_min, config.lr_max)
    found = read_curve(*sweep(model, train_loader, config, precision), config.lr_rule)
    low, high = config.lr_scale * found.lr_min, config.lr_scale * found.lr_max
    return dataclasses.replace(found, lr_min=low, lr_max=high)


def sweep(model: nn.Module, loader: Iterable, config: Config, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Train a copy of ``model`` while the LR rises; see ``find_lr``.

    Returns (S,) LRs, equally spaced on a log axis, and (S,) losses, up to the first one that is far too high or NaN.
    """
    model, epoch = copy.deepcopy(model), getattr(loader, "epoch", None)
    autocast = dict(device_type=precision.device.type, dtype=precision.dtype, enabled=precision.name != "fp32")
    mixed = dict(amp_backend="torch", amp_config=autocast, grad_scaler=precision.grad_scaler())
    finder = LRFinder(model, make_optimizer(model, config), make_criterion(config), precision.device, **mixed)
    test = dict(start_lr=config.range_test_start, end_lr=config.range_test_end, num_iter=config.range_test_steps)
    gpus = [precision.device] if precision.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        # No limit as a multiple of the lowest loss, which is near 0 once a small set is learned by heart.
        finder.range_test(TrainDataLoaderIter(loader), **test, smooth_f=0, diverge_th=math.inf)
    if epoch is not None:
        loader.epoch = epoch
    lrs, losses = np.array(finder.history["lr"]), np.array(finder.history["loss"])
    too_high = np.flatnonzero(~(losses <= DIVERGED * losses[0]))
    end = too_high[0] + np.isfinite(losses[too_high[0]]) if len(too_high) else len(losses)
    return lrs[:end], losses[:end]


def read_curve(lrs: np.ndarray, losses: np.ndarray, rule: str = "onset-minimum") -> LRRange:
    """Read the suggestions off a sweep: (S,) increasing LRs, and (S,) losses.

    Raises LRRangeError if the curve is too short, never falls or never rises again, or the rule puts LRMIN above LRMAX.
    """
    if len(lrs) < SMOOTHING_WINDOW:
        raise LRRangeError(
            f"the range test ended after {len(lrs)} steps, because the loss stopped being finite or exceeded "
            f"{DIVERGED:g} times the first: lower range_test_start, {OWN_LRS}, and look at the data for NaN"
        )
    smoothed = smooth(losses)
    lowest = int(np.argmin(smoothed))
    beginning = max(3, len(losses) // 10)
    start_loss = float(np.median(losses[:beginning]))
    fallen = start_loss - smoothed[lowest]
    if lowest < beginning or fallen < 0.05 * abs(start_loss):
        raise LRRangeError(
            f"the loss never fell: {start_loss:.3f} at LR {lrs[0]:.1e}, at best {smoothed[lowest]:.3f}. If it rose at "
            f"once, lower range_test_start; if it stayed flat, raise range_test_end or range_test_steps; {OWN_LRS}"
        )
    if smoothed[lowest:].max() - smoothed[lowest] < 0.05 * fallen:
        raise LRRangeError(
            f"the loss was still falling at LR {lrs[-1]:.1e}, the end of the range test, so its minimum is unknown: "
            f"raise range_test_end, {OWN_LRS}"
        )
    suggestions = {
        "onset": float(lrs[_onset(smoothed, start_loss, lowest)]),
        "steepest": float(lrs[_steepest(lrs, smoothed, lowest)]),
        "minimum": float(lrs[lowest]),
    }
    low, high = (suggestions[name] for name in rule.split("-"))
    if not low < high:
        raise LRRangeError(
            f"rule {rule!r} puts LRMIN at {low:.1e} and LRMAX at {high:.1e}: the curve falls too abruptly to tell them "
            f"apart; raise range_test_steps, {OWN_LRS}"
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
