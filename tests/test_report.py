"""The numbers that people read are generated from one source and agree with it."""

import json
import os
import re

import numpy as np
import pytest
import torch

from benchmarks import speed
from models import CustomResNet
from utils import config as configs
from utils.analysis import Predictions
from utils.dataset import CIFAR10_CLASSES
from utils.metrics import History
from utils.runs import report
from utils.runs.report import ResultsError
from utils.runs.weights import WEIGHTS_NAME, load_model, save_weights
from utils.runtime import PROJECT_ROOT as ROOT
from utils.runtime import ConfigError

README = ROOT / "README.md"
PUBLISHED_WEIGHTS = report.RESULTS / WEIGHTS_NAME


@pytest.fixture
def metrics() -> dict:
    """Metrics of a made-up run of two epochs on 30 test images."""
    history = History([1e-2, 1e-3], [1.5, 1.0], [40.0, 60.0], [1.4, 0.9], [50.0, 63.0], [10.0, 11.5], 60, 30)
    labels = np.arange(30) % 10
    answers = np.where(np.arange(30) < 20, labels, (labels + 1) % 10)
    plain = Predictions(np.eye(10, dtype=np.float32)[answers] * 0.9 + 0.01, labels)
    record = {
        "config": configs.full().to_dict(),
        "lr_range": {"lr_min": 5e-4, "lr_max": 1e-2, "rule": "steepest-minimum"},
        "range_test_seconds": 3.0,
        "data": "toy images",
        "source": "image-folder",
        "device": "a CPU, 2 threads",
        "precision": "fp32",
        "world": 1,
        "versions": {"python": "3.11", "torch": "2.15"},
        "commit": "0123abc",
    }
    closed = report.closed_history(history, plain)
    assert history.test_accuracy == [50.0, 63.0]  # a checkpoint keeps what was measured
    return report.build_metrics(record, configs.full(), closed, 0.15, plain, plain, CIFAR10_CLASSES)


def test_metrics_hold_what_a_result_must_be_quoted_with(metrics):
    assert metrics["test_accuracy"] == pytest.approx(100 * 20 / 30)
    assert metrics["per_class_accuracy"]["plane"] == pytest.approx(100 * 2 / 3)
    assert metrics["seeds"] == [0]
    assert metrics["std_accuracy"] is None
    assert metrics["weight_decay"] == pytest.approx(1.5e-3 / 1e-2)
    assert metrics["wall_seconds"] == pytest.approx(21.5)
    assert json.loads(json.dumps(metrics)) == metrics
    assert "66.67% (single run)" in report.readme_blocks(metrics)["headline"]


def test_several_seeds_give_a_mean_and_its_spread(metrics):
    runs = [{**metrics, "test_accuracy": value, "test_accuracy_tta": value + 0.5} for value in (94.0, 95.0)]
    several = {**metrics, **report.over_seeds(runs)}
    assert several["mean_accuracy"] == 94.5
    assert several["std_accuracy"] == pytest.approx(0.7071, abs=1e-4)
    assert "94.50 ± 0.71% (mean and std of 2 seeds)" in report.readme_blocks(several)["headline"]


def test_a_class_without_test_images_has_no_accuracy(metrics):
    plain = Predictions(np.eye(10, dtype=np.float32)[:5], np.arange(5))
    history = History(**metrics["history"])
    found = report.build_metrics(metrics, configs.full(), history, 0.15, plain, plain, CIFAR10_CLASSES)
    assert found["per_class_accuracy"]["truck"] is None
    assert "nan" not in json.dumps(found, allow_nan=False).lower()


def test_the_log_has_the_assignments_lines_and_the_last_epoch_is_the_shipped_weights(metrics):
    log = report.training_log(metrics)
    assert "Train: Loss=1.0000 Accuracy=60.00" in log
    assert "Test set: Average loss: 1.4000, Accuracy: 15/30 (50.00%)" in log
    assert f"Average loss: {metrics['test_loss']:.4f}, Accuracy: 20/30 (66.67%)" in log
    assert "LR=0.001000 Time=11.5s" in log


@pytest.mark.parametrize(
    ("ema_decay", "words"),
    [(0.99, "belong to the averaged weights."), (0.0, "belong to the weights at the end of the")],
)
def test_the_log_says_which_weights_were_tested(metrics, ema_decay, words):
    assert words in report.training_log({**metrics, "config": {**metrics["config"], "ema_decay": ema_decay}})


