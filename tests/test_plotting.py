"""Figures: everything a reader looks for is there and legible."""

import colorsys
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from utils import plotting

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
CLASSES = ("plane", "car", "bird")
LONG = tuple(f"Staffordshire bull terrier {number}" for number in range(12))
LRS = np.logspace(-6, 0, 100)
SUGGESTIONS = {"onset": 2e-5, "steepest": 3.5e-4, "valley": 1e-4, "minimum/10": 3.4e-4, "minimum": 3.4e-3}


PLAIN_STAGE = ("layer2", "conv 3×3\nmax-pool\nBN · ReLU", "", "256×8×8", False)
RESIDUAL_STAGE = ("layer1", "conv 3×3\nmax-pool\nBN · ReLU", "2 ×\nconv 3×3\nBN · ReLU", "128×16×16", True)


def words_of(figure: Figure) -> list[Text]:
    """Every visible text, laid out."""
    figure.draw_without_rendering()
    found = list(figure.texts)
    for axis in figure.axes:
        if not axis.axison:
            found += axis.texts
            continue
        found += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        found += axis.get_legend().get_texts() if axis.get_legend() else []
        for ticked, (low, high) in ((axis.xaxis, sorted(axis.get_xlim())), (axis.yaxis, sorted(axis.get_ylim()))):
            found += [label for label, at in zip(ticked.get_ticklabels(), ticked.get_ticklocs()) if low <= at <= high]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in words_of(figure))


def mistakes(count: int, answer: str = "cat") -> Figure:
    return plotting.misclassified(PICTURES[:count], [answer] * count, ["dog"] * count, [0.97] * count, [0.015] * count)


def range_test(lr_min: float = 3.5e-4, lr_max: float = 3.4e-3) -> Figure:
    losses = 2.3 - 0.7 / (1 + np.exp(-(np.log10(LRS) + 3.4) * 2)) + np.maximum(np.log10(LRS) + 2.3, 0) ** 2
    return plotting.lr_range_test(LRS, losses, losses, SUGGESTIONS, lr_min, lr_max)


def cycle(epochs: int, peak: int) -> Figure:
    lrs = np.interp(np.arange(10 * epochs), [0, 10 * peak - 1, 10 * epochs - 1], [8e-4, 8e-3, 8e-4])
    return plotting.one_cycle(lrs, epochs, peak, beta1s=np.full(len(lrs), 0.9), annihilated=lrs / 2)


def curves(epochs: int, peak: int, best: float, every: int = 1) -> Figure:
    shape = 1 - np.exp(-np.arange(1, epochs + 1) / epochs * 4)
    tested = [value if (epoch + 1) % every == 0 else None for epoch, value in enumerate(best * shape)]
    losses = [None if value is None else 2.3 - value / 50 for value in tested]
    return plotting.training_curves(2.3 - 2 * shape, losses, best * shape**2, tested, peak)


def heatmap(classes) -> Figure:
    return plotting.confusion_heatmap(RNG.integers(1, 9, (len(classes),) * 2), classes)


def experiment() -> Figure:
    seeds = [[0.7, 0.8, 0.9], [-1.3], []]
    names = ["flip", "half width", "cutout"]
    return plotting.effects(names, [0.8, -1.3, -0.2], [0.1, None, 0.1], seeds, title="Ablations", xlabel="points")


PANELS = {"plain": {"20": RNG.random((3, 4)), "56": RNG.random(4)}, "residual": {"20": 2 * RNG.random((3, 4))}}


def costs() -> Figure:
    def point(images: int, batch_size: int) -> dict:
        costs = {"seconds": images / 300, "peak_memory_mib": 900, "images_mib": images / 9}
        return {"images": images, "batch_size": batch_size, **costs}

    by_count = [point(128 * 2**step, 128) for step in range(4)]
    by_batch = [point(64 * 2**step, 64 * 2**step) for step in range(5)]
    return plotting.scaling({"training, by image count": by_count, "step, by batch size": by_batch})


