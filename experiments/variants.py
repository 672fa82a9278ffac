"""What is tried: the recipe, and variants that change one thing about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from models import CustomResNet
from utils.config import Config

ORIGINAL_LR_MAX = 0.0157  # what the original write-up's range test suggested


@dataclass(frozen=True)
class Variant:
    """One departure from the recipe.

    Attributes:
        name: unique in its table.
        shows: what a reader learns from it.
        changes: ``Config`` fields and their values.
        lr_min_factor, lr_max_factor: the cycle's ends, as multiples of what the range test found.
        edit_model: changes a new model in place.
        edit_group: changes the optimizer's only parameter group in place, before the first step. ``OneCycleLR`` keeps
            the ends of its ramps there: "initial_lr", "max_lr" and "min_lr" (the last step's).
    """

    name: str
    shows: str
    changes: dict = field(default_factory=dict)
    lr_min_factor: float = 1.0
    lr_max_factor: float = 1.0
    edit_model: Callable[[CustomResNet], None] | None = None
    edit_group: Callable[[dict], None] | None = None

    def departs_from(self, config: Config) -> bool:
        """False when it only sets what ``config`` has already."""
        plain = dataclasses.replace(self, name="", shows="", changes={}) == Variant("", "")
        return not plain or dataclasses.replace(config, **self.changes) != config


RECIPE = Variant("recipe", "every setting as in utils/config.py")


# --- the model ------------------------------------------------------------------------------------------------------


def remove_skips(model: CustomResNet) -> None:
    """x + R(x) becomes R(x), with the same modules, and so the same parameters and initial weights."""
    for layer in (model.layer1, model.layer3):
        layer.conv, layer.block = nn.Sequential(layer.conv, layer.block), None


def pad_by_replication(model: CustomResNet) -> None:
    """Convolutions continue the border pixels instead of padding with zeros."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "replicate"


def norm_momentum(momentum: float) -> Callable[[CustomResNet], None]:
    """Batch norm's running statistics move by ``momentum`` a step (torch's default: 0.1)."""

    def edit(model: CustomResNet) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    return edit


# --- the optimizer's parameter group ----------------------------------------------------------------------------------


def constant_lr(fraction: float) -> Callable[[dict], None]:
    """``fraction`` of LRMAX from the first step to the last; LR times weight decay stays what it was at the peak."""

    def edit(group: dict) -> None:
        lr = fraction * group["max_lr"]
        group["lr"] = group["initial_lr"] = group["max_lr"] = group["min_lr"] = lr
        group["weight_decay"] /= fraction

    return edit


def no_warm_up(group: dict) -> None:
    """LRMAX from the first step until the peak's epoch is over, then down as in the recipe."""
    group["lr"] = group["initial_lr"] = group["max_lr"]


def annihilation(group: dict) -> None:
    """The way down ends at LRMIN / 100."""
    group["min_lr"] /= 100


def original_optimizer(group: dict) -> None:
    """Annihilation, and Adam's L2 penalty of 1e-4 instead of decoupled decay."""
    annihilation(group)
    group["weight_decay"], group["decoupled_weight_decay"] = 1e-4, False


# --- the lists ------------------------------------------------------------------------------------------------------

CONSTANT_FRACTIONS = (0.1, 0.2, 0.05, 0.4)


def constant_variants() -> dict[float, Variant]:
    """A constant LR by its fraction of LRMAX: the best one is chosen on validation, then enters the ablations."""
    return {
        fraction: Variant(f"constant LR, LRMAX x {fraction}", "what the cycle buys", edit_group=constant_lr(fraction))
        for fraction in CONSTANT_FRACTIONS
    }


def tuning(recipe: Config) -> list[Variant]:
    """One factor at a time around ``recipe``, the most informative first; what it sets already is left out."""
    variants = [
        Variant(
            f"LRMAX x {factor}, decay x {decay}",
            "range-test rule and weight decay, together",
            {"decay_at_peak": decay * recipe.decay_at_peak},
            lr_max_factor=factor,
        )
        for factor, decay in (
            *((0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0)),  # along the axes first, then the grid's corners
            *((0.5, 2.0), (0.5, 0.5), (2.0, 0.5), (2.0, 2.0), (0.25, 1.0), (0.25, 2.0), (1.0, 3.0)),
        )
    ]
    variants += [
        Variant(f"EMA {decay}" if decay else "no EMA", "averaging weights", {"ema_decay": decay})
        for decay in (0.0, 0.995, 0.998, 0.98)
    ]
    variants += [
        Variant(f"LRMIN x {factor}", "where the cycle begins and ends", lr_min_factor=factor)
        for factor in (0.1, 0.3, 3.0)
    ]
    variants += [
        Variant(f"rule {rule}", "which points of the range test's curve to take", {"lr_rule": rule})
        for rule in ("steepest-minimum", "tenth-minimum", "valley-minimum")
    ]
    settings = [
        ("label_smoothing", (0.2, 0.05, 0.0), "softer targets"),
        ("dropout", (0.05, 0.1), "more regularization"),
        ("beta2", (0.999, 0.95), "memory of Adam's second moment"),
        ("beta1", (0.85, 0.95), "memory of Adam's first moment"),
        ("cycle_beta1", (True,), "beta1 from 0.95 to 0.85 at the peak and back"),
        ("eps", (1e-5, 1e-4, 1e-3), "a floor under Adam's second moment"),
        ("logit_scale", (0.0625, 0.25, 1.0), "how large the first logits are"),
        ("pad_mode", ("constant", "reflect"), "what is seen beyond the border"),
        ("alternate_flip", (False, True), "both sides of an image in any two epochs, or a coin toss"),
    ]
    variants += [
        Variant(f"{name} {value}", shows, {name: value}) for name, values, shows in settings for value in values
    ]
    variants += [
        Variant(f"BN momentum {momentum}", "batch norm's running statistics", edit_model=norm_momentum(momentum))
        for momentum in (0.4, 0.03)
    ]
    return [variant for variant in variants if variant.departs_from(recipe)] + list(constant_variants().values())


def ablations(recipe: Config, constant: Variant) -> list[Variant]:
    """The recipe without one of its parts at a time.

    Args:
        recipe: what they depart from.
        constant: the best of ``constant_variants``.
    """
    return [
        Variant("no residual connections", "what x + R(x) buys over R(x): same parameters", edit_model=remove_skips),
        constant,
        Variant("no warm-up", "what the way up to LRMAX buys", edit_group=no_warm_up),
        Variant("with annihilation", "what ending at LRMIN / 100 would buy", edit_group=annihilation),
        Variant("no cutout", "what cutout buys", {"cutout": 0}),
        Variant(f"padding {recipe.pad // 2} a side", "what the wider crop buys", {"pad": recipe.pad // 2}),
        Variant(
            "replicate padding", "zeros at the border of every convolution, or pixels", edit_model=pad_by_replication
        ),
        Variant(
            f"batch {recipe.batch_size // 4}",
            "four times the steps, LRs found anew",
            {"batch_size": recipe.batch_size // 4},
        ),
        Variant(
            "original settings",
            "the original write-up: fixed LRs, coupled decay, annihilation, cycled beta1, 2 px of padding, no averaging",
            {
                "lr_min": ORIGINAL_LR_MAX / 100,
                "lr_max": ORIGINAL_LR_MAX,
                "beta2": 0.999,
                "cycle_beta1": True,
                "label_smoothing": 0.0,
                "logit_scale": 1.0,
                "ema_decay": 0.0,
                "alternate_flip": False,
                "pad": 2,
            },
            edit_model=pad_by_replication,
            edit_group=original_optimizer,
        ),
    ]
