"""From the records of all runs to what people read: tables, sentences, figures, pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.variants import ABLATIONS, RECIPE, is_current
from utils import plotting
from utils.runs.files import write_atomically
from utils.runs.report import markdown_table, replace_block
from utils.runtime import PROJECT_ROOT

RESULTS = PROJECT_ROOT / "experiments" / "results"
RECORD_NAME, RECORDS_NAME, PAGE_NAME = "record.json", "runs.json", "README.md"
NO_RUNS = "No run of it is finished yet."
PLAIN, TTA, VIEWS, LOSS = "test_accuracy", "test_accuracy_tta", "test_accuracy_six_views", "test_loss"
MEASURES = {"Accuracy": PLAIN, "Flip TTA": TTA, "Six views": VIEWS, "Loss": LOSS}
# From a run's metrics.json into its record.
RECORDED = (
    *(*MEASURES.values(), "per_class_accuracy", "lr_min", "lr_max", "weight_decay", "wall_seconds"),
    *("range_test_seconds", "device", "precision", "versions", "commit", "data", "train_images", "test_images"),
)
APART = "coupled decay"  # its runs scatter several times as much as all others, so their spread is not pooled


def all_records(runs: Path, alone: bool = False) -> list[dict]:
    """Those of the ``runs`` folder, and unless they are wanted ``alone``, the others in experiments/results."""
    path = RESULTS / RECORDS_NAME
    published = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not alone else []
    here = [json.loads(record.read_text(encoding="utf-8")) for record in sorted(runs.glob(f"*/{RECORD_NAME}"))]
    found = {(*key_of(one), "" if is_current(one) else json.dumps(one)): one for one in [*published, *here]}
    return sorted(found.values(), key=lambda record: (record["stage"], *key_of(record)))


def key_of(record: dict) -> tuple[int, str, int]:
    """Width, variant and seed."""
    return record["config"]["width"], record["variant"], record["seed"]


def frame(records: Sequence[dict]) -> pd.DataFrame:
    """A row per record: its entries, the network's ``width``, and ``is_current``."""
    data = pd.DataFrame([{**dict.fromkeys(MEASURES.values()), **record} for record in records])
    width, current = [record["config"]["width"] for record in records], [is_current(record) for record in records]
    return data.assign(width=width, is_current=current)


def ablation_rows(data: pd.DataFrame) -> pd.DataFrame:
    """The current runs of recipe and variants at the width that most variants were run at, failed ones included."""
    data = data[data["is_current"]]
    return data[data["width"] == data.loc[data["variant"] != RECIPE.name, "width"].mode().max()]


def pooled_spread(rows: pd.DataFrame, measure: str) -> float:
    """The standard deviation of a run within its variant, from all variants with two runs or more; NaN without any."""
    groups = rows[rows["variant"] != APART].groupby("variant")[measure]
    freedom = (groups.count() - 1).clip(lower=0)
    return float(np.sqrt((groups.var() * freedom).sum() / freedom.sum())) if freedom.any() else float("nan")


