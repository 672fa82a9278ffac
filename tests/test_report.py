"""Numbers that people read: generated from one source, and true to it."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from utils.checkpoint import load_weights

from benchmarks import speed
from models import CustomResNet
from utils import config as configs
from utils import plotting, report
from utils.analysis import Predictions
from utils.dataset import CIFAR10_CLASSES
from utils.engine import History

ROOT = Path(report.__file__).resolve().parent.parent
README = ROOT / "README.md"


@pytest.fixture
def metrics() -> dict:
    """Metrics of a made-up run of two epochs on 30 test images."""
    history = History([1e-2, 1e-3], [1.5, 1.0], [40.0, 60.0], [1.4, 0.9], [50.0, 63.0], [10.0, 11.5], 60, 30)
    labels = np.arange(30) % 10
    answers = np.where(np.arange(30) < 20, labels, (labels + 1) % 10)
    plain = Predictions(np.eye(10, dtype=np.float32)[answers] * 0.9 + 0.01, labels)
    report.close_history(history, plain)
    record = {
        "config": configs.full().to_dict(),
        "lr_range": {"lr_min": 5e-4, "lr_max": 1e-2, "rule": "steepest-minimum"},
        "range_test_seconds": 3.0,
        "data": "toy images",
        "source": "image-folder",
        "device": "a CPU, 2 threads",
        "precision": "fp32",
        "versions": {"python": "3.11", "torch": "2.15"},
        "commit": "0123abc",
    }
    return report.build_metrics(record, configs.full(), history, plain, plain, CIFAR10_CLASSES)


def test_metrics_hold_what_a_result_must_be_quoted_with(metrics):
    assert metrics["test_accuracy"] == pytest.approx(100 * 20 / 30)
    assert metrics["per_class_accuracy"]["plane"] == pytest.approx(100 * 2 / 3)
    assert metrics["seeds"] == [0]
    assert metrics["std_accuracy"] is None
    assert metrics["weight_decay"] == pytest.approx(1.5e-3 / 1e-2)
    assert metrics["wall_seconds"] == pytest.approx(21.5)
    assert json.loads(json.dumps(metrics)) == metrics


def test_several_seeds_give_a_mean_and_its_spread(metrics):
    history, per_seed = History(**metrics["history"]), {0: (94.0, 94.5), 1: (95.0, 95.5)}
    plain = Predictions(np.eye(10, dtype=np.float32), np.arange(10))
    record = {**metrics, "lr_range": {"lr_min": 5e-4, "lr_max": 1e-2, "rule": "steepest-minimum"}}
    several = report.build_metrics(record, configs.full(), history, plain, plain, CIFAR10_CLASSES, per_seed)
    assert several["mean_accuracy"] == 94.5
    assert several["std_accuracy"] == pytest.approx(0.7071, abs=1e-4)
    assert "94.50 ± 0.71% (mean and std of 2 seeds)" in report.readme_blocks(several)["headline"]


def test_a_single_run_is_called_one(metrics):
    assert "66.67% (single run)" in report.readme_blocks(metrics)["headline"]


def test_the_log_has_the_assignments_lines_and_the_last_epoch_is_the_shipped_weights(metrics):
    log = report.training_log(metrics)
    assert "Train: Loss=1.0000 Accuracy=60.00" in log
    assert "Test set: Average loss: 1.4000, Accuracy: 15/30 (50.00%)" in log
    assert f"Average loss: {metrics['test_loss']:.4f}, Accuracy: 20/30 (66.67%)" in log
    assert "LR=0.001000 Time=11.5s" in log


def test_readme_parts_are_replaced_and_nothing_else(metrics):
    text = "before\n<!-- generated: headline -->\nold\n<!-- end: headline -->\nafter\n"
    changed = report.replace_block(text, "headline", "new")
    assert changed == "before\n<!-- generated: headline -->\nnew\n<!-- end: headline -->\nafter\n"
    with pytest.raises(ValueError, match="0 places for the generated part 'results'"):
        report.replace_block(text, "results", "new")


@pytest.mark.parametrize(
    ("seconds", "words"), [(8.24, "8.2 s"), (119.6, "2 min 0 s"), (725, "12 min 5 s"), (4980, "1 h 23 min")]
)
def test_durations_read_well(seconds, words):
    assert report.duration(seconds) == words


def test_only_the_full_recipe_on_cifar10_goes_to_results(toy, tmp_path):
    full, quick = configs.full(), configs.quick()
    assert report.results_folder(full, toy, tmp_path) == tmp_path  # 60 images are not CIFAR-10
    assert report.results_folder(quick, toy, tmp_path) == tmp_path


def test_the_full_recipe_on_cifar10_goes_to_results(cifar10, tmp_path):
    assert report.results_folder(configs.full(), cifar10, tmp_path) == report.RESULTS
    assert report.results_folder(configs.full(train_images=5000), cifar10, tmp_path) == tmp_path
    digits = report.results_folder(configs.full(), cifar10.subset(train=600), tmp_path)
    assert digits == tmp_path


def test_results_hold_figures_weights_metrics_and_log(metrics, tmp_path):
    torch.manual_seed(0)
    model = CustomResNet()
    figure = plotting.class_accuracy(np.full(10, 90.0), CIFAR10_CLASSES, 90.0)
    report.write_results(tmp_path, metrics, model, {"class_accuracy.png": figure}, note="a note")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "class_accuracy.png",
        "custom_resnet.safetensors",
        "metrics.json",
        "training_logs.md",
    ]
    assert report.read_metrics(tmp_path) == {**metrics, "note": "a note"}
    assert (tmp_path / report.WEIGHTS_NAME).stat().st_size < 16e6


def test_the_final_test_is_of_the_weights_in_the_file(toy, tmp_path):
    torch.manual_seed(0)
    model = CustomResNet()
    plain, mirrored = report.final_test(model, toy, torch.device("cpu"))
    report.save_weights(model, tmp_path / "weights.safetensors")
    again, _ = report.final_test(
        load_weights(CustomResNet(), tmp_path / "weights.safetensors"), toy, torch.device("cpu")
    )
    assert np.array_equal(plain.probabilities, again.probabilities)
    assert not np.array_equal(plain.probabilities, mirrored.probabilities)


# --- what is committed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict:
    return report.read_metrics()


def test_readme_and_log_agree_with_metrics(published):
    assert report.render_readme(README.read_text(), published) == README.read_text()
    assert (ROOT / "training_logs.md").read_text() == report.training_log(published)


def test_the_readmes_speed_table_is_the_measured_one():
    stored = json.loads((ROOT / "benchmarks" / "results" / "speed-cpu.json").read_text())
    assert not stored["machine"]["quick"]
    assert report.replace_block(README.read_text(), "speed", speed.markdown_table(stored)) == README.read_text()


def test_the_published_figures_agree_with_each_other(published):
    history = published["history"]
    assert history["test_accuracy"][-1] == published["test_accuracy"]
    assert history["test_loss"][-1] == published["test_loss"]
    assert len(history["lr"]) == published["epochs"]
    assert np.mean(list(published["per_class_accuracy"].values())) == pytest.approx(published["test_accuracy"])
    assert published["mean_accuracy"] == pytest.approx(np.mean(published["seed_accuracies"]))


def test_every_picture_and_file_that_the_readme_links_to_exists():
    text = README.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    local = [link.split("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []
    for alt in re.findall(r"!\[([^\]]*)\]\(Results/", text):
        assert len(alt) > 20, "a picture needs a text for those who cannot see it"


def test_the_shipped_weights_recognize_real_images(cifar10, published):
    """300 images, so that the test stays short: the full check is `python predict.py --test`."""
    few = cifar10.subset(test=300)
    model = load_weights(CustomResNet(), report.RESULTS / report.WEIGHTS_NAME)
    plain, _ = report.final_test(model, few, torch.device("cpu"))
    error = 3 * (published["test_accuracy"] * (100 - published["test_accuracy"]) / 300) ** 0.5  # three sigma
    assert plain.accuracy == pytest.approx(published["test_accuracy"], abs=error)


@pytest.mark.skipif("S10_FULL_CHECKS" not in os.environ, reason="S10_FULL_CHECKS=1 tests all 10,000 images, a minute")
def test_the_shipped_weights_score_exactly_what_metrics_say(cifar10, published):
    plain, mirrored = report.final_test(
        load_weights(CustomResNet(), report.RESULTS / report.WEIGHTS_NAME), cifar10, torch.device("cpu")
    )
    assert (plain.accuracy, mirrored.accuracy) == (published["test_accuracy"], published["test_accuracy_tta"])