FIGURES = {
    "class accuracy, published": lambda: plotting.class_accuracy(np.linspace(86, 97, 12), LONG, 94.2),
    "class accuracy, quick": lambda: plotting.class_accuracy(np.array([5, 48.0, None]), CLASSES, 26.5),
    "class accuracy, many classes": lambda: plotting.class_accuracy(RNG.random(200) * 100, LONG * 17, 50),
    "confusion, long names": lambda: heatmap(LONG),
    "confusion, many classes": lambda: heatmap(LONG * 17),
    "range test": range_test,
    "range test, wide range": lambda: range_test(LRS[3], LRS[-3]),
    "cycle, published": lambda: cycle(24, 5),
    "cycle, quick": lambda: cycle(6, 2),
    "cycle, late peak": lambda: cycle(6, 5),
    "curves, published": lambda: curves(24, 5, 94),
    "curves, quick": lambda: curves(6, 2, 45, every=2),
    "mistakes, long names": lambda: mistakes(12, LONG[0]),
    "grid, long names": lambda: plotting.image_grid(PICTURES, LONG, "Test images"),
    "filters": lambda: plotting.filter_grid(np.eye(27).reshape(27, 3, 3, 3), "The first filters"),
    "maps": lambda: plotting.activation_maps(PICTURES[:8], np.ones((8, 32, 32)), LONG, LONG[::-1], "Evidence"),
    "effects": experiment,
    "panels": lambda: plotting.curves(PANELS, "epoch", "train error in percent"),
    "gradient norms": lambda: plotting.gradient_norms(
        {title: {"plain": np.logspace(-18, -2, 21), "with skips": np.full(21, 0.1)} for title in ("a", "b", "c")}
    ),
    "augmentation, long names": lambda: plotting.augmentation_grid(
        PICTURES[:10], np.stack([PICTURES[:10]] * 2), LONG, "Train images"
    ),
    "scaling": costs,
    "diagram": lambda: plotting.block_diagram([PLAIN_STAGE, RESIDUAL_STAGE] * 2 + [PLAIN_STAGE] * 3),
}


@pytest.mark.parametrize("name", FIGURES)
def test_words_are_apart_from_each_other_and_large_enough_at_700_pixels(name):
    figure = FIGURES[name]()
    found = words_of(figure)
    assert len(found) < 300
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    crossing = [(a, b) for (a, first), (b, second) in itertools.combinations(boxes, 2) if first.overlaps(second)]
    assert not crossing
    assert [text for text, box in boxes if box.x0 < -1 or box.x1 > figure.bbox.x1 + 1] == []
    assert min(text.get_fontsize() for text in found) * 700 / (72 * plotting.WIDTH) >= 8


@pytest.mark.parametrize(("name", "least"), [("curves, published", 2), ("curves, quick", 2), ("cycle, late peak", 1)])
def test_no_legend_lies_on_a_curve(name, least):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    legends = [(axis, axis.get_legend().get_window_extent()) for axis in figure.axes if axis.get_legend()]
    assert len(legends) == least
    for axis, box in legends:
        for line in axis.lines[:2]:
            assert not box.count_contains(axis.transData.transform(line.get_xydata()))


@pytest.mark.parametrize(("name", "degrees"), [("RED", (-10, 20)), ("ORANGE", (28, 45)), ("BLUE", (195, 230))])
def test_colours_are_what_the_words_call_them(name, degrees):
    hue = 360 * colorsys.rgb_to_hsv(*to_rgb(getattr(plotting, name)))[0]
    assert degrees[0] <= (hue - 360 if hue > 340 else hue) <= degrees[1]


