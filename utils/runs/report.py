"""From a finished run to what people read: metrics.json, training_logs.md, the README's tables, and Results/.

Every number in the README and the log is generated from ``metrics.json``; a test fails if one drifts.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchsummary import summary

from models import CustomResNet
from utils import runtime
from utils.analysis import Predictions, per_class_accuracy, predict
from utils.config import Config, full, with_defaults
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.loaders import BatchedLoader
from utils.lr_finder import LRRange
from utils.metrics import History
from utils.runs import machine
from utils.runs.weights import WEIGHTS_NAME, rounded_to_half
from utils.runtime import ConfigError, Precision, Session10Error, write_atomically, write_json
from utils.sources import IMAGE_SIZE

RESULTS = runtime.PROJECT_ROOT / "Results"
METRICS_NAME, LOG_NAME = "metrics.json", "training_logs.md"
RECIPE_TRAIN_IMAGES = 50_000
# Settings in which runs of the recipe may differ: the seed, and how a machine computes.
NOT_OF_THE_RECIPE = ("seed", "eval_batch_size", "num_workers", "precision", "deterministic", "packed", "compile")
TEST_BATCH = 500  # images at a time in the final test
# Of the record, quoted in metrics.json.
ORIGIN = ("device", "precision", "world", "versions", "data", "source", "commit")

# What others published for networks of this kind on CIFAR-10: (who, how, test accuracy, time on which hardware).
PUBLISHED = (
    (
        "The original Session 10 write-up",
        "this model, the assignment's recipe, single run",
        "93.10%",
        "about 13 min, T4",
    ),
    ("Others on the same assignment", "Adam, single runs", "90.3 to 93.3%", "not stated"),
    (
        "[D. Page, *How to train your ResNet*](https://github.com/davidcpage/cifar10-fast) (2018)",
        "ResNet-9, SGD, 24 epochs",
        "94.08% (median of 50)",
        "79 s, V100",
    ),
    (
        "[cifar10-fast-simple](https://github.com/99991/cifar10-fast-simple)",
        "Page's later network, patch whitening, SGD, 10 epochs, flip TTA",
        "94.09 ± 0.12% (100 runs)",
        "14.3 s (training only), A100",
    ),
    (
        "[K. Jordan, airbench94](https://arxiv.org/abs/2404.00498) (2024)",
        "another network, many tricks, TTA",
        "94.0%",
        "3.29 s, A100 (a later version: 2.6 s)",
    ),
)


class ResultsError(Session10Error):
    """Results that cannot be written or published; the message says what is kept."""


# --- metrics ----------------------------------------------------------------------------------------------------------


def run_record(
    config: Config,
    lr_range: LRRange,
    range_test_seconds: float,
    dataset: ImageDataset,
    precision: Precision,
    world: int,
) -> dict:
    """What is known before the first epoch, as plain JSON values; every checkpoint holds it, metrics.json quotes it."""
    return {
        "run_id": uuid.uuid4().hex,
        "config": config.to_dict(),
        "lr_range": lr_range.to_dict(),
        "range_test_seconds": range_test_seconds,
        "data": dataset.description,
        "source": dataset.source,
        "fingerprint": dataset.fingerprint,
        "device": runtime.device_name(precision.device),
        "precision": precision.name,
        "world": world,
        "versions": machine.versions(),
        "commit": machine.code_commit(),
    }


def final_test(model: nn.Module, dataset: ImageDataset) -> tuple[Predictions, Predictions]:
    """Test the shipped weights: rounded to float16, computed in float32 without TF32.

    So the result depends neither on the training precision nor, except for rare ties, on the device, and the weights
    file reproduces it in any new process.

    Returns:
        Predictions without and with flip TTA.
    """
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(rounded_to_half(model.state_dict()))
    device = next(model.parameters()).device
    batch_size = min(TEST_BATCH, len(dataset.test_labels))
    loader = BatchedLoader(dataset.test_images, dataset.test_labels, batch_size, device=device)
    precision = Precision("fp32", device)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return tuple(predict(shipped, loader, precision=precision, tta=tta) for tta in (False, True))


def closed_history(history: History, final: Predictions) -> History:
    """A copy whose last test figures are the shipped weights', so that every document says the same."""
    return dataclasses.replace(
        history,
        test_loss=[*history.test_loss[:-1], final.loss],
        test_accuracy=[*history.test_accuracy[:-1], final.accuracy],
    )