def test_readme_parts_are_replaced_and_nothing_else(metrics):
    text = "before\n<!-- generated: headline -->\nold\n<!-- end: headline -->\nafter\n"
    changed = report.replace_block(text, "headline", "new")
    assert changed == "before\n<!-- generated: headline -->\nnew\n<!-- end: headline -->\nafter\n"
    with pytest.raises(ValueError, match="0 places for the generated part 'results'"):
        report.replace_block(text, "results", "new")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(8.24, "8.2 s"), (59.97, "1 min 0 s"), (119.6, "2 min 0 s"), (725, "12 min 5 s"), (4980, "1 h 23 min")],
)
def test_durations_read_well(seconds, words):
    assert report.duration(seconds) == words


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (configs.quick(), "a profile or subset other than the full one"),
        (configs.full(train_images=5000), "a profile or subset other than the full one"),
        (configs.full(lr_min=1e-3, lr_max=1e-2), "learning rates that were given"),
        (configs.full(), r"other images \(toy images\)"),
        (configs.full(cutout=0, seed=7), r"settings other than the recipe's \(cutout 0, not 8\)"),
    ],
)
def test_only_the_full_recipe_on_cifar10_can_be_published(toy, config, problem):
    with pytest.raises(ConfigError, match=rf"cannot be published .*{problem}.*: leave out --publish, or run the full"):
        report.check_publishable(config, toy)


def test_the_full_recipe_on_cifar10_can_be_published(cifar10):
    report.check_publishable(configs.full(), cifar10)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project with a README and old results."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "Results")
    monkeypatch.setattr(report.runtime, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr(report, "render_readme", lambda text, metrics: f"32×32: {metrics['mean_accuracy']}")
    report.RESULTS.mkdir()
    (report.RESULTS / "of_an_older_run.png").write_bytes(b"old")
    (tmp_path / "README.md").write_text("32×32: none", encoding="utf-8")
    return tmp_path


def finished_run(folder, metrics, seed=0, accuracy=94.0, **changes):
    """A run's folder as ``Job.finish`` leaves it."""
    folder.mkdir()
    config = {**metrics["config"], "seed": seed, **changes}
    report.write_metrics(folder, {**metrics, "config": config, "test_accuracy": accuracy})
    for name in (WEIGHTS_NAME, "train.png", "checkpoint.pt"):
        (folder / name).write_bytes(b"of seed %d" % seed)
    return folder


def test_publishing_replaces_results_as_one_set_of_one_run(project, metrics):
    runs = [finished_run(project / f"run{seed}", metrics, seed, 94.0 + seed) for seed in (0, 1)]
    published = report.publish(runs[0], runs[1:])
    assert sorted(path.name for path in report.RESULTS.iterdir()) == [WEIGHTS_NAME, "metrics.json", "train.png"]
    assert (report.RESULTS / "train.png").read_bytes() == b"of seed 0"
    assert report.read_metrics(report.RESULTS) == published
    assert published["seed_accuracies"] == [94.0, 95.0]
    assert published["test_accuracy"] == 94.0
    assert (project / "README.md").read_text(encoding="utf-8") == "32×32: 94.5"
    assert "seeds 0, 1, all but the means from seed 0" in (project / "training_logs.md").read_text(encoding="utf-8")
    assert not list(project.glob(".*"))  # nothing is left over


def test_what_is_unfinished_or_different_is_not_published(project, metrics):
    run = finished_run(project / "run", metrics)
    other = finished_run(project / "other", metrics, seed=1, dropout=0.1)
    with pytest.raises(ResultsError, match=r"differs from .* in dropout: only equal runs make a mean"):
        report.publish(run, [other])
    with pytest.raises(ResultsError, match=r"no .*metrics\.json: a run writes it when it is finished"):
        report.publish(project)
    assert (report.RESULTS / "of_an_older_run.png").exists()


def test_a_setting_newer_than_a_published_run_had_its_default(project, metrics):
    older = {name: value for name, value in metrics["config"].items() if name != "ghost_batch"}
    first = finished_run(project / "first", {**metrics, "config": older})
    equal = finished_run(project / "equal", metrics, seed=1)
    other = finished_run(project / "other", metrics, seed=2, ghost_batch=0)
    assert report.publish(first, [equal])["seeds"] == [0, 1]
    with pytest.raises(ResultsError, match=r"differs from .* in ghost_batch: only equal"):
        report.publish(first, [other])
    with pytest.raises(ResultsError, match=r"differs from .* in ghost_batch: only equal"):
        report.publish(other, [first])


def test_a_readme_that_cannot_be_updated_leaves_everything_as_it_was(project, metrics, monkeypatch):
    run = finished_run(project / "run", metrics)
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    monkeypatch.setattr(report, "render_readme", lambda text, metrics: report.replace_block(text, "results", ""))
    with pytest.raises(ResultsError, match=r"README\.md cannot be updated \(there are 0 places for .*'results'"):
        report.publish(run)
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_a_kill_between_the_two_renames_of_publishing_loses_nothing(project, metrics, monkeypatch):
    run = finished_run(project / "run", metrics)

    def killed(source, target, replace=os.replace):
        if target == report.RESULTS:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            report.publish(run)
    assert (project / ".Results.old" / "of_an_older_run.png").exists()
    report.publish(run)
    assert (report.RESULTS / "train.png").exists()
    assert not list(project.glob(".*"))


@pytest.mark.parametrize("content", ["{}", "[]", "no json", ""])
def test_metrics_that_no_run_wrote_are_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ResultsError, match=r"metrics\.json (cannot be read|is not what a finished run writes)"):
        report.read_metrics(tmp_path)


