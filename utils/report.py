"""From a finished run to what people read: figures, metrics.json, training_logs.md and the README's tables.

Every number outside this module's output is generated from ``metrics.json``; a test fails when one drifts.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchsummary import summary

from models import CustomResNet
from utils import plotting, runtime
from utils.analysis import Predictions, confident_mistakes, confusion_matrix, per_class_accuracy, predict
from utils.checkpoint import rounded_to_half, save_weights, write_atomically
from utils.config import Config
from utils.dataset import CIFAR10_CLASSES, IMAGE_SIZE, ImageDataset
from utils.engine import History, table_header, table_row
from utils.loaders import BatchedLoader
from utils.lr_finder import LRRange
from utils.runtime import Precision
from utils.schedule import one_cycle_beta1s, one_cycle_lrs
from utils.transforms import BatchAugment, denormalize, normalize

RESULTS = runtime.PROJECT_ROOT / "Results"
WEIGHTS_NAME = "custom_resnet.safetensors"
GRID_IMAGES = 20
MISTAKES_SHOWN = 20


# What others published for networks of this kind on CIFAR-10: (who, how, test accuracy, time on which hardware).
PUBLISHED = (
    ("The original Session 10 write-up", "this model and recipe, single run", "93.10%", "about 13 min, T4"),
    ("Others on the same assignment", "Adam, single runs", "90.3 to 93.3%", "not stated"),
    (
        "[D. Page, *How to train your ResNet*](https://github.com/davidcpage/cifar10-fast) (2018)",
        "ResNet-9, SGD, 24 epochs",
        "94.08% (median of 50)",
        "79 s, V100",
    ),
    (
        "[cifar10-fast-simple](https://github.com/99991/cifar10-fast-simple)",
        "Page's network, SGD, 10 epochs",
        "94.09 ± 0.12% (100 runs)",
        "14.3 s, A100",
    ),
    (
        "[K. Jordan, airbench94](https://github.com/KellerJordan/cifar10-airbench) (2024)",
        "another network, many tricks, TTA",
        "94.0%",
        "2.6 s, A100",
    ),
)


# --- where results go ---------------------------------------------------------------------------------------------


def results_folder(config: Config, dataset: ImageDataset, run_dir: Path) -> Path:
    """``Results/`` for the full recipe on CIFAR-10; the run's own folder for everything else.

    A quick run, other images or the stand-in must never replace the figures that the README shows.
    """
    is_recipe = config.profile == "full" and config.train_images is None and config.test_images is None
    is_recipe = is_recipe and config.lr_min is None  # both ends of the cycle come from the range test
    is_cifar10 = dataset.classes == CIFAR10_CLASSES and not dataset.is_stand_in
    return RESULTS if is_recipe and is_cifar10 and len(dataset.train_labels) == 50_000 else Path(run_dir)


def run_record(
    config: Config, lr_range: LRRange, range_test_seconds: float, dataset: ImageDataset, precision: Precision
) -> dict:
    """What is known before the first epoch, as plain JSON values: kept in the run folder, quoted with the results."""
    return {
        "config": config.to_dict(),
        "lr_range": lr_range.to_dict(),
        "range_test_seconds": range_test_seconds,
        "data": dataset.description,
        "source": dataset.source,
        "fingerprint": dataset.fingerprint(),
        "device": runtime.device_name(precision.device),
        "precision": precision.name,
        "versions": runtime.versions(),
        "commit": runtime.code_commit(),
    }


# --- the final test -------------------------------------------------------------------------------------------------


def final_test(model: nn.Module, dataset: ImageDataset, device: torch.device, batch_size: int = 500):
    """Test the weights that are shipped: rounded to float16, computed in float32 without TF32.

    So the figure depends neither on the training precision nor, but for the odd tie, on the device; and the weights
    file gives it back in any fresh process.

    Returns:
        ``(plain, mirrored)``: predictions without and with flip TTA.
    """
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(rounded_to_half(model.state_dict()))
    loader = BatchedLoader(
        dataset.test_images, dataset.test_labels, min(batch_size, len(dataset.test_labels)), device=device
    )
    precision = Precision("fp32", torch.device(device))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return tuple(predict(shipped, loader, precision=precision, tta=tta) for tta in (False, True))


def close_history(history: History, final: Predictions) -> None:
    """Make the last epoch's test figures those of the shipped weights, so that every document says the same."""
    history.test_loss[-1] = final.loss
    history.test_accuracy[-1] = final.accuracy