def differences(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """By variant, the ``difference`` of its mean to the recipe's, and that one's standard ``error``.

    The error of a difference of means of n and m runs is s * sqrt(1/n + 1/m), s from ``pooled_spread``.
    """
    found = rows.groupby("variant")[measure].agg(["count", "mean", "std"])
    variance = found["std"].where(found.index == APART, pooled_spread(rows, measure)) ** 2 / found["count"]
    found["difference"] = found["mean"] - found["mean"].get(RECIPE.name, np.nan)
    found["error"] = np.sqrt(variance + variance.get(RECIPE.name, np.nan))
    return found.reindex([variant.name for variant in ABLATIONS]).dropna(subset="difference")


def clear(found: pd.DataFrame) -> list[str]:
    """The rows whose difference exceeds two standard errors."""
    return found.index[found["difference"].abs() > 2 * found["error"]].tolist()


# --- Markdown ---------------------------------------------------------------------------------------------------------


def signed(found: pd.DataFrame, name: str, decimals: int = 2) -> str:
    """``"+0.12 ± 0.05"``; without the error while nothing is known of the spread, and empty for an unknown ``name``."""
    if name not in found.index:
        return ""
    value, error = found.loc[name, ["difference", "error"]].round(decimals) + 0.0  # no "-0.00"
    return f"{value:+.{decimals}f}" + (f" ± {error:.{decimals}f}" if np.isfinite(error) else "")


def spread(values: pd.Series) -> str:
    """``"94.52 ± 0.14"``, a single value, or nothing."""
    decimals = 4 if values.name == LOSS else 2
    return " ± ".join(f"{number:.{decimals}f}" for number in (values.mean(), values.std()) if np.isfinite(number))


def about(rows: pd.DataFrame) -> str:
    """Images, width and machines of runs."""
    row, devices = rows.iloc[0], "; ".join(sorted(rows["device"].unique()))
    images = f"{row['train_images']:,.0f} train and {row['test_images']:,.0f} {row['split']} images"
    return f"{images} of {row['data'].partition(';')[0]}, width {row['width']}, on {devices}."


def seeds_section(data: pd.DataFrame) -> str:
    rows = data[data["variant"].eq(RECIPE.name) & data["is_current"] & data["status"].eq("done")]
    rows = rows[rows["width"] == rows["width"].max()]
    if rows.empty:
        return NO_RUNS
    seeds = ", ".join(str(seed) for seed in sorted(rows["seed"]))
    table = [(name, spread(rows[measure])) for name, measure in MEASURES.items() if rows[measure].notna().all()]
    return f"{about(rows)} Seeds {seeds}.\n\n{markdown_table(('Measure', 'Mean ± standard deviation'), table)}"


def ablations_section(data: pd.DataFrame, is_page: bool = True) -> str:
    """The table of all variants and what stands out; on the page with loss and purpose, for which a README has no room."""
    rows = ablation_rows(data)
    done = rows[rows["status"] == "done"]
    plain, tta = differences(done, PLAIN), differences(done, TTA)
    if plain.empty:
        return NO_RUNS
    table = []
    for variant in (RECIPE, *ABLATIONS):
        own = done[done["variant"] == variant.name]
        failed = rows["variant"].eq(variant.name).sum() - len(own)
        count = f"{len(own)} ({failed} failed)" if failed else len(own)
        means = [spread(own[measure]) for measure in (PLAIN, TTA)]
        row = [variant.name, count, *means, *(signed(found, variant.name) for found in (plain, tta))]
        if len(own) or failed:
            table.append([*row, spread(own[LOSS]), variant.purpose] if is_page else row)
    header = ("Variant", "Seeds", "Accuracy", "Flip TTA", "Difference", "with TTA", *("Loss", "What it is") * is_page)
    in_both, in_none = set(clear(plain)) & set(clear(tta)), set(plain.index) - set(clear(plain)) - set(clear(tta))
    places = {"in both columns": in_both, "in one": set(plain.index) - in_both - in_none, "in neither": in_none}
    named = {place: ", ".join(f"*{name}*" for name in plain.index if name in there) for place, there in places.items()}
    missing = ", ".join(f"*{variant.name}*" for variant in ABLATIONS if variant.name not in plain.index)
    return (
        f"{about(done)} After a mean, ± is the standard deviation over seeds; after a difference, the standard error, which "
        f"follows from the number of runs and the pooled spread of a run within its variant: {pooled_spread(done, PLAIN):.2f} "
        f"points, and {pooled_spread(done, TTA):.2f} with flip TTA. ({APART.capitalize()}, whose runs scatter far more, has a "
        "spread of its own.) All differences are to the same runs of the recipe, and so share their error.\n\n"
        f"{markdown_table(header, table)}\n\nDifferences of more than two standard errors "
        f"{'; '.join(f'{place}: {names}' for place, names in named.items() if names)}. Where a change does "
        f"nothing, chance alone makes so large a difference one time in twenty.{f' Not run yet: {missing}.' if missing else ''}"
    )


def readme_part(data: pd.DataFrame) -> str:
    """The project README's part: the table and its figure."""
    alt = "Test accuracy without one part of the recipe, compared with the whole recipe; with standard errors, sorted"
    return f"{ablations_section(data, is_page=False)}\n\n![{alt}](experiments/results/ablations.png)"


def runs_table(data: pd.DataFrame) -> str:
    """A line per run."""
    formats = {PLAIN: ".2f", TTA: ".2f", LOSS: ".4f", "train_accuracy": ".2f", "lr_min": ".1e", "lr_max": ".1e"}
    header = ("Stage", "Width", "Variant", "Seed", "Split", "Accuracy", "Flip TTA", "Loss", "Train", "LRMIN", "LRMAX")
    rows = []
    for _, run in data.iterrows():
        results = [*[""] * len(formats), f"failed: {run.get('reason')}"]
        if run["status"] == "done":
            figures = (format(run[name], digits) for name, digits in formats.items())
            results = [*figures, f"{run['wall_seconds'] / 60:.1f}"]
        rows.append([*run[["stage", "width", "variant", "seed", "split"]], *results, run["device"]])
    note = "Minutes are wall time, including whatever else the machine did."
    return f"# Every run that was made\n\n{note}\n\n{markdown_table((*header, 'Minutes', 'Device'), rows)}\n"


# --- files ------------------------------------------------------------------------------------------------------------


def ablations_figure(data: pd.DataFrame) -> Figure | None:
    """Each variant's difference and those of its single runs; None while there are none."""
    done = ablation_rows(data[data["status"] == "done"])
    found = differences(done, PLAIN)
    single = done.set_index("variant")[PLAIN] - done.loc[done["variant"] == RECIPE.name, PLAIN].mean()
    rows = [(name, row["difference"], row["error"], single[[name]].tolist()) for name, row in found.iterrows()]
    title = f"Ablations at width {done['width'].max()}: difference of test accuracy to the recipe's"
    label = "points of accuracy (bar: standard error; small dots: each run)"
    return plotting.differences(rows, title=title, xlabel=label) if rows else None


def render_page(text: str, data: pd.DataFrame) -> str:
    """``text`` with its generated parts renewed."""
    text = replace_block(text, "seeds", seeds_section(data))
    return replace_block(text, "ablations", ablations_section(data))


def write_results(folder: Path, records: Sequence[dict]) -> pd.DataFrame:
    """Write records, tables and figures, and return the ``frame``; the page, if ``folder`` has one, keeps all but its generated parts."""
    data, page = frame(records), folder / PAGE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in records)  # a line per run
    write_atomically(folder / RECORDS_NAME, f"[\n{lines}\n]\n".encode())
    write_atomically(folder / "runs.md", runs_table(data).encode())
    if (figure := ablations_figure(data)) is not None:
        plotting.save_figure(figure, folder / "ablations.png")
    if page.exists():
        write_atomically(page, render_page(page.read_text(encoding="utf-8"), data).encode())
    return data
