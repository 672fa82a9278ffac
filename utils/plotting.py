"""Arrays in, matplotlib Figures out: no torch, no training, no files read.

All figures share one look: a white background (readable on dark pages too), colours that colour-blind readers can
tell apart, and pictures drawn pixel by pixel, without smoothing or ticks. Values are written in tick labels, titles and
legends rather than beside their points, where another run's curve might cross them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

# Okabe & Ito, *Color Universal Design* (2008). Their "vermilion" looks orange, so red is from P. Tol, *Colour Schemes*
# (2021).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC3311", "#767676"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "image.interpolation": "nearest",
    "text.parse_math": False,  # a class may be called "under_$10$"
}
WIDTH = 8.5  # inches; at 150 dpi a little wider than a README
DPI = 150

styled = mpl.rc_context(STYLE)  # a decorator: the function draws in this style


def new_figure(height: float, rows: int = 1, columns: int = 1, **options):
    """``(figure, axes)`` as from ``pyplot.subplots``, ``WIDTH`` by ``height`` inches.

    The figure is unknown to pyplot, so a notebook shows it once and nothing piles up in memory.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(rows, columns, **options)


@styled
def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, creating its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _headline(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")


def _note(axis, text: str, xy: tuple[float, float], offset: tuple[float, float], color: str, **options) -> None:
    """Bold text, ``offset`` points away from the data point ``xy``."""
    style = {"fontsize": 9, "fontweight": "bold", "textcoords": "offset points"}
    axis.annotate(text, xy, xytext=offset, color=color, **style, **options)


def _fit(name: str, columns: int) -> str:
    """``name``, shortened so that ``columns`` of them fit in a row."""
    limit = 100 // columns
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _name_ticks(axis, names: Sequence[str], most: int, offset: float = 0.0, **options) -> None:
    """Label ``offset``, 1 + ``offset``, ... on an x or y axis; with more than ``most`` names, only every second, third, ..."""
    shown = range(0, len(names), math.ceil(len(names) / most))
    axis.set_ticks([i + offset for i in shown], [names[i] for i in shown], fontsize=9, **options)
    axis.set_tick_params(length=0, pad=6)  # keeps the labels of both axes apart in the corner


def _log_axis(axis, digits: str = "g", subs: Sequence[float] = (1, 2, 5)) -> None:
    """Make an x or y axis logarithmic, labelled without superscripts, since the style parses no math."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(f"{{x:{digits}}}")


# --- pictures ---------------------------------------------------------------------------------------------------------


def _picture_grid(title: str, height: float, rows: int, columns: int):
    """``(figure, axes)`` with a headline; axes that get no picture stay empty."""
    figure, axes = new_figure(height, rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    _headline(figure, title)
    return figure, axes


def _show_picture(axis, picture: np.ndarray, title: str = "", below: str = "", color: str = "black") -> None:
    """A picture with ``title`` above it, in ``color``, and more text below."""
    axis.set_axis_on()
    axis.imshow(picture)
    emphasis = "normal" if color == "black" else "bold"
    axis.set_title(title, fontsize=8.5, fontweight=emphasis, loc="center", color=color, pad=3)
    axis.set_xlabel(below, fontsize=8.5, labelpad=3)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


@styled
def image_grid(pictures: np.ndarray, titles: Sequence[str], title: str) -> Figure:
    """Pictures, ten a row, each with its own title.

    Args:
        pictures: (N, H, W, 3) uint8, N at least 1.
        titles: N strings.
    """
    rows = math.ceil(len(pictures) / 10)
    figure, axes = _picture_grid(title, 0.4 + 1.06 * rows, rows, 10)
    for axis, picture, name in zip(axes.flat, pictures, titles):
        _show_picture(axis, picture, _fit(name, 10))
    return figure


@styled
def augmentation_grid(originals: np.ndarray, augmented: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Each original above several augmented versions of it.

    Args:
        originals: (N, H, W, 3) uint8.
        augmented: (V, N, H, W, 3) uint8, V versions of each.
        names: N class names.
    """
    columns = max(len(originals), 8)
    rows = 1 + len(augmented)
    figure, axes = _picture_grid(title, 0.5 + 8 * rows / columns, rows, columns)
    for row, pictures in enumerate([originals, *augmented]):
        for axis, picture, name in zip(axes[row], pictures, names):
            _show_picture(axis, picture, "" if row else _fit(name, columns))
        axes[row, 0].set_ylabel(f"epoch {row}" if row else "original", fontsize=9)
    return figure


@styled
def filter_grid(filters: np.ndarray, title: str) -> Figure:
    """The filters of a first convolution as small pictures, sixteen a row.

    Args:
        filters: (N, 3, H, W) float. Grey stands for 0, and the extreme colours for the largest weight of all.
    """
    columns = 16
    rows = math.ceil(len(filters) / columns)
    pictures = 0.5 + 0.5 * filters.transpose(0, 2, 3, 1) / np.abs(filters).max()
    figure, axes = _picture_grid(title, 0.4 + 0.55 * rows, rows, columns)
    for axis, picture in zip(axes.flat, pictures):
        _show_picture(axis, picture)
    return figure


@styled
def misclassified(
    pictures: np.ndarray,
    predicted: Sequence[str],
    true: Sequence[str],
    predicted_probability: Sequence[float],
    true_probability: Sequence[float],
) -> Figure:
    """Wrong answers in the given order, five a row, with both probabilities. There may be none.

    Args:
        pictures: (N, H, W, 3) uint8.
        predicted, true: N class names each.
        predicted_probability, true_probability: N values in [0, 1] each.
    """
    rows = math.ceil(len(pictures) / 5)
    title = "Most confident mistakes: predicted in red, truth below"
    if not rows:
        title = "No mistakes to show: every answer was right"
    figure, axes = _picture_grid(title, 0.4 + 1.95 * rows, max(1, rows), 5)
    for axis, picture, wrong, right, p_wrong, p_right in zip(
        axes.flat, pictures, predicted, true, predicted_probability, true_probability
    ):
        _show_picture(axis, picture, f"{_fit(wrong, 6)} {p_wrong:.0%}", f"is {_fit(right, 6)} ({p_right:.1%})", RED)
    return figure


@styled
def activation_maps(
    pictures: np.ndarray, maps: np.ndarray, predicted: Sequence[str], true: Sequence[str], title: str
) -> Figure:
    """Each picture with answer and truth, wrong answers in red, above the same picture with its evidence laid over it.

    Args:
        pictures: (N, H, W, 3) uint8, N at least 1.
        maps: (N, H, W) float in [0, 1], the evidence for the predicted class.
        predicted, true: N class names each.
    """
    columns = max(len(pictures), 8)
    figure, axes = _picture_grid(title, 2.95 * 8 / columns, 2, columns)
    for above, below, picture, evidence, answer, truth in zip(*axes, pictures, maps, predicted, true):
        color = "black" if answer == truth else RED
        _show_picture(above, picture, _fit(answer, columns), f"is {_fit(truth, columns + 2)}", color)
        _show_picture(below, picture)
        below.imshow(evidence, cmap="viridis", alpha=0.6, vmin=0, vmax=1)
    return figure


# --- learning rates ---------------------------------------------------------------------------------------------------


@styled
def lr_range_test(
    lrs: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    suggestions: dict[str, float],
    lr_min: float,
    lr_max: float,
) -> Figure:
    """The range test's curve, the range in use shaded; below it each rule's suggestion in its own row.

    Args:
        lrs, losses, smoothed: (S,) each.
        suggestions: LR by rule name, at least one.
        lr_min, lr_max: the range in use.
    """
    rows = len(suggestions)
    figure, (axis, rules) = new_figure(4.1 + 0.23 * rows, 2, sharex=True, height_ratios=(3.2, 0.1 + 0.23 * rows))
    axis.plot(lrs, losses, color=GREY, lw=0.8, alpha=0.7, label="loss of each batch")
    axis.plot(lrs, smoothed, color=BLUE, label="smoothed")
    top = float(np.median(losses[:10])) * 1.35
    axis.set_ylim(min(losses.min(), smoothed.min()) * 0.92, top)
    for each in (axis, rules):
        each.axvspan(lr_min, lr_max, color=BLUE, alpha=0.10, lw=0)
        each.axvline(lr_min, color=BLUE, lw=1, ls="--")
        each.axvline(lr_max, color=BLUE, lw=1, ls="--")
    near_left, near_right = np.log([lr_min / lrs[0], lrs[-1] / lr_max]) < 0.14 * np.log(lrs[-1] / lrs[0])
    for name, lr, on_left in (("LRMIN", lr_min, not near_left), ("LRMAX", lr_max, near_right)):
        side, offset = ("right", -5) if on_left else ("left", 5)  # outside the range, where the axis leaves room
        _note(axis, f"{name} {lr:.1e}", (lr, top), (offset, -4), BLUE, ha=side, va="top")
    for row, lr in enumerate(suggestions.values()):
        in_use = np.isclose(lr, (lr_min, lr_max)).any()
        marker = {
            "marker": "o",
            "ms": 8,
            "mec": "white",
            "color": RED if in_use else GREY,
            "zorder": 4 if in_use else 3,
        }
        axis.plot(lr, np.interp(np.log(lr), np.log(lrs), smoothed), **marker)
        rules.plot(lr, row, **marker)
    rules.set_yticks(range(rows), [f"{name} {lr:.1e}" for name, lr in suggestions.items()], fontsize=9)
    rules.tick_params(axis="y", length=0)
    rules.set_title("what each rule suggests; red: in use", fontsize=9, fontweight="normal")
    rules.set(xlabel="learning rate (log scale)", ylim=(rows - 0.4, -0.6))  # the first rule on top
    _log_axis(rules.xaxis, ".0e", subs=(1,))
    axis.set(title="LR range test: the cycle runs over the shaded range", ylabel="training loss")
    middle = (np.sqrt(lr_min * lr_max), 0.92)  # between the two dashed lines, below their names, above the curve
    axis.legend(loc="upper center", bbox_to_anchor=middle, bbox_transform=axis.get_xaxis_transform())
    return figure


@styled
def one_cycle(lrs: np.ndarray, epochs: int, peak_epoch: int, beta1s: np.ndarray, annihilated: np.ndarray) -> Figure:
    """The LR of every step against the epoch, its peak and lowest value marked, above Adam's beta1.

    Args:
        lrs: (steps,) LR of every step.
        epochs: length of the cycle.
        peak_epoch: the epoch at whose end the LR peaks.
        beta1s: (steps,) Adam's beta1.
        annihilated: (steps,) LRs of a cycle with an annihilation phase, for comparison.
    """
    epoch = (np.arange(len(lrs)) + 1) * epochs / len(lrs)
    figure, (axis, below) = new_figure(4.8, 2, sharex=True, height_ratios=(3, 1))
    axis.plot(epoch, annihilated, color=ORANGE, ls="--", lw=1.4, label="with annihilation (not used)")
    axis.plot(epoch, lrs, color=BLUE, label="one cycle, no annihilation")
    peak, lowest = np.argmax(lrs), lrs[-1]
    axis.plot(epoch[peak], lrs[peak], "o", color=RED, zorder=3)
    axis.axhline(lowest, color=GREY, lw=1, ls=":")
    # Text goes to the wider side of the peak, the legend to the same side below it.
    side, offset, corner = ("left", 10, "upper right") if peak_epoch <= epochs / 2 else ("right", -10, "upper left")
    words = f"LRMAX {lrs[peak]:.1e} at the end of epoch {peak_epoch}"
    _note(axis, words, (epoch[peak], lrs[peak]), (offset, 2), RED, ha=side)
    ends = "at both ends" if np.isclose(lrs[0], lowest) else "at the end"
    _note(axis, f"LRMIN {lowest:.1e} {ends}", (epoch[peak], lowest), (0, 3), GREY, ha=side)
    axis.legend(loc=corner, bbox_to_anchor=(0, 0, 1, 0.88))
    title = "One cycle: the learning rate of every step"
    axis.set(title=title, ylabel="learning rate", xlim=(0, epochs), ylim=(0, lrs.max() * 1.15))
    below.plot(epoch, beta1s, color=GREEN)
    below.set(xlabel="epoch", ylabel="Adam's β₁", ylim=(min(beta1s) - 0.02, max(beta1s) + 0.02))
    below.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    return figure


# --- training ---------------------------------------------------------------------------------------------------------


@styled
def training_curves(
    train_loss: Sequence[float],
    test_loss: Sequence[float | None],
    train_accuracy: Sequence[float],
    test_accuracy: Sequence[float | None],
    peak_epoch: int,
) -> Figure:
    """Loss and accuracy of each epoch, train and test overlaid, the LR's peak marked.

    Args:
        train_loss, test_loss: mean cross-entropy per image; None for an epoch without a test.
        train_accuracy, test_accuracy: percent, likewise.
        peak_epoch: counted from 1.
    """
    figure, (left, right) = new_figure(3.7, 1, 2)
    for axis, train, test, name, form in (
        (left, train_loss, test_loss, "Cross-entropy", "{:.3f}"),
        (right, train_accuracy, test_accuracy, "Accuracy", "{:.2f}%"),
    ):
        for kind, color, values in (("train (augmented)", ORANGE, train), ("test", BLUE, test)):
            points = [(epoch, value) for epoch, value in enumerate(values, start=1) if value is not None]
            if points:
                label = f"{kind}, last {form.format(points[-1][1])}"
                axis.plot(*zip(*points), color=color, marker="o", ms=3, label=label)
        axis.axvline(peak_epoch, color=GREY, lw=1, ls="--", label="the LR peaks")
        axis.set(title=name, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    if len(train_loss) > 2 * peak_epoch:  # the first epochs would squeeze all later ones into the top of the axis
        late = np.array([*train_accuracy[peak_epoch - 1 :], *test_accuracy[peak_epoch - 1 :]], dtype=float)
        low = max(0, 5 * (np.nanmin(late) // 5 - 1))
        right.set_ylim(low, min(100, right.get_ylim()[1]))
        right.set_title(f"Accuracy (axis starts at {low:.0f}%)")
    left.legend()
    right.legend()
    return figure


@styled
def curves(panels: dict[str, dict[str, np.ndarray]], x_label: str, y_label: str, x: np.ndarray | None = None) -> Figure:
    """Named curves in one panel or several side by side, all on the same scale.

    Args:
        panels: by panel title, by curve name, (S,) values, or (R, S) for the mean of R repetitions, their range shaded.
        x_label, y_label: of the axes.
        x: (S,) positions; by default 1, 2, ..., S, each marked with a dot. With x, the first curve is a broad grey band
            that others are compared with: it shows even where they coincide.
    """
    styles = [{"color": color, "marker": "o", "ms": 3} for color in (BLUE, ORANGE, GREEN, RED)]
    if x is not None:
        styles = [{"color": GREY, "lw": 7, "alpha": 0.5}, {"color": BLUE}]
    figure, axes = new_figure(3.5, 1, len(panels), squeeze=False, sharey=True)
    for axis, (title, named) in zip(axes[0], panels.items()):
        for style, (name, values) in zip(itertools.cycle(styles), named.items()):
            values = np.atleast_2d(values)
            at = np.arange(1, values.shape[1] + 1) if x is None else x
            axis.plot(at, values.mean(axis=0), label=name, **style)
            axis.fill_between(at, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.2, lw=0)
        axis.set(title=title, xlabel=x_label)
        axis.set_ylim(bottom=0)
        axis.legend()
    axes[0, 0].set_ylabel(y_label)
    return figure


# --- results ----------------------------------------------------------------------------------------------------------


@styled
def confusion_heatmap(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """The confusion matrix in percent of each true class; the diagonal has no colour, so that mistakes stand out.

    Args:
        matrix: (C, C) counts, true classes down, predicted across. Cells show numbers up to 16 classes.
        classes: C names.
    """
    count = len(classes)
    percent = 100.0 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    mistaken = np.where(np.eye(count, dtype=bool), np.nan, percent)  # NaN: no colour
    words = np.vectorize(lambda value: "" if value < 0.05 else "100" if value >= 99.95 else f"{value:.1f}")(percent)
    shows_words = count <= 16
    names = [_fit(name, 4) for name in classes]
    longest = max(map(len, names))
    rotation, extra = (90, 0.07 * longest) if count * longest > 80 else (0, 0)
    figure, axis = new_figure(6.6 + extra)
    sns.heatmap(
        mistaken,
        ax=axis,
        vmin=0,
        vmax=max(1.0, np.nanmax(mistaken)),
        cmap="Blues",
        square=True,
        linewidths=1 if count <= 50 else 0,
        annot=words if shows_words else None,
        fmt="",
        annot_kws={"fontsize": 9},
        cbar_kws={"label": "% of the true class taken for another", "shrink": 0.8},
        xticklabels=False,
        yticklabels=False,
    )
    for i in range(count) if shows_words else ():
        axis.text(i + 0.5, i + 0.5, words[i, i], ha="center", va="center", fontsize=9, fontweight="bold")
    _name_ticks(axis.xaxis, names, most=30, offset=0.5, rotation=rotation)
    _name_ticks(axis.yaxis, names, most=30, offset=0.5)
    axis.set(xlabel="predicted", ylabel="true")
    axis.grid(False)
    _headline(figure, "Confusion matrix, percent of each true class (diagonal: correct)")
    return figure


@styled
def class_accuracy(accuracies: np.ndarray, classes: Sequence[str], mean: float) -> Figure:
    """Accuracy by class as bars, the best on top, with a line at the overall accuracy.

    Args:
        accuracies: (C,) percent; NaN or None for a class without images.
        classes: C names.
        mean: overall accuracy, percent.
    """
    values = np.array(accuracies, dtype=float)
    words = ["no images" if np.isnan(value) else f"{value:.1f}%" for value in values]
    order = np.argsort(np.nan_to_num(values, nan=-1.0), kind="stable")[::-1]
    bars = np.nan_to_num(values[order])
    figure, axis = new_figure(np.clip(0.9 + 0.3 * len(order), 2, 9))
    axis.barh(np.arange(len(order)), bars, color=np.where(bars >= mean, BLUE, ORANGE), height=0.72)
    axis.axvline(mean, color="black", ls="--", lw=1.2)
    _name_ticks(axis.yaxis, [f"{_fit(classes[i], 4)}  {words[i]}" for i in order], most=50)
    axis.set(xlabel="test accuracy", xlim=(0, 100), ylim=(len(order) - 0.4, -0.6))  # the best on top
    axis.set_title(f"Accuracy by class (dashed: overall {mean:.2f}%; orange: below it)")
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    return figure


@styled
def effects(
    names: Sequence[str],
    means: Sequence[float],
    errors: Sequence[float | None],
    seeds: Sequence[Sequence[float]],
    *,
    title: str,
    xlabel: str,
    decimals: int = 1,
) -> Figure:
    """A row for every variant: its mean difference with an error bar, and below it each seed as a grey dot.

    Args:
        names: V strings, the first on top.
        means: V differences in points.
        errors: half the length of each error bar, None for no bar; ``xlabel`` says what they are.
        seeds: V sequences of single runs' differences; empty to show the mean alone.
        decimals: of the ticks.
    """
    figure, axis = new_figure(1.1 + 0.27 * len(names))
    axis.axvline(0, color=GREY, ls="--", lw=1.2)
    axis.xaxis.set_major_formatter(f"{{x:+.{decimals}f}}")
    axis.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # no ticks that rounding would move
    for row, (mean, error, values) in enumerate(zip(means, errors, seeds)):
        axis.plot(values, [row + 0.25] * len(values), "o", color=GREY, mec="none", alpha=0.7, ms=4)
        axis.errorbar(mean, row, xerr=error, fmt="o", color=BLUE, ms=6, capsize=3, lw=1.6, zorder=3)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set(title=title, xlabel=xlabel, ylim=(len(names) - 0.5, -0.5))
    return figure


@styled
def scaling(curves: dict[str, Sequence[dict[str, float]]]) -> Figure:
    """How cost grows, on log axes: seconds above and peak memory below, a column for each curve.

    Args:
        curves: by title, the points measured, smallest first: each with ``images``, ``batch_size``, ``seconds``,
            ``peak_memory_mib`` and ``images_mib`` (MiB of the images alone). The x axis is ``batch_size`` where that
            varies, else ``images``.
    """
    figure, axes = new_figure(5.4, 2, len(curves), sharex="col", squeeze=False)
    for (title, points), above, below in zip(curves.items(), *axes):
        column = {name: np.array([point[name] for point in points], dtype=float) for name in points[0]}
        seconds, memory = column["seconds"], column["peak_memory_mib"]
        by_batch = len(set(column["batch_size"])) > 1
        x = column["batch_size"] if by_batch else column["images"]
        above.plot(x, seconds[-1] * x / x[-1], "--", color=GREY, lw=1.2, label="in proportion")
        above.plot(x, seconds, "o", color=BLUE, ms=5, label="measured")
        if not by_batch:
            grown = memory[0] + column["images_mib"] - column["images_mib"][0]
            below.plot(x, grown, "--", color=GREY, lw=1.2, label="the images alone", zorder=3)
        below.plot(x, memory, "o-", color=BLUE, ms=5, label="measured")
        below.set_ylim(memory.min() / 3, memory.max() * 3)  # so that flat looks flat
        for axis in (above, below):
            _log_axis(axis.yaxis)
            axis.legend(loc="upper left")
        _log_axis(below.xaxis)
        below.set_xticks(x, [f"{value:,.0f}" for value in x])
        above.set_title(title.replace(", by", ",\nby"), fontsize=10)
        below.set_xlabel("batch size" if by_batch else "images")
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, MiB")
    return figure


# --- the network ------------------------------------------------------------------------------------------------------


@styled
def gradient_norms(panels: dict[str, dict[str, np.ndarray]]) -> Figure:
    """The size of the gradient at the input of every block, on a log axis, two panels a row.

    Args:
        panels: by panel title, by curve name, (blocks + 1,) norms; curves with "skip" in their name are blue.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(3.2 * rows, rows, columns, squeeze=False)
    for axis, (title, named) in zip(axes.flat, panels.items()):
        for name, norms in named.items():
            axis.plot(norms, color=BLUE if "skip" in name else ORANGE, marker="o", ms=3, label=name)
        _log_axis(axis.yaxis, ".0e", subs=(1,))
        axis.set_title(title)
        axis.legend()
    for axis in axes[-1]:
        axis.set_xlabel("block (0: the network's input)")
    for axis in axes[:, 0]:
        axis.set_ylabel("norm of the gradient")
    return figure


@styled
def block_diagram(stages: Sequence[tuple[str, str, str, str, bool]]) -> Figure:
    """The network as a row of boxes, skip connections as arcs.

    Args:
        stages: (name, what is inside, the block after that or "", output shape, has a skip around the block), input
            first.
    """
    figure, axis = new_figure(2.9)
    gap, middle, half_height = 0.2, -0.1, 0.62
    corner = "round,pad=0,rounding_size=0.06"
    arrow = {"arrowstyle": "->", "color": "#333333", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    centred = {"ha": "center", "va": "center"}
    left = 0.0
    for name, inside, block, shape, residual in stages:
        color, face = (BLUE, "#E6F1F8") if residual else (GREY, "#F2F2F2")
        right = left + (2.12 if block else 0.8)
        box = (left, -half_height), right - left, 2 * half_height
        axis.add_patch(FancyBboxPatch(*box, boxstyle=corner, fc=face, ec=color, lw=1.3))
        axis.text((left + right) / 2, half_height + 0.16, name, fontweight="bold", color=color, **centred)
        axis.text(left + 0.4, middle, inside, fontsize=8.5, linespacing=1.35, **centred)
        axis.text((left + right) / 2, -half_height - 0.2, shape, fontsize=9, color="#333333", **centred)
        if left:
            axis.annotate("", (left, middle), (left - gap, middle), arrowprops=arrow)
        if block:
            inner = left + 0.99, left + 1.75
            box = (inner[0], middle - 0.32), inner[1] - inner[0], 0.64
            axis.add_patch(FancyBboxPatch(*box, boxstyle=corner, fc="white", ec=color, lw=1))
            axis.text(sum(inner) / 2, middle, block, fontsize=8.5, linespacing=1.35, **centred)
            sum_at = right - 0.15
            axis.annotate("", (inner[0], middle), (inner[0] - 0.2, middle), arrowprops=arrow)
            axis.annotate("", (sum_at - 0.08 if residual else right, middle), (inner[1], middle), arrowprops=arrow)
            if residual:
                axis.text(sum_at, middle, "+", color=BLUE, fontsize=15, fontweight="bold", **centred)
                fork, top = inner[0] - 0.12, middle + 0.46
                axis.plot([fork, fork, sum_at], [middle, top, top], color=BLUE, lw=1.6)
                axis.annotate("", (sum_at, middle + 0.1), (sum_at, top), arrowprops={**arrow, "color": BLUE, "lw": 1.6})
                axis.text(sum(inner) / 2, top + 0.12, "x + R(x)", color=BLUE, fontsize=9, **centred)
        left = right + gap
    axis.text(0, -1.15, "below each box: channels × height × width of its output", fontsize=8.5, color="#555555")
    axis.set_axis_off()
    axis.set(xlim=(-0.03, left - gap + 0.03), ylim=(-1.25, 1))
    return figure
