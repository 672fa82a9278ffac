"""The project's objects or arrays in, matplotlib Figures out: no training, no files read.

Each colour has one meaning and can be told apart by colour-blind readers. Values are written in labels, titles and
legends rather than beside their points, where another run's curve might cross them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import seaborn as sns
import torch
from matplotlib import font_manager, style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from models import CustomResNet
from utils import analysis, schedule
from utils.analysis import Predictions
from utils.config import Config
from utils.dataset import ImageDataset
from utils.loaders import BatchedLoader
from utils.lr_finder import LRRange
from utils.metrics import History
from utils.transforms import BatchAugment, denormalize, normalize

# Okabe & Ito, *Color Universal Design* (2008); red and indigo are from P. Tol, *Colour Schemes* (2021).
TRAIN, TEST, RESIDUAL, PLAIN = "#E69F00", "#0072B2", "#009E73", "#CC79A7"
PROJECT, BASELINE, WRONG = "#332288", "#767676", "#CC3311"
MEANINGS = {  # by words in a curve's name or its panel's title
    "train": TRAIN,
    "test": TEST,
    "residual|skips?": RESIDUAL,
    "plain": PLAIN,
    "one cycle|this project": PROJECT,
    "constant|baseline": BASELINE,
}
UNNAMED = ("#56B4E9", "#882255", "#999933", "#44AA99")  # for curves without such a word

# For class names in other scripts, where installed; matplotlib cannot draw emoji fonts in colour.
FALLBACKS = "Noto Sans CJK JP,Microsoft YaHei,PingFang SC,Arial Unicode MS,WenQuanYi Zen Hei,Noto Emoji,Segoe UI Symbol"
FONTS = ["DejaVu Sans", *sorted({*FALLBACKS.split(",")} & {*font_manager.get_font_names()})]
STYLE = style.library["seaborn-v0_8-whitegrid"] | {
    "font.family": FONTS,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E3E3E3",
    "legend.frameon": True,
    "legend.edgecolor": "white",
    "legend.fontsize": 9,
    "image.interpolation": "nearest",
}
WIDTH, DPI = 8.5, 150  # inches, and dots per inch: a little wider than a README

styled = mpl.rc_context(STYLE)  # a decorator: the function draws in this style


def new_figure(height: float, rows: int = 1, columns: int = 1, **options):
    """``(figure, axes)`` of ``height`` inches, unknown to pyplot, so that a notebook shows the figure only once."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI, facecolor="white")
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, creating its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _pictures(title: str, columns: int, height: float, cells: Sequence[tuple]) -> Figure:
    """Pictures in rows of ``height`` inches, pixel by pixel; a cell is (picture[, text above[, text below, is wrong]])."""
    rows = max(1, math.ceil(len(cells) / columns))
    figure, axes = new_figure(0.4 + height * rows, rows, columns, squeeze=False)
    figure.suptitle(title, x=0.01, ha="left")
    for axis in axes.flat[len(cells) :]:
        axis.set_axis_off()
    for axis, cell in zip(axes.flat, cells):
        picture, above, below, wrong = (*cell, "", "", False)[:4]
        axis.imshow(picture)
        emphasis = {"fontweight": "bold", "color": WRONG} if wrong else {"fontweight": "normal"}
        axis.set_title(above, fontsize=8.5, loc="center", pad=3, **emphasis)
        axis.set_xlabel(below, fontsize=8.5, labelpad=3)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


@functools.cache
def _drawable() -> set[int]:
    """The code points that ``FONTS`` can draw."""
    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in FONTS)
    return set().union(*(font.get_charmap() for font in fonts))


_warn_once = functools.cache(warnings.warn)


def _fit(name: str, columns: int) -> str:
    """``name``, shortened so that ``columns`` of them fit in a row, with □ for what no font can draw."""
    if not name.isascii() and (missing := set(map(ord, name)) - _drawable()):
        _warn_once("no installed font has all letters of the class names: figures show □ for them")
        name = name.translate(dict.fromkeys(missing, "□"))
    limit = 100 // columns
    shown = name if len(name) <= limit else name[: limit - 1] + "…"
    return shown.replace("$", r"\$")  # a class may be called "under_$10$", which is no formula


def _names(dataset: ImageDataset, labels: np.ndarray, columns: int) -> list[str]:
    return [_fit(dataset.classes[label], columns) for label in labels]


@styled
def sample_images(dataset: ImageDataset, count: int = 20) -> Figure:
    """The first ``count`` test images after normalization and back, as the network sees them."""
    images = denormalize(normalize(torch.from_numpy(dataset.test_images[:count])))
    names = _names(dataset, dataset.test_labels[:count], 10)
    return _pictures("Test images: never augmented", 10, 1.06, list(zip(images, names)))


