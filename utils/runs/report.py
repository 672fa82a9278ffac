"""From a finished run to what people read: metrics.json, and from it every number in the log, README and model card."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torchsummary import summary

from models.custom_resnet import IMAGE_SIZE, CustomResNet
from utils import runtime
from utils.analysis import Predictions, per_class_accuracy, predict
from utils.config import Config, from_profile
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.loaders import BatchedLoader
from utils.lr_finder import LRRange
from utils.metrics import History
from utils.runs.files import write_atomically, write_json
from utils.runs.machine import code_commit, device_name, versions
from utils.runs.weights import WEIGHTS_NAME, rounded_to_half
from utils.runtime import ConfigError, Precision, Session10Error

RESULTS = runtime.PROJECT_ROOT / "Results"
METRICS_NAME, LOG_NAME = "metrics.json", "training_logs.md"
DOCUMENTS = ("README.md", "Results/MODEL_CARD.md")  # with generated parts
TEXTS = Path(__file__).with_name("texts.md")  # the words of these parts
JPEG_TEST_IMAGES = Path(__file__).with_name("jpeg_test_images.json")
RECIPE_TRAIN_IMAGES = 50_000
TEST_BATCH = 500  # images at a time in the final test
# Settings in which runs of the recipe may differ: the seed, and how a machine computes.
IGNORED_SETTINGS = ("seed", "precision", "deterministic", "packed", "recorded", "compile")
SUFFIXES = {"none": "", "flip": "_tta", "six views": "_six_views"}  # of the names in metrics.json
WORDS = {"": "", "_tta": " with flip TTA", "_six_views": " with six-view TTA"}


class ResultsError(Session10Error):
    """Results that cannot be read, written or published."""


def run_record(
    config: Config, lr_range: LRRange, seconds: float, dataset: ImageDataset, precision: Precision, world: int
) -> dict:
    """What is known after ``seconds`` of range test, as JSON values; every checkpoint and metrics.json hold it."""
    return {
        "config": config.to_dict(),
        "lr_range": lr_range.to_dict(),
        "range_test_seconds": seconds,
        "data": dataset.description,
        **{name: getattr(dataset, name) for name in ("source", "split", "fingerprint")},
        "device": device_name(precision.device),
        "precision": precision.name,
        "world": world,
        "versions": versions(),
        "commit": code_commit(),
    }


def final_test(model: torch.nn.Module, dataset: ImageDataset) -> dict[str, Predictions]:
    """Test the shipped weights with each kind of test-time augmentation (see ``engine.TTA``).

    They are rounded to float16 and computed with in float32 without TF32, so that the file reproduces the result anywhere.
    """
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(rounded_to_half(model.state_dict()))
    precision = Precision("fp32", next(model.parameters()).device)
    loader = BatchedLoader(dataset.test_images, dataset.test_labels, TEST_BATCH, device=precision.device)
    bar = runtime.progress_bar(loader, "test", delay=1, unit="batch")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return predict(shipped, bar, precision=precision)


def test_figures(predictions: dict[str, Predictions], fingerprint: str) -> dict:
    """What metrics.json holds of a final test. Accuracies in percent; on the offline copy of CIFAR-10, which has some
    images only as JPEG copies and is known by its fingerprint, also those on the other images.
    """
    plain = predictions["none"]
    figures = {f"test_accuracy{SUFFIXES[tta]}": found.accuracy for tta, found in predictions.items()}
    figures |= {"test_loss": plain.loss, "test_images": len(plain.labels)}
    copies = json.loads(JPEG_TEST_IMAGES.read_text(encoding="utf-8"))
    if fingerprint == copies["fingerprint"]:
        exact = np.setdiff1d(np.arange(len(plain.labels)), copies["test_images"])
        figures["exact_test_images"] = len(exact)
        for tta, found in predictions.items():
            part = Predictions(found.probabilities[exact], found.labels[exact])
            figures[f"test_accuracy_exact{SUFFIXES[tta]}"] = part.accuracy
    return figures


def with_final_test(history: History, plain: Predictions) -> History:
    """A copy whose last test figures are the shipped weights', so that every document says the same."""
    loss, accuracy = [*history.test_loss[:-1], plain.loss], [*history.test_accuracy[:-1], plain.accuracy]
    return History(**{**history.to_dict(), "test_loss": loss, "test_accuracy": accuracy})


