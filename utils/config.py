"""Every hyperparameter of Session 10, defined once, with the reason for its value."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from utils.runtime import ConfigError

PROFILES = ("full", "quick")

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Config:
    """The settings of one training run. Frozen: ``dataclasses.replace`` makes a variant.

    Raises:
        ConfigError: a setting has the wrong type or is out of range, or several do not go together.
    """

    profile: Literal[PROFILES] = "full"

    # --- data -------------------------------------------------------------------------------------------------
    train_images: Count | None = None  # None: all; else the size of a class-balanced subset
    test_images: Count | None = None
    batch_size: Count = 512
    eval_batch_size: Count = 1000  # larger, since there are no gradients; it does not change the accuracy
    pipeline: Literal["batched", "albumentations"] = "batched"  # many images at once on the device, or image by image
    num_workers: Annotated[int, Field(ge=0)] = 2  # loader processes, for "albumentations"; "batched" needs none

    # --- augmentation: the assignment's pad 4, crop 32, flip, cutout 8x8 -----------------------------------------
    pad: Annotated[int, Field(ge=0, le=31)] = 4  # pixels on *each* side: the 32x32 crop moves by up to 4 either way
    pad_mode: Literal["reflect", "constant"] = "reflect"  # mirror the image at its border, or use the mean colour
    flip: bool = True
    # "batched" only: mirror each image in every other epoch, instead of at random (see BatchedLoader).
    alternate_flip: bool = True
    cutout: Annotated[int, Field(ge=0, le=32)] = 8  # side of the square filled with the mean colour; 0: none

    # --- model ------------------------------------------------------------------------------------------------
    width: Count = 64  # channels of the first layer; 32 halves every layer
    dropout: Fraction = 0.0  # augmentation and 24 short epochs regularize enough
    logit_scale: Positive = 0.125  # makes the loss start near ln 10 (see models/custom_resnet.py)
    residual: bool = True  # False: R(x) instead of x + R(x), the ablation this lesson is about
    conv_padding: Literal["zeros", "replicate"] = "zeros"  # what pads the input of a convolution
    norm_momentum: Fraction = 0.1  # how far batch norm's running statistics move per step
    # Batch norm over groups of this many images, whose noise regularizes a little; 0: over the whole batch.
    ghost_batch: Annotated[int, Field(ge=0)] = 64
    # "patches": the first filters are computed from patches of the train images, and the other convolutions start near
    # the identity (see models/variants.py).
    init: Literal["default", "patches"] = "patches"

    # --- optimizer: Adam ----------------------------------------------------------------------------------------
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99  # averages over 100 steps; 0.999 would span 10 of the 24 epochs
    eps: Positive = 1e-8
    # Decoupled weight decay shrinks the weights by a share of lr * weight_decay per step. The setting is this product
    # at the peak: weight_decay = decay_at_peak / LRMAX, which the range test finds.
    decay_at_peak: Annotated[float, Field(ge=0)] = 1.5e-3
    coupled_decay: Annotated[float, Field(ge=0)] = 0.0  # above 0: Adam with an L2 penalty of this size instead
    decay_norm_and_bias: bool = True  # False: no decay of batch norm's weights and the biases
    label_smoothing: Fraction = 0.2  # chosen over 0.1 by the confirmation (experiments/results/README.md)
    ema_decay: Fraction = 0.99  # per step: averages over about 100. The averaged weights are tested; 0: no average
    ema_also: tuple[Fraction, ...] = ()  # further averages, kept to compare their lengths
    ema_every: Count = 5  # steps between two updates, each with ema_decay ** ema_every

    # --- one cycle ------------------------------------------------------------------------------------------------
    epochs: Count = 24
    peak_epoch: Count = 5  # the LR peaks at the last step of this epoch
    schedule: Literal["one-cycle", "constant", "no-warm-up", "annihilation"] = "one-cycle"  # the others: ablations
    lr_min: Positive | None = None  # None: found by the range test, as is lr_max
    lr_max: Positive | None = None
    # From where learning begins to where it no longer helps: the low end lets the cycle anneal further.
    lr_rule: Literal["steepest-minimum", "valley-minimum", "tenth-minimum", "onset-minimum"] = "onset-minimum"
    lr_min_factor: Positive = 1.0  # the ends of the cycle as multiples of what the rule finds
    lr_max_factor: Positive = 1.0
    cycle_beta1: bool = False  # False: only the LR cycles, beta1 stays constant

    # --- LR range test --------------------------------------------------------------------------------------------
    range_test_start: Positive = 1e-6  # low enough to show the flat part of the curve
    range_test_end: Positive = 1.0  # far beyond the minimum
    range_test_steps: Annotated[int, Field(ge=20)] = 100  # fewer make the curve unreadable

    # --- run ------------------------------------------------------------------------------------------------------
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    eval_every: Count = 1  # epochs between two tests; the last epoch is always tested
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # see utils/runtime.py
    deterministic: bool = False  # CUDA only: bit-identical reruns; CPU runs always are
    packed: Literal["auto", "on", "off"] = "auto"  # see models/packed.py: faster on a CPU with AMX, in bf16
    # Modes of torch.compile; "reduce-overhead" and "max-autotune" use CUDA graphs.
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
                raise ConfigError(f"{name} is not a setting: utils/config.py lists them all") from None
            if first["type"] == "unexpected_positional_argument":
                raise ConfigError(f"{first['input']!r} has no name: name every setting, as in seed=3") from None
            reason = first["msg"].replace("Input should be", "it should be")
            value = values.kwargs[name] if isinstance(values, ArgsKwargs) else first["input"]
            raise ConfigError(f"{name} is {value!r}: {reason}") from None
        config._check_together()
        return config

    def _check_together(self) -> None:
        if self.train_images is not None and self.batch_size > self.train_images:
            raise ConfigError(
                f"batch_size is {self.batch_size}: it is larger than the train set of {self.train_images} images; "
                f"lower it to {self.train_images} or less"
            )
        if self.ghost_batch == 1:
            raise ConfigError(
                "ghost_batch is 1: the statistics of a group need at least 2 images; the usual groups are 32 to 64, and 0 "
                "normalizes over the whole batch"
            )
        if self.epochs <= self.peak_epoch:
            raise ConfigError(
                f"epochs is {self.epochs}: the LR peaks at epoch {self.peak_epoch} and needs a later one to come down; "
                f"train for at least {self.peak_epoch + 1} epochs or lower peak_epoch"
            )
        if (self.lr_min is None) != (self.lr_max is None):
            raise ConfigError(
                f"lr_min is {self.lr_min} and lr_max is {self.lr_max}: give both to skip the range test, or neither to "
                "run it"
            )
        if self.lr_min is not None and self.lr_min >= self.lr_max:
            raise ConfigError(f"lr_min is {self.lr_min}: it must be below lr_max, which is {self.lr_max}")
        if self.range_test_start >= self.range_test_end:
            raise ConfigError(
                f"range_test_start is {self.range_test_start}: it must be below range_test_end, which is "
                f"{self.range_test_end}"
            )

    def to_dict(self) -> dict:
        """The settings as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def with_defaults(saved: dict) -> dict:
    """``saved``, from an earlier ``Config.to_dict()``, completed: a setting it lacks is newer and had its default."""
    return {**Config().to_dict(), **saved}


