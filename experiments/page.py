"""From the runs' records to the files that people read: tables, figures, a page."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.campaign import FOLDS, STAGES, is_current, read_json
from experiments.effects import Effect, main_effects, paired
from experiments.variants import (
    ALL_THAT_HELPED,
    BASE,
    FACTORS,
    RECIPE,
    Variant,
    ablations,
    confirm,
    is_regularized,
    levels_of,
    plackett_burman,
    screen_design,
)
from utils import plotting, runtime
from utils.engine import highest_decay
from utils.runs.report import markdown_table

RESULTS = runtime.PROJECT_ROOT / "experiments" / "results"
RECORDS_NAME, RUNS_NAME, PAGE_NAME = "runs.json", "runs.md", "README.md"
SCREEN_NAME, ABLATIONS_NAME = "screen.png", "ablations.png"
FROZEN = ("<!-- written by hand -->", "<!-- end -->")
NOT_FROZEN = "Nothing is frozen yet."
MEASURES = {"score": "accuracy, mean of plain and flip TTA (points)", "test_loss": "cross-entropy (nats)"}
ALT = {
    SCREEN_NAME: "The screen: what each setting adds to the accuracy, with standard errors",
    ABLATIONS_NAME: "Ablations: test accuracy without one part of the recipe, compared with the whole",
}
PAGE = f"""# The search for better settings

Generated from [runs.json]({RECORDS_NAME}) by `python -m experiments table --publish`; only the part on what was
frozen is written by hand. [Every run]({RUNS_NAME}) is listed, {{count}} so far, including those that failed.
Accuracies are in percent, after the last epoch, of the averaged weights (without EMA: of the last ones); ± is a
standard deviation over seeds after a mean, and a standard error after a difference or an effect.

## The screen

Eleven settings, each at two values, in twelve runs: a Plackett-Burman design. Each value of a setting meets each value
of every other one equally often, so all twelve runs tell something about each of the eleven. Where two settings work
together, part of that shows up as effects of others, so a screen suggests and the confirmation decides. The last run is
the base.
It is repeated with other seeds: the differences between its repetitions are the noise behind all standard errors.

{{screen}}

## The confirmation

The proposals follow a rule from before the screen: all factors whose effect on accuracy exceeds its standard error,
and the three largest of these. They are tried at full width, since a narrow network, which under-fits, can mislead.
It misleads most about regularizers, so two of these are tried on top of all that helped.

{{confirm}}

The rule for the choice, from before any result of this stage was known: the proposal with the largest difference to the
base in the mean of plain and flip TTA accuracy, if that exceeds its standard error; else the base. If this is all that
helped, a regularizer comes in that beats it by more than the standard error of their difference. A variant of which a
run failed is out.

{{choice}}

## What was frozen, and why

{FROZEN[0]}
{{frozen}}
{FROZEN[1]}

## The result

The frozen recipe on all train images, tested on the test set, with seeds that no choice has seen.

{{seeds}}

## What each part is worth

{{ablations}}
"""


def published() -> list[dict]:
    """The records in ``RESULTS``, of every run that was made; empty if there is no such file.

    Raises:
        Session10Error: the file is damaged.
    """
    path = RESULTS / RECORDS_NAME
    return read_json(path) if path.exists() else []


def comparable(records: Sequence[dict], small: bool = False) -> list[dict]:
    """Those that compare with each other and with today's recipe and plans; ``small``: with a trial of the machinery."""
    current = [record for record in records if is_current(record, small)]
    planned = {"screen": screen_design(), "seeds": [RECIPE], "ablations": [RECIPE, *ablations()]}
    screened = [record for record in current if _is_planned(record, planned["screen"])]
    planned["confirm"] = confirm(answers) if (answers := _screen_answers(screened).get("score")) else []
    return [record for record in current if _is_planned(record, planned[record["stage"]])]


def _is_planned(record: dict, variants: Sequence[Variant]) -> bool:
    """Whether the record's stage has a variant of its name with its changes."""
    return any((variant.name, variant.changes) == (record["variant"], record["changes"]) for variant in variants)


# --- what the runs say ------------------------------------------------------------------------------------------------


def screen_effects(records: Sequence[dict], measure: str = "score") -> list[Effect]:
    """What each factor of the screen does to ``measure``, one of ``MEASURES``.

    Raises:
        ValueError: too few runs are done.
    """
    done = _done(records, "screen")
    levels = np.array([levels_of(record["changes"]) for record in done]).reshape(len(done), len(FACTORS))
    blocks = np.array([record["seed"] % FOLDS for record in done])
    effects, errors = main_effects(levels, blocks, np.array([_value(record, measure) for record in done]))
    errors = [None] * len(effects) if errors is None else errors.tolist()
    return [Effect(factor.name, *found, len(done)) for factor, *found in zip(FACTORS, effects.tolist(), errors)]


