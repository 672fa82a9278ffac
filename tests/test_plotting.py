"""Figures: what a reader looks for is there and legible."""

import itertools
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from utils import plotting
from utils.analysis import Predictions
from utils.config import from_profile
from utils.lr_finder import LRRange
from utils.metrics import History

RNG = np.random.default_rng(0)
CLASSES = ("plane", "car", "bird")
LONG = tuple(f"Staffordshire bull terrier {number}" for number in range(12))
MANY = tuple(f"class {number}" for number in range(100))
LRS = np.logspace(-6, 0, 100)
SUGGESTIONS = {"onset": 2e-5, "steepest": 3.5e-4, "minimum": 3.4e-3}
PANELS = {"plain": {"20": RNG.random((3, 4)), "56": RNG.random(4)}, "with skips": {"20": 2 * RNG.random((3, 4))}}
ROWS = [("half width", -1.3, 0.2, [-1.3]), ("flip", 0.8, 0.1, [0.7, 0.8, 0.9]), ("cutout", -0.2, None, [])]


def words_of(figure: Figure) -> list[Text]:
    """Every visible text, laid out."""
    figure.draw_without_rendering()
    found = list(figure.texts)
    for axis in figure.axes:
        found += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        found += axis.get_legend().get_texts() if axis.get_legend() else []
        for ticked, (low, high) in ((axis.xaxis, sorted(axis.get_xlim())), (axis.yaxis, sorted(axis.get_ylim()))):
            found += [label for label, at in zip(ticked.get_ticklabels(), ticked.get_ticklocs()) if low <= at <= high]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in words_of(figure))


def range_test(lr_min: float = 2e-5, lr_max: float = 3.4e-3) -> Figure:
    losses = 2.3 - 0.7 / (1 + np.exp(-(np.log10(LRS) + 3.4) * 2)) + np.maximum(np.log10(LRS) + 2.3, 0) ** 2
    return plotting.lr_range_test(LRRange(lr_min, lr_max, LRS, losses, losses, "rule", SUGGESTIONS), 0.2)


def cycle(profile: str, **changes) -> Figure:
    return plotting.one_cycle(from_profile(profile, **changes), LRRange(8e-4, 8e-3), 10)


def training(epochs: int, peak: int, best: float, every: int = 1) -> Figure:
    rise = 1 - np.exp(-np.arange(1, epochs + 1) / epochs * 4)
    tested = [value if (epoch + 1) % every == 0 else None for epoch, value in enumerate(best * rise)]
    losses = [None if value is None else 2.3 - value / 50 for value in tested]
    seconds = [1.0] * epochs
    history = History(seconds, list(2.3 - 2 * rise), list(best * rise**2), losses, tested, seconds, 10, 10)
    return plotting.training_curves(history, peak, "Seed 100")


def predictions(per_class: list[int], of: int = 1000) -> Predictions:
    """``of`` images of each class, ``per_class`` of them right, the others taken for the next class."""
    labels = np.repeat(np.arange(len(per_class)), of)
    right = np.concatenate([np.arange(of) < count for count in per_class])
    answers = np.where(right, labels, (labels + 1) % len(per_class))
    return Predictions(np.eye(len(per_class), dtype=np.float32)[answers], labels)