def build_metrics(
    record: dict,
    config: Config,
    history: History,
    weight_decay: float,
    plain: Predictions,
    tta: Predictions,
    classes: Sequence[str],
    note: str = "",
) -> dict:
    """metrics.json's content for one run.

    Args:
        record: from ``run_record``.
        config: the run's settings.
        history: from ``closed_history``.
        weight_decay: the optimizer's.
        plain, tta: from ``final_test``.
        classes: class names.
        note: a sentence for the log, such as what else the machine was doing.
    """
    per_class = [None if math.isnan(value) else value for value in per_class_accuracy(plain).tolist()]
    metrics = {
        "profile": config.profile,
        "test_accuracy": plain.accuracy,
        "test_loss": plain.loss,
        "test_accuracy_tta": tta.accuracy,
        "test_images": len(plain.labels),
        "train_images": history.train_size,
        "per_class_accuracy": dict(zip(classes, per_class)),
        "epochs": config.epochs,
        "peak_epoch": config.peak_epoch,
        "batch_size": config.batch_size,
        "lr_min": record["lr_range"]["lr_min"],
        "lr_max": record["lr_range"]["lr_max"],
        "lr_rule": record["lr_range"]["rule"],
        "weight_decay": weight_decay,
        "wall_seconds": float(sum(history.seconds)),
        "lr_range": record["lr_range"],
        "range_test_seconds": record["range_test_seconds"],
        **{name: record[name] for name in ORIGIN},
        "config": record["config"],
        "history": history.to_dict(),
        "note": note,
    }
    return {**metrics, **over_seeds([metrics])}


def over_seeds(runs: Sequence[dict]) -> dict:
    """The part of the metrics about several runs of one config: accuracy by seed, mean and standard deviation (n - 1)."""
    names = ("test_accuracy", "test_accuracy_tta")
    plain, tta = (np.array([run[name] for run in runs], dtype=float) for name in names)
    several = len(runs) > 1
    return {
        "seeds": [run["config"]["seed"] for run in runs],
        "seed_accuracies": plain.tolist(),
        "seed_accuracies_tta": tta.tolist(),
        "mean_accuracy": float(plain.mean()),
        "mean_accuracy_tta": float(tta.mean()),
        "std_accuracy": float(plain.std(ddof=1)) if several else None,
        "std_accuracy_tta": float(tta.std(ddof=1)) if several else None,
    }


# --- files ------------------------------------------------------------------------------------------------------------


def read_metrics(folder: str | os.PathLike = RESULTS) -> dict:
    """The content of a folder's ``metrics.json``.

    Raises:
        ResultsError: it is missing, or not what this project writes.
    """
    path = Path(folder) / METRICS_NAME
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"no {path}: a run writes it when it is finished") from None
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read ({error}): finish the run again, or get a fresh copy") from error
    if not isinstance(metrics, dict) or not {"test_accuracy", "history", "config"} <= metrics.keys():
        raise ResultsError(f"{path} is not what a finished run writes: finish the run again, or get a fresh copy")
    return metrics


def write_metrics(folder: Path, metrics: dict) -> None:
    """Write ``metrics.json``, last of all results: a folder that has it holds a finished run."""
    write_json(folder / METRICS_NAME, metrics)


def check_publishable(config: Config, dataset: ImageDataset) -> None:
    """Only the full recipe on CIFAR-10 may replace the numbers that the README shows.

    Raises:
        ConfigError: it names what differs.
    """
    problems = []
    if config.profile != "full" or config.train_images is not None or config.test_images is not None:
        problems.append("a profile or subset other than the full one")
    if config.lr_min is not None:
        problems.append("learning rates that were given instead of found by the range test")
    if not problems:
        recipe = full().to_dict()
        differing = [
            f"{name} {value!r}, not {recipe[name]!r}"
            for name, value in config.to_dict().items()
            if value != recipe[name] and name not in NOT_OF_THE_RECIPE
        ]
        if differing:
            problems.append(f"settings other than the recipe's ({'; '.join(differing)})")
    if dataset.classes != CIFAR10_CLASSES or dataset.is_stand_in or len(dataset.train_labels) != RECIPE_TRAIN_IMAGES:
        problems.append(f"other images ({dataset.description})")
    if problems:
        raise ConfigError(
            f"this run cannot be published in Results/, because it uses {' and '.join(problems)}: leave out --publish, or "
            "run the full profile on CIFAR-10"
        )