def _value(record: dict, measure: str) -> float:
    if measure == "score":  # less noisy than either accuracy
        return (record["test_accuracy"] + record["test_accuracy_tta"]) / 2
    return record[measure]


def _screen_answers(records: Sequence[dict]) -> dict[str, list[Effect]]:
    """``screen_effects`` by measure; empty while too few runs are done."""
    try:
        return {measure: screen_effects(records, measure) for measure in MEASURES}
    except ValueError:
        return {}


def paired_differences(
    records: Sequence[dict], stage: str, measure: str, reference: str | None = None
) -> dict[str, Effect]:
    """By variant of ``stage``: its paired difference to ``reference``, by default the base or the recipe."""
    reference = reference or _reference(stage)
    by_variant: dict[str, dict[int, float]] = {}
    for record in _in_order(_done(records, stage)):
        by_variant.setdefault(record["variant"], {})[record["seed"]] = _value(record, measure)
    compared = by_variant.pop(reference, {})
    found = {name: paired(name, values, compared) for name, values in by_variant.items()}
    return {name: effect for name, effect in found.items() if effect is not None}


def _in_order(records: Sequence[dict]) -> list[dict]:
    """Sorted as their variants stand in the plans; those of no plan come last."""
    planned = [RECIPE.name, BASE.name, ALL_THAT_HELPED, *(variant.name for variant in ablations())]
    place = {name: number for number, name in enumerate(planned)}
    return sorted(records, key=lambda record: place.get(record["variant"], len(place)))


def chosen(records: Sequence[dict]) -> str:
    """The variant that the confirmation chooses, by the rule that the page states."""
    failed = {record["variant"] for record in _runs(records, "confirm") if record["status"] == "failed"}

    def largest_first(reference: str, regularized: bool) -> list[Effect]:
        """Differences of the variants without a failed run that say how large the noise is."""
        found = paired_differences(records, "confirm", "score", reference).values()
        eligible = [one for one in found if is_regularized(one.name) == regularized and one.name not in failed]
        return sorted((one for one in eligible if one.error is not None), key=lambda one: -one.value)

    proposals = largest_first(BASE.name, regularized=False)
    if not proposals or proposals[0].value <= proposals[0].error:
        return BASE.name
    proposal = proposals[0].name
    if proposal != ALL_THAT_HELPED:
        return proposal
    better = (one.name for one in largest_first(proposal, regularized=True) if one.value > one.error)
    return next(better, proposal)


def _reference(stage: str) -> str:
    return BASE.name if stage == "confirm" else RECIPE.name


def _runs(records: Sequence[dict], stage: str) -> list[dict]:
    """Runs of ``stage`` and those it is compared with, at the width at which most of it is finished."""
    finished = Counter(r["config"]["width"] for r in records if r["stage"] == stage and r["status"] == "done")
    width = max(finished, key=lambda width: (finished[width], width), default=None)
    if stage == "seeds":  # narrower ones are there for the ablations to compare with
        width = STAGES["seeds"].width
    stages = ("seeds", "ablations") if stage == "ablations" else (stage,)
    return [r for r in records if r["stage"] in stages and r["config"]["width"] == width]


def _done(records: Sequence[dict], stage: str) -> list[dict]:
    return [record for record in _runs(records, stage) if record["status"] == "done"]


# --- the files --------------------------------------------------------------------------------------------------------


def write_results(folder: Path, records: Sequence[dict], small: bool = False) -> None:
    """Write all files into ``folder``; the page keeps its hand-written part.

    Args:
        folder: made if missing.
        records: of every run that was made.
        small: they are a trial of the machinery.
    """
    shown = comparable(records, small)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in records)  # a line a run
    runtime.write_atomically(folder / RECORDS_NAME, f"[\n{lines}\n]\n".encode())
    runtime.write_atomically(folder / RUNS_NAME, runs_table(records).encode())
    if _screen_answers(shown):
        plotting.save_figure(screen_figure(shown), folder / SCREEN_NAME)
    if paired_differences(shown, "ablations", "test_accuracy"):
        plotting.save_figure(ablations_figure(shown), folder / ABLATIONS_NAME)
    page = folder / PAGE_NAME
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    runtime.write_atomically(page, render_page(shown, len(records), _hand_written(old)).encode())


def _hand_written(page: str) -> str:
    begin, end = (re.escape(marker) for marker in FROZEN)
    found = re.search(rf"{begin}\n(.*?)\n{end}", page, flags=re.DOTALL)
    return found[1] if found else NOT_FROZEN


