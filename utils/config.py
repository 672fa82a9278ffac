"""Every hyperparameter of Session 10, once, each with its reason."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from utils.runtime import ConfigError

PROFILES = ("full", "quick")

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Config:
    """One training run. Frozen: a run's settings never change under it; ``dataclasses.replace`` makes a variant.

    Raises:
        ConfigError: a setting of the wrong type or outside its range, or several that do not go together.
    """

    profile: Literal[PROFILES] = "full"

    # --- data -------------------------------------------------------------------------------------------------
    train_images: Count | None = None  # None: all; else a class-balanced subset of this size
    test_images: Count | None = None
    batch_size: Count = 512
    eval_batch_size: Count = 1000  # no gradients, so it may be larger; accuracy does not depend on it
    pipeline: Literal["batched", "albumentations"] = "batched"  # whole batches on the device, or image by image
    num_workers: Annotated[int, Field(ge=0)] = 2  # loader processes of "albumentations"; "batched" needs none

    # --- augmentation: the assignment's pad 4, crop 32, flip, cutout 8x8 -----------------------------------------
    pad: Annotated[int, Field(ge=0, le=31)] = 4  # pixels on *each* side: the 32x32 crop moves by up to 4 either way
    pad_mode: Literal["reflect", "constant"] = "reflect"  # continue the picture, or pad with the mean colour
    flip: bool = True
    # Each image mirrored in every other epoch instead of by a coin toss (see BatchedLoader); "batched" only.
    alternate_flip: bool = True
    cutout: Annotated[int, Field(ge=0, le=32)] = 8  # side of the square filled with the mean colour; 0 turns it off

    # --- model ------------------------------------------------------------------------------------------------
    width: Count = 64  # channels of the first layer; 32 halves every layer, for experiments
    dropout: Fraction = 0.0  # augmentation and 24 short epochs regularize enough
    logit_scale: Positive = 0.125  # starts the loss near ln 10 (see models/custom_resnet.py)
    residual: bool = True  # False: R(x) instead of x + R(x), the ablation that this lesson is about
    conv_padding: Literal["zeros", "replicate"] = "zeros"  # what a convolution sees beyond the border
    norm_momentum: Fraction = 0.1  # how far batch norm's running statistics move a step
    ghost_batch: Annotated[int, Field(ge=0)] = 0  # batch statistics over groups of so many images; 0: the whole batch
    init: Literal["default", "patches"] = "default"  # "patches": the first filters from the images' own patches

    # --- optimizer: Adam ----------------------------------------------------------------------------------------
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99  # averages 100 steps; 0.999 would remember 10 of the 24 epochs
    eps: Positive = 1e-8
    # Decoupled weight decay shrinks the weights by lr * weight_decay a step. What matters is that product at the
    # peak, so it is the setting, and weight_decay = decay_at_peak / LRMAX follows from the range test.
    decay_at_peak: Annotated[float, Field(ge=0)] = 1.5e-3
    coupled_decay: Annotated[float, Field(ge=0)] = 0.0  # above 0: Adam's L2 penalty of this size instead
    decay_norm_and_bias: bool = True  # False: batch norm's weights and the biases are left out of the decay
    label_smoothing: Fraction = 0.1
    ema_decay: Fraction = 0.99  # a step; the averaged weights (of about 100 steps) are the ones tested. 0: no average
    ema_also: tuple[Fraction, ...] = ()  # further averages that ride along in a run, to compare their lengths
    ema_every: Count = 5  # update the average every so many steps, with ema_decay ** ema_every

    # --- one cycle ------------------------------------------------------------------------------------------------
    epochs: Count = 24
    peak_epoch: Count = 5  # the LR peaks at the last step of this epoch
    schedule: Literal["one-cycle", "constant", "no-warm-up", "annihilation"] = "one-cycle"  # the others: ablations
    lr_min: Positive | None = None  # None: found by the range test
    lr_max: Positive | None = None
    lr_rule: Literal["steepest-minimum", "valley-minimum", "tenth-minimum", "onset-minimum"] = "steepest-minimum"
    lr_min_factor: Positive = 1.0  # the cycle's ends as multiples of what the rule reads off the curve
    lr_max_factor: Positive = 1.0
    cycle_beta1: bool = False  # one cycle on the LR alone; beta1 stays where it is

    # --- LR range test --------------------------------------------------------------------------------------------
    range_test_start: Positive = 1e-6  # low enough to see the flat part
    range_test_end: Positive = 1.0  # far beyond divergence
    range_test_steps: Annotated[int, Field(ge=20)] = 100  # fewer make no readable curve

    # --- run ------------------------------------------------------------------------------------------------------
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    eval_every: Count = 1  # test after every so many epochs; after the last one always
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # see utils/runtime.py
    deterministic: bool = False  # CUDA only: bit-identical reruns; a CPU run is so anyway
    packed: Literal["auto", "on", "off"] = "auto"  # small maps side by side: faster on a CPU with bf16 matrix units
    # torch.compile's modes; "reduce-overhead" and "max-autotune" use CUDA graphs.
    compile: Literal["off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "off"

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, values: Any, handler) -> Config:
        try:
            config = handler(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            if first["type"] == "unexpected_keyword_argument":
                raise ConfigError(f"{name} is no setting: utils/config.py lists them all") from None
            reason = first["msg"].replace("Input should be", "it should be")
            value = values.kwargs[name] if isinstance(values, ArgsKwargs) else first["input"]
            raise ConfigError(f"{name} is {value!r}: {reason}") from None
        config._check_together()
        return config

    def _check_together(self) -> None:
        def require(ok: bool, name: str, reason: str):
            if not ok:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: {reason}")

        if self.train_images is not None:
            require(
                self.batch_size <= self.train_images,
                "batch_size",
                f"it is larger than the train set of {self.train_images} images; lower it to {self.train_images} or less",
            )
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
            require(self.lr_min < self.lr_max, "lr_min", f"it must be below lr_max, which is {self.lr_max}")
        require(
            self.range_test_start < self.range_test_end,
            "range_test_start",
            f"it must be below range_test_end, which is {self.range_test_end}",
        )

    def to_dict(self) -> dict:
        """The settings as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


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
