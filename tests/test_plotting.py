"""Figures: what a reader must find in them."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from utils import plotting

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
CLASSES = ("plane", "car", "bird")


def texts(figure: Figure) -> str:
    """Every visible word of a figure."""
    found = [figure._suptitle.get_text()] if figure._suptitle else []
    for axis in figure.axes:
        found += [axis.get_title(loc) for loc in ("left", "center")] + [axis.get_xlabel(), axis.get_ylabel()]
        found += [text.get_text() for text in axis.texts]
        found += [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []
        found += [label.get_text() for label in (*axis.get_xticklabels(), *axis.get_yticklabels())]
    return "\n".join(found)


def mistakes(count: int) -> Figure:
    return plotting.misclassified(PICTURES[:count], ["cat"] * count, ["dog"] * count, [0.97] * count, [0.015] * count)


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_misclassified_works_for_any_count(count):
    words = texts(mistakes(count))
    assert words.count("cat 97%") == count
    assert words.count("is dog (1.5%)") == count
    assert ("No mistakes" in words) == (count == 0)


def test_pictures_are_drawn_pixel_by_pixel_without_ticks():
    for figure in (mistakes(3), plotting.image_grid(PICTURES, ["x"] * 12, "grid")):
        shown = [axis for axis in figure.axes if axis.images]
        assert len(shown) in (3, 12)
        for axis in shown:
            assert axis.images[0].get_interpolation() == "nearest"
            assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0


def test_range_test_marks_every_rule_and_the_range_on_a_log_axis():
    lrs = np.logspace(-6, 0, 50)
    losses = 2.3 + RNG.normal(0, 0.01, 50)
    figure = plotting.lr_range_test(lrs, losses, losses, {"steepest": 1e-4, "minimum": 1e-2}, 1e-4, 1e-2)
    words = texts(figure)
    assert figure.axes[0].get_xscale() == "log"
    for expected in ("steepest: 1.0e-04", "minimum: 1.0e-02", "LRMIN 1.0e-04", "LRMAX 1.0e-02", "learning rate"):
        assert expected in words


def test_one_cycle_names_peak_and_ends_and_shows_beta1():
    lrs = np.interp(np.arange(60), [0, 19, 59], [1e-3, 1e-2, 1e-3])
    words = texts(plotting.one_cycle(lrs, 6, 2, beta1s=np.full(60, 0.9), annihilated=lrs / 2))
    assert "LRMAX 1.0e-02 at the end of epoch 2" in words
    assert words.count("LRMIN 1.0e-03") == 2
    assert "β₁" in words
    assert "annihilation (not used)" in words


def test_training_curves_overlay_train_and_test_and_mark_the_peak():
    figure = plotting.training_curves([2, 1], [1.8, 0.9], [30, 60], [40, 71.25], peak_epoch=1)
    words = texts(figure)
    assert "train (augmented)" in words
    assert "LR peaks" in words
    assert "71.25%" in words
    for axis in figure.axes:
        curves = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
        assert len(curves) == 2
        assert axis.get_xlabel() == "epoch"


def test_confusion_heatmap_shows_percent_of_the_true_class():
    words = texts(plotting.confusion_heatmap(np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]]), CLASSES))
    for expected in ("80.0", "20.0", "100.0", "plane", "predicted", "true"):
        assert expected in words


def test_class_accuracy_bars_start_at_zero_and_show_the_overall():
    figure = plotting.class_accuracy(np.array([90.0, 95.0, np.nan]), CLASSES, mean=92.5)
    axis = figure.axes[0]
    assert axis.get_xlim()[0] == 0
    assert [bar.get_width() for bar in axis.patches] == [0, 90, 95]
    assert "overall 92.50%" in texts(figure)


def test_block_diagram_draws_an_arc_for_each_residual_block():
    stages = [("input", "image", "3×32×32", False), ("layer1", "conv", "128×16×16", True)]
    words = texts(plotting.block_diagram(stages))
    assert words.count("x + R(x)") == 1
    assert "128×16×16" in words


def test_a_saved_figure_is_a_png_wide_enough_for_a_readme(tmp_path):
    path = plotting.save_figure(mistakes(2), tmp_path / "new" / "mis.png")
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.format == "PNG"
        assert image.width >= 1200