def build_metrics(
    record: dict, history: History, predictions: dict[str, Predictions], classes: Sequence[str], note: str = ""
) -> dict:
    """metrics.json's content for one run; ``note`` is a sentence for the log."""
    config, lr_range = record["config"], record["lr_range"]
    per_class = [None if np.isnan(value) else value for value in per_class_accuracy(predictions["none"]).tolist()]
    metrics = {
        **test_figures(predictions, record["fingerprint"]),
        "train_images": history.train_size,
        "per_class_accuracy": dict(zip(classes, per_class)),
        **{name: config[name] for name in ("profile", "epochs", "peak_epoch", "batch_size")},
        **{"lr_min": lr_range["lr_min"], "lr_max": lr_range["lr_max"], "lr_rule": lr_range["rule"]},
        "weight_decay": config["coupled_decay"] or config["decay_at_peak"] / lr_range["lr_max"],
        "wall_seconds": float(sum(history.seconds)),
        **record,
        "history": history.to_dict(),
        "note": note,
    }
    return {**metrics, **seed_statistics([metrics])}


def seed_statistics(runs: Sequence[dict]) -> dict:
    """Accuracy by seed, mean and standard deviation (n - 1) of runs of one config; those that a run lacks are left out."""
    statistics: dict = {"seeds": [run["config"]["seed"] for run in runs]}
    for suffix in WORDS:
        values = [run.get(f"test_accuracy{suffix}") for run in runs]
        if None not in values:
            statistics[f"seed_accuracies{suffix}"] = values
            statistics[f"mean_accuracy{suffix}"] = float(np.mean(values))
            statistics[f"std_accuracy{suffix}"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return statistics


def read_metrics(folder: str | Path = RESULTS) -> dict:
    """The content of a folder's ``metrics.json``; ResultsError if there is none."""
    path = Path(folder) / METRICS_NAME
    if not path.exists():
        raise ResultsError(f"no {path}: a run writes it when it is finished")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        # Older metrics say it only in the description.
        metrics.setdefault("split", "validation" if "held out for validation" in metrics["data"] else "test")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is not what a finished run writes ({error}): finish the run again") from error
    return metrics


def check_publishable(config: Config, dataset: ImageDataset) -> None:
    """ConfigError unless this is the full recipe on CIFAR-10: only that may replace what the README shows."""
    here, recipe = config.to_dict(), from_profile("full").to_dict()
    differing = [name for name in recipe if here[name] != recipe[name] and name not in IGNORED_SETTINGS]
    problems = [f"{name} is {here[name]!r}, not {recipe[name]!r}" for name in differing]
    is_cifar10 = dataset.classes == CIFAR10_CLASSES and not dataset.is_stand_in and dataset.split == "test"
    if not is_cifar10 or len(dataset.train_labels) != RECIPE_TRAIN_IMAGES:
        problems.append(f"the images are {dataset.description}")
    if problems:
        raise ConfigError(f"only the full recipe on CIFAR-10 can be published, but {'; '.join(problems)}")


def publish(run_dir: str | Path, others: Iterable[str | Path] = ()) -> dict:
    """Put a finished run into ``Results/``, training_logs.md, the README and the model card; returns the metrics there.

    ``others`` are finished runs of the same recipe with other seeds, which count in the mean. ResultsError, before anything
    is changed, if a run is not finished or of another recipe, or a document's markers are damaged.
    """
    folders = [Path(run_dir), *map(Path, others)]
    runs = [read_metrics(folder) for folder in folders]
    recipes = [(run["data"], {**run["config"], "seed": None}) for run in runs]
    for folder, recipe in zip(folders, recipes):
        if recipe != recipes[0]:
            raise ResultsError(f"{folder} has other settings or images than {run_dir}: only equal runs make a mean")
    metrics = {**runs[0], **seed_statistics(runs)}
    texts = {runtime.PROJECT_ROOT / LOG_NAME: training_log(metrics)}
    for path in (runtime.PROJECT_ROOT / name for name in DOCUMENTS):
        texts[path] = render_readme(path.read_text(encoding="utf-8"), metrics)

    for figure in RESULTS.glob("*.png"):  # of the run before
        figure.unlink()
    for path in (folders[0] / WEIGHTS_NAME, *folders[0].glob("*.png"), *folders[0].glob("*.csv")):
        shutil.copy2(path, RESULTS)
    for path, text in texts.items():
        write_atomically(path, text.encode())
    write_json(RESULTS / METRICS_NAME, metrics)
    return metrics


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A Markdown table; ``align`` has "l" or "r" for each column, and missing ones are left-aligned."""
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(header), "l")]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in (header, rules, *rows))


def duration(seconds: float) -> str:
    """``"8.2 s"``, ``"12 min 5 s"`` or ``"1 h 23 min"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def accuracies(metrics: dict, name: str = "test_accuracy", with_mean: bool = False) -> str:
    """``"94.48%, 94.97% with flip TTA"``, as far as the metrics have them; or mean ± standard deviation over seeds."""
    found = []
    for end, words in WORDS.items():
        if with_mean and metrics.get(f"std_accuracy{end}") is not None:
            found.append(f"{metrics[f'mean_accuracy{end}']:.2f} ± {metrics[f'std_accuracy{end}']:.2f}%{words}")
        elif name + end in metrics:
            alone = f" (seed {metrics['config']['seed']})" if with_mean and len(metrics["seeds"]) > 1 else ""
            found.append(f"{metrics[name + end]:.2f}%{words}{alone}")
    return ", ".join(found)


def epoch_lines(history: History, epoch: int) -> str:
    """The log of ``epoch``, counted from 0, in the assignment's form."""
    text = f"Epoch {epoch + 1}: LR={history.lr[epoch]:#.4g} Time={history.seconds[epoch]:.1f}s\n"
    text += f"Train: Loss={history.train_loss[epoch]:.4f} Accuracy={history.train_accuracy[epoch]:.2f}"
    if (accuracy := history.test_accuracy[epoch]) is not None:
        right = f"{round(accuracy / 100 * history.test_size)}/{history.test_size} ({accuracy:.2f}%)"
        text += f"\nTest set: Average loss: {history.test_loss[epoch]:.4f}, Accuracy: {right}"
    return text


def readme_blocks(metrics: dict) -> dict[str, str]:
    """The generated parts of all documents, by name: the words of texts.md around the run's figures."""
    history, classes, seeds = History(**metrics["history"]), metrics["per_class_accuracy"], metrics["seeds"]
    epochs = [epoch_lines(history, epoch) for epoch in range(history.epochs)]
    exact = ""
    if "exact_test_images" in metrics:
        images, figures = metrics["exact_test_images"], accuracies(metrics, "test_accuracy_exact")
        exact = f" On the {images:,} bit-exact test images seed {metrics['config']['seed']} has {figures}."
    cells = ["-" if value is None else f"{value:.1f}%" for value in classes.values()]
    words = {
        **metrics,
        "means": accuracies(metrics, with_mean=True),
        "runs": f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else "single run",
        "seed_list": ", ".join(map(str, seeds)),
        "exact": exact,
        "accuracies": accuracies(metrics),
        "time": duration(metrics["wall_seconds"] + metrics["range_test_seconds"]),
        "train_accuracy": history.train_accuracy[-1],
        **{"first_epoch": epochs[0], "last_epoch": epochs[-1], "all_epochs": "\n\n".join(epochs)},
    }
    blocks = {"classes": markdown_table(list(classes), [cells], "r" * len(classes))}
    for part in TEXTS.read_text(encoding="utf-8").split("<!-- part: ")[1:]:
        name, text = part.split(" -->\n", 1)
        blocks[name] = text.format(**words, **blocks).strip()
    return blocks


def training_log(metrics: dict) -> str:
    """training_logs.md: hardware, versions and data of the run, then every epoch."""
    return readme_blocks(metrics)["training_logs"] + "\n"


def render_readme(text: str, metrics: dict) -> str:
    """A document with its parts between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->`` updated."""
    blocks = {**readme_blocks(metrics), "summary": f"```\n{model_summary()}\n```"}
    for name in re.findall(r"<!-- generated: (\w+) -->", text):
        text = replace_block(text, name, blocks[name]) if name in blocks else text
    return text


def replace_block(text: str, name: str, block: str) -> str:
    """``text`` with one generated part replaced; ResultsError unless it has exactly one place."""
    pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)"
    text, found = re.subn(pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.DOTALL)
    if found != 1:
        raise ResultsError(f"there are {found} places for the generated part {name!r}: exactly one is needed")
    return text


def model_summary() -> str:
    """torchsummary's table of the network, in eval mode because torchsummary runs a batch through it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=[]):
        summary(CustomResNet().eval(), (3, IMAGE_SIZE, IMAGE_SIZE), device="cpu")
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())