def test_class_names_are_drawn_as_they_are():
    classes = ("under_$10$", r"$\frac$", "a{b}_c^")
    for figure in (
        heatmap(classes),
        plotting.class_accuracy(np.array([90.0, 80.0, 70.0]), classes, 80),
        plotting.misclassified(PICTURES[:3], classes, classes[::-1], [0.9] * 3, [0.1] * 3),
        plotting.image_grid(PICTURES[:3], classes, "grid"),
    ):
        words = texts(figure)
        assert all(name in words for name in classes)


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_misclassified_works_for_any_count(count):
    figure = mistakes(count)
    words = texts(figure)
    assert words.count("cat 97%") == words.count("is dog (1.5%)") == count
    assert ("No mistakes" in words) == (count == 0)
    assert ("predicted in red, truth below" in words) == (count > 0)
    assert all(text.get_color() == plotting.RED for text in words_of(figure) if "cat" in text.get_text())


def test_pictures_are_drawn_pixel_by_pixel_without_ticks():
    for figure, count in ((mistakes(3), 3), (plotting.image_grid(PICTURES, ["x"] * 12, "grid"), 12)):
        shown = [axis for axis in figure.axes if axis.images]
        assert len(shown) == count
        for axis in shown:
            assert axis.images[0].get_interpolation() == "nearest"
            assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0


def test_filters_are_pictures_in_which_grey_is_zero():
    filters = np.zeros((20, 3, 3, 3))
    filters[0, 2, 0, 1], filters[19, 0, 2, 0] = 0.5, -0.25  # blue in the first row, red in the last
    shown = [axis.images[0].get_array() for axis in plotting.filter_grid(filters, "filters").axes if axis.images]
    assert len(shown) == 20
    assert shown[0][0, 1].tolist() == [0.5, 0.5, 1.0]
    assert shown[19][2, 0].tolist() == [0.25, 0.5, 0.5]
    assert np.all(shown[1] == 0.5)


def test_range_test_marks_every_rule_in_its_own_row_and_those_in_use_in_red():
    figure = range_test()
    words = texts(figure)
    for expected in ("LRMIN 3.5e-04", "LRMAX 3.4e-03", "learning rate (log scale)"):
        assert expected in words
    rules = figure.axes[1]
    assert rules.get_xscale() == "log"
    markers = [line for line in rules.lines if line.get_marker() == "o"]
    for (name, lr), line, row in zip(SUGGESTIONS.items(), markers, rules.get_yticks(), strict=True):
        assert f"{name} {lr:.1e}" in words
        assert line.get_xydata().tolist() == [[lr, row]]
        assert (line.get_color() == plotting.RED) == (name in ("steepest", "minimum"))
    heights = [rules.transData.transform(line.get_xydata())[0, 1] for line in markers]
    assert np.diff(np.sort(heights)).min() > markers[0].get_markersize() * figure.dpi / 72  # no marker hides another


@pytest.mark.parametrize(("low", "high"), [(7e-6, 1.4e-1), (4.8e-6, 3.4e-3), (LRS[0], LRS[-1])])
def test_the_names_of_the_range_stay_on_their_axis(low, high):
    figure = range_test(low, high)
    axis = figure.axes[0]
    figure.draw_without_rendering()
    within = axis.get_window_extent()
    for text in axis.texts:
        box = text.get_window_extent()
        assert within.x0 < box.x0 < box.x1 < within.x1, text.get_text()


@pytest.mark.parametrize(("epochs", "peak"), [(24, 5), (6, 2), (6, 5)])
def test_one_cycle_names_peak_and_ends_beside_their_lines(epochs, peak):
    figure = cycle(epochs, peak)
    words = texts(figure)
    for expected in (f"LRMAX 8.0e-03 at the end of epoch {peak}", "β₁", "annihilation (not used)"):
        assert expected in words
    axis = figure.axes[0]
    label = next(text for text in axis.texts if text.get_text() == "LRMIN 8.0e-04 at both ends")
    box, line = label.get_window_extent(), axis.transData.transform((0, 8e-4))[1]
    assert 0 <= box.y0 - line < 12  # pixels: on its line
    used = next(curve for curve in axis.lines if curve.get_label() == "one cycle, no annihilation")
    assert not box.count_contains(axis.transData.transform(used.get_xydata()))