@styled
def augmented_images(dataset: ImageDataset, config: Config, count: int = 10, versions: int = 3) -> Figure:
    """The first ``count`` train images above what the network sees of them in ``versions`` epochs."""
    images, labels = dataset.train_images[:count], dataset.train_labels[:count]
    augment = BatchAugment(config.pad, config.flip, config.cutout)
    options = {"augment": augment, "alternate_flip": config.alternate_flip, "seed": config.seed}
    loader = BatchedLoader(images, labels, len(images), **options)
    augmented = [image for _ in range(versions) for batch, _ in loader for image in denormalize(batch)]
    names = _names(dataset, labels, len(images)) + [""] * len(augmented)
    title = f"Train images, and what the network sees of them in {versions} epochs"
    figure = _pictures(title, len(images), 0.85, list(zip([*images, *augmented], names)))
    for row, axis in enumerate(figure.axes[:: len(images)]):
        axis.set_ylabel(f"epoch {row}" if row else "original", fontsize=9)
    return figure


@styled
def first_filters(model: CustomResNet, title: str) -> Figure:
    """The 3x3 filters of the first convolution: grey stands for 0, full colours for the largest weight."""
    filters = model.prep.conv.conv.weight.detach().float().cpu().numpy()
    pictures = 0.5 + 0.5 * filters.transpose(0, 2, 3, 1) / np.abs(filters).max()
    return _pictures(title, 16, 0.55, list(zip(pictures)))


@styled
def mistakes(dataset: ImageDataset, predictions: Predictions, count: int = 20) -> Figure:
    """The ``count`` mistakes that the network was surest of, with both probabilities. There may be none."""
    worst = analysis.confident_mistakes(predictions, count)
    words = []
    for labels, text in ((predictions.predicted[worst], "{} {:.0%}"), (predictions.labels[worst], "is {} ({:.1%})")):
        probabilities = predictions.probabilities[worst, labels]
        words.append([text.format(*pair) for pair in zip(_names(dataset, labels, 6), probabilities)])
    cells = [(*cell, True) for cell in zip(dataset.test_images[worst], *words)]
    title = "Most confident mistakes: predicted in red, truth below" if cells else "No mistakes: every answer was right"
    return _pictures(title, 5, 1.95, cells)


@styled
def grad_cam(model: CustomResNet, dataset: ImageDataset, predictions: Predictions) -> Figure:
    """Where the network looks (Grad-CAM): in the first four right answers, then in its four surest mistakes."""
    right = np.flatnonzero(predictions.predicted == predictions.labels)[:4]
    shown = np.concatenate([right, analysis.confident_mistakes(predictions, 4)])
    pictures, answers, truths = (
        each[shown] for each in (dataset.test_images, predictions.predicted, predictions.labels)
    )
    images = normalize(torch.from_numpy(pictures).to(next(model.parameters()).device))
    names = [f"is {name}" for name in _names(dataset, truths, 10)]
    cells = [*zip(pictures, _names(dataset, answers, 8), names, answers != truths), *zip(pictures)]
    title = "Answer (mistakes in red) and truth; below, the evidence for the answer"
    figure = _pictures(title, len(shown), 1.4, cells)
    below = figure.axes[len(shown) :]
    for axis, evidence in zip(below, analysis.class_activation_maps(model, images, answers)):
        heat = axis.imshow(evidence, cmap="viridis", alpha=0.6, vmin=0, vmax=1)
    bar = figure.colorbar(heat, ax=below, ticks=[0, 0.5, 1], location="bottom", aspect=60, pad=0.03)
    bar.set_label("evidence, as a share of the picture's strongest", fontsize=8.5)
    return figure


@styled
def lr_range_test(lr_range: LRRange, label_smoothing: float = 0.0) -> Figure:
    """The range test's curve, each rule's suggestion on it, and the range in use; the loss has ``label_smoothing``."""
    lrs, losses, smoothed = lr_range.lrs, lr_range.losses, lr_range.smoothed
    ends = (lr_range.lr_min, lr_range.lr_max)
    figure, axis = new_figure(4.6)
    axis.axvspan(*ends, color=PROJECT, alpha=0.1, lw=0, label="range of the cycle")
    axis.plot(lrs, losses, color=TRAIN, lw=0.8, label="loss of each batch")
    axis.plot(lrs, smoothed, color=TRAIN, lw=2, label="smoothed")
    for marker, (name, lr) in zip("os^Dv", lr_range.suggestions.items()):
        in_use = np.isclose(lr, ends).any()
        style = {"color": PROJECT if in_use else "white", "mec": PROJECT, "ms": 8, "ls": "", "zorder": 3 + in_use}
        height = np.interp(np.log(lr), np.log(lrs), smoothed)
        axis.plot(lr, height, marker, **style, label=f"{name} {lr:.1e}{', in use' if in_use else ''}")
    axis.set(xscale="log", ylim=(min(losses.min(), smoothed.min()) * 0.92, float(np.median(losses[:10])) * 1.35))
    axis.set(title=f"LR range test: LRMIN {ends[0]:.1e}, LRMAX {ends[1]:.1e}", xlabel="learning rate (log scale)")
    axis.set_ylabel("training loss" + (f" (with label smoothing {label_smoothing:g})" if label_smoothing else ""))
    axis.legend(loc="upper center")
    return figure