def changed_settings(saved: dict, config: Config) -> list[str]:
    """Where ``saved``, from an earlier ``Config.to_dict()``, differs from ``config``, in words."""
    saved, here = with_defaults(saved), config.to_dict()
    return [f"{name} {saved[name]!r} there, {here[name]!r} here" for name in here if saved[name] != here[name]]


def choices(setting: str) -> tuple[str, ...]:
    """The values that a setting of ``Config`` may have, if they are words."""
    return get_args(get_type_hints(Config)[setting])


def full(**changes) -> Config:
    """The recipe: all images, 24 epochs, batch 512, with ``changes`` to single settings."""
    return Config(**changes)


def quick(**changes) -> Config:
    """The same code on few images and for few epochs: minutes on a laptop. Its accuracy means nothing.

    A smaller batch leaves enough steps to see the cycle work.
    """
    settings = dict(
        profile="quick",
        train_images=2500,
        test_images=1000,
        batch_size=64,
        epochs=6,
        peak_epoch=2,
        range_test_steps=80,
        ema_decay=0.9,  # averages over 10 steps; 100 would be nearly half of this run
    )
    return Config(**{**settings, **changes})


def from_profile(name: str, **changes) -> Config:
    """The profile called ``name``, with ``changes`` to single settings.

    Raises:
        ConfigError: ``name`` is not one of ``PROFILES``.
    """
    if name not in PROFILES:
        raise ConfigError(f"profile is {name!r}: choose one of {', '.join(PROFILES)}")
    return {"full": full, "quick": quick}[name](**changes)
