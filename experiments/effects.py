"""What a factor does, and how well we know it: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Effect:
    """A difference ``value`` with its standard error, None where the data give none; ``count`` runs or pairs behind it."""

    name: str
    value: float
    error: float | None
    count: int


def main_effects(levels: np.ndarray, blocks: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """What each factor does on average over all settings of the others, by least squares on ``values``.

    The model is an offset for each block plus an effect for each factor that is at its high level. In a whole
    Plackett-Burman design that is the mean of the runs with the factor less the mean of those without. The noise's
    standard deviation comes from what the model leaves over, with as many degrees of freedom as there are more runs than
    unknowns: from repeated runs of one setting, then, and from further blocks. With n runs of a balanced design each
    effect has a standard error of 2 sd / sqrt(n), 0.58 sd for 12. Two-factor interactions, if any, are spread thinly over
    the effects of the other factors.

    Args:
        levels: (R, F), +1 where a run has the factor, -1 where not.
        blocks: (R,) integers: runs that share images, or whatever else moves them alike.
        values: (R,) what was measured.

    Returns:
        The (F,) effects and their (F,) standard errors, or None when there are as many unknowns as runs.

    Raises:
        ValueError: so few runs that the factors cannot be told apart.
    """
    levels, values = np.asarray(levels, dtype=float), np.asarray(values, dtype=float)
    offsets = (np.asarray(blocks)[:, None] == np.unique(blocks)[None, :]).astype(float)
    matrix = np.hstack([levels / 2, offsets])  # from -1/2 to +1/2: a coefficient is the whole step
    unknowns = matrix.shape[1]
    if np.linalg.matrix_rank(matrix) < unknowns:
        raise ValueError(
            f"{len(values)} runs cannot tell {levels.shape[1]} factors apart: finish the design's runs first"
        )
    found = np.linalg.lstsq(matrix, values, rcond=None)[0]
    freedom = len(values) - unknowns
    if not freedom:
        return found[: levels.shape[1]], None
    variance = np.sum((values - matrix @ found) ** 2) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(matrix.T @ matrix)))
    return found[: levels.shape[1]], errors[: levels.shape[1]]


def paired(name: str, values: Mapping[int, float], reference: Mapping[int, float]) -> Effect | None:
    """The mean difference over the seeds that both have; its standard error is that of the pairs' differences.

    Runs of one seed share images, order and initial weights; what those do to both cancels.

    Returns:
        None where there is no common seed; an error of None for a single pair.
    """
    differences = np.array([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])
    if not len(differences):
        return None
    error = float(differences.std(ddof=1) / np.sqrt(len(differences))) if len(differences) > 1 else None
    return Effect(name, float(differences.mean()), error, len(differences))