@styled
def one_cycle(config: Config, lr_range: LRRange, steps_per_epoch: int) -> Figure:
    """The LR of every step on a linear and on a log axis, beside a cycle that ends in an annihilation phase."""
    ends = (lr_range.lr_min, lr_range.lr_max)
    lrs = schedule.lrs_for(config, *ends, steps_per_epoch)
    annihilated = schedule.lrs_for(dataclasses.replace(config, schedule="annihilation"), *ends, steps_per_epoch)
    epoch = (np.arange(len(lrs)) + 1) / steps_per_epoch
    figure, (linear, log) = new_figure(5.2, 2, sharex=True)
    for axis in (linear, log):
        axis.plot(epoch, annihilated, color=BASELINE, ls="--", lw=1.4, label="with an annihilation phase (not used)")
        axis.plot(epoch, lrs, color=PROJECT, lw=2, label=f"{config.schedule} (this run)")
        axis.plot(epoch[[0, lrs.argmax(), -1]], lrs[[0, lrs.argmax(), -1]], "o", color=PROJECT)
    title = f"LR of every step: LRMIN {ends[0]:.1e}, LRMAX {ends[1]:.1e} at the end of epoch {config.peak_epoch}"
    linear.set(title=title, ylabel="learning rate", xlim=(-0.02 * config.epochs, 1.02 * config.epochs))
    log.set(xlabel="epoch", ylabel="learning rate (log scale)", yscale="log", ylim=(annihilated.min() / 2, ends[1] * 3))
    log.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    log.legend(loc="lower center")
    return figure


