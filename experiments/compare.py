"""Two runs side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.tables import MEASURES
from utils import plotting
from utils.config import Config
from utils.runs.report import read_metrics
from utils.runtime import say

RESULTS = (*MEASURES.values(), "lr_min", "lr_max", "weight_decay", "wall_seconds", "range_test_seconds", "device")


def compare(first: Path, second: Path, out: Path | None = None) -> None:
    """Print the settings that differ and the results of two finished runs, and draw their errors.

    Args:
        first, second: the runs' folders.
        out: of the figure; None: ``compare.png`` in the first folder.
    """
    both = {f"{letter}: {run.resolve().name}": read_metrics(run) for letter, run in zip("AB", (first, second))}
    defaults = Config().to_dict()  # of settings that are newer than a run
    settings = pd.DataFrame({name: {**defaults, **one["config"], "data": one["data"]} for name, one in both.items()})
    differing = settings[settings.astype(str).nunique(axis=1) > 1]
    say(f"Settings that differ:\n{differing.to_string() if len(differing) else 'none'}\n")
    say(pd.DataFrame({name: pd.Series(one).reindex(RESULTS) for name, one in both.items()}).dropna().to_string())
    panels: dict[str, dict[str, np.ndarray]] = {"train error": {}, "test error": {}}
    for name, one in both.items():
        for kind, panel in zip(("train", "test"), panels.values()):
            panel[name] = 100 - np.array(one["history"][f"{kind}_accuracy"], dtype=float)  # NaN: not tested
    out = out or first / "compare.png"
    plotting.save_figure(plotting.curves(panels, "epoch", "error, %"), out)
    say(f"\ncurves: {out}")
