"""The figures of Results/, drawn from the objects of a run."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from models import CustomResNet
from utils import config as configs
from utils import plotting
from utils.analysis import Predictions
from utils.lr_finder import LRRange, read_curve
from utils.metrics import History
from utils.runs import figures

RESULTS = Path(__file__).resolve().parent.parent / "Results"


@pytest.fixture(scope="module")
def run(toy) -> figures.FigureInputs:
    """A made-up run of two epochs on the toy images, every third answer wrong, the first epoch untested."""
    torch.manual_seed(0)
    labels = toy.test_labels
    answers = np.where(np.arange(len(labels)) % 3, labels, (labels + 1) % 10)
    lrs = np.logspace(-6, 0, 60)
    losses = 2.3 - 0.7 / (1 + np.exp(-(np.log10(lrs) + 3.4) * 2)) + np.maximum(np.log10(lrs) + 2.3, 0) ** 2
    return figures.FigureInputs(
        config=configs.quick(epochs=2, peak_epoch=1, batch_size=10, train_images=60),
        dataset=toy,
        model=CustomResNet(),
        lr_range=read_curve(lrs, losses),
        history=History([1e-2, 1e-3], [1.5, 1.0], [40.0, 60.0], [None, 0.9], [None, 63.0], [10.0, 11.5], 60, 30),
        predictions=Predictions(np.eye(10, dtype=np.float32)[answers] * 0.9 + 0.01, labels),
    )


def test_a_run_gets_every_figure_that_results_holds(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.draw_all(run)
    assert set(drawn) == {path.name for path in RESULTS.glob("*.png")}
    shown = drawn["grad_cam.png"].axes[4]  # the first wrong answer
    truth = run.dataset.classes[run.dataset.test_labels[0]]
    assert shown.get_title() != truth
    assert shown.get_xlabel() == f"is {truth}"
    assert shown.title.get_color() == plotting.RED


def test_a_figure_that_fails_is_named_in_a_warning_and_the_others_are_drawn(run, monkeypatch):
    broken = Figure()
    broken.text(0, 0, r"$\frac$")  # fails when it is laid out, not when it is made
    monkeypatch.setattr(plotting, "image_grid", lambda *args: broken)
    for name in ("augmentation_grid", "misclassified", "confusion_heatmap"):  # slow, and not tested here
        monkeypatch.setattr(plotting, name, lambda *args: Figure())
    config = dataclasses.replace(run.config, schedule="constant")
    model = nn.Sequential(nn.Linear(1, 1))
    unusual = dataclasses.replace(run, config=config, model=model, lr_range=LRRange.given(1e-4, 1e-2))
    with pytest.warns(UserWarning, match="is left out: ") as caught:
        drawn = figures.draw_all(unusual)
    missing = {"network.png", "grad_cam.png", "test.png"}
    messages = [str(warning.message) for warning in caught]  # some versions of matplotlib warn of their own
    assert {text.split(" is left out: ")[0] for text in messages if " is left out: " in text} == missing
    assert "ValueError" in str(next(w.message for w in caught if "test.png" in str(w.message)))
    unneeded = {"lr_finder.png", "one_cycle.png"}  # no range test, no cycle
    assert set(drawn) == {path.name for path in RESULTS.glob("*.png")} - missing - unneeded


@pytest.mark.parametrize(("epochs", "peak", "steps"), [(24, 5, 98), (6, 5, 3), (2, 1, 2)])
def test_one_cycle_is_compared_with_annihilation(epochs, peak, steps):
    config = configs.quick(epochs=epochs, peak_epoch=peak)
    axis = figures.one_cycle(config, LRRange.given(1e-3, 1e-2), steps).axes[0]
    other, used = axis.lines[:2]
    assert other.get_label() == "with annihilation (not used)"
    assert len(used.get_ydata()) == epochs * steps
    assert used.get_ydata()[-1] == pytest.approx(1e-3)
    assert other.get_ydata()[-1] == pytest.approx(1e-5)
    assert max(other.get_ydata()) == pytest.approx(1e-2)


def test_a_run_without_mistakes_still_shows_where_the_network_looks(run):
    perfect = Predictions(np.eye(10, dtype=np.float32)[run.dataset.test_labels], run.dataset.test_labels)
    assert "No mistakes" in figures.mistakes(run.dataset, perfect)._suptitle.get_text()
    shown = figures.grad_cam(run.model, run.dataset, perfect)
    assert [axis.get_title() for axis in shown.axes if axis.get_title()] == [
        run.dataset.classes[label] for label in run.dataset.test_labels[:4]
    ]


def test_train_samples_show_the_originals_and_other_versions_of_them(run):
    figure = figures.train_samples(run.dataset, run.config, count=8, versions=2)
    pictures = np.array([axis.images[0].get_array() for axis in figure.axes]).reshape(3, 8, 32, 32, 3)
    assert np.array_equal(pictures[0], run.dataset.train_images[:8])
    assert not np.array_equal(pictures[1], pictures[0])
    assert not np.array_equal(pictures[1], pictures[2])


def test_test_samples_are_exactly_the_test_images(run):
    figure = figures.test_samples(run.dataset)
    assert np.array_equal([axis.images[0].get_array() for axis in figure.axes], run.dataset.test_images[:20])