@styled
def training_curves(history: History, peak_epoch: int, title: str = "") -> Figure:
    """Loss and accuracy of each epoch, train and test overlaid; ``title`` may name the seed and the tested weights."""
    figure, (left, right) = new_figure(4, 1, 2)
    figure.suptitle(title, x=0.01, ha="left")
    for axis, train, test, name, form in (
        (left, history.train_loss, history.test_loss, "Cross-entropy", "{:.3f}"),
        (right, history.train_accuracy, history.test_accuracy, "Accuracy", "{:.2f}%"),
    ):
        for kind, color, values in (("train (augmented)", TRAIN, train), ("test", TEST, test)):
            points = [(epoch, value) for epoch, value in enumerate(values, start=1) if value is not None]
            if points:
                label = f"{kind}, last {form.format(points[-1][1])}"
                axis.plot(*zip(*points), color=color, marker="o", ms=3, label=label)
        axis.axvline(peak_epoch, color=BASELINE, lw=1, ls="--", label="the LR peaks")
        axis.set(title=name, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    if history.epochs > 2 * peak_epoch:  # the first epochs would squeeze all later ones into the top of the axis
        late = history.train_accuracy[peak_epoch - 1 :] + history.test_accuracy[peak_epoch - 1 :]
        low = max(0, 5 * (np.nanmin(np.array(late, dtype=float)) // 5 - 1))
        right.set(ylim=(low, min(100, right.get_ylim()[1])), title=f"Accuracy (axis starts at {low:.0f}%)")
    right.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    return figure


@styled
def curves(
    panels: dict[str, dict[str, np.ndarray]], xlabel: str, ylabel: str, *, first: int = 1, log: bool = False
) -> Figure:
    """Named curves in one panel or several, two per row, all on the same scale.

    Args:
        panels: by panel title, by curve name, (S,) values, or (R, S) for the mean of R repetitions, their range shaded.
            A word of ``MEANINGS`` in the name, or else in the title, gives the colour; curves of one colour differ in
            their dashes.
        xlabel, ylabel: of the axes.
        first: position of the first value; the others follow at steps of 1.
        log: a logarithmic y axis.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(3.5 * rows, rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, (title, named) in zip(axes.flat, panels.items()):
        unnamed, drawn = itertools.cycle(UNNAMED), []
        for name, values in named.items():
            texts = itertools.product((name.lower(), title.lower()), MEANINGS.items())
            found = (color for text, (words, color) in texts if re.search(rf"\b({words})\b", text))
            color = next(found, None) or next(unnamed)
            kind = drawn.count(color) % 4
            drawn.append(color)
            values = np.atleast_2d(values)
            at = first + np.arange(values.shape[1])
            style = {"color": color, "ls": ("-", "--", ":", "-.")[kind], "marker": "os^D"[kind], "ms": 3.5}
            axis.plot(at, values.mean(axis=0), label=name, **style)
            axis.fill_between(at, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        axis.label_outer()
        axis.legend()
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=None if log else 0)
    return figure


@styled
def confusion_matrix(predictions: Predictions, classes: Sequence[str]) -> Figure:
    """Percent of each true class by answer, in numbers up to 16 classes; mistakes alone are coloured."""
    matrix, count = analysis.confusion_matrix(predictions), len(classes)
    percent = 100.0 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    mistaken = np.where(np.eye(count, dtype=bool), 0, percent)
    words = [["" if value < 0.05 else f"{value:.1f}".replace("100.0", "100") for value in row] for row in percent]
    names, every = [_fit(name, 4) for name in classes], math.ceil(count / 30)
    figure, axis = new_figure(8 if count * max(map(len, names)) > 80 else 6.6)
    look = dict(cmap="Reds", vmin=0, vmax=max(1, mistaken.max()), linewidths=0.5, square=True)
    texts = dict(annot=np.array(words) if count <= 16 else None, fmt="", annot_kws={"fontsize": 9})
    bar = dict(cbar_kws={"label": "% of the true class taken for another", "shrink": 0.8})
    sns.heatmap(mistaken, **look, **texts, **bar, xticklabels=every, yticklabels=every, ax=axis)
    rotation = 90 if count * max(map(len, names)) > 80 else 0
    axis.set_xticklabels(names[::every], fontsize=9, rotation=rotation)
    axis.set_yticklabels(names[::every], fontsize=9, rotation=0)
    axis.set(xlabel="predicted", ylabel="true")
    figure.suptitle("Confusion matrix, percent of each true class (diagonal: correct)", x=0.01, ha="left")
    return figure


@styled
def class_accuracy(predictions: Predictions, classes: Sequence[str]) -> Figure:
    """A dot per class, the best on top, with a bar of one binomial standard error to each side; dashed: overall."""
    values = analysis.per_class_accuracy(predictions)
    errors = np.sqrt(values * (100 - values) / np.maximum(np.bincount(predictions.labels, minlength=len(values)), 1))
    words = ["no images" if np.isnan(value) else f"{value:.1f}%" for value in values]
    names = [f"{_fit(name, 4)}  {text}" for name, text in zip(classes, words)]
    title = f"Accuracy by class (dashed: overall {predictions.accuracy:.2f}%)"
    rows = list(zip(names, values, errors, itertools.repeat(())))
    label = "test accuracy (bar: standard error)"
    figure = differences(rows, title=title, xlabel=label, reference=predictions.accuracy)
    low, step = (85, 5) if np.nanmin(values - errors) > 85 else (0, 20)
    figure.axes[0].set(xlim=(low, 100), xticks=range(low, 101, step))
    figure.axes[0].xaxis.set_major_formatter(PercentFormatter(decimals=0))
    return figure


@styled
def differences(rows: Sequence[tuple], *, title: str, xlabel: str, reference: float = 0.0) -> Figure:
    """The largest on top: a mean per row with a bar of one standard error to each side, and a dashed line.

    Args:
        rows: (name, mean, standard error or None, single runs' values) each, in percentage points. Single runs are small
            hollow dots, none for an empty list; a mean that rests on a single run is hollow itself. Where rows rest on
            different numbers of runs, "(n = ...)" is added to the names.
        title, xlabel: of the axis; ``xlabel`` should say what the bars are.
        reference: where the dashed line stands.
    """
    rows = sorted(rows, key=lambda row: -np.inf if np.isnan(row[1]) else row[1], reverse=True)
    counts = {len(points) for *_, points in rows}
    figure, axis = new_figure(np.clip(1.1 + 0.27 * len(rows), 2, 9))
    axis.axvline(reference, color=BASELINE, ls="--", lw=1.2)
    for height, (_, mean, error, points) in enumerate(rows):
        if len(points) > 1:
            axis.plot(points, [height + 0.28] * len(points), "o", mfc="white", mec=BASELINE, ms=4)
        inside = "white" if len(points) == 1 else TEST
        axis.errorbar(mean, height, xerr=error, fmt="o", color=TEST, mfc=inside, capsize=3, zorder=3)
    labels = [f"{name} (n = {len(points)})" if len(counts) > 1 else name for name, *_, points in rows]
    every = math.ceil(len(rows) / 40)
    axis.set_yticks(range(0, len(rows), every), labels[::every], fontsize=9)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # no ticks that rounding would move
    axis.xaxis.set_major_formatter("{x:+.1f}" if np.ptp(axis.get_xlim()) > 1 else "{x:+.2f}")
    axis.set(title=title, xlabel=xlabel, ylim=(len(rows) - 0.5, -0.6))
    return figure
