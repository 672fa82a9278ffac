"""Every hyperparameter of Session 10, defined once, with the reason for its value.

The flags of ``train.py`` and their help are made from it (utils/runs/cli.py).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from utils.runtime import ConfigError

# What each profile changes. "quick" is the same code with half the channels, few images and few epochs: minutes on a
# laptop, and its accuracy means nothing. Its smaller batch leaves enough steps to see the cycle work.
PROFILES = {
    "full": {},
    "quick": dict(
        train_images=2500,
        test_images=1000,
        batch_size=64,
        epochs=6,
        peak_epoch=2,
        width=32,
        range_test_steps=80,
        ema_decay=0.9,  # averages over 10 steps; 100 would be nearly half of this run
    ),
}
SCHEDULES = ("one-cycle", "constant", "no-warm-up", "low-end", "annihilation")


def _is(kind: Any, description: str, **limits) -> Any:
    """A setting's type, the text of its flag, and pydantic's limits (ge: at least, gt: above, lt: below)."""
    return Annotated[kind, Field(description=description, **limits)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Config:
    """The settings of one training run. Frozen: ``dataclasses.replace`` makes a variant.

    Raises pydantic's ValidationError, of which ``from_profile`` makes a ConfigError, if a setting cannot work.
    """

    profile: _is(Literal[tuple(PROFILES)], "full: the recipe; quick: minutes on a CPU, for its workings only") = "full"

    # --- data -------------------------------------------------------------------------------------------------
    train_images: _is(int | None, "size of a class-balanced subset; not set: all", ge=1) = None
    test_images: _is(int | None, "the same for the test set", ge=1) = None
    batch_size: _is(int, "images per step", ge=1) = 512

    # --- augmentation: the assignment's pad 4, crop 32, flip, cutout 8x8 -----------------------------------------
    pad: _is(int, "reflected pixels on each side: the 32x32 crop moves by up to as many either way", ge=0, le=31) = 4
    flip: _is(bool, "mirror images left-right; off where the direction matters (arrows, letters)") = True
    alternate_flip: _is(bool, "mirror each image in every other epoch, not at random") = True
    cutout: _is(int, "side of the square filled with the mean colour; 0: none", ge=0, le=32) = 8

    # --- model ------------------------------------------------------------------------------------------------
    width: _is(int, "channels of the first layer; 32 halves every layer", ge=1) = 64
    dropout: _is(float, "after each ReLU; augmentation and 24 short epochs regularize enough", ge=0, lt=1) = 0.0
    residual: _is(bool, "x + R(x); off: R(x), the ablation this lesson is about") = True
    ghost_batch: _is(int, "images per group of batch norm, whose noise regularizes; 0: the whole batch", ge=0) = 64
    init: _is(Literal["default", "patches"], "first filters: torch's, or models/patches.py's") = "patches"

    # --- optimizer: Adam ----------------------------------------------------------------------------------------
    beta1: _is(float, "Adam's memory of gradients", ge=0, lt=1) = 0.9
    # 0.999 would remember 10 of the 24 epochs, 0.99 remembers 100 steps.
    beta2: _is(float, "Adam's memory of squared gradients", ge=0, lt=1) = 0.99
    # Decoupled weight decay shrinks the weights by a share of lr * weight_decay per step.
    decay_at_peak: _is(float, "this product at the peak: weight_decay = decay_at_peak / LRMAX", ge=0) = 1.5e-3
    coupled_decay: _is(float, "above 0: an L2 penalty of this size instead", ge=0) = 0.0
    label_smoothing: _is(float, "chosen by the search (experiments/results/README.md)", ge=0, lt=1) = 0.2
    ema_decay: _is(float, "of the averaged weights, which are tested, per step; 0: no average", ge=0, lt=1) = 0.99

    # --- one cycle ------------------------------------------------------------------------------------------------
    epochs: _is(int, "length of the cycle", ge=1) = 24
    peak_epoch: _is(int, "the LR peaks at the last step of this epoch", ge=1) = 5
    schedule: _is(Literal[SCHEDULES], "one-cycle, or an ablation's") = "one-cycle"
    lr_min: _is(float | None, "with lr_max: skips the range test, which finds both", gt=0) = None
    lr_max: _is(float | None, "with lr_min: the LR at the peak", gt=0) = None
    # The range test finds LRMIN and LRMAX; that learning begins at LRMIN lets the cycle anneal further.
    lr_rule: _is(Literal["onset-minimum", "steepest-minimum"], "LRMIN and LRMAX by range test") = "onset-minimum"
    lr_scale: _is(float, "multiplies what the range test finds, for ablations", gt=0) = 1.0

    # --- LR range test --------------------------------------------------------------------------------------------
    range_test_start: _is(float, "low enough to show the flat part of the curve", gt=0) = 1e-6
    range_test_end: _is(float, "far beyond the minimum", gt=0) = 1.0
    range_test_steps: _is(int, "one batch each; fewer than 20 make the curve unreadable", ge=20) = 100

    # --- run ------------------------------------------------------------------------------------------------------
    seed: _is(int, "of weights, order and augmentation", ge=0, lt=2**63) = 0
    eval_every: _is(int, "epochs between two tests; the last epoch is always tested", ge=1) = 1
    precision: _is(Literal["auto", "fp32", "bf16", "fp16"], "auto: the fastest that is safe on this machine") = "auto"
    deterministic: _is(bool, "CUDA only: bit-identical reruns; CPU runs always are") = False
    packed: _is(Literal["auto", "on", "off"], "small maps side by side (models/packed.py); auto: with AMX") = "auto"
    recorded: _is(Literal["auto", "off"], "auto: on CUDA the step is recorded once and replayed") = "auto"
    compile: _is(Literal["off", "default"], "torch.compile: minutes at the start; not timed on a GPU yet") = "off"

    @model_validator(mode="after")
    def _check_together(self) -> Config:
        if self.ghost_batch == 1:
            raise ValueError("ghost_batch is 1: statistics need 2 images; usual are 32 to 64, or 0 for the whole batch")
        if self.epochs <= self.peak_epoch:
            raise ValueError(
                f"epochs is {self.epochs}: the LR peaks at epoch {self.peak_epoch} and needs a later one to come down; "
                "raise epochs or lower peak_epoch"
            )
        if (self.lr_min is None) != (self.lr_max is None):
            raise ValueError(f"lr_min is {self.lr_min} and lr_max is {self.lr_max}: give both, or neither")
        if self.lr_min is not None and self.lr_min >= self.lr_max:
            raise ValueError(f"lr_min is {self.lr_min}: it must be below lr_max, which is {self.lr_max}")
        if self.range_test_start >= self.range_test_end:
            raise ValueError(f"range_test_start is {self.range_test_start}: it must be below range_test_end")
        return self

    def to_dict(self) -> dict:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)


def from_profile(name: str, **changes) -> Config:
    """The profile called ``name``, with ``changes`` to single settings; text, as from a command line, is converted.

    Raises ConfigError if there is no such profile, or a setting cannot work.
    """
    if name not in PROFILES:
        raise ConfigError(f"profile is {name!r}: choose one of {', '.join(PROFILES)}")
    try:
        return Config(profile=name, **{**PROFILES[name], **changes})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = first["msg"].removeprefix("Value error, ")
        setting = "".join(map(str, first["loc"][:1]))
        raise ConfigError(f"{setting} is {first['input']!r}: {reason}" if setting else reason) from None


def changed_settings(saved: dict, config: Config) -> list[str]:
    """Where ``saved``, from an earlier ``Config.to_dict()``, differs from ``config``, as text.

    A setting that ``saved`` lacks is newer and had its default; one that no longer exists is ignored.
    """
    saved = {**Config().to_dict(), **saved}
    return [
        f"{name} {saved[name]!r} there, {value!r} here" for name, value in vars(config).items() if saved[name] != value
    ]
