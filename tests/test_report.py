"""The numbers that people read are generated from one source and agree with it."""

import json
import os
import re

import numpy as np
import pytest
import torch

from models import CustomResNet
from utils.analysis import Predictions
from utils.config import from_profile
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.lr_finder import LRRange
from utils.metrics import History
from utils.runs import report
from utils.runs.files import write_json
from utils.runs.report import ResultsError
from utils.runs.weights import WEIGHTS_NAME, load_model, save_weights
from utils.runtime import PROJECT_ROOT as ROOT
from utils.runtime import ConfigError, Precision

README = ROOT / "README.md"
PUBLISHED = report.read_metrics()


def predictions(right: int, count: int = 30) -> Predictions:
    """The first ``right`` of ``count`` answers are correct."""
    labels = np.arange(count) % 10
    answers = np.where(np.arange(count) < right, labels, (labels + 1) % 10)
    return Predictions(np.eye(10, dtype=np.float32)[answers] * 0.9 + 0.01, labels)


@pytest.fixture
def record(toy) -> dict:
    """What was known before the first epoch of a made-up run."""
    lr_range, precision = LRRange(5e-4, 1e-2), Precision("fp32", torch.device("cpu"))
    return report.run_record(from_profile("full"), lr_range, 3.0, toy, precision, 1)


@pytest.fixture
def metrics(record) -> dict:
    """Metrics of this run, two epochs on 30 test images."""
    history = History([1e-2, 4.8e-6], [1.5, 1.0], [40.0, 60.0], [1.4, 0.9], [50.0, 63.0], [10.0, 11.5], 60, 30)
    found = {"none": predictions(20), "flip": predictions(21), "six views": predictions(24)}
    closed = report.with_final_test(history, found["none"])
    assert history.test_accuracy == [50.0, 63.0]  # a checkpoint keeps what was measured
    return report.build_metrics(record, closed, found, CIFAR10_CLASSES)


def test_metrics_hold_what_a_result_must_be_quoted_with(metrics):
    assert metrics["test_accuracy"] == pytest.approx(100 * 20 / 30)
    assert metrics["test_accuracy_tta"] == pytest.approx(70)
    assert metrics["test_accuracy_six_views"] == metrics["mean_accuracy_six_views"] == pytest.approx(80)
    assert metrics["per_class_accuracy"]["plane"] == pytest.approx(100 * 2 / 3)
    assert (metrics["seeds"], metrics["std_accuracy"], metrics["split"]) == ([0], None, "test")
    assert metrics["weight_decay"] == pytest.approx(1.5e-3 / 1e-2)
    assert metrics["wall_seconds"] == pytest.approx(21.5)
    assert {"device", "versions", "data", "commit", "lr_min", "lr_max", "epochs", "batch_size"} <= metrics.keys()
    assert json.loads(json.dumps(metrics)) == metrics
    headline = report.readme_blocks(metrics)["headline"]
    assert "66.67%, 70.00% with flip TTA, 80.00% with six-view TTA** (single run)" in headline


def test_several_seeds_give_a_mean_and_its_spread(metrics):
    runs = [{**metrics, "test_accuracy": value, "test_accuracy_tta": value + 0.5} for value in (94.0, 95.0)]
    del runs[1]["test_accuracy_six_views"]
    published = {name: value for name, value in metrics.items() if not name.endswith("_accuracy_six_views")}
    several = {**published, "test_accuracy_six_views": 80.0, **report.seed_statistics(runs)}
    assert several["mean_accuracy"] == 94.5
    assert several["std_accuracy"] == pytest.approx(0.7071, abs=1e-4)
    assert "seed_accuracies_six_views" not in report.seed_statistics(runs)  # one of the runs has none
    headline = report.readme_blocks(several)["headline"]
    assert "94.50 ± 0.71%, 95.00 ± 0.71% with flip TTA, 80.00% with six-view TTA (seed 0)**" in headline
    assert "(mean ± standard deviation of 2 seeds)" in headline


def test_a_class_without_test_images_has_no_accuracy(record, metrics):
    few = dict.fromkeys(report.SUFFIXES, Predictions(np.eye(10, dtype=np.float32)[:5], np.arange(5)))
    found = report.build_metrics(record, History(**metrics["history"]), few, CIFAR10_CLASSES)
    assert found["per_class_accuracy"]["truck"] is None
    assert report.readme_blocks(found)["classes"].endswith("| - | - | - | - | - |")


