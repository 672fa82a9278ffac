"""From the log to one table (JSON and Markdown) and a figure with error bars for each split."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.runner import Log
from experiments.variants import RECIPE
from utils import plotting
from utils.checkpoint import write_atomically

FIGURES = {"validation": "tune.png", "test": "ablations.png"}
_TITLES = {
    "validation": "Tuning: accuracy on held-out train images",
    "test": "Results and ablations: test accuracy",
}


@dataclass(frozen=True)
class Row:
    """One variant over its seeds. Accuracies and differences in percent and points, ``None`` where there is none.

    Attributes:
        accuracies, accuracies_tta: of each finished run, without and with flip TTA.
        mean, std, mean_tta, std_tta: over them; std (n - 1) from two runs on.
        difference, difference_error: mean less the recipe's mean, and its standard error.
        failed: how many runs diverged or found no LRs.
        seconds: mean training time.
    """

    variant: str
    shows: str
    seeds: list[int]
    accuracies: list[float]
    accuracies_tta: list[float]
    mean: float | None
    std: float | None
    mean_tta: float | None
    std_tta: float | None
    difference: float | None
    difference_error: float | None
    failed: int
    seconds: float | None


@dataclass(frozen=True)
class Section:
    """The variants of one recipe on one split of one dataset; the recipe itself comes first."""

    split: str
    recipe: str
    data: str
    train_images: int
    eval_images: int
    epochs: int
    devices: list[str]
    commits: list[str]
    rows: list[Row]


def sections(records: Sequence[dict]) -> list[Section]:
    """Group a log by split, recipe and data, in order of first appearance: only like is compared with like."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["split"], record["recipe"], record["data"]), []).append(record)
    return [_section(*name, group) for name, group in groups.items()]


def _section(split: str, recipe: str, data: str, records: list[dict]) -> Section:
    by_variant: dict[str, list[dict]] = {}
    for record in records:
        by_variant.setdefault(record["variant"], []).append(record)
    reference = _done(by_variant.get(RECIPE.name, []))
    names = sorted(by_variant, key=lambda name: name != RECIPE.name)  # stable: the rest stays in order
    return Section(
        split=split,
        recipe=recipe,
        data=data,
        train_images=records[0]["train_images"],
        eval_images=records[0]["eval_images"],
        epochs=records[0]["config"]["epochs"],
        devices=sorted({f"{record['device']}, {record['precision']}" for record in records}),
        commits=sorted({record["commit"] for record in records}),
        rows=[_row(by_variant[name], reference) for name in names],
    )


def _done(records: list[dict]) -> list[dict]:
    return [record for record in records if record["status"] == "done"]


def _row(records: list[dict], reference: list[dict]) -> Row:
    done = _done(records)
    values, tta = ([record[name] for record in done] for name in ("accuracy", "accuracy_tta"))
    baseline = [record["accuracy"] for record in reference]
    difference = error = None
    if values and baseline and records[0]["variant"] != RECIPE.name:
        difference = float(np.mean(values) - np.mean(baseline))
        if len(values) > 1 and len(baseline) > 1:
            error = math.sqrt(np.var(values, ddof=1) / len(values) + np.var(baseline, ddof=1) / len(baseline))
    return Row(
        variant=records[0]["variant"],
        shows=records[0]["shows"],
        seeds=[record["seed"] for record in done],
        accuracies=values,
        accuracies_tta=tta,
        mean=_mean(values),
        std=_std(values),
        mean_tta=_mean(tta),
        std_tta=_std(tta),
        difference=difference,
        difference_error=error,
        failed=len(records) - len(done),
        seconds=_mean([record["seconds"] for record in done]),
    )


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _std(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def markdown(section: Section) -> str:
    """The section as a Markdown table, with a sentence on what was measured."""
    lines = [
        f"### {_TITLES[section.split]}",
        "",
        f"{section.train_images:,} train and {section.eval_images:,} {section.split} images of {section.data}; "
        f"{section.epochs} epochs, last epoch; mean ± standard deviation over seeds, difference ± its standard error; "
        f"{'; '.join(section.devices)}; recipe {section.recipe}, commit {', '.join(section.commits)}.",
        "",
        "| Variant | Seeds | Accuracy | with flip TTA | Points to the recipe | Training | Shows |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in section.rows:
        count = f"{len(row.seeds)}" + (f" ({row.failed} failed)" if row.failed else "")
        seconds = "" if row.seconds is None else f"{row.seconds:.1f} s"
        lines.append(
            f"| {row.variant} | {count} | {_spread(row.mean, row.std, '%')} | {_spread(row.mean_tta, row.std_tta, '%')} "
            f"| {_spread(row.difference, row.difference_error, '', '+')} | {seconds} | {row.shows} |"
        )
    return "\n".join(lines) + "\n"


def _spread(value: float | None, error: float | None, unit: str, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}") + unit


def draw(section: Section) -> Figure:
    """Each seed a dot, each variant's mean with its standard deviation, the recipe's as a line across.

    Variants without a finished run are left out.
    """
    rows = [row for row in section.rows if row.accuracies]
    with mpl.rc_context(plotting.STYLE):
        figure, axis = plotting.new_figure(1.1 + 0.27 * len(rows))
        for position, row in enumerate(rows):
            is_recipe = row.variant == RECIPE.name
            color = plotting.ORANGE if is_recipe else plotting.BLUE
            if is_recipe:
                axis.axvline(row.mean, color=color, ls="--", lw=1.2)
            axis.plot(row.accuracies, [position] * len(row.accuracies), ".", color=plotting.GREY, ms=4, zorder=2)
            axis.errorbar(row.mean, position, xerr=row.std, fmt="o", color=color, ms=6, capsize=3, lw=1.6, zorder=3)
        axis.set_yticks(range(len(rows)), [f"{row.variant} (n = {len(row.accuracies)})" for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.xaxis.set_major_formatter(PercentFormatter(decimals=1))
        axis.set_xlabel(f"{section.split} accuracy: each seed (grey), mean ± standard deviation; dashed: the recipe")
        axis.set_title(_TITLES[section.split])
    return figure


def write_tables(folder: Path) -> list[Section]:
    """Write ``table.json``, ``table.md`` and, of each split's newest section, a figure; returns the sections."""
    folder = Path(folder)
    found = sections(Log(folder).records)
    content = json.dumps([asdict(section) for section in found], indent=1) + "\n"
    write_atomically(folder / "table.json", content.encode())
    write_atomically(folder / "table.md", "\n".join(markdown(section) for section in found).encode())
    for section in found:  # a later section of the same split replaces the earlier one's figure
        if any(row.accuracies for row in section.rows):
            plotting.save_figure(draw(section), folder / FIGURES[section.split])
    return found