def publish(run_dir: str | os.PathLike, others: Iterable[str | os.PathLike] = ()) -> dict:
    """Put a finished run into ``Results/``, ``training_logs.md`` and the README's tables; returns the metrics there.

    ``Results/`` is replaced as a whole, so that everything in it comes from this run.

    Args:
        run_dir: of the run that is shown.
        others: folders of finished runs of the same config with other seeds, which count in the mean.

    Raises:
        ResultsError: a run is not finished, or differs in config or images; or the README lacks a marker.
    """
    folders = [Path(run_dir), *others]
    runs = [read_metrics(folder) for folder in folders]
    settings = [{**with_defaults(run["config"]), "seed": None, "data": run["data"]} for run in runs]
    for folder, other in zip(folders, settings):
        if other != settings[0]:
            names = [name for name in {**settings[0], **other} if other.get(name) != settings[0].get(name)]
            raise ResultsError(f"{folder} differs from {run_dir} in {', '.join(names)}: only equal runs make a mean")
    metrics = {**runs[0], **over_seeds(runs)}
    readme = runtime.PROJECT_ROOT / "README.md"
    try:  # before anything is replaced
        log, text = training_log(metrics), render_readme(readme.read_text(encoding="utf-8"), metrics)
    except ValueError as error:
        raise ResultsError(
            f"{readme} cannot be updated ({error}), so nothing was changed: restore its marker comments, then "
            "publish again"
        ) from error

    _replace_results(folders[0], metrics)
    write_atomically(runtime.PROJECT_ROOT / LOG_NAME, log.encode())
    write_atomically(readme, text.encode())
    return metrics


def _replace_results(run_dir: Path, metrics: dict) -> None:
    """Put a run's weights and figures, and ``metrics``, in the place of ``Results/``.

    A kill between the two renames is repaired by the next call.
    """
    old, fresh = (RESULTS.with_name(f".{RESULTS.name}.{suffix}") for suffix in ("old", "new"))
    if old.exists() and not RESULTS.exists():
        os.replace(old, RESULTS)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for path in (run_dir / WEIGHTS_NAME, *sorted(run_dir.glob("*.png"))):
        shutil.copy2(path, fresh)
    write_metrics(fresh, metrics)
    if RESULTS.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(RESULTS, old)
    os.replace(fresh, RESULTS)
    shutil.rmtree(old, ignore_errors=True)


# --- texts ------------------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A Markdown table.

    Args:
        header: column names.
        rows: one cell per column.
        align: "l" or "r" for each column; missing ones are left-aligned.
    """
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(header), "l")]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in (header, rules, *rows))


def training_log(metrics: dict) -> str:
    """training_logs.md: hardware, versions and data of the run, then every epoch."""
    history = History(**metrics["history"])
    config = with_defaults(metrics["config"])
    tested = "the averaged weights" if config["ema_decay"] else "the weights at the end of the epoch"
    lines = [
        "# Training logs",
        "",
        "Generated from the run's history; do not edit by hand.",
        "",
        f"- {setup_sentence(metrics)}",
        f"- Commit of the code: `{metrics['commit']}`",
        "- Losses are mean cross-entropy per image, without label smoothing. Train values are measured on augmented images "
        f"while the weights change; test values belong to {tested}. Those of the last epoch belong to the "
        f"weights in `{WEIGHTS_NAME}`.",
        *([f"- {metrics['note']}"] if metrics.get("note") else []),
        "",
        "```",
    ]
    for epoch in range(history.epochs):
        lines += [
            f"Epoch {epoch + 1}: LR={history.lr[epoch]:.6f} Time={history.seconds[epoch]:.1f}s",
            f"Train: Loss={history.train_loss[epoch]:.4f} Accuracy={history.train_accuracy[epoch]:.2f}",
        ]
        if history.test_accuracy[epoch] is not None:
            correct = round(history.test_accuracy[epoch] / 100 * history.test_size)
            lines.append(
                f"Test set: Average loss: {history.test_loss[epoch]:.4f}, Accuracy: {correct}/{history.test_size} "
                f"({history.test_accuracy[epoch]:.2f}%)"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n```\n"


def setup_sentence(metrics: dict) -> str:
    """Hardware, versions, seeds, data and time in one sentence; which run they are of, if there are several."""
    seeds, shown = ", ".join(str(seed) for seed in metrics["seeds"]), metrics["config"]["seed"]
    versions = metrics["versions"]
    return (
        f"{metrics['train_images']:,} train and {metrics['test_images']:,} test images of {metrics['data']}; "
        f"{metrics['epochs']} epochs of batch {metrics['batch_size']} in {duration(metrics['wall_seconds'])} on "
        f"{metrics['device']} in {metrics['precision']}; torch {versions['torch']}, Python {versions['python']}; "
        + (f"seed {seeds}" if len(metrics["seeds"]) == 1 else f"seeds {seeds}, all but the means from seed {shown}")
    )


def duration(seconds: float) -> str:
    """``"8.2 s"``, ``"12 min 5 s"`` or ``"1 h 23 min"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def spread(mean: float, std: float | None, count: int) -> str:
    """``"94.52 ± 0.14% (mean and std of 5 seeds)"``, or the single value named as such."""
    return f"{mean:.2f}% (single run)" if std is None else f"{mean:.2f} ± {std:.2f}% (mean and std of {count} seeds)"