def test_the_final_test_is_of_the_weights_in_the_file(toy, tmp_path):
    torch.manual_seed(0)
    model = CustomResNet(width=8)
    plain, tta = report.final_test(model, toy)
    save_weights(model, tmp_path / "weights.safetensors", {"classes": list(CIFAR10_CLASSES), "width": 8})
    loaded, _ = load_model(tmp_path / "weights.safetensors")
    again, _ = report.final_test(loaded, toy)
    assert np.array_equal(plain.probabilities, again.probabilities)
    assert not np.array_equal(plain.probabilities, tta.probabilities)


# --- what is committed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict:
    return report.read_metrics()


def test_readme_and_log_agree_with_metrics(published):
    assert report.render_readme(README.read_text(encoding="utf-8"), published) == README.read_text(encoding="utf-8")
    assert (ROOT / "training_logs.md").read_text(encoding="utf-8") == report.training_log(published)


def test_the_readmes_speed_table_is_the_measured_one():
    text = README.read_text(encoding="utf-8")
    assert report.replace_block(text, "speed", speed.readme_part()) == text


def test_the_published_figures_agree_with_each_other(published):
    history = published["history"]
    assert history["test_accuracy"][-1] == published["test_accuracy"]
    assert history["test_loss"][-1] == published["test_loss"]
    assert len(history["lr"]) == published["epochs"]
    assert np.mean(list(published["per_class_accuracy"].values())) == pytest.approx(published["test_accuracy"])
    assert published["mean_accuracy"] == pytest.approx(np.mean(published["seed_accuracies"]))


def test_every_picture_and_file_that_the_readme_links_to_exists():
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    local = [link.split("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []
    for alt in re.findall(r"!\[([^\]]*)\]\(Results/", text):
        assert len(alt) > 20, "a picture needs a text for readers who cannot see it"


def test_the_shipped_weights_recognize_real_images(cifar10, published):
    """300 images, so that the test stays short: the full check is `python predict.py --test`."""
    few = cifar10.subset(test=300)
    model, _ = load_model(PUBLISHED_WEIGHTS)
    plain, _ = report.final_test(model, few)
    error = 3 * (published["test_accuracy"] * (100 - published["test_accuracy"]) / 300) ** 0.5  # three sigma
    assert plain.accuracy == pytest.approx(published["test_accuracy"], abs=error)


@pytest.mark.skipif("S10_FULL_CHECKS" not in os.environ, reason="S10_FULL_CHECKS=1 tests all 10,000 images, a minute")
def test_the_shipped_weights_score_exactly_what_metrics_say(cifar10, published):
    model, _ = load_model(PUBLISHED_WEIGHTS)
    plain, tta = report.final_test(model, cifar10)
    assert (plain.accuracy, tta.accuracy) == (published["test_accuracy"], published["test_accuracy_tta"])
