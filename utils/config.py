"""Every hyperparameter of Session 10, once, each with its reason."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

PROFILES = ("full", "quick")
COMPILE_MODES = ("off", "default", "reduce-overhead")


class ConfigError(ValueError):
    """A setting that cannot work; the message names the value, the reason and the fix."""


@dataclass(frozen=True)
class Config:
    """One training run. Frozen: a run's settings never change under it; ``dataclasses.replace`` makes a variant."""

    profile: str = "full"

    # --- data -------------------------------------------------------------------------------------------------
    train_images: int | None = None  # None: all; else a class-balanced subset of this size
    test_images: int | None = None
    batch_size: int = 512
    eval_batch_size: int = 1000  # no gradients, so it may be larger; accuracy does not depend on it
    pipeline: str = "batched"  # "batched": augment whole batches on the device; "albumentations": image by image
    num_workers: int = 2  # loader processes of the albumentations pipeline; the batched one needs none

    # --- augmentation: the assignment's pad 4, crop 32, flip, cutout 8x8 -----------------------------------------
    pad: int = 4  # pixels on *each* side, so that the 32x32 crop moves by up to 4 either way
    pad_mode: str = "reflect"  # "reflect" continues the picture, "constant" pads with the mean colour
    flip: bool = True
    # Each image mirrored in every other epoch instead of by a coin toss (see BatchedLoader); "batched" only.
    alternate_flip: bool = True
    cutout: int = 8  # side of the square filled with the mean colour; 0 turns it off

    # --- model ------------------------------------------------------------------------------------------------
    dropout: float = 0.0  # augmentation and 24 short epochs regularize enough
    logit_scale: float = 0.125  # starts the loss near ln 10 (see models/custom_resnet.py)

    # --- optimizer: Adam ----------------------------------------------------------------------------------------
    beta1: float = 0.9
    beta2: float = 0.99  # averages 100 steps; 0.999 would remember 10 of the 24 epochs
    eps: float = 1e-8
    # Decoupled weight decay shrinks the weights by lr * weight_decay a step. What matters is that product at the
    # peak, so it is the setting, and weight_decay = decay_at_peak / LRMAX follows from the range test.
    decay_at_peak: float = 1.5e-3
    label_smoothing: float = 0.1
    ema_decay: float = 0.99  # a step; the averaged weights (of about 100 steps) are the ones tested. 0: no average
    ema_every: int = 5  # update the average every so many steps, with ema_decay ** ema_every

    # --- one cycle ------------------------------------------------------------------------------------------------
    epochs: int = 24
    peak_epoch: int = 5  # the LR peaks at the last step of this epoch
    lr_min: float | None = None  # None: found by the range test
    lr_max: float | None = None
    lr_rule: str = "steepest-minimum"  # how the range test answers (see utils/lr_finder.py)
    cycle_beta1: bool = False  # one cycle on the LR alone; beta1 stays where it is

    # --- LR range test --------------------------------------------------------------------------------------------
    range_test_start: float = 1e-6  # low enough to see the flat part
    range_test_end: float = 1.0  # far beyond divergence
    range_test_steps: int = 100

    # --- run ------------------------------------------------------------------------------------------------------
    seed: int = 0
    precision: str = "auto"  # "auto", "fp32", "bf16" or "fp16" (see utils/runtime.py)
    deterministic: bool = False  # CUDA only: bit-identical reruns; a CPU run is so anyway
    compile: str = "off"  # "default" or, with CUDA graphs, "reduce-overhead": torch.compile's modes

    def __post_init__(self):
        def require(ok: bool, name: str, reason: str):
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: {reason}")

        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type.removesuffix(" | None")
            if value is None and field.type.endswith("None"):
                continue
            if kind == "int":
                require(type(value) is int, field.name, "it must be a whole number")
            elif kind == "float":
                require(type(value) in (int, float) and math.isfinite(value), field.name, "it must be a finite number")
        require(self.profile in PROFILES, "profile", f"choose one of {', '.join(PROFILES)}")
        require(self.batch_size >= 1, "batch_size", "it must be at least 1; the recipe uses 512")
        require(self.eval_batch_size >= 1, "eval_batch_size", "it must be at least 1")
        for name in ("train_images", "test_images"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "ask for at least 1 image, or None for all of them")
        if self.train_images is not None:
            require(
                self.batch_size <= self.train_images,
                "batch_size",
                f"it is larger than the train set of {self.train_images} images; lower it to {self.train_images} or less",
            )
        require(self.pipeline in ("batched", "albumentations"), "pipeline", "choose 'batched' or 'albumentations'")
        require(self.num_workers >= 0, "num_workers", "it must be 0 (no extra process) or more")
        require(0 <= self.pad < 32, "pad", "it must be between 0 and 31 pixels")
        require(self.pad_mode in ("reflect", "constant"), "pad_mode", "choose 'reflect' or 'constant'")
        require(0 <= self.cutout <= 32, "cutout", "it must be between 0 (off) and 32 pixels, the image's side")
        require(0 <= self.dropout < 1, "dropout", "choose a probability of at least 0 and below 1")
        require(0 <= self.beta1 < 1, "beta1", "Adam needs a value of at least 0 and below 1")
        require(0 <= self.beta2 < 1, "beta2", "Adam needs a value of at least 0 and below 1")
        require(self.eps > 0, "eps", "it must be positive")
        require(self.decay_at_peak >= 0, "decay_at_peak", "it must not be negative; 0 turns weight decay off")
        require(0 <= self.label_smoothing < 1, "label_smoothing", "choose a value of at least 0 and below 1")
        require(0 <= self.ema_decay < 1, "ema_decay", "choose a value of at least 0 (off) and below 1")
        require(self.ema_every >= 1, "ema_every", "it must be at least 1")
        require(self.peak_epoch >= 1, "peak_epoch", "it must be at least 1")
        require(
            self.epochs > self.peak_epoch,
            "epochs",
            f"the LR peaks at epoch {self.peak_epoch} and needs a later one to come down in; "
            f"train for at least {self.peak_epoch + 1} epochs or lower peak_epoch",
        )
        require(
            (self.lr_min is None) == (self.lr_max is None),
            "lr_min",
            f"lr_max is {self.lr_max!r}; give both to skip the range test, or neither to run it",
        )
        if self.lr_min is not None:
            require(
                0 < self.lr_min < self.lr_max,
                "lr_min",
                f"it must be positive and below lr_max, which is {self.lr_max}",
            )
        require(
            0 < self.range_test_start < self.range_test_end,
            "range_test_start",
            f"it must be positive and below range_test_end, which is {self.range_test_end}",
        )
        require(self.range_test_steps >= 20, "range_test_steps", "a readable curve needs at least 20 steps")
        require(0 <= self.seed < 2**63, "seed", "it must be 0 or more, and below 2**63")
        require(
            self.compile in COMPILE_MODES, "compile", f"choose one of {', '.join(repr(mode) for mode in COMPILE_MODES)}"
        )
        require(
            self.precision in ("auto", "fp32", "bf16", "fp16"), "precision", "choose 'auto', 'fp32', 'bf16' or 'fp16'"
        )

    def to_dict(self) -> dict:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)


def full(**changes) -> Config:
    """The recipe: all images, 24 epochs, batch 512. ``changes`` replace single settings."""
    return Config(**changes)


def quick(**changes) -> Config:
    """The same code path in minutes on a laptop: few images, few epochs. Its accuracy means nothing.

    The batch shrinks with the data, so that there are still enough steps to see the cycle work.
    """
    settings = dict(
        profile="quick",
        train_images=2500,
        test_images=1000,
        batch_size=64,
        epochs=6,
        peak_epoch=2,
        range_test_steps=80,
        ema_decay=0.9,  # averages 10 steps; 100, nearly half of this run, would lag far behind
    )
    return Config(**{**settings, **changes})


def from_profile(name: str, **changes) -> Config:
    """``full(**changes)`` or ``quick(**changes)`` by name.

    Raises:
        ConfigError: ``name`` is not one of ``PROFILES``.
    """
    if name not in PROFILES:
        raise ConfigError(f"profile is {name!r}: choose one of {', '.join(PROFILES)}")
    return {"full": full, "quick": quick}[name](**changes)