def runs_table(records: Sequence[dict]) -> str:
    """A Markdown line for every run."""
    settings = ("Stage", "Width", "Variant", "Seed", "Split")
    results = ("Accuracy", "Flip TTA", "Loss", "Train", "LRMIN", "LRMAX", "Minutes", "Device")
    rows = []
    for record in records:
        row = [record["stage"], record["config"]["width"], record["variant"], record["seed"], record["split"]]
        if record["status"] == "failed":
            row += [f"failed: {record['reason']}", *[""] * 6, record["device"]]
        else:
            row += [f"{record[name]:.2f}" for name in ("test_accuracy", "test_accuracy_tta")]
            row += [f"{record['test_loss']:.4f}", f"{record['train_accuracy']:.2f}"]
            row += [
                f"{record['lr_min']:.1e}",
                f"{record['lr_max']:.1e}",
                f"{record['wall_seconds'] / 60:.1f}",
                record["device"],
            ]
        rows.append(row)
    note = "Minutes are wall time, including whatever else the machine did."
    return f"# Every run that was made\n\n{note}\n\n{markdown_table((*settings, *results), rows)}\n"


def screen_figure(records: Sequence[dict]) -> Figure:
    """What each setting of the screen adds.

    Raises:
        ValueError: too few runs are done.
    """
    found = screen_effects(records)
    return _bars(
        [effect.name for effect in found],
        found,
        title="The screen: what each setting does, on held-out train images",
        xlabel="points of accuracy (mean of plain and flip TTA), with standard errors",
        decimals=2,
    )


def ablations_figure(records: Sequence[dict]) -> Figure:
    """What the recipe loses without one of its parts."""
    found = paired_differences(records, "ablations", "test_accuracy").values()
    width = _done(records, "ablations")[0]["config"]["width"]
    return _bars(
        [f"{effect.name} (n = {effect.count})" for effect in found],
        found,
        title=f"Ablations at width {width}: test accuracy without one part of the recipe",
        xlabel="difference to the recipe in points (grey: each seed; bar: standard error)",
    )


def _bars(names: Sequence[str], effects: Collection[Effect], **options) -> Figure:
    columns = ([getattr(effect, column) for effect in effects] for column in ("value", "error", "pairs"))
    return plotting.effects(names, *columns, **options)


def readme_part(records: Sequence[dict]) -> str:
    """The README's part on the experiments, in Markdown: what is finished of the screen and of the ablations."""
    parts, folder = [], "experiments/results/"  # where links in the README lead
    if _screen_answers(records):
        done = _done(records, "screen")
        parts += [
            f"Eleven settings were tried together in {len(done)} runs, each with {_about(done)}. A dot shows what a setting "
            "adds, averaged over many combinations of the other ten, and the bar its standard error:",
            _picture(SCREEN_NAME, folder),
        ]
    if paired_differences(records, "ablations", "test_accuracy"):
        parts += [
            "### What each part is worth",
            variants_section(records, "ablations"),
            _picture(ABLATIONS_NAME, folder),
        ]
    return "\n\n".join(parts)


def render_page(records: Sequence[dict], count: int, frozen: str) -> str:
    """The page's Markdown, from the current records, the count of all records, and the hand-written part."""
    sections = {stage: variants_section(records, stage) for stage in ("confirm", "seeds", "ablations")}
    if paired_differences(records, "ablations", "test_accuracy"):
        sections["ablations"] += "\n\n" + _picture(ABLATIONS_NAME)
    choice = ""
    if paired_differences(records, "confirm", "test_accuracy"):
        planned = STAGES["confirm"].seeds * len(confirm(_screen_answers(records).get("score", [])))
        choice = f"From {len(_runs(records, 'confirm'))} of {planned} planned runs, it chooses: **{chosen(records)}**."
    return PAGE.format(count=count, frozen=frozen, screen=_screen_section(records), choice=choice, **sections)


def _screen_section(records: Sequence[dict]) -> str:
    settings = [[factor.name, f"`{factor.low}`", f"`{factor.high}`", factor.why] for factor in FACTORS]
    signs = np.where(plackett_burman() > 0, "+", "-")
    parts = [
        markdown_table(("Setting", "Base", "Other value", "Why"), settings),
        "The design, a row a run (+: the other value; columns in the order above):",
        markdown_table(("Run", *range(1, 12)), [[number, *row] for number, row in enumerate(signs, 1)]),
    ]
    done, answers = _done(records, "screen"), _screen_answers(records)
    if not answers:
        return "\n\n".join([*parts, f"{len(done)} runs are done: too few to tell the settings apart."])
    header = ("Setting", *(f"Effect on {text}" for text in MEASURES.values()))
    rows = [[one.name, _signed(one), _signed(other, 4)] for one, other in zip(*answers.values())]
    parts += [
        f"Main effects, from {len(done)} runs by least squares (label smoothing itself changes the cross-entropy, "
        "whatever the accuracy does). Only the repeated runs tell how large the noise is, so take the standard errors as "
        f"rough: they rest on {len(done) - len(plackett_burman())} repetitions.",
        markdown_table(header, rows),
        _picture(SCREEN_NAME),
    ]
    return "\n\n".join([*parts, *_averages(done)])