def build_metrics(
    record: dict,
    config: Config,
    history: History,
    plain: Predictions,
    mirrored: Predictions,
    classes: Sequence[str],
    seed_accuracies: dict[int, tuple[float, float]] | None = None,
) -> dict:
    """metrics.json's content.

    Args:
        record: from ``run_record``.
        config: of the run.
        history: after ``close_history``.
        plain, mirrored: from ``final_test``.
        classes: class names.
        seed_accuracies: by seed, the final accuracy without and with flip TTA, of all runs of this config. None: this
            run is the only one.
    """
    per_seed = seed_accuracies or {config.seed: (plain.accuracy, mirrored.accuracy)}
    values, tta_values = (np.array(column) for column in zip(*per_seed.values()))
    lr_max = record["lr_range"]["lr_max"]
    return {
        "profile": config.profile,
        "test_accuracy": plain.accuracy,
        "test_loss": plain.loss,
        "test_accuracy_tta": mirrored.accuracy,
        "test_images": len(plain.labels),
        "train_images": history.train_size,
        "per_class_accuracy": dict(zip(classes, per_class_accuracy(plain).tolist())),
        "epochs": config.epochs,
        "peak_epoch": config.peak_epoch,
        "batch_size": config.batch_size,
        "seeds": [int(seed) for seed in per_seed],
        "seed_accuracies": values.tolist(),
        "seed_accuracies_tta": tta_values.tolist(),
        "mean_accuracy": float(values.mean()),
        "mean_accuracy_tta": float(tta_values.mean()),
        "std_accuracy": float(values.std(ddof=1)) if len(values) > 1 else None,
        "std_accuracy_tta": float(tta_values.std(ddof=1)) if len(values) > 1 else None,
        "lr_min": record["lr_range"]["lr_min"],
        "lr_max": lr_max,
        "lr_rule": record["lr_range"]["rule"],
        "weight_decay": config.decay_at_peak / lr_max,
        "wall_seconds": float(sum(history.seconds)),
        "range_test_seconds": record["range_test_seconds"],
        "device": record["device"],
        "precision": record["precision"],
        "versions": record["versions"],
        "data": record["data"],
        "source": record["source"],
        "commit": record["commit"],
        "config": record["config"],
        "history": history.to_dict(),
    }


# --- files ----------------------------------------------------------------------------------------------------------


def write_results(
    folder: Path, metrics: dict, model: nn.Module, figures: dict[str, plotting.Figure], note: str = ""
) -> None:
    """Write figures, ``metrics.json``, the weights and the log; for ``Results/``, the README's tables too.

    Args:
        folder: from ``results_folder``.
        metrics: from ``build_metrics``.
        model: the tested weights.
        figures: by file name.
        note: a sentence for the log, such as what else the machine was doing.
    """
    folder, metrics = Path(folder), {**metrics, "note": note}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        plotting.save_figure(figure, folder / name)
    save_weights(model, folder / WEIGHTS_NAME, {"classes": ",".join(metrics["per_class_accuracy"])})
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    published = folder == RESULTS
    log = runtime.PROJECT_ROOT / "training_logs.md" if published else folder / "training_logs.md"
    write_atomically(log, training_log(metrics).encode())
    if published:
        update_readme(runtime.PROJECT_ROOT / "README.md", metrics)


def read_metrics(folder: Path = RESULTS) -> dict:
    """The content of a folder's ``metrics.json``.

    Raises:
        FileNotFoundError: there is none yet.
    """
    return json.loads((Path(folder) / "metrics.json").read_text())


