"""What is tried: variants of the recipe, each a name and the settings that it changes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from utils.config import Config, changed_settings, from_profile

FIRST_SEED = 100  # seeds from 0 and from 50 chose the recipe; these had no part in it
WIDTHS = {"seeds": 64, "ablations": 32}  # channels of the network's first layer, by command
TINY = dict(train_images=None, test_images=None, batch_size=16, epochs=3, peak_epoch=1, range_test_steps=40, width=8)


@dataclass(frozen=True)
class Variant:
    """One departure from the recipe.

    Attributes:
        name: in tables, figures and folders.
        purpose: what it shows a reader.
        changes: ``Config`` fields with their values.
        seeds: how many runs, with seeds from ``FIRST_SEED``.
    """

    name: str
    purpose: str
    changes: dict = field(default_factory=dict)
    seeds: int = 3


RECIPE = Variant("recipe", "every setting as in utils/config.py", seeds=10)
ABLATIONS = (
    Variant(
        "no residual connections",
        "R(x) instead of x + R(x), with the same parameters",
        {"residual": False},
        seeds=10,  # the lesson's own subject
    ),
    *(
        Variant(
            f"constant LR {scale} LRMAX",
            "one learning rate instead of a cycle; the average of the weights is kept",
            {"schedule": "constant", "lr_scale": scale},
        )
        for scale in (0.1, 0.4)
    ),
    # The product of LR and decay, which shrinks the weights, averages half of its peak over a cycle, and a constant LR
    # keeps it at the peak. This is the control.
    Variant(
        "constant LR 0.4, half the decay",
        "a constant LR with no more decay over the whole run than the recipe has",
        {"schedule": "constant", "lr_scale": 0.4, "decay_at_peak": Config().decay_at_peak / 2},
    ),
    Variant("no warm-up", "starts at LRMAX", {"schedule": "no-warm-up"}),
    Variant("ends at LRMIN / 100", "the same ramp down, to a hundredth of LRMIN", {"schedule": "low-end"}),
    Variant(
        "annihilation",
        "down to LRMIN a tenth of the run earlier, then in a straight line to LRMIN / 100",
        {"schedule": "annihilation"},
    ),
    Variant("no cutout", "crop and flip only", {"cutout": 0}),
    Variant("no flip", "crop and cutout only", {"flip": False, "alternate_flip": False}),
    Variant("padding 2", "crops that move by up to 2 pixels instead of 4", {"pad": 2}),
    Variant("no EMA", "the last weights instead of their running average", {"ema_decay": 0.0}),
    Variant("no label smoothing", "targets of 0 and 1", {"label_smoothing": 0.0}),
    Variant("coupled decay", "Adam's L2 penalty at a single, untuned value, 1e-4", {"coupled_decay": 1e-4}),
)


@dataclass(frozen=True)
class Run:
    """One training."""

    variant: Variant
    width: int
    seed: int
    small: bool = False  # a trial of the machinery: few images, 3 epochs, a thin network

    @property
    def config(self) -> Config:
        """Its settings. The recipe, one of whose runs is published, is tested after every epoch."""
        changes = {"width": self.width, "seed": self.seed, **self.variant.changes}
        if self.variant != RECIPE:
            changes["eval_every"] = Config().epochs
        return from_profile("quick", **{**changes, **TINY}) if self.small else from_profile("full", **changes)

    @property
    def folder(self) -> str:
        """``no-cutout-32-seed100``."""
        return re.sub(r"[^\w.]+", "-", f"{self.variant.name} {self.width} seed{self.seed}")

    @property
    def key(self) -> tuple[int, str, int]:
        return self.config.width, self.variant.name, self.seed


def plan(command: str, width: int | None, seeds: int | None, small: bool) -> list[Run]:
    """A command's runs, seed by seed, so that a time limit cuts the last seeds. None: the usual width or number."""
    variants = (RECIPE,) if command == "seeds" else (RECIPE, *ABLATIONS)
    width = width or WIDTHS[command]
    runs = [Run(one, width, FIRST_SEED + n, small) for one in variants for n in range(seeds or one.seeds)]
    return sorted(runs, key=lambda run: run.seed)


def is_current(record: dict) -> bool:
    """Whether today's code would make a record's run, with the same settings."""
    config = record["config"]
    for variant in (RECIPE, *ABLATIONS):
        if (variant.name, variant.changes, "test") == (record["variant"], record["changes"], record["split"]):
            run = Run(variant, config["width"], record["seed"], small=config["profile"] != "full")
            return not changed_settings(config, run.config)
    return False