def test_jpeg_copies_are_left_out_of_a_second_figure():
    copies = json.loads(report.JPEG_TEST_IMAGES.read_text())
    wrong = predictions(10_000, 10_000)
    wrong.probabilities[copies["test_images"][0]] = 0.1
    wrong.labels[copies["test_images"][0]] = 9
    found = dict.fromkeys(report.SUFFIXES, wrong)
    figures = report.test_figures(found, copies["fingerprint"])
    assert (figures["exact_test_images"], figures["test_accuracy"]) == (9827, pytest.approx(99.99))
    assert figures["test_accuracy_exact"] == figures["test_accuracy_exact_six_views"] == 100
    assert "test_accuracy_exact" not in report.test_figures(found, "of other data")


def test_the_log_has_the_assignments_lines_and_the_last_epoch_is_the_shipped_weights(metrics):
    log = report.training_log({**metrics, "note": "Two runs shared the machine."})
    assert "Train: Loss=1.0000 Accuracy=60.00" in log
    assert "Test set: Average loss: 1.4000, Accuracy: 15/30 (50.00%)" in log
    assert f"Average loss: {metrics['test_loss']:.4f}, Accuracy: 20/30 (66.67%)" in log
    assert "Epoch 1: LR=0.01000 Time=10.0s" in log
    assert "Epoch 2: LR=4.800e-06 Time=11.5s" in log
    assert "Two runs shared the machine." in log


def test_only_the_parts_between_markers_change_and_damaged_markers_are_named(metrics):
    text = "a\n<!-- generated: headline -->\nold\n<!-- end: headline -->\n<!-- generated: other -->\nb\n"
    changed = report.render_readme(text, metrics)
    assert changed == text.replace("old", report.readme_blocks(metrics)["headline"])
    for damaged in (text + text, text.replace("<!-- end: headline -->", "")):
        with pytest.raises(ResultsError, match=r"there are \d places for the generated part 'headline'"):
            report.render_readme(damaged, metrics)


@pytest.mark.parametrize(("seconds", "words"), [(8.24, "8.2 s"), (59.97, "1 min 0 s"), (4980, "1 h 23 min")])
def test_durations_read_well(seconds, words):
    assert report.duration(seconds) == words


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (from_profile("quick"), "profile is 'quick', not 'full'"),
        (from_profile("full", train_images=5000), "train_images is 5000, not None"),
        (from_profile("full", lr_min=1e-3, lr_max=1e-2), "lr_min is 0.001, not None"),
        (from_profile("full", seed=7), "but the images are toy images$"),
    ],
)
def test_only_the_full_recipe_on_cifar10_can_be_published(toy, config, problem):
    with pytest.raises(ConfigError, match=f"only the full recipe on CIFAR-10 can be published, .*{problem}"):
        report.check_publishable(config, toy)


def test_the_full_recipe_on_cifar10_can_be_published():
    images, labels = np.zeros((50_000, 32, 32, 3), np.uint8), np.zeros(50_000, np.int64)
    dataset = ImageDataset(images, labels, images[:1], labels[:1], CIFAR10_CLASSES, "official")
    report.check_publishable(from_profile("full", seed=7, precision="fp32"), dataset)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with old results, a README and a model card."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "Results")
    monkeypatch.setattr(report.runtime, "PROJECT_ROOT", tmp_path)
    report.RESULTS.mkdir()
    (report.RESULTS / "of_an_older_run.png").write_bytes(b"old")
    for name in report.DOCUMENTS:
        (tmp_path / name).write_text("32×32: <!-- generated: weights -->\n<!-- end: weights -->\n", encoding="utf-8")
    return tmp_path


def finished_run(folder, metrics, seed=0, accuracy=94.0, **changes):
    """A run's folder as ``Job.finish`` leaves it."""
    folder.mkdir()
    config = {**metrics["config"], "seed": seed, **changes}
    write_json(folder / report.METRICS_NAME, {**metrics, "config": config, "test_accuracy": accuracy})
    for name in (WEIGHTS_NAME, "train.png", "history.csv", "checkpoint.pt"):
        (folder / name).write_bytes(b"of seed %d" % seed)
    return folder


