"""What a factor does, and how well we know it: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Effect:
    """What a factor or a variant changes, and how well that is known."""

    name: str
    value: float  # the difference
    error: float | None  # its standard error; None where the data give none
    count: int  # runs or pairs behind it
    pairs: tuple[float, ...] = ()  # each pair's difference; none for a factor


def main_effects(levels: np.ndarray, blocks: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """What each factor does on average over all settings of the others, by least squares on ``values``.

    The model is an offset for each block plus an effect for each factor at its high level. In a whole Plackett-Burman
    design that effect is the mean of the runs with the factor less the mean of those without. The noise's standard
    deviation comes from the residuals, whose degrees of freedom (runs less unknowns) come from repeated runs of one
    setting and from further blocks. With n runs of a balanced design each effect has a standard error of 2 sd /
    sqrt(n), 0.58 sd for 12. Two-factor interactions, if any, are spread thinly over the effects of the other factors.

    Args:
        levels: (R, F), +1 where a run has the factor, -1 where not.
        blocks: (R,) integers: runs with the same one share images, or anything else that moves them alike.
        values: (R,) what was measured.

    Returns:
        The (F,) effects and their (F,) standard errors, or None when there are as many unknowns as runs.

    Raises:
        ValueError: too few runs to tell the factors apart.
    """
    count = levels.shape[1]
    offsets = blocks[:, None] == np.unique(blocks)
    matrix = np.hstack([levels / 2, offsets])  # from -1/2 to +1/2: a coefficient is the whole step
    unknowns = matrix.shape[1]
    if np.linalg.matrix_rank(matrix) < unknowns:
        raise ValueError(f"{len(values)} runs cannot tell {count} factors apart: finish the design's runs first")
    found = np.linalg.lstsq(matrix, values, rcond=None)[0]
    freedom = len(values) - unknowns
    if not freedom:
        return found[:count], None
    variance = np.sum((values - matrix @ found) ** 2) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(matrix.T @ matrix)))
    return found[:count], errors[:count]


def paired(name: str, values: Mapping[int, float], reference: Mapping[int, float]) -> Effect | None:
    """The mean difference over the seeds that both have, and the standard error from the pairs' differences.

    Runs of one seed share images, order and, unless the variant changes them, initial weights: as far as these move both
    runs alike, they cancel.

    Returns:
        None where there is no common seed; a single pair has no error.
    """
    pairs = np.array([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])
    if not len(pairs):
        return None
    error = float(pairs.std(ddof=1) / np.sqrt(len(pairs))) if len(pairs) > 1 else None
    return Effect(name, float(pairs.mean()), error, len(pairs), tuple(pairs.tolist()))