FIGURES = {
    "class accuracy, many classes": lambda: plotting.class_accuracy(predictions([*range(100)], 100), MANY),
    "confusion, long names": lambda: plotting.confusion_matrix(predictions([*range(12)], 12), LONG),
    "confusion, many classes": lambda: plotting.confusion_matrix(predictions([*range(100)], 100), MANY),
    "range test": range_test,
    "cycle, late peak": lambda: cycle("quick", peak_epoch=5),
    "training, published": lambda: training(24, 5, 94),
    "training, quick": lambda: training(6, 2, 45, every=2),
    "curves": lambda: plotting.curves(PANELS, "epoch", "train error in percent"),
    "gradients": lambda: plotting.curves(
        {name: {"plain": np.logspace(-18, -2, 21)} for name in "abcd"}, "block", "norm", first=0, log=True
    ),
    "differences": lambda: plotting.differences(ROWS, title="Ablations", xlabel="points"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_words_are_apart_from_each_other_and_large_enough_at_700_pixels(name):
    figure = FIGURES[name]()
    found = words_of(figure)
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    crossing = [(a, b) for (a, first), (b, second) in itertools.combinations(boxes, 2) if first.overlaps(second)]
    assert not crossing
    assert [text for text, box in boxes if box.x0 < -1 or box.x1 > figure.bbox.x1 + 1] == []
    assert min(text.get_fontsize() for text in found) * 700 / (72 * plotting.WIDTH) >= 8


@pytest.mark.parametrize("name", ["range test", "training, published", "training, quick", "cycle, late peak"])
def test_no_legend_lies_on_a_curve(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    legends = [(axis, axis.get_legend().get_window_extent()) for axis in figure.axes if axis.get_legend()]
    assert legends
    for axis, box in legends:
        for line in axis.lines[:2]:
            assert not box.count_contains(axis.transData.transform(line.get_xydata()))


def test_class_names_are_drawn_as_they_are_or_as_boxes_with_one_warning():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for names in (("under_$10$", r"$\frac$", "a{b}_c^"), ("猫", "🐶", "Kätzchen")):
            for draw in (plotting.confusion_matrix, plotting.class_accuracy):
                words = texts(draw(predictions([3, 2, 1], 3), names)).replace(r"\$", "$")
                assert all(name in words for name in names if name.isascii() or name == "Kätzchen")
    assert len(seen) <= 1


def test_the_range_test_marks_what_is_in_use_and_says_what_the_loss_contains():
    figure = range_test()
    words = texts(figure)
    for expected in ("LRMIN 2.0e-05", "LRMAX 3.4e-03", "onset 2.0e-05, in use", "steepest 3.5e-04\n", "smoothing 0.2"):
        assert expected in words
    filled = [line for line in figure.axes[0].lines if line.get_ls() == "None" and line.get_color() == plotting.PROJECT]
    assert [line.get_xdata()[0] for line in filled] == [2e-5, 3.4e-3]


def test_one_cycle_shows_its_ends_beside_those_of_a_cycle_with_annihilation():
    linear, log = cycle("full").axes
    assert (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
    for axis in (linear, log):
        annihilated, used = (line.get_ydata() for line in axis.lines[:2])
        assert len(used) == 240
        assert used[[0, -1]] == pytest.approx(8e-4)
        assert used.max() == annihilated.max() == pytest.approx(8e-3)
        assert annihilated[215] == pytest.approx(8e-4, rel=0.02)
        assert annihilated[-1] == pytest.approx(8e-6)
    assert log.get_ylim()[0] < 8e-6


def test_training_curves_overlay_train_and_test_and_skip_untested_epochs():
    history = History([1e-3] * 3, [2, 1, 0.5], [30, 60, 65], [1.8, None, 0.9], [40, None, 71.25], [1.0] * 3)
    figure = plotting.training_curves(history, 2, "Seed 100; tested: the averaged weights")
    words = texts(figure)
    for expected in ("Seed 100; tested: the averaged weights", "train (augmented), last 65.00%", "test, last 71.25%"):
        assert expected in words
    for axis in figure.axes:
        train, test, peak = axis.lines
        assert (train.get_color(), test.get_color()) == (plotting.TRAIN, plotting.TEST)
        assert list(train.get_xdata()) == [1, 2, 3]
        assert list(test.get_xdata()) == [1, 3]
        assert set(peak.get_xdata()) == {2}


@pytest.mark.parametrize("ends", [(66, 74), (61, 62), (10, 95)])
def test_percent_ticks_are_whole_numbers_and_not_rounded(ends):
    accuracy = list(np.linspace(*ends, 6))
    history = History(accuracy, accuracy, accuracy, accuracy, accuracy, accuracy)
    right = plotting.training_curves(history, 2).axes[1]
    words_of(right.figure)
    shown = [float(label.get_text().removesuffix("%")) for label in right.get_yticklabels()]
    assert np.allclose(shown, right.get_yticks())


def test_one_colour_means_one_thing_and_panels_share_their_scale():
    figure = plotting.curves({**PANELS, "test error": {"A": np.ones(4), "B": np.ones(4)}}, "epoch", "percent")
    plain, skips, test = figure.axes[:3]
    assert plain.get_ylim() == skips.get_ylim() == test.get_ylim()
    for axis, color in ((plain, plotting.PLAIN), (skips, plotting.RESIDUAL), (test, plotting.TEST)):
        assert {line.get_color() for line in axis.lines} == {color}
    assert len({line.get_linestyle() for line in plain.lines}) == 2
    assert np.allclose(plain.lines[0].get_ydata(), PANELS["plain"]["20"].mean(axis=0))
    named = plotting.curves({"": dict.fromkeys(("one cycle", "constant LR", "other"), np.ones(3))}, "epoch", "percent")
    colors = [line.get_color() for line in named.axes[0].lines]
    assert colors == [plotting.PROJECT, plotting.BASELINE, plotting.UNNAMED[0]]


def test_the_confusion_matrix_shows_percent_of_the_true_class_which_may_have_no_images():
    three = predictions([8, 10, 10], 10)
    only_two = Predictions(three.probabilities[:20], three.labels[:20])
    words = texts(plotting.confusion_matrix(only_two, CLASSES))
    for expected in ("80.0", "20.0", "100", "plane", "predicted", "true"):
        assert expected in words
    assert "bird  no images" in texts(plotting.class_accuracy(only_two, CLASSES))


@pytest.mark.parametrize(("counts", "left"), [([950, 880, 970], 85), ([950, 855, 970], 0)])
def test_class_accuracy_shows_dots_with_standard_errors_the_best_on_top(counts, left):
    figure = plotting.class_accuracy(predictions(counts), CLASSES)
    axis = figure.axes[0]
    assert axis.get_xlim() == (left, 100)
    assert [label.get_text().split()[0] for label in axis.get_yticklabels()] == ["bird", "plane", "car"]
    assert f"overall {sum(counts) / 30:.2f}%" in texts(figure)
    assert np.allclose(axis.collections[0].get_segments()[0][:, 0], 97 + np.array([-1, 1]) * np.sqrt(97 * 3 / 1000))


def test_differences_are_sorted_and_single_seeds_hollow():
    figure = plotting.differences(ROWS, title="Ablations", xlabel="points")
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["flip (n = 3)", "cutout (n = 0)", "half width (n = 1)"]
    assert axis.yaxis_inverted()  # the first row on top
    means = {
        line.get_xdata()[0]: line.get_markerfacecolor()
        for line in axis.lines
        if line.get_marker() == "o" and line.get_ms() == 6
    }
    assert means == {0.8: plotting.TEST, -0.2: plotting.TEST, -1.3: "white"}
    assert [list(line.get_xdata()) for line in axis.lines if line.get_ms() == 4] == [[0.7, 0.8, 0.9]]
    bars = [segment[:, 0].tolist() for bar in axis.collections for segment in bar.get_segments()]
    assert np.allclose(bars, [[0.7, 0.9], [-1.5, -1.1]])
