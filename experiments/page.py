"""From the runs' records to the files that people read: tables, figures, a page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.campaign import FOLDS
from experiments.effects import Effect, main_effects, paired
from experiments.variants import BASE, FACTORS, RECIPE, levels_of, plackett_burman
from utils import plotting
from utils.runtime import write_atomically

RECORDS_NAME, RUNS_NAME, PAGE_NAME = "runs.json", "runs.md", "README.md"
FROZEN = ("<!-- written by hand -->", "<!-- end -->")
NOT_FROZEN = "Nothing is frozen yet."
MEASURES = {"score": "accuracy, mean of plain and flip TTA (points)", "test_loss": "cross-entropy (nats)"}


def score(record: dict) -> float:
    """The mean of plain and TTA accuracy, in percent: less noisy than either."""
    return (record["test_accuracy"] + record["test_accuracy_tta"]) / 2


def screen_effects(records: Sequence[dict], measure: str = "score") -> list[Effect]:
    """What each factor of the screen does to ``measure`` ("score", or a key of the records).

    Raises:
        ValueError: too few runs are done.
    """
    done = _done(records, "screen")
    value = score if measure == "score" else lambda record: record[measure]
    levels = np.array([levels_of(record["changes"]) for record in done]).reshape(len(done), len(FACTORS))
    blocks = np.array([record["seed"] % FOLDS for record in done])
    effects, errors = main_effects(levels, blocks, np.array([value(record) for record in done]))
    errors = [None] * len(effects) if errors is None else errors.tolist()
    return [Effect(factor.name, *found, len(done)) for factor, *found in zip(FACTORS, effects.tolist(), errors)]


def differences(records: Sequence[dict], stage: str, reference: str, measure: str) -> dict[str, Effect]:
    """By variant of ``stage``: its paired difference to the variant ``reference`` ("base" or "recipe")."""
    by_variant: dict[str, dict[int, float]] = {}
    for record in _done(records, stage, *(["seeds"] if reference == RECIPE.name else [])):
        by_variant.setdefault(record["variant"], {})[record["seed"]] = record[measure]
    base = by_variant.pop(reference, {})
    found = {name: paired(name, values, base) for name, values in by_variant.items()}
    return {name: effect for name, effect in found.items() if effect is not None}


def write_results(folder: Path, records: Sequence[dict], current: Sequence[dict]) -> None:
    """Write all files into ``folder``; the page keeps its hand-written part.

    Args:
        folder: made if missing.
        records: of every run that was made.
        current: those of them that compare with each other and with the recipe of now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in records)  # a line a run
    write_atomically(folder / RECORDS_NAME, f"[\n{lines}\n]\n".encode())
    write_atomically(folder / RUNS_NAME, runs_table(records).encode())
    for name, figure in draw(current).items():
        plotting.save_figure(figure, folder / name)
    page = folder / PAGE_NAME
    frozen = _hand_written(page.read_text(encoding="utf-8")) if page.exists() else NOT_FROZEN
    write_atomically(page, render_page(current, len(records), frozen).encode())


def runs_table(records: Sequence[dict]) -> str:
    """A Markdown line for every run."""
    header = (
        "Stage",
        "Width",
        "Variant",
        "Seed",
        "Split",
        "Accuracy",
        "Flip TTA",
        "Loss",
        "Train",
        "LRMIN",
        "LRMAX",
        "Minutes",
    )
    rows = []
    for record in records:
        row = [record["stage"], record["config"]["width"], record["variant"], record["seed"], record["split"]]
        if record["status"] == "failed":
            row += [f"failed: {record['reason']}", *[""] * 6]
        else:
            row += [f"{record[name]:.2f}" for name in ("test_accuracy", "test_accuracy_tta")]
            row += [f"{record['test_loss']:.4f}", f"{record['train_accuracy']:.2f}"]
            row += [f"{record['lr_min']:.1e}", f"{record['lr_max']:.1e}", f"{record['wall_seconds'] / 60:.1f}"]
        rows.append(row)
    return "# Every run that was made\n\n" + _table(header, rows)


