"""What is tried: variants of the recipe, each a name and the settings that it changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.effects import Effect
from utils.config import full

EMA_DECAY = 0.99  # of the recipe before the screen
EMA_ALSO = (0.98, 0.995, 0.998)  # more averages of the weights, tested at no cost in each run of the screen
# The narrow network of the screen under-fits, and so judges regularizers too harshly: these get a second chance at full
# width, on top of what helped.
REGULARIZERS = ("decay x 2", "label smoothing 0.2")
BASE_RUNS = 4  # of each replicate of the screen: one is the design's last row, the others show the noise


@dataclass(frozen=True)
class Variant:
    """One departure from the recipe: ``name``, what it ``shows`` a reader, and ``Config`` fields with their values."""

    name: str
    shows: str
    changes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Factor:
    """One setting of the screen: a ``Config`` field, its value in the recipe before the screen, and the other value."""

    name: str
    field: str
    low: object
    high: object
    why: str


# Settings that evidence from elsewhere supports (nearly all fast CIFAR-10 recipes share them), or that nobody has
# measured with Adam.
FACTORS = (
    Factor(
        "LRMIN by onset",
        "lr_rule",
        "steepest-minimum",
        "onset-minimum",
        "a far lower LRMIN: decay to nearly zero beat decay to a tenth for AdamW (arXiv 2502.15938)",
    ),
    Factor("decay x 2", "decay_at_peak", 1.5e-3, 3e-3, "the train accuracy of 98% leaves room to regularize"),
    Factor("LRMAX x 1.6", "lr_max_factor", 1.0, 1.6, "the range test's minimum is flat; a higher peak regularizes"),
    Factor("ghost batch 64", "ghost_batch", 0, 64, "noisier batch statistics regularize (arXiv 1705.08741)"),
    Factor("label smoothing 0.2", "label_smoothing", 0.1, 0.2, "what Page's recipe uses"),
    Factor("no decay of vectors", "decay_norm_and_bias", True, False, "common, but unproven here: batch norm and bias"),
    Factor("patch filters", "init", "default", "patches", "a start that need not be learned (arXiv 2404.00498)"),
    Factor("dropout 0.05", "dropout", 0.0, 0.05, "the usual regularizer, in a small dose"),
    Factor("beta2 0.95", "beta2", 0.99, 0.95, "0.999 would remember 10 of 24 epochs; is 100 steps still too long?"),
    Factor(
        "norm momentum 0.4",
        "norm_momentum",
        0.1,
        0.4,
        "running statistics lag 2 steps behind the weights instead of 10; the weight average removes their noise",
    ),
    Factor(
        "pad with grey", "pad_mode", "reflect", "constant", "mirrored borders, or the mean colour as in most recipes"
    ),
)


def with_factors(name: str, shows: str, chosen: Collection[str]) -> Variant:
    """The base with the named factors at their high values."""
    return Variant(
        name, shows, {factor.field: factor.high if factor.name in chosen else factor.low for factor in FACTORS}
    )


BASE = with_factors("base", "every factor as it was before the screen", ())
ALL_THAT_HELPED = "all that helped"  # the first proposal
RECIPE = Variant("recipe", "every setting as in utils/config.py")


def plackett_burman() -> np.ndarray:
    """The 12-run design for 11 factors of Plackett and Burman (1946): (12, 11) of -1 and +1, the last row all -1.

    Any two columns are uncorrelated, so each factor's effect is read from all 12 runs.
    """
    first = [1 if sign == "+" else -1 for sign in "++-+++---+-"]
    return np.array([np.roll(first, shift) for shift in range(11)] + [[-1] * 11])


def screen_design() -> list[Variant]:
    """The design's twelve runs; the last is the base."""
    rows = [[factor.name for factor, level in zip(FACTORS, row) if level > 0] for row in plackett_burman()[:-1]]
    return [with_factors(f"design {number}", ", ".join(row), row) for number, row in enumerate(rows, 1)] + [BASE]


def levels_of(changes: dict) -> list[int]:
    """The design's row that a run's ``changes`` came from: +1 for each factor at its high value, else -1."""
    return [1 if changes[factor.field] == factor.high else -1 for factor in FACTORS]


def confirm(effects: Sequence[Effect]) -> list[Variant]:
    """What is tried at full width: the base, the proposals, and the first proposal with one regularizer more.

    The proposals follow a rule from before the screen: all factors whose effect on accuracy is larger than its standard
    error, together; and the three largest of these.

    Args:
        effects: of each factor on accuracy, named as in ``FACTORS``.
    """
    helped = sorted((e for e in effects if e.value > (e.error or 0.0)), key=lambda effect: -effect.value)
    if not helped:
        return [BASE]
    names = [effect.name for effect in helped]
    proposals = {ALL_THAT_HELPED: names}
    if len(names) > 3:
        proposals["the three that helped most"] = names[:3]
    for regularizer in REGULARIZERS:
        if regularizer not in names:
            proposals[f"{ALL_THAT_HELPED}, {regularizer}"] = [*names, regularizer]
    return [BASE, *(with_factors(name, ", ".join(chosen), chosen) for name, chosen in proposals.items())]


def is_regularized(name: str) -> bool:
    """True for the name of the first proposal with one regularizer more."""
    return name.startswith(f"{ALL_THAT_HELPED}, ")


def ablations() -> list[Variant]:
    """The recipe without one part at a time, those that the screen and the confirmation added included, and a control."""
    recipe = full()
    added = [factor for factor in FACTORS if getattr(recipe, factor.field) == factor.high]
    constant = {
        share: {
            "schedule": "constant",
            "lr_max_factor": share * recipe.lr_max_factor,
            "lr_min_factor": share * recipe.lr_min_factor,  # unused, but it must stay below LRMAX
        }
        for share in (0.1, 0.4)
    }
    return [
        Variant(
            "no residual connections", "what x + R(x) buys over R(x), with the same parameters", {"residual": False}
        ),
        *(
            Variant(f"constant LR {share} LRMAX", "what a cycle buys over one learning rate", changes)
            for share, changes in constant.items()
        ),
        # The control: the product of LR and decay, which shrinks the weights, averages half of its peak over a cycle; a
        # constant LR keeps it at the peak.
        Variant(
            "constant LR 0.4, half the decay",
            "the same with no more decay over the whole run than the recipe has",
            {**constant[0.4], "decay_at_peak": recipe.decay_at_peak / 2},
        ),
        Variant("no warm-up", "what the way up to LRMAX buys", {"schedule": "no-warm-up"}),
        Variant(
            "annihilation", "the same ramp down to LRMIN / 100, as the original had it", {"schedule": "annihilation"}
        ),
        Variant("no cutout", "what cutout buys", {"cutout": 0}),
        Variant("no flip", "what mirrored images buy", {"flip": False, "alternate_flip": False}),
        Variant("padding 2", "what moving by 4 pixels buys over 2", {"pad": 2}),
        Variant("no EMA", "what averaging the weights buys", {"ema_decay": 0.0}),
        Variant("no label smoothing", "what softer targets buy", {"label_smoothing": 0.0}),
        Variant("coupled decay", "Adam's L2 penalty of 1e-4, as the original had it", {"coupled_decay": 1e-4}),
        *(Variant(f"without {one.name}", f"`{one.field}` as before the screen", {one.field: one.low}) for one in added),
    ]
