"""The figures of Results/, drawn from the objects of a run."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from models import CustomResNet
from utils import plotting
from utils.analysis import Predictions
from utils.config import from_profile
from utils.lr_finder import LRRange
from utils.metrics import History
from utils.runs import figures

RESULTS = Path(__file__).resolve().parent.parent / "Results"


@pytest.fixture(scope="module")
def run(toy) -> dict:
    """A made-up run of two epochs on the toy images, every third answer wrong, the first epoch untested."""
    torch.manual_seed(0)
    labels = toy.test_labels
    answers = np.where(np.arange(len(labels)) % 3, labels, (labels + 1) % 10)
    lrs = np.logspace(-6, 0, 60)
    losses = 2.3 - np.exp(-((np.log10(lrs) + 2) ** 2))
    return {
        "config": from_profile("quick", epochs=2, peak_epoch=1, batch_size=10, train_images=60, seed=7),
        "dataset": toy,
        "model": CustomResNet(width=4),
        "lr_range": LRRange(1e-4, 1e-2, lrs, losses, losses, "onset-minimum", {"onset": 1e-4, "minimum": 1e-2}),
        "history": History([1e-2, 1e-3], [1.5, 1.0], [40.0, 60.0], [None, 0.9], [None, 63.0], [10.0, 11.5], 60, 30),
        "predictions": Predictions(np.eye(10, dtype=np.float32)[answers] * 0.9 + 0.01, labels),
    }


def test_a_run_gets_every_figure_that_results_holds(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures.draw_all(**run)
    assert set(drawn) == {path.name for path in RESULTS.glob("*.png")}
    assert drawn["model_viz.png"].get_suptitle() == "Seed 7; tested: the averaged weights"
    assert drawn["grad_cam.png"].axes[4].title.get_color() == plotting.WRONG  # the first mistake
    assert drawn["grad_cam.png"].axes[-1].get_xlabel().startswith("evidence")


def test_a_figure_that_fails_is_left_out_with_one_warning_and_given_lrs_have_no_range_test_to_show(run):
    blind = dataclasses.replace(run["dataset"], test_images=run["dataset"].test_images[:0])
    with pytest.warns(UserWarning, match="left out: IndexError") as seen:
        drawn = figures.draw_all(**{**run, "dataset": blind, "lr_range": LRRange(1e-3, 1e-2)})
    assert {"train.png", "confusion_matrix.png", "one_cycle.png"} < set(drawn)
    left_out = {str(each.message).split()[0] for each in seen}
    assert {"mis.png", "grad_cam.png"} <= left_out
    assert len(left_out) == len(seen) == 8 - len(drawn)


def test_a_run_without_mistakes_still_shows_where_the_network_looks(run):
    toy = run["dataset"]
    perfect = Predictions(np.eye(10, dtype=np.float32)[toy.test_labels], toy.test_labels)
    assert "No mistakes" in plotting.mistakes(toy, perfect).get_suptitle()
    shown = plotting.grad_cam(run["model"], toy, perfect)
    titles = [axis.get_title() for axis in shown.axes if axis.get_title()]
    assert titles == [toy.classes[label] for label in toy.test_labels[:4]]


def test_mistakes_name_the_answer_in_red_and_the_truth_with_both_probabilities(run):
    figure = plotting.mistakes(run["dataset"], run["predictions"], count := 7)
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title().split()[1] for axis in shown] == ["91%"] * count
    assert [axis.get_xlabel().split()[2] for axis in shown] == ["(1.0%)"] * count
    assert {axis.title.get_color() for axis in shown} == {plotting.WRONG}


def test_pictures_are_drawn_pixel_by_pixel_without_ticks(run):
    figure = plotting.sample_images(run["dataset"], 12)
    shown = [axis for axis in figure.axes if axis.images]
    assert np.array_equal([axis.images[0].get_array() for axis in shown], run["dataset"].test_images[:12])
    for axis in shown:
        assert axis.images[0].get_interpolation() == "nearest"
        assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0


def test_augmented_images_show_the_originals_and_other_versions_of_them(run):
    figure = plotting.augmented_images(run["dataset"], run["config"], count=8, versions=2)
    pictures = np.array([axis.images[0].get_array() for axis in figure.axes]).reshape(3, 8, 32, 32, 3)
    assert np.array_equal(pictures[0], run["dataset"].train_images[:8])
    assert not np.array_equal(pictures[1], pictures[0])
    assert not np.array_equal(pictures[1], pictures[2])
