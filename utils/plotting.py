"""Arrays in, matplotlib Figures out: no torch, no training, no files read.

One look for all: white ground (readable on a dark page too), Okabe and Ito's colour-blind-safe colours, 32x32 pictures
drawn pixel by pixel with no smoothing and no ticks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe & Ito, *Color Universal Design* (2008).
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"

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
    "lines.linewidth": 1.8,
    "image.interpolation": "nearest",
}
WIDTH = 8.5  # inches; at 150 dpi a little more than a README is wide
DPI = 150


def new_figure(height: float, rows: int = 1, columns: int = 1, **options):
    """A Figure outside pyplot's registry, so that notebooks show it once and nothing piles up in memory.

    Args:
        height: in inches; the width is ``WIDTH``.
        rows, columns, **options: as for ``Figure.subplots``.

    Returns:
        ``(figure, axes)``, as from ``pyplot.subplots``.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
        axes = figure.subplots(rows, columns, **options)
    return figure, axes


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG, creating the folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _show_picture(axis, picture: np.ndarray, title: str = "", color: str = "black") -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=8.5, fontweight="normal", loc="center", color=color, pad=3)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def image_grid(pictures: np.ndarray, titles: Sequence[str], title: str, columns: int = 10) -> Figure:
    """A grid of pictures with a word over each.

    Args:
        pictures: (N, H, W, 3) uint8, N at least 1.
        titles: N strings.
        title: over the whole.
        columns: pictures a row.
    """
    rows = -(-len(pictures) // columns)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(0.4 + 1.06 * rows * 10 / columns, rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, picture, word in zip(axes.flat, pictures, titles):
            axis.set_axis_on()
            _show_picture(axis, picture, word)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def augmentation_grid(originals: np.ndarray, augmented: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Each original above several augmented versions of it.

    Args:
        originals: (N, H, W, 3) uint8.
        augmented: (V, N, H, W, 3) uint8, V versions of each.
        names: N class names.
        title: over the whole.
    """
    versions, count = augmented.shape[:2]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(0.5 + 1.0 * (versions + 1) * 8 / count, versions + 1, count, squeeze=False)
        for column in range(count):
            _show_picture(axes[0, column], originals[column], names[column])
            for row in range(versions):
                _show_picture(axes[row + 1, column], augmented[row, column])
        axes[0, 0].set_ylabel("original", fontsize=9)
        for row in range(versions):
            axes[row + 1, 0].set_ylabel(f"epoch {row + 1}", fontsize=9)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def step_by_step(stages: Sequence[tuple[str, np.ndarray]], title: str) -> Figure:
    """What each augmentation step does to one picture: ``stages`` are (name, (H, W, 3) uint8), in order."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(1.9, 1, len(stages), squeeze=False)
        for axis, (name, picture) in zip(axes[0], stages):
            _show_picture(axis, picture, f"{name}\n{picture.shape[0]}×{picture.shape[1]}")
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def lr_range_test(
    lrs: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    suggestions: dict[str, float],
    lr_min: float,
    lr_max: float,
) -> Figure:
    """The range test's curve on a log axis, the range found shaded, every suggestion marked.

    Args:
        lrs, losses, smoothed: (S,) each.
        suggestions: LR by rule name.
        lr_min, lr_max: the range in use.
    """
    with mpl.rc_context(STYLE):
        figure, axis = new_figure(4.2)
        axis.axvspan(lr_min, lr_max, color=BLUE, alpha=0.10, lw=0)
        axis.plot(lrs, losses, color=GREY, lw=0.8, alpha=0.7, label="loss of each batch")
        axis.plot(lrs, smoothed, color=BLUE, label="smoothed")
        markers = dict(zip(suggestions, ("v", "D", "s", "o", "^", "P")))
        for name, lr in suggestions.items():
            height = float(np.interp(np.log(lr), np.log(lrs), smoothed))
            axis.plot(lr, height, markers[name], color=RED, ms=8, mec="white", label=f"{name}: {lr:.1e}", zorder=3)
        top = float(np.median(losses[:10])) * 1.35
        axis.set_ylim(min(losses.min(), smoothed.min()) * 0.92, top)
        for name, lr, side in (("LRMIN", lr_min, "right"), ("LRMAX", lr_max, "left")):
            axis.axvline(lr, color=BLUE, lw=1, ls="--")
            axis.annotate(
                f"{name} {lr:.1e}",
                (lr, top),
                xytext=(-5 if side == "right" else 5, -4),
                textcoords="offset points",
                ha=side,
                va="top",
                color=BLUE,
                fontsize=9,
                fontweight="bold",
            )
        axis.set_xscale("log")
        axis.set_xlabel("learning rate (log scale)")
        axis.set_ylabel("training loss")
        axis.set_title("LR range test: the cycle runs over the shaded range")
        axis.legend(loc="lower left", fontsize=8.5)
    return figure


def one_cycle(
    lrs: np.ndarray,
    epochs: int,
    peak_epoch: int,
    beta1s: np.ndarray | None = None,
    annihilated: np.ndarray | None = None,
) -> Figure:
    """The LR of every step against the epoch, its peak marked.

    Args:
        lrs: (steps,) LR of every step.
        epochs: length of the cycle.
        peak_epoch: where the peak lies.
        beta1s: (steps,) Adam's beta1, or None to leave it out.
        annihilated: (steps,) the cycle that the assignment leaves out, for comparison.
    """
    epoch = (np.arange(len(lrs)) + 1) * epochs / len(lrs)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(
            3.6 if beta1s is None else 4.8,
            1 if beta1s is None else 2,
            squeeze=False,
            sharex=True,
            **({} if beta1s is None else {"height_ratios": (3, 1)}),
        )
        axis = axes[0, 0]
        if annihilated is not None:
            axis.plot(epoch, annihilated, color=ORANGE, ls="--", lw=1.4, label="with annihilation (not used)")
        axis.plot(epoch, lrs, color=BLUE, label="one cycle, no annihilation")
        peak = int(np.argmax(lrs))
        axis.plot(epoch[peak], lrs[peak], "o", color=RED, zorder=3)
        axis.annotate(
            f"LRMAX {lrs[peak]:.1e} at the end of epoch {peak_epoch}",
            (epoch[peak], lrs[peak]),
            xytext=(10, -2),
            textcoords="offset points",
            color=RED,
            fontsize=9,
            fontweight="bold",
        )
        axis.annotate(f"LRMIN {lrs[0]:.1e}", (epoch[0], lrs[0]), xytext=(8, -3), textcoords="offset points", fontsize=9)
        axis.annotate(
            f"LRMIN {lrs[-1]:.1e}",
            (epoch[-1], lrs[-1]),
            xytext=(0, 42),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        axis.set_ylabel("learning rate")
        axis.set_title("One cycle: the learning rate of every step")
        axis.set_ylim(0, lrs.max() * 1.12)
        if annihilated is not None:
            axis.legend(loc="upper right", fontsize=9)
        if beta1s is not None:
            axes[1, 0].plot(epoch, beta1s, color=GREEN)
            axes[1, 0].set_ylabel("Adam's β₁")
            axes[1, 0].set_ylim(0.83, 0.97)
        axes[-1, 0].set_xlabel("epoch")
        axes[-1, 0].set_xlim(0, epochs)
        axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    return figure


def training_curves(
    train_loss: Sequence[float],
    test_loss: Sequence[float],
    train_accuracy: Sequence[float],
    test_accuracy: Sequence[float],
    peak_epoch: int,
) -> Figure:
    """Loss and accuracy after each epoch, train and test overlaid, the peak of the LR marked.

    Args:
        train_loss, test_loss: mean cross-entropy per image.
        train_accuracy, test_accuracy: percent.
        peak_epoch: counted from 1.
    """
    epochs = np.arange(1, len(train_loss) + 1)
    with mpl.rc_context(STYLE):
        figure, (left, right) = new_figure(3.7, 1, 2)
        for axis, train, test, name in (
            (left, train_loss, test_loss, "Cross-entropy"),
            (right, train_accuracy, test_accuracy, "Accuracy"),
        ):
            axis.plot(epochs, train, color=ORANGE, marker="o", ms=3, label="train (augmented)")
            axis.plot(epochs, test, color=BLUE, marker="o", ms=3, label="test")
            axis.axvline(peak_epoch, color=GREY, lw=1, ls="--")
            axis.annotate(
                "LR peaks",
                (peak_epoch, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -3),
                textcoords="offset points",
                va="top",
                color=GREY,
                fontsize=9,
            )
            axis.set_title(name)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        if len(epochs) > 2 * peak_epoch:  # the first epochs would squeeze all that follows into the top of the axis
            low = 5 * (min(*train_accuracy[peak_epoch - 1 :], *test_accuracy[peak_epoch - 1 :]) // 5 - 1)
            right.set_ylim(low, 100)
            right.set_title(f"Accuracy (axis starts at {low:.0f}%)")
        right.annotate(
            f"{test_accuracy[-1]:.2f}%",
            (epochs[-1], test_accuracy[-1]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            color=BLUE,
            fontsize=9,
            fontweight="bold",
        )
        left.legend(loc="upper right", bbox_to_anchor=(1, 0.93), fontsize=9)
    return figure


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
    count = len(pictures)
    rows = max(1, -(-count // columns))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(0.5 + 1.95 * rows if count else 1.5, rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, picture, wrong, right, p_wrong, p_right in zip(
            axes.flat, pictures, predicted, true, predicted_probability, true_probability
        ):
            axis.set_axis_on()
            _show_picture(axis, picture)
            axis.set_title(f"{wrong} {p_wrong:.0%}", fontsize=9.5, color=RED, loc="center", fontweight="bold", pad=3)
            axis.set_xlabel(f"is {right} ({p_right:.1%})", fontsize=9, labelpad=3)
        words = "Most confident mistakes: the answer in red, the truth below" if count else "No mistakes to show"
        figure.suptitle(words, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def confusion_heatmap(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """The confusion matrix in percent of each true class; the diagonal is left uncoloured so that mistakes show.

    Args:
        matrix: (C, C) counts, true classes down, predicted across.
        classes: C names.
    """
    totals = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    percent = 100.0 * matrix / totals
    diagonal = np.eye(len(matrix), dtype=bool)
    labels = np.array([[f"{value:.1f}" if value >= 0.05 else "" for value in row] for row in percent])
    with mpl.rc_context(STYLE):
        figure, axis = new_figure(6.6)
        sns.heatmap(
            np.where(diagonal, np.nan, percent),
            annot=False,
            cmap="Blues",
            vmin=0,
            square=True,
            linewidths=1,
            linecolor="white",
            xticklabels=classes,
            yticklabels=classes,
            ax=axis,
            cbar_kws={"label": "% of the true class taken for another", "shrink": 0.8},
        )
        threshold = np.where(diagonal, 0, percent).max() * 0.6
        for (row, column), text in np.ndenumerate(labels):
            on_diagonal = row == column
            dark = not on_diagonal and percent[row, column] > threshold
            axis.text(
                column + 0.5,
                row + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold" if on_diagonal else "normal",
                color="white" if dark else "black",
            )
        axis.grid(False)  # rc_context cannot: the axes were made under the shared style
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        axis.tick_params(length=0)
        axis.set_title("Confusion matrix, percent of each true class (diagonal: correct)")
    return figure


def class_accuracy(accuracies: np.ndarray, classes: Sequence[str], mean: float) -> Figure:
    """Accuracy by class as bars, best at the top, with the overall accuracy as a line.

    Args:
        accuracies: (C,) percent.
        classes: C names.
        mean: overall accuracy, percent.
    """
    order = np.argsort(np.nan_to_num(accuracies, nan=-1.0), kind="stable")
    with mpl.rc_context(STYLE):
        figure, axis = new_figure(3.9)
        values = np.nan_to_num(accuracies[order])
        axis.barh(np.arange(len(order)), values, color=[BLUE if v >= mean else ORANGE for v in values], height=0.72)
        for position, value in enumerate(values):
            axis.annotate(
                f"{value:.1f}%",
                (value, position),
                xytext=(-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color="white" if value >= mean else "black",
                fontsize=9,
                fontweight="bold",
            )
        axis.axvline(mean, color=GREY, ls="--", lw=1.2)
        axis.annotate(
            f"overall {mean:.2f}%",
            (mean, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            color=GREY,
            fontsize=9,
            ha="center",
        )
        axis.set_yticks(np.arange(len(order)), [classes[i] for i in order])
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, 100)
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axis.set_xlabel("test accuracy")
        axis.set_title("Accuracy by class (orange: below the overall)")
    return figure


def gradient_norms(panels: dict[str, dict[str, np.ndarray]]) -> Figure:
    """The size of the gradient at the input of every block, on a log axis, one panel a setting.

    Args:
        panels: by panel title, by curve name, (blocks + 1,) norms; a curve whose name holds "skip" is drawn in blue.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(3.5, 1, len(panels), squeeze=False)
        for axis, (title, curves) in zip(axes[0], panels.items()):
            for name, norms in curves.items():
                color = BLUE if "skip" in name else ORANGE
                axis.semilogy(np.arange(len(norms)), norms, color=color, marker="o", ms=3)
                # Names where the curves are far apart, at the input, on the side that the curve leaves free.
                offset = (16, -5) if norms[-1] > norms[0] else (10, 7)
                axis.annotate(
                    name, (0, norms[0]), xytext=offset, textcoords="offset points", color=color, fontweight="bold"
                )
            axis.set_title(title)
            axis.set_xlabel("block (0: the network's input)")
            axis.margins(y=0.14)
        axes[0, 0].set_ylabel("norm of the gradient")
    return figure


def block_diagram(stages: Sequence[tuple[str, str, str, bool]]) -> Figure:
    """The network as a row of boxes, skip connections as arcs.

    Args:
        stages: (name, what is inside, output shape, has a residual block), input first.
    """
    with mpl.rc_context(STYLE):
        figure, axis = new_figure(2.9)
        axis.set_axis_off()
        axis.set_xlim(-0.55, len(stages) - 0.45)
        axis.set_ylim(-1.25, 1.35)
        half_width, half_height = 0.41, 0.62
        for position, (name, inside, shape, residual) in enumerate(stages):
            color = BLUE if residual else GREY
            axis.add_patch(
                FancyBboxPatch(
                    (position - half_width, -half_height),
                    2 * half_width,
                    2 * half_height,
                    boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor="#E6F1F8" if residual else "#F2F2F2",
                    edgecolor=color,
                    linewidth=1.3,
                )
            )
            axis.text(position, 0.42, name, ha="center", va="center", fontweight="bold", fontsize=10, color=color)
            axis.text(position, -0.12, inside, ha="center", va="center", fontsize=8, linespacing=1.35)
            axis.text(position, -half_height - 0.2, shape, ha="center", va="center", fontsize=9, color="#333333")
            if position:
                axis.annotate(
                    "",
                    (position - half_width, 0),
                    (position - 1 + half_width, 0),
                    arrowprops={"arrowstyle": "->", "color": "#333333", "lw": 1.2},
                )
            if residual:
                axis.annotate(
                    "",
                    (position + 0.3, half_height),
                    (position - 0.3, half_height),
                    arrowprops={
                        "arrowstyle": "->",
                        "color": BLUE,
                        "lw": 1.6,
                        "connectionstyle": "arc3,rad=-0.55",
                    },
                )
                axis.text(position, half_height + 0.42, "x + R(x)", ha="center", va="center", color=BLUE, fontsize=9)
        axis.text(
            -0.55, -1.15, "below each box: channels × height × width of its output", fontsize=8.5, color="#555555"
        )
    return figure


def activation_maps(
    pictures: np.ndarray, maps: np.ndarray, titles: Sequence[str], colors: Sequence[str], title: str
) -> Figure:
    """Pictures above where the network looked.

    Args:
        pictures: (N, H, W, 3) uint8.
        maps: (N, H, W) float in [0, 1], the evidence for the predicted class.
        titles: N strings.
        colors: N title colours.
        title: over the whole.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(2.75 * 8 / len(pictures), 2, len(pictures), squeeze=False)
        for column, (picture, evidence, word, color) in enumerate(zip(pictures, maps, titles, colors)):
            _show_picture(axes[0, column], picture, word, color)
            _show_picture(axes[1, column], picture)
            axes[1, column].imshow(evidence, cmap="viridis", alpha=0.6, vmin=0, vmax=1, interpolation="nearest")
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
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