def make_figures(
    dataset: ImageDataset, config: Config, lr_range: LRRange, history: History, predictions: Predictions
) -> dict[str, plotting.Figure]:
    """Every figure of ``Results/``, by file name; no ``lr_finder.png`` where the LRs were given instead of found."""
    classes = dataset.classes
    steps = -(-len(dataset.train_labels) // config.batch_size)
    cycle = (config.epochs, config.peak_epoch, steps)
    mistakes = confident_mistakes(predictions, MISTAKES_SHOWN)
    figures = {
        "train.png": draw_train_samples(dataset, config),
        "test.png": draw_test_samples(dataset),
        "one_cycle.png": plotting.one_cycle(
            one_cycle_lrs(lr_range.lr_min, lr_range.lr_max, *cycle),
            config.epochs,
            config.peak_epoch,
            one_cycle_beta1s(*cycle) if config.cycle_beta1 else np.full(config.epochs * steps, config.beta1),
        ),
        "model_viz.png": plotting.training_curves(
            history.train_loss, history.test_loss, history.train_accuracy, history.test_accuracy, config.peak_epoch
        ),
        "mis.png": plotting.misclassified(
            dataset.test_images[mistakes.index],
            [classes[i] for i in mistakes.predicted],
            [classes[i] for i in mistakes.true],
            mistakes.predicted_probability,
            mistakes.true_probability,
        ),
        "confusion_matrix.png": plotting.confusion_heatmap(confusion_matrix(predictions), classes),
        "class_accuracy.png": plotting.class_accuracy(per_class_accuracy(predictions), classes, predictions.accuracy),
    }
    if len(lr_range.losses):
        figures["lr_finder.png"] = plotting.lr_range_test(
            lr_range.lrs, lr_range.losses, lr_range.smoothed, lr_range.suggestions, lr_range.lr_min, lr_range.lr_max
        )
    return figures


def draw_train_samples(dataset: ImageDataset, config: Config, count: int = 10, versions: int = 3) -> plotting.Figure:
    """The first ``count`` train images above what the network sees of them in ``versions`` epochs."""
    images, labels = dataset.train_images[:count], dataset.train_labels[:count]
    loader = BatchedLoader(
        images,
        labels,
        len(images),
        augment=BatchAugment(config.pad, config.pad_mode, config.flip, config.cutout),
        alternate_flip=config.alternate_flip,
        seed=config.seed,
    )
    augmented = np.stack([denormalize(batch) for _ in range(versions) for batch, _ in loader])
    names = [dataset.classes[label] for label in labels]
    return plotting.augmentation_grid(images, augmented, names, "Train images, and what three epochs show the network")


def draw_test_samples(dataset: ImageDataset, count: int = GRID_IMAGES) -> plotting.Figure:
    """The first ``count`` test images, put through normalization and back: what the network really sees."""
    shown = denormalize(normalize(torch.from_numpy(dataset.test_images[:count])))
    names = [dataset.classes[label] for label in dataset.test_labels[:count]]
    return plotting.image_grid(shown, names, "Test images: never augmented")


# --- texts ----------------------------------------------------------------------------------------------------------


def training_log(metrics: dict) -> str:
    """training_logs.md: the run's circumstances, then every epoch."""
    history = History(**metrics["history"])
    lines = [
        "# Training logs",
        "",
        "Generated from the run's history; nothing here is edited by hand.",
        "",
        f"- {setup_sentence(metrics)}",
        f"- Commit of the code: `{metrics['commit']}`",
        "- Losses are mean cross-entropy per image, without label smoothing. Train figures are of augmented images while "
        "the weights move; test figures are of the averaged weights. The last epoch's are those of the weights in "
        f"`{WEIGHTS_NAME}`.",
        *([f"- {metrics['note']}"] if metrics.get("note") else []),
        "",
        "```",
    ]
    for epoch in range(history.epochs):
        correct = round(history.test_accuracy[epoch] / 100 * history.test_size)
        lines += [
            f"Epoch {epoch + 1}: LR={history.lr[epoch]:.6f} Time={history.seconds[epoch]:.1f}s",
            f"Train: Loss={history.train_loss[epoch]:.4f} Accuracy={history.train_accuracy[epoch]:.2f}",
            f"Test set: Average loss: {history.test_loss[epoch]:.4f}, Accuracy: {correct}/{history.test_size} "
            f"({history.test_accuracy[epoch]:.2f}%)",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n```\n"


def setup_sentence(metrics: dict) -> str:
    """Hardware, versions, seeds, data and time in one sentence."""
    seeds = ", ".join(str(seed) for seed in metrics["seeds"])
    versions = metrics["versions"]
    return (
        f"{metrics['train_images']:,} train and {metrics['test_images']:,} test images of {metrics['data']}; "
        f"{metrics['epochs']} epochs of batch {metrics['batch_size']} in {duration(metrics['wall_seconds'])} on "
        f"{metrics['device']} in {metrics['precision']}; torch {versions['torch']}, Python {versions['python']}; "
        f"{'seed' if len(metrics['seeds']) == 1 else 'seeds'} {seeds}"
    )


def duration(seconds: float) -> str:
    """``"8.2 s"``, ``"12 min 5 s"`` or ``"1 h 23 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def spread(mean: float, std: float | None, count: int) -> str:
    """``"94.52 ± 0.14% (5 seeds)"``, or the single value named as such."""
    return f"{mean:.2f}% (single run)" if std is None else f"{mean:.2f} ± {std:.2f}% (mean and std of {count} seeds)"


def readme_blocks(metrics: dict) -> dict[str, str]:
    """The README's generated parts, by name."""
    count = len(metrics["seeds"])
    plain = spread(metrics["mean_accuracy"], metrics["std_accuracy"], count)
    mirrored = spread(metrics["mean_accuracy_tta"], metrics["std_accuracy_tta"], count)
    history = History(**metrics["history"])
    classes = metrics["per_class_accuracy"]
    note = f"\n\n{metrics['note']}" if metrics.get("note") else ""
    return {
        "headline": (
            f"**{plain} test accuracy after the last of {metrics['epochs']} epochs; {mirrored} with flip test-time "
            f"augmentation.** {setup_sentence(metrics)}.{note}"
        ),
        "results": "\n".join(
            [
                "| | |",
                "| --- | --- |",
                f"| Test accuracy, last epoch | {plain} |",
                f"| with flip TTA | {mirrored} |",
                f"| Test loss | {metrics['test_loss']:.4f} |",
                f"| Train accuracy, last epoch (augmented images) | {history.train_accuracy[-1]:.2f}% |",
                f"| LRMIN, LRMAX (range test, rule {metrics['lr_rule']}) | {metrics['lr_min']:.2e}, {metrics['lr_max']:.2e} |",
                f"| Weight decay (decoupled) | {metrics['weight_decay']:.3f} |",
                f"| Training, testing after every epoch included | {duration(metrics['wall_seconds'])} |",
                f"| Hardware | {metrics['device']}, {metrics['precision']} |",
                f"| Versions | {', '.join(f'{name} {version}' for name, version in metrics['versions'].items())} |",
                f"| Data | {metrics['data']} |",
                f"| Seeds | {', '.join(str(seed) for seed in metrics['seeds'])} |",
            ]
        ),
        "classes": "\n".join(
            [
                "| " + " | ".join(classes) + " |",
                "| " + " | ".join("---:" for _ in classes) + " |",
                "| " + " | ".join(f"{value:.1f}%" for value in classes.values()) + " |",
            ]
        ),
        "comparison": "\n".join(
            [
                "| Who | How | Test accuracy | Training time |",
                "| --- | --- | --- | --- |",
                f"| **Ours** | this model and recipe, Adam, {metrics['epochs']} epochs | **{plain}**; {mirrored} with flip TTA | "
                f"{duration(metrics['wall_seconds'])}, {metrics['device']} |",
                *("| " + " | ".join(row) + " |" for row in PUBLISHED),
            ]
        ),
        "logs": "\n".join(
            ["```", table_header(), *(table_row(history, epoch) for epoch in range(history.epochs)), "```"]
        ),
    }


def update_readme(path: Path, metrics: dict) -> None:
    """Rewrite the README's generated parts, each between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.

    Raises:
        ValueError: a part's markers are missing.
    """
    write_atomically(path, render_readme(path.read_text(), metrics).encode())


def render_readme(text: str, metrics: dict) -> str:
    """``text`` with its generated parts made anew from ``metrics``."""
    for name, block in {**readme_blocks(metrics), "summary": f"```\n{model_summary()}\n```"}.items():
        text = replace_block(text, name, block)
    return text


def replace_block(text: str, name: str, block: str) -> str:
    """``text`` with one generated part replaced.

    Raises:
        ValueError: the part's markers are missing or doubled.
    """
    pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)"
    text, found = re.subn(pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.DOTALL)
    if found != 1:
        raise ValueError(f"README.md has {found} places for the generated part {name!r}: it needs exactly one")
    return text


def model_summary() -> str:
    """torchsummary's table of the network (which gets a copy in eval mode: it runs a batch through it)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng():
        summary(CustomResNet().eval(), (3, IMAGE_SIZE, IMAGE_SIZE), device="cpu")
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())