def test_publishing_replaces_results_by_those_of_one_run(project, metrics):
    runs = [finished_run(project / f"run{seed}", metrics, seed, 94.0 + seed) for seed in (0, 1)]
    published = report.publish(runs[0], runs[1:])
    names = [WEIGHTS_NAME, "history.csv", "metrics.json", "train.png", "MODEL_CARD.md"]
    assert sorted(path.name for path in report.RESULTS.iterdir()) == sorted(names)
    assert (report.RESULTS / "train.png").read_bytes() == b"of seed 0"
    assert report.read_metrics(report.RESULTS) == published
    assert (published["seed_accuracies"], published["test_accuracy"]) == ([94.0, 95.0], 94.0)
    for name in report.DOCUMENTS:
        text = (project / name).read_text(encoding="utf-8")
        assert "32×32" in text
        assert "Test accuracy: 94.00%, 70.00% with flip TTA" in text
    assert "Seeds: 0, 1; whatever has no ± is of seed 0." in (project / "training_logs.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("fault", ["unfinished", "other settings", "damaged README"])
def test_what_cannot_be_published_changes_nothing(project, metrics, fault):
    run = finished_run(project / "run", metrics)
    other = finished_run(project / "other", metrics, seed=1, dropout=0.1 if fault == "other settings" else 0.0)
    if fault == "unfinished":
        (other / report.METRICS_NAME).unlink()
    if fault == "damaged README":
        (project / "README.md").write_text("<!-- generated: weights -->\n")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    with pytest.raises(ResultsError, match=r"no .*metrics\.json|has other settings|0 places"):
        report.publish(run, [other])
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_the_final_test_is_of_the_weights_in_the_file(toy, tmp_path):
    model = CustomResNet(width=8)
    found = report.final_test(model, toy)
    save_weights(model, tmp_path / "weights.safetensors", {"classes": list(CIFAR10_CLASSES)})
    again = report.final_test(load_model(tmp_path / "weights.safetensors")[0], toy)
    assert all(np.array_equal(found[tta].probabilities, again[tta].probabilities) for tta in found)
    assert not np.array_equal(found["none"].probabilities, found["flip"].probabilities)
    assert not np.array_equal(found["flip"].probabilities, found["six views"].probabilities)


# --- what is committed ------------------------------------------------------------------------------------------------


def test_the_documents_agree_with_metrics():
    for name in report.DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert report.render_readme(text, PUBLISHED) == text, name
    assert (ROOT / report.LOG_NAME).read_text(encoding="utf-8") == report.training_log(PUBLISHED)
    parts = set(re.findall(r"<!-- generated: (\w+) -->", README.read_text(encoding="utf-8")))
    assert {"headline", "provenance", "results", "classes", "comparison", "log", "summary"} <= parts


def test_the_published_figures_agree_with_each_other():
    history = PUBLISHED["history"]
    assert history["test_accuracy"][-1] == PUBLISHED["test_accuracy"]
    assert history["test_loss"][-1] == PUBLISHED["test_loss"]
    assert np.mean(list(PUBLISHED["per_class_accuracy"].values())) == pytest.approx(PUBLISHED["test_accuracy"])
    assert PUBLISHED["mean_accuracy"] == pytest.approx(np.mean(PUBLISHED["seed_accuracies"]))


def test_every_picture_and_file_that_the_readme_links_to_exists():
    text = README.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    local = [link for link in links if link and not link.startswith("http")]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []
    for alt in re.findall(r"!\[([^\]]*)\]\(Results/", text):
        assert len(alt) > 20, "a picture needs a text for readers who cannot see it"


@pytest.mark.skipif("S10_FULL_CHECKS" not in os.environ, reason="S10_FULL_CHECKS=1 tests all 10,000 images, minutes")
def test_the_shipped_weights_score_exactly_what_metrics_say(cifar10):
    predicted = report.final_test(load_model(report.RESULTS / WEIGHTS_NAME)[0], cifar10)
    figures = report.test_figures(predicted, cifar10.fingerprint)
    names = [name for name in figures if name.startswith("test_accuracy")]
    assert {name: figures[name] for name in names} == {name: PUBLISHED[name] for name in names}


@pytest.mark.parametrize("content", ["{", "[]", '{"loss": 1}'])
def test_metrics_that_no_run_wrote_are_named(tmp_path, content):
    (tmp_path / report.METRICS_NAME).write_text(content)
    with pytest.raises(report.ResultsError, match=r"metrics.json is not what a finished run writes"):
        report.read_metrics(tmp_path)