def draw(records: Sequence[dict]) -> dict[str, Figure]:
    """The figures that the runs so far allow, by file name."""
    figures = {}
    effects = _effects_or_none(records, "score")
    if effects is not None:
        figures["screen.png"] = plotting.effects(
            [effect.name for effect in effects],
            [effect.value for effect in effects],
            [effect.error for effect in effects],
            [[] for _ in effects],
            title="The screen: what each setting does, on held-out train images",
            xlabel="points of accuracy (mean of plain and flip TTA), with standard errors",
            decimals=2,
        )
    found = list(differences(records, "ablations", RECIPE.name, "test_accuracy").values())
    if found:
        reference = {r["seed"]: r["test_accuracy"] for r in _done(records, "seeds")}
        singles = [
            [
                r["test_accuracy"] - reference[r["seed"]]
                for r in _done(records, "ablations")
                if r["variant"] == e.name and r["seed"] in reference
            ]
            for e in found
        ]
        (width,) = {record["config"]["width"] for record in _done(records, "ablations")}
        figures["ablations.png"] = plotting.effects(
            [f"{effect.name} (n = {effect.count})" for effect in found],
            [effect.value for effect in found],
            [effect.error for effect in found],
            singles,
            title=f"Ablations at width {width}: test accuracy without one part of the recipe",
            xlabel="points of test accuracy to the recipe: each seed (grey), mean with its standard error",
        )
    return figures


def render_page(records: Sequence[dict], count: int, frozen: str) -> str:
    """The page's Markdown.

    Args:
        records: the current ones.
        count: how many there are in all.
        frozen: the hand-written part.
    """
    return "\n".join(
        [
            "# How the recipe was found",
            "",
            f"Generated from [runs.json]({RECORDS_NAME}) by `python -m experiments table`; only the part on what was frozen "
            f"is written by hand. [Every run]({RUNS_NAME}) that was made is there, {count} so far, those that failed too. "
            "Accuracies are in percent, after the last epoch, of the averaged weights; ± is a standard deviation over seeds "
            "behind a mean, and a standard error behind a difference or an effect.",
            "",
            "## The screen",
            "",
            *_screen_section(records),
            "## The confirmation",
            "",
            "The proposals follow a rule from before the screen: all factors whose effect on accuracy exceeds its standard "
            "error, and the three largest of these. Here at full width, since what a narrow network under-fits it judges "
            "wrongly.",
            "",
            *_variants_section(records, "confirm", BASE.name),
            "## What was frozen, and why",
            "",
            FROZEN[0],
            frozen,
            FROZEN[1],
            "",
            "## The result",
            "",
            "The frozen recipe on all train images, tested on the test set, with seeds that no choice has seen.",
            "",
            *_variants_section(records, "seeds", RECIPE.name),
            "## What each part is worth",
            "",
            *_variants_section(records, "ablations", RECIPE.name),
            *(
                ["![Ablations: test accuracy without one part of the recipe](ablations.png)", ""]
                if differences(records, "ablations", RECIPE.name, "test_accuracy")
                else []
            ),
        ]
    )


def _screen_section(records: Sequence[dict]) -> list[str]:
    rows = [[number, *("+" if level > 0 else "-" for level in row)] for number, row in enumerate(plackett_burman(), 1)]
    lines = [
        "Eleven settings, each at two values, in twelve runs: a Plackett-Burman design. Each value of a setting meets each "
        "value of every other one equally often, so all twelve runs say something about each of the eleven. The last run is "
        "the base, repeated with other seeds: how far these repetitions differ is the noise behind all standard errors.",
        "",
        _table(
            ("Setting", "Base", "Other value", "Why"), [[f.name, _code(f.low), _code(f.high), f.why] for f in FACTORS]
        ),
        "The design, a row a run (+: the other value; columns in the order above):",
        "",
        _table(("Run", *range(1, 12)), rows),
    ]
    effects = {measure: _effects_or_none(records, measure) for measure in MEASURES}
    if effects["score"] is None:
        return [*lines, f"{len(_done(records, 'screen'))} runs are done: too few to tell the settings apart.", ""]
    rows = [[one.name, _signed(one), _signed(other, 4)] for one, other in zip(*effects.values())]
    lines += [
        f"Main effects, from {effects['score'][0].count} runs by least squares (label smoothing moves the cross-entropy by "
        "itself, whatever the accuracy does):",
        "",
        _table(("Setting", *(f"Effect on {text}" for text in MEASURES.values())), rows),
        "![The screen: what each setting does](screen.png)",
        "",
    ]
    return [*lines, *_averages_section(_done(records, "screen"))]