def readme_blocks(metrics: dict) -> dict[str, str]:
    """The README's generated parts, by name."""
    count = len(metrics["seeds"])
    plain = spread(metrics["mean_accuracy"], metrics["std_accuracy"], count)
    tta = spread(metrics["mean_accuracy_tta"], metrics["std_accuracy_tta"], count)
    classes = metrics["per_class_accuracy"]
    config = with_defaults(metrics["config"])
    factors = {"LRMIN": config["lr_min_factor"], "LRMAX": config["lr_max_factor"]}
    times = [f", {name} times {factor:g}" for name, factor in factors.items() if factor != 1]
    rows = [
        ("Test accuracy, last epoch", plain),
        ("with flip TTA", tta),
        ("Test loss", f"{metrics['test_loss']:.4f}"),
        ("Train accuracy, last epoch (augmented images)", f"{metrics['history']['train_accuracy'][-1]:.2f}%"),
        (
            f"LRMIN, LRMAX (range test, rule {metrics['lr_rule']}{''.join(times)})",
            f"{metrics['lr_min']:.2e}, {metrics['lr_max']:.2e}",
        ),
        ("Weight decay (decoupled)", f"{metrics['weight_decay']:.3f}"),
        ("Training, with a test after every epoch", duration(metrics["wall_seconds"])),
        ("Hardware", f"{metrics['device']}, {metrics['precision']}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())),
        ("Data", metrics["data"]),
        ("Seeds", ", ".join(str(seed) for seed in metrics["seeds"])),
    ]
    ours = (
        "**Ours**",
        f"this model and recipe, Adam, {metrics['epochs']} epochs",
        f"**{plain}**; {tta} with flip TTA",
        f"{duration(metrics['wall_seconds'])}, {metrics['device']}",
    )
    note = f"\n\n{metrics['note']}" if metrics.get("note") else ""
    return {
        "headline": (
            f"**{plain} test accuracy after the last of {metrics['epochs']} epochs; {tta} with flip test-time "
            "augmentation.**"
        ),
        "provenance": f"{setup_sentence(metrics)}.{note}",
        "results": markdown_table(("Measured", "Value"), rows),
        "classes": markdown_table(
            list(classes), [[f"{value:.1f}%" for value in classes.values()]], align="r" * len(classes)
        ),
        "comparison": markdown_table(("Who", "How", "Test accuracy", "Training time"), (ours, *PUBLISHED)),
    }


def render_readme(text: str, metrics: dict) -> str:
    """``text`` with its generated parts, each between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``, updated.

    Raises:
        ValueError: a part's markers are missing or doubled.
    """
    for name, block in {**readme_blocks(metrics), "summary": f"```\n{model_summary()}\n```"}.items():
        text = replace_block(text, name, block)
    return text


def replace_block(text: str, name: str, block: str) -> str:
    """``text`` with one generated part replaced; ValueError unless it has exactly one place."""
    pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)"
    text, found = re.subn(pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"there are {found} places for the generated part {name!r}: exactly one is needed")
    return text


def write_block(path: Path, name: str, block: str) -> None:
    """Replace one generated part of a file; ValueError as ``replace_block``."""
    write_atomically(path, replace_block(path.read_text(encoding="utf-8"), name, block).encode())


def model_summary() -> str:
    """torchsummary's table of the network, in eval mode because torchsummary runs a batch through it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=[]):
        summary(CustomResNet().eval(), (3, IMAGE_SIZE, IMAGE_SIZE), device="cpu")
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())