def test_training_curves_overlay_train_and_test_and_skip_untested_epochs():
    figure = plotting.training_curves([2, 1, 0.5], [1.8, None, 0.9], [30, 60, 65], [40, None, 71.25], peak_epoch=2)
    words = texts(figure)
    for expected in ("train (augmented), last 65.00%", "test, last 71.25%", "test, last 0.900", "the LR peaks"):
        assert expected in words
    for axis in figure.axes:
        train, test, peak = axis.lines
        assert list(train.get_xdata()) == [1, 2, 3]
        assert list(test.get_xdata()) == [1, 3]
        assert set(peak.get_xdata()) == {2}


def test_panels_share_scale_and_colours_and_show_mean_and_range_of_repetitions():
    left, right = plotting.curves(PANELS, "epoch", "percent").axes
    assert left.get_ylim() == right.get_ylim()
    assert left.lines[0].get_color() == right.lines[0].get_color() != left.lines[1].get_color()
    assert np.allclose(left.lines[0].get_ydata(), PANELS["plain"]["20"].mean(axis=0))
    assert left.collections[0].get_datalim(left.transData).ymax == pytest.approx(PANELS["plain"]["20"].max())
    many = plotting.curves({"": {str(depth): np.ones(3) for depth in range(6)}}, "epoch", "percent").axes[0]
    assert len(many.lines) == 6


def test_the_curve_compared_with_shows_where_another_covers_it():
    same = {"found": np.ones(3), "yours": np.ones(3)}
    found, yours = plotting.curves({"": same}, "epoch", "learning rate", x=np.arange(3)).axes[0].lines
    assert found.get_linewidth() > 2 * yours.get_linewidth()


def test_confusion_heatmap_shows_percent_of_the_true_class():
    words = texts(plotting.confusion_heatmap(np.array([[8, 2, 0], [0, 10, 0], [0, 0, 0]]), CLASSES))
    for expected in ("80.0", "20.0", "100", "plane", "predicted", "true"):
        assert expected in words


def test_class_accuracy_bars_start_at_zero_and_name_the_overall_and_the_classes_without_images():
    figure = plotting.class_accuracy(np.array([90.0, None, 95.0]), CLASSES, mean=92.5)
    axis = figure.axes[0]
    assert axis.get_xlim()[0] == 0
    assert [bar.get_width() for bar in axis.patches] == [95, 90, 0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["bird  95.0%", "plane  90.0%", "car  no images"]
    assert "dashed: overall 92.50%; orange: below it" in texts(figure)
    assert set(axis.lines[0].get_xdata()) == {92.5}
    colors = [bar.get_facecolor()[:3] for bar in axis.patches]
    assert colors[:2] == [to_rgb(plotting.BLUE), to_rgb(plotting.ORANGE)]


def test_effects_show_every_seed_as_a_difference_from_zero():
    figure = experiment()
    axis = figure.axes[0]
    assert {(0, 0), (0.7, 0.8, 0.9), (-1.3,)} <= {tuple(line.get_xdata()) for line in axis.lines}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["flip", "half width", "cutout"]
    bottom, top = axis.get_ylim()
    assert bottom > top  # the first row on top
    assert "+0.5" in texts(figure)


def test_scaling_is_on_log_axes_against_what_varies():
    figure = costs()
    for axis in figure.axes:
        assert axis.get_xscale() == axis.get_yscale() == "log"
    assert [axis.get_xlabel() for axis in figure.axes[2:]] == ["images", "batch size"]


def test_block_diagram_draws_every_block_and_the_sum_where_there_is_a_skip():
    stages = [PLAIN_STAGE, RESIDUAL_STAGE, (*RESIDUAL_STAGE[:-1], False)]
    words = texts(plotting.block_diagram(stages))
    assert words.count("x + R(x)") == 1
    assert words.count(RESIDUAL_STAGE[2]) == 2


def test_a_saved_figure_is_a_png_wide_enough_for_a_readme(tmp_path):
    plotting.save_figure(mistakes(2), tmp_path / "new" / "mis.png")
    with Image.open(tmp_path / "new" / "mis.png") as image:
        assert image.format == "PNG"
        assert image.width >= 1200