def _averages_section(records: Sequence[dict]) -> list[str]:
    """How the averages that rode along compare with the recipe's own, over all runs of the screen."""
    records = [record for record in records if "averages" in record]
    if not records:
        return []
    own = {number: record["test_accuracy"] for number, record in enumerate(records)}
    rows = []
    for decay in sorted({decay for record in records for decay in record["averages"]}, key=float):
        tested = {
            n: record["averages"][decay]["accuracy"] for n, record in enumerate(records) if decay in record["averages"]
        }
        rows.append([decay, len(tested), f"{np.mean(list(tested.values())):.2f}", _signed(paired(decay, tested, own))])
    return [
        "Further averages of the weights rode along in each of these runs, paired with the run's own average:",
        "",
        _table(("EMA decay a step", "Runs", "Accuracy", "Difference"), rows),
    ]


def _variants_section(records: Sequence[dict], stage: str, reference: str) -> list[str]:
    """A table of a stage's variants, the reference first."""
    here = [record for record in records if record["stage"] == stage]
    if not here:
        return ["No run of it has been made yet.", ""]
    if stage == "ablations":
        here = [record for record in records if record["stage"] == "seeds"] + here
    plain, tta = (differences(records, stage, reference, name) for name in ("test_accuracy", "test_accuracy_tta"))
    names = sorted(dict.fromkeys(record["variant"] for record in here), key=lambda name: name != reference)
    rows = []
    for name in names:
        runs = [record for record in here if record["variant"] == name]
        done = _done(runs, *{record["stage"] for record in runs})
        failed = len(runs) - len(done)
        rows.append(
            [
                name,
                f"{len(done)}" + (f" ({failed} failed)" if failed else ""),
                *(_spread([record[key] for record in done]) for key in ("test_accuracy", "test_accuracy_tta")),
                _spread([record["test_loss"] for record in done], 4),
                *(_signed(found.get(name)) for found in (plain, tta)),
                runs[0]["shows"],
            ]
        )
    about = sorted(
        {
            f"{r['train_images']:,} train and {r['test_images']:,} {r['split']} images, width {r['config']['width']}"
            for r in _done(here, stage)
        }
    )
    header = ("Variant", "Seeds", "Accuracy", "Flip TTA", "Loss", "Difference", "with TTA", "Shows")
    return [f"{'; '.join(about)}. Differences are paired by seed.", "", _table(header, rows)]


def _effects_or_none(records: Sequence[dict], measure: str) -> list[Effect] | None:
    try:
        return screen_effects(records, measure)
    except ValueError:
        return None


def _done(records: Sequence[dict], *stages: str) -> list[dict]:
    """Finished runs of ``stages``, at the largest width at which the first of them has any."""
    records = [record for record in records if record["stage"] in stages and record["status"] == "done"]
    width = max((record["config"]["width"] for record in records if record["stage"] == stages[0]), default=None)
    return [record for record in records if record["config"]["width"] == width]


def _hand_written(page: str) -> str:
    begin, end = (re.escape(marker) for marker in FROZEN)
    found = re.search(rf"{begin}\n(.*?)\n{end}", page, flags=re.DOTALL)
    return found[1] if found else NOT_FROZEN


def _table(header: Sequence, rows: Sequence[Sequence]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _code(value) -> str:
    return f"`{value}`"


def _spread(values: Sequence[float], decimals: int = 2) -> str:
    """``"94.52 ± 0.14"``, a single value, or nothing."""
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{decimals}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{decimals}f}{spread}"


def _signed(effect: Effect | None, decimals: int = 2) -> str:
    """``"+0.12 ± 0.05"``, without the error where there is none, or nothing."""
    if effect is None:
        return ""
    value = round(effect.value, decimals) + 0.0  # no "-0.00"
    return f"{value:+.{decimals}f}" + ("" if effect.error is None else f" ± {effect.error:.{decimals}f}")