def _averages(records: Sequence[dict]) -> list[str]:
    """How the averages that rode along compare with the recipe's own, over all runs of the screen."""
    own = {number: record["test_accuracy"] for number, record in enumerate(records)}
    by_decay: dict[str, dict[int, float]] = {}
    for number, record in enumerate(records):
        for decay, tested in record.get("averages", {}).items():
            if _is_reached(float(decay), record):
                by_decay.setdefault(decay, {})[number] = tested["accuracy"]
    if not by_decay:
        return []
    rows = []
    for decay, tested in sorted(by_decay.items(), key=lambda item: float(item[0])):
        mean = np.mean(list(tested.values()))
        rows.append([decay, len(tested), f"{mean:.2f}", _signed(paired(decay, tested, own))])
    return [
        "Further averages of the weights rode along in each of these runs, paired with the run's own average (decays so "
        "high that a run of this length never reaches them are left out):",
        markdown_table(("EMA decay a step", "Runs", "Accuracy", "Difference"), rows),
    ]


def _is_reached(decay: float, record: dict) -> bool:
    """Whether the run's last update of the average had this decay."""
    config = record["config"]
    steps = math.ceil(record["train_images"] / config["batch_size"])
    last = config["epochs"] * (steps // config["ema_every"]) - 1
    return decay ** config["ema_every"] <= highest_decay(last)


def variants_section(records: Sequence[dict], stage: str) -> str:
    """A table of a stage's variants, the one that the others are compared with first."""
    runs, done = _runs(records, stage), _done(records, stage)
    if not done:
        return "No run of it is finished yet."
    plain, tta = (paired_differences(records, stage, name) for name in ("test_accuracy", "test_accuracy_tta"))
    planned = {variant.name: variant.shows for variant in [RECIPE, *ablations()]}
    # In today's words, where there are any.
    shows = {record["variant"]: planned.get(record["variant"], record["shows"]) for record in _in_order(runs)}
    rows = []
    for name in shows:
        finished = [record for record in done if record["variant"] == name]
        failed = sum(record["variant"] == name for record in runs) - len(finished)
        rows.append(
            [
                name,
                f"{len(finished)} ({failed} failed)" if failed else len(finished),
                *(_spread([record[key] for record in finished]) for key in ("test_accuracy", "test_accuracy_tta")),
                _spread([record["test_loss"] for record in finished], 4),
                *(_signed(found.get(name)) for found in (plain, tta)),
                shows[name],
            ]
        )
    header = ("Variant", "Seeds", "Accuracy", "Flip TTA", "Loss", "Difference", "with TTA", "Shows")
    devices = " and ".join(sorted({record["device"] for record in done}))
    about = [f"{_about(done)}, on {devices}."]
    if plain:
        about.append("Differences are paired by seed.")
    if mixed := _mixed_pairs(done, stage):
        about.append(f"In {mixed} pairs the two runs were made on different machines.")
    if any(effect.error is None for effect in plain.values()):
        about.append(
            "A difference from a single pair has no standard error, and equal runs also differ by a few tenths of a point."
        )
    if stage == "ablations" and (missing := [name for name in planned if name not in shows]):
        about.append(f"Still to be made: {', '.join(missing)}.")
    return f"{' '.join(about)}\n\n{markdown_table(header, rows)}"


def _mixed_pairs(records: Sequence[dict], stage: str) -> str:
    """``"3 of 40"`` pairs compare runs of different devices; empty if none does."""
    device = {(record["variant"], record["seed"]): record["device"] for record in records}
    own = _reference(stage)
    pairs = [(one, device[own, seed]) for (name, seed), one in device.items() if name != own and (own, seed) in device]
    mixed = sum(one != other for one, other in pairs)
    return f"{mixed} of {len(pairs)}" if mixed else ""


def _about(records: Sequence[dict]) -> str:
    """The images and the width of finished runs, once for each kind of them."""
    about = {
        f"{r['train_images']:,} train and {r['test_images']:,} {r['split']} images of {r['data'].partition(';')[0]}, "
        f"width {r['config']['width']}"  # after a semicolon, the data name how many images were held out
        for r in records
    }
    return "; ".join(sorted(about))


def _picture(name: str, folder: str = "") -> str:
    """The Markdown for a figure."""
    return f"![{ALT[name]}]({folder}{name})"


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
