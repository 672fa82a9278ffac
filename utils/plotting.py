"""Arrays in, matplotlib Figures out: no torch, no training, no files read.

One look for all: white ground (readable on a dark page too), colours that the colour-blind tell apart and that are what
they are called, 32x32 pictures drawn pixel by pixel with no smoothing and no ticks. What a point is worth stands in a tick
label, a title or a legend rather than beside it, where a line of the next run would strike it through.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

# Okabe & Ito, *Color Universal Design* (2008); their "vermilion" looks orange, so red is P. Tol's, *Colour Schemes* (2021).
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
WIDTH = 8.5  # inches; at 150 dpi a little more than a README is wide
DPI = 150
MOST_CELLS = 16  # classes whose confusion matrix has room for a number in every cell

styled = mpl.rc_context(STYLE)  # a decorator: what the function draws is drawn in our style


@styled
def new_figure(height: float, rows: int = 1, columns: int = 1, **options):
    """A Figure outside pyplot's registry, so that notebooks show it once and nothing piles up in memory.

    Args:
        height: in inches; the width is ``WIDTH``.
        rows, columns, **options: as for ``Figure.subplots``.

    Returns:
        ``(figure, axes)``, as from ``pyplot.subplots``.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(rows, columns, **options)


@styled
def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG, creating the folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _headline(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")


def _note(axis, text: str, xy: tuple[float, float], offset: tuple[float, float], color: str, **options) -> None:
    """Bold words ``offset`` points away from the data point ``xy``."""
    style = {"fontsize": 9, "fontweight": "bold", "textcoords": "offset points", **options}
    axis.annotate(text, xy, xytext=offset, color=color, **style)


def _fit(name: str, columns: int) -> str:
    """``name``, cut where it would run into its neighbour's in a row of ``columns``."""
    limit = 100 // columns
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _name_ticks(axis, names: Sequence[str], most: int, **options) -> None:
    """Name the positions 0, 1, ... of an x or y axis; of more than ``most`` every second, third, ..."""
    shown = range(0, len(names), -(-len(names) // most))
    axis.set_ticks(shown, [names[i] for i in shown], fontsize=9, **options)
    axis.set_tick_params(length=0, pad=6)  # apart in the corner where both axes begin


def _log_axis(axis, digits: str = "g", subs: Sequence[float] = (1, 2, 5)) -> None:
    """Make an x or y axis logarithmic, with plain numbers as in the texts: the style parses no exponents."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(f"{{x:{digits}}}")


# --- pictures -------------------------------------------------------------------------------------------------------


def _show_picture(axis, picture: np.ndarray, title: str = "", below: str = "", color: str = "black") -> None:
    """A picture with words above, in ``color``, and below it."""
    axis.set_axis_on()
    axis.imshow(picture, interpolation="nearest")
    emphasis = "normal" if color == "black" else "bold"
    axis.set_title(title, fontsize=8.5, fontweight=emphasis, loc="center", color=color, pad=3)
    axis.set_xlabel(below, fontsize=8.5, labelpad=3)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _picture_axes(height: float, rows: int, columns: int):
    """Like ``new_figure``; what no picture is put into stays empty."""
    figure, axes = new_figure(height, rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


@styled
def image_grid(pictures: np.ndarray, titles: Sequence[str], title: str, columns: int = 10) -> Figure:
    """A grid of pictures with a word over each.

    Args:
        pictures: (N, H, W, 3) uint8, N at least 1.
        titles: N strings.
        title: over the whole.
        columns: pictures a row.
    """
    rows = -(-len(pictures) // columns)
    figure, axes = _picture_axes(0.4 + 1.06 * rows * 10 / columns, rows, columns)
    for axis, picture, word in zip(axes.flat, pictures, titles):
        _show_picture(axis, picture, _fit(word, columns))
    _headline(figure, title)
    return figure


@styled
def augmentation_grid(originals: np.ndarray, augmented: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Each original above several augmented versions of it.

    Args:
        originals: (N, H, W, 3) uint8.
        augmented: (V, N, H, W, 3) uint8, V versions of each.
        names: N class names.
        title: over the whole.
    """
    columns = max(len(originals), 8)
    words = ["original", *(f"epoch {version + 1}" for version in range(len(augmented)))]
    figure, axes = _picture_axes(0.5 + 8 * len(words) / columns, len(words), columns)
    for row, (word, pictures) in enumerate(zip(words, [originals, *augmented])):
        for axis, picture, name in zip(axes[row], pictures, names):
            _show_picture(axis, picture, "" if row else _fit(name, columns))
        axes[row, 0].set_ylabel(word, fontsize=9)
    _headline(figure, title)
    return figure


@styled
def step_by_step(stages: Sequence[tuple[str, np.ndarray]], title: str) -> Figure:
    """What each augmentation step does to one picture: ``stages`` are (name, (H, W, 3) uint8), in order."""
    figure, axes = _picture_axes(1.9, 1, len(stages))
    for axis, (name, picture) in zip(axes[0], stages):
        _show_picture(axis, picture, f"{name}\n{picture.shape[0]}×{picture.shape[1]}")
    _headline(figure, title)
    return figure


@styled
def misclassified(
    pictures: np.ndarray,
    predicted: Sequence[str],
    true: Sequence[str],
    predicted_probability: Sequence[float],
    true_probability: Sequence[float],
    columns: int = 5,
) -> Figure:
    """Wrong answers with both probabilities, in the given order; works for any number of them, 0 included.

    Args:
        pictures: (N, H, W, 3) uint8.
        predicted, true: N class names each.
        predicted_probability, true_probability: N values in [0, 1] each.
        columns: pictures a row.
    """
    rows = -(-len(pictures) // columns)
    figure, axes = _picture_axes(0.4 + 1.95 * rows, max(1, rows), columns)
    for axis, picture, wrong, right, p_wrong, p_right in zip(
        axes.flat, pictures, predicted, true, predicted_probability, true_probability
    ):
        wrong, right = f"{_fit(wrong, 6)} {p_wrong:.0%}", f"is {_fit(right, 6)} ({p_right:.1%})"
        _show_picture(axis, picture, wrong, right, RED)
    words = "Most confident mistakes: predicted in red, truth below"
    _headline(figure, words if len(pictures) else "No mistakes to show: every answer was right")
    return figure


@styled
def activation_maps(
    pictures: np.ndarray, maps: np.ndarray, predicted: Sequence[str], true: Sequence[str], title: str
) -> Figure:
    """Pictures above where the network looked; answer and truth over each, a wrong answer in red.

    Args:
        pictures: (N, H, W, 3) uint8, N at least 1.
        maps: (N, H, W) float in [0, 1], the evidence for the predicted class.
        predicted, true: N class names each.
        title: over the whole.
    """
    columns = max(len(pictures), 8)
    figure, axes = _picture_axes(2.95 * 8 / columns, 2, columns)
    for above, below, picture, evidence, answer, truth in zip(*axes, pictures, maps, predicted, true):
        color = "black" if answer == truth else RED
        _show_picture(above, picture, _fit(answer, columns), f"is {_fit(truth, columns + 2)}", color)
        _show_picture(below, picture)
        below.imshow(evidence, cmap="viridis", alpha=0.6, vmin=0, vmax=1, interpolation="nearest")
    _headline(figure, title)
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
    """The range test's curve on a log axis, the range found shaded, every suggestion marked in a row of its own.

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
    for name, lr, side, offset in (("LRMIN", lr_min, "right", -5), ("LRMAX", lr_max, "left", 5)):
        for each in (axis, rules):
            each.axvline(lr, color=BLUE, lw=1, ls="--")
        _note(axis, f"{name} {lr:.1e}", (lr, top), (offset, -4), BLUE, ha=side, va="top")
    for row, lr in enumerate(suggestions.values()):
        color = RED if np.isclose(lr, (lr_min, lr_max)).any() else GREY
        height = float(np.interp(np.log(lr), np.log(lrs), smoothed))
        axis.plot(lr, height, "o", color=color, ms=8, mec="white", zorder=4 if color == RED else 3)
        rules.plot(lr, row, "o", color=color, ms=8, mec="white", zorder=3)
    rules.set_yticks(range(rows), [f"{name} {lr:.1e}" for name, lr in suggestions.items()], fontsize=9)
    rules.set_ylim(rows - 0.4, -0.6)  # the first on top
    rules.tick_params(axis="y", length=0)
    rules.set_title("what each rule suggests; red: in use", fontsize=9, fontweight="normal")
    rules.set_xlabel("learning rate (log scale)")
    _log_axis(rules.xaxis, ".0e", subs=(1,))
    axis.set_ylabel("training loss")
    axis.set_title("LR range test: the cycle runs over the shaded range")
    axis.legend(loc="lower left")
    return figure


@styled
def one_cycle(
    lrs: np.ndarray,
    epochs: int,
    peak_epoch: int,
    beta1s: np.ndarray | None = None,
    annihilated: np.ndarray | None = None,
) -> Figure:
    """The LR of every step against the epoch, its peak and its lowest LR marked.

    Args:
        lrs: (steps,) LR of every step.
        epochs: length of the cycle.
        peak_epoch: where the peak lies.
        beta1s: (steps,) Adam's beta1, or None to leave it out.
        annihilated: (steps,) the cycle that the assignment leaves out, for comparison.
    """
    epoch = (np.arange(len(lrs)) + 1) * epochs / len(lrs)
    panels = {} if beta1s is None else {"height_ratios": (3, 1)}
    figure, axes = new_figure(4.8 if panels else 3.6, 2 if panels else 1, squeeze=False, sharex=True, **panels)
    axis, last = axes[0, 0], axes[-1, 0]
    if annihilated is not None:
        axis.plot(epoch, annihilated, color=ORANGE, ls="--", lw=1.4, label="with annihilation (not used)")
    axis.plot(epoch, lrs, color=BLUE, label="one cycle, no annihilation")
    peak, lowest = int(np.argmax(lrs)), lrs[-1]
    # In the half of the axis that is the wider, on the side of the peak where the curve leaves room.
    side, offset = ("left", 10) if peak_epoch <= epochs / 2 else ("right", -10)
    axis.plot(epoch[peak], lrs[peak], "o", color=RED, zorder=3)
    words = f"LRMAX {lrs[peak]:.1e} at the end of epoch {peak_epoch}"
    _note(axis, words, (epoch[peak], lrs[peak]), (offset, 2), RED, ha=side)
    axis.axhline(lowest, color=GREY, lw=1, ls=":")
    ends = " at both ends" if np.isclose(lrs[0], lowest) else " at the end"
    _note(axis, f"LRMIN {lowest:.1e}{ends}", (epoch[peak], lowest), (0, 3), GREY, ha=side)
    axis.set_ylabel("learning rate")
    axis.set_title("One cycle: the learning rate of every step")
    axis.set_ylim(0, lrs.max() * 1.15)
    if annihilated is not None:
        axis.legend(loc="upper right" if side == "left" else "upper left", bbox_to_anchor=(0, 0, 1, 0.88))
    if beta1s is not None:
        last.plot(epoch, beta1s, color=GREEN)
        last.set_ylabel("Adam's β₁")
        last.set_ylim(min(beta1s) - 0.02, max(beta1s) + 0.02)
    last.set_xlabel("epoch")
    last.set_xlim(0, epochs)
    last.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    return figure


# --- training -----------------------------------------------------------------------------------------------------------


def _plot_epochs(axis, values: Sequence[float | None], **options) -> None:
    """A curve over the epochs 1, 2, ...; an epoch whose value is None is passed over."""
    values = np.array(values, dtype=float)
    known = np.flatnonzero(np.isfinite(values))
    axis.plot(known + 1, values[known], marker="o", ms=3, **options)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


@styled
def training_curves(
    train_loss: Sequence[float],
    test_loss: Sequence[float | None],
    train_accuracy: Sequence[float],
    test_accuracy: Sequence[float | None],
    peak_epoch: int,
) -> Figure:
    """Loss and accuracy after each epoch, train and test overlaid, the peak of the LR marked.

    Args:
        train_loss, test_loss: mean cross-entropy per image; None for an epoch that was not tested.
        train_accuracy, test_accuracy: percent, the same.
        peak_epoch: counted from 1.
    """
    figure, (left, right) = new_figure(3.7, 1, 2)
    for axis, train, test, name, form in (
        (left, train_loss, test_loss, "Cross-entropy", "{:.3f}"),
        (right, train_accuracy, test_accuracy, "Accuracy", "{:.2f}%"),
    ):
        _plot_epochs(axis, train, color=ORANGE, label=f"train (augmented), last {form.format(train[-1])}")
        tested = [value for value in test if value is not None]
        if tested:
            _plot_epochs(axis, test, color=BLUE, label=f"test, last {form.format(tested[-1])}")
        axis.axvline(peak_epoch, color=GREY, lw=1, ls="--", label="the LR peaks")
        axis.set_title(name)
    right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    if len(train_loss) > 2 * peak_epoch:  # the first epochs would squeeze all that follows into the top of the axis
        late = np.array([*train_accuracy[peak_epoch - 1 :], *test_accuracy[peak_epoch - 1 :]], dtype=float)
        low = max(0, 5 * (np.nanmin(late) // 5 - 1))
        right.set_ylim(low, min(100, right.get_ylim()[1]))
        right.set_title(f"Accuracy (axis starts at {low:.0f}%)")
    for axis in (left, right):
        axis.legend(loc="best")
    return figure


@styled
def curves_by_epoch(panels: dict[str, dict[str, Sequence[float | None]]], ylabel: str = "train error") -> Figure:
    """Runs side by side on one scale, epoch by epoch: for instance two depths, plain and residual.

    Args:
        panels: by panel title, by run name, percent at the end of every epoch (None: not measured). Runs of the same
            name have the same colour in every panel.
        ylabel: what is in percent.
    """
    names = list(dict.fromkeys(name for runs in panels.values() for name in runs))
    colors = dict(zip(names, (BLUE, ORANGE, GREEN, RED, GREY) * len(names)))
    figure, axes = new_figure(3.5, 1, len(panels), squeeze=False, sharey=True)
    for axis, (title, runs) in zip(axes[0], panels.items()):
        for name, values in runs.items():
            _plot_epochs(axis, values, color=colors[name], label=name)
        axis.set_title(title)
        axis.legend()
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(decimals=0))
    return figure


# --- results ------------------------------------------------------------------------------------------------------------


@styled
def confusion_heatmap(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """The confusion matrix in percent of each true class; the diagonal is left uncoloured so that mistakes show.

    Args:
        matrix: (C, C) counts, true classes down, predicted across.
        classes: C names.
    """
    count = len(classes)
    percent = 100.0 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    mistaken = np.where(np.eye(count, dtype=bool), np.nan, percent)
    highest = max(1.0, np.nanmax(mistaken))
    edges = np.arange(count + 1) - 0.5  # of the cells, whose centres are 0, 1, ...
    names = [_fit(name, 4) for name in classes]
    longest = max(map(len, names))
    upright = {"rotation": 90} if count * longest > 80 else {}
    figure, axis = new_figure(6.6 + (0.07 * longest if upright else 0))
    lines = {"edgecolors": "white", "linewidth": 1} if count <= 50 else {}
    mesh = axis.pcolormesh(edges, edges, mistaken, cmap="Blues", vmin=0, vmax=highest, **lines)
    figure.colorbar(mesh, label="% of the true class taken for another", shrink=0.8).outline.set_visible(False)
    for row, column in np.argwhere(percent >= 0.05) if count <= MOST_CELLS else ():
        value, correct = percent[row, column], row == column
        axis.text(
            column,
            row,
            f"{value:.1f}" if value < 99.95 else "100",
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold" if correct else "normal",
            color="white" if not correct and value > 0.6 * highest else "black",
        )
    _name_ticks(axis.xaxis, names, most=30, **upright)
    _name_ticks(axis.yaxis, names, most=30)
    axis.set_aspect("equal")
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    axis.grid(False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    _headline(figure, "Confusion matrix, percent of each true class (diagonal: correct)")
    return figure


@styled
def class_accuracy(accuracies: np.ndarray, classes: Sequence[str], mean: float) -> Figure:
    """Accuracy by class as bars, best at the top, with the overall accuracy as a line.

    Args:
        accuracies: (C,) percent; NaN or None for a class without images.
        classes: C names.
        mean: overall accuracy, percent.
    """
    values = np.array(accuracies, dtype=float)
    order = np.argsort(np.nan_to_num(values, nan=-1.0), kind="stable")[::-1]
    figure, axis = new_figure(np.clip(0.9 + 0.3 * len(order), 2, 9))
    bars = np.nan_to_num(values[order])
    axis.barh(np.arange(len(order)), bars, color=np.where(bars >= mean, BLUE, ORANGE), height=0.72)
    axis.axvline(mean, color="black", ls="--", lw=1.2)
    _name_ticks(axis.yaxis, [f"{_fit(classes[i], 4)}  {_percent(values[i])}" for i in order], most=50)
    axis.set_ylim(len(order) - 0.4, -0.6)  # the first on top
    axis.set_xlim(0, 100)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axis.set_xlabel("test accuracy")
    axis.set_title(f"Accuracy by class (dashed: overall {mean:.2f}%; orange: below it)")
    return figure


def _percent(value: float) -> str:
    return "no images" if np.isnan(value) else f"{value:.1f}%"


@styled
def effects(
    names: Sequence[str],
    means: Sequence[float],
    errors: Sequence[float | None],
    seeds: Sequence[Sequence[float]],
    *,
    title: str,
    xlabel: str,
    reference: int | None = None,
    decimals: int = 1,
) -> Figure:
    """A row for every variant: the mean with its error bar, and below it each seed as a grey dot.

    Args:
        names: V strings, the first on top.
        means: V values: percent with a ``reference``, else differences in points.
        errors: half the length of each error bar, None for no bar; ``xlabel`` says what they are (a standard deviation,
            a standard error).
        seeds: V sequences of single runs' values; an empty one where only the mean is to be shown.
        title: over the whole.
        xlabel: what is measured.
        reference: number of the row that the others are compared with, drawn in orange, and a dashed line through its
            mean; None where the values are differences, whose dashed line is at 0.
        decimals: of the ticks.
    """
    figure, axis = new_figure(1.1 + 0.27 * len(names))
    base, color, form = (0, GREY, "{x:+.%df}") if reference is None else (means[reference], ORANGE, "{x:.%df}%%")
    axis.axvline(base, color=color, ls="--", lw=1.2)
    axis.xaxis.set_major_formatter(form % decimals)
    for row, (mean, error, values) in enumerate(zip(means, errors, seeds)):
        color = ORANGE if row == reference else BLUE
        axis.plot(values, [row + 0.25] * len(values), "o", color=GREY, mec="none", alpha=0.7, ms=4)
        axis.errorbar(mean, row, xerr=error, fmt="o", color=color, ms=6, capsize=3, lw=1.6, zorder=3)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(xlabel)
    axis.set_title(title)
    return figure


@styled
def scaling(curves: dict[str, Sequence[dict[str, float]]]) -> Figure:
    """How cost grows, on log axes: seconds above and peak memory below, a column for each curve.

    Args:
        curves: by title, the points measured, smallest first: each with ``images``, ``batch_size``, ``seconds``,
            ``peak_memory_mib`` and ``images_mib`` (MiB of the images themselves). A curve is drawn against ``images``,
            or against ``batch_size`` where its points differ in that.
    """
    figure, axes = new_figure(5.4, 2, len(curves), sharex="col", squeeze=False)
    for (title, points), above, below in zip(curves.items(), *axes):
        column = {name: np.array([point[name] for point in points], dtype=float) for name in points[0]}
        by_batch = len(set(column["batch_size"])) > 1
        x, seconds, memory = (
            column["batch_size" if by_batch else "images"],
            column["seconds"],
            column["peak_memory_mib"],
        )
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


# --- the network --------------------------------------------------------------------------------------------------------


@styled
def gradient_norms(panels: dict[str, dict[str, np.ndarray]]) -> Figure:
    """The size of the gradient at the input of every block, on a log axis, one panel a setting, two panels a row.

    Args:
        panels: by panel title, by curve name, (blocks + 1,) norms; a curve whose name holds "skip" is drawn in blue.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(3.2 * rows, rows, columns, squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for name, norms in curves.items():
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
def block_diagram(stages: Sequence[tuple[str, str, str, bool]]) -> Figure:
    """The network as a row of boxes, skip connections as arcs.

    Args:
        stages: (name, what is inside, output shape, has a residual block), input first.
    """
    figure, axis = new_figure(2.9)
    axis.set_axis_off()
    axis.set_xlim(-0.55, len(stages) - 0.45)
    axis.set_ylim(-1.25, 1.35)
    half_width, half_height = 0.41, 0.62
    corner = "round,pad=0,rounding_size=0.06"
    arrow = {"arrowstyle": "->", "color": "#333333", "lw": 1.2}
    arc = {"arrowstyle": "->", "color": BLUE, "lw": 1.6, "connectionstyle": "arc3,rad=-0.55"}
    centred = {"ha": "center", "va": "center"}
    for x, (name, inside, shape, residual) in enumerate(stages):
        color, face = (BLUE, "#E6F1F8") if residual else (GREY, "#F2F2F2")
        origin = (x - half_width, -half_height)
        axis.add_patch(
            FancyBboxPatch(origin, 2 * half_width, 2 * half_height, boxstyle=corner, fc=face, ec=color, lw=1.3)
        )
        axis.text(x, 0.42, name, fontweight="bold", color=color, **centred)
        axis.text(x, -0.12, inside, fontsize=8.5, linespacing=1.35, **centred)
        axis.text(x, -half_height - 0.2, shape, fontsize=9, color="#333333", **centred)
        if x:
            axis.annotate("", (x - half_width, 0), (x - 1 + half_width, 0), arrowprops=arrow)
        if residual:
            axis.annotate("", (x + 0.3, half_height), (x - 0.3, half_height), arrowprops=arc)
            axis.text(x, half_height + 0.42, "x + R(x)", color=BLUE, fontsize=9, **centred)
    axis.text(-0.55, -1.15, "below each box: channels × height × width of its output", fontsize=8.5, color="#555555")
    return figure


def curves(panels: dict[str, dict[str, np.ndarray]], x_label: str, y_label: str, x: np.ndarray | None = None) -> Figure:
    """Named curves on one pair of axes or several side by side, all with the same scale.

    Args:
        panels: by panel title, by curve name, (S,) values or (R, S) of R repetitions: their mean, and their range shaded.
        x_label, y_label: of the axes.
        x: (S,) where the values lie; None: at 1, 2, ..., S, each marked with a dot.
    """
    colors = (GREY, BLUE) if x is not None else (BLUE, ORANGE, GREEN, RED)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(3.5, 1, len(panels), squeeze=False, sharey=True)
        for axis, (title, named) in zip(axes[0], panels.items()):
            for color, (name, values) in zip(colors, named.items()):
                values = np.atleast_2d(values)
                at = np.arange(1, values.shape[1] + 1) if x is None else x
                axis.plot(at, values.mean(axis=0), color=color, marker="o" if x is None else "", ms=3, label=name)
                axis.fill_between(at, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)
            axis.set_title(title)
            axis.set_xlabel(x_label)
            axis.set_ylim(bottom=0)
            axis.legend()
        axes[0, 0].set_ylabel(y_label)
    return figure
