"""Experiments: what the published tables say, which runs are made, shared, kept or refused. Trainings are pretended."""

import dataclasses
import json
import math
import threading
from collections import defaultdict

import numpy as np
import pytest
from filelock import FileLock

import experiments.__main__ as command
from experiments import tables
from experiments.variants import ABLATIONS, RECIPE, Run, is_current
from utils.config import Config
from utils.engine import NonFiniteLossError
from utils.lr_finder import LRRangeError
from utils.runs import report
from utils.runs.checkpoint import RunFolder

RECORDS = json.loads((tables.RESULTS / tables.RECORDS_NAME).read_text(encoding="utf-8"))
PAGE = (tables.RESULTS / tables.PAGE_NAME).read_text(encoding="utf-8")


@pytest.fixture
def trained(monkeypatch):
    """Pretends to train; returns the settings of each run. A constant LR fails."""
    calls = []

    def run_job(config, dataset, run_dir, *, device):
        print("epoch table")
        with RunFolder(run_dir):
            calls.append(config)
            if config.lr_scale == 0.1:
                raise NonFiniteLossError("epoch 2: the loss is not finite")
            if config.lr_scale == 0.4:
                raise LRRangeError("the curve has no answer")
            accuracy = 90.0 + (config.seed % 7) / 10 - (0.5 if not config.cutout else 0.0)
            history = {"train_accuracy": [50.0, 97.0], "test_accuracy": [None, accuracy]}
            metrics = {"test_accuracy": accuracy, "test_accuracy_tta": accuracy + 0.4, "test_loss": 0.4}
            metrics |= {"lr_min": 1e-5, "lr_max": 1e-2, "wall_seconds": 60.0, "device": "a CPU", "history": history}
            metrics |= {"train_images": 60, "test_images": 30, "data": dataset.description, "config": config.to_dict()}
            (run_dir / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
            return metrics

    monkeypatch.setattr(command, "run_job", run_job)
    monkeypatch.setattr(command, "WAIT_SECONDS", 0.05)
    return calls


@pytest.fixture
def execute(toy, tmp_path, trained, monkeypatch):
    """The command on toy images, which pass for the whole of CIFAR-10, with folders of its own."""
    monkeypatch.setattr(command, "load_dataset", lambda folder: toy)
    monkeypatch.setattr(command, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "RECIPE_TRAIN_IMAGES", len(toy.train_labels))
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "published")
    command.README.write_text("old\n<!-- generated: experiments -->\n<!-- end: experiments -->\n", encoding="utf-8")
    return lambda *args: command.main([*args, "--runs", str(tmp_path / "runs")])


# --- what is published ------------------------------------------------------------------------------------------------


def test_a_difference_has_the_error_that_the_pooled_spread_gives_it():
    """The same numbers as in the page's table, in plain loops."""
    runs = defaultdict(list)
    for record in RECORDS:
        if record["split"] == "test" and record["config"]["width"] == 32:
            runs[record["variant"]].append(record["test_accuracy"])
    squares = freedom = 0
    for variant, values in runs.items():
        if variant != "coupled decay":
            mean = sum(values) / len(values)
            squares += sum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
    spread = math.sqrt(squares / freedom)
    assert f"within its variant: {spread:.2f} points" in PAGE
    table = PAGE.partition("<!-- generated: ablations -->")[2]
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in table.splitlines() if row.startswith("| ")}
    recipe = runs["recipe"]
    for variant in ("no residual connections", "no flip", "no EMA"):
        values = runs[variant]
        difference = sum(values) / len(values) - sum(recipe) / len(recipe)
        error = spread * math.sqrt(1 / len(values) + 1 / len(recipe))
        assert cells[variant][4] == f"{difference:+.2f} ± {error:.2f}"
        assert cells[variant][1] == str(len(values))


def test_the_screen_s_effects_are_differences_of_means_over_the_design():
    means, changes = defaultdict(list), {}
    for record in RECORDS:
        if record["stage"] == "screen":
            means[record["variant"]].append((record["test_accuracy"] + record["test_accuracy_tta"]) / 2)
            changes[record["variant"]] = record["changes"]
    assert sorted(map(len, means.values())) == [1] * 11 + [4]
    for setting, name in (("init", "first filters from patches"), ("dropout", "dropout 0.05"), ("beta2", "beta2 0.95")):
        sides = {True: [], False: []}
        for variant, values in means.items():
            sides[changes[variant][setting] != changes["base"][setting]].append(np.mean(values))
        assert f"| {name} | {np.mean(sides[True]) - np.mean(sides[False]):+.2f} ± 0.07 |" in PAGE


def test_the_published_page_and_readme_are_what_the_records_say():
    data = tables.frame(RECORDS)
    assert tables.render_page(PAGE, data) == PAGE
    assert (tables.RESULTS / "runs.md").read_text(encoding="utf-8") == tables.runs_table(data)
    readme = command.README.read_text(encoding="utf-8")
    assert report.replace_block(readme, "experiments", tables.readme_part(data)) == readme


def test_the_recipe_and_its_variants_are_still_those_of_the_records():
    made = [record for record in RECORDS if record["split"] == "test" and not record["variant"].startswith("without ")]
    assert all(is_current(record) for record in made)
    assert {record["variant"] for record in made} == {one.name for one in (RECIPE, *ABLATIONS)}
    assert is_current({**made[0], "config": {**made[0]["config"], "eps": 1e-3}})  # a setting that no longer exists
    assert not is_current({**made[0], "config": {**made[0]["config"], "label_smoothing": 0.3}})
    assert not is_current({**made[0], "changes": {"cutout": 7}})


def made_up(values: dict[str, list[float]]):
    """The frame of runs with these accuracies by variant; with flip TTA all but the recipe's are 94."""
    about = {
        "stage": "ablations",
        "split": "test",
        "status": "done",
        "device": "a CPU",
        "data": "toys",
        "test_loss": 0.4,
    }
    about |= {"train_images": 60, "test_images": 30}
    records = []
    for variant in (RECIPE, *ABLATIONS):
        for seed, value in enumerate(values.get(variant.name, []), start=100):
            record = {"variant": variant.name, "changes": variant.changes, "seed": seed, "test_accuracy": value}
            record |= {"config": Run(variant, 32, seed).config.to_dict()}
            records.append({**about, **record, "test_accuracy_tta": value if variant == RECIPE else 94.0})
    return tables.frame(records)


def test_words_follow_the_numbers_and_coupled_decay_does_not_widen_the_others():
    values = {"recipe": [94.0, 94.2], "no flip": [93.0, 93.2], "no cutout": [93.9], "coupled decay": [94, 80, 60]}
    data = made_up(values)
    found = tables.differences(data, "test_accuracy")
    spread = math.sqrt(0.02)  # of both pairs
    assert found.loc["no flip", "error"] == pytest.approx(spread)
    assert found.loc["no cutout", "error"] == pytest.approx(spread * math.sqrt(1.5))
    assert found.loc["coupled decay", "error"] > 5
    text = tables.ablations_section(data)
    assert "in one: *no flip*; in neither: *no cutout*, *coupled decay*." in text
    assert "Not run yet: *no residual connections*, " in text
    assert "| no flip | 2 | 93.10 ± 0.14 | 94.00 ± 0.00 | -1.00 ± 0.14 | -0.10 ± 0.10 |" in text
    assert "crop and cutout" not in tables.readme_part(data)
    single = tables.ablations_section(made_up({"recipe": [94.0], "no flip": [93.0]}))
    assert "| no flip | 1 | 93.00 | 94.00 | -1.00 | +0.00 |" in single  # no error without any spread


# --- the command ------------------------------------------------------------------------------------------------------


def test_runs_are_made_once_and_failed_ones_are_results(execute, trained, tmp_path, capsys):
    assert execute("ablations", "--seeds", "1", "--publish") == 0
    printed = capsys.readouterr().out
    assert len(trained) == 14
    assert {config.width for config in trained} == {32}
    assert "constant-LR-0.1-LRMAX-32-seed100: failed, epoch 2: the loss is not finite" in printed
    assert "constant-LR-0.4-LRMAX-32-seed100: failed, the curve has no answer" in printed
    assert "no-cutout-32-seed100: 89.70%, 90.10% with flip TTA" in printed
    assert "epoch table" not in printed  # it is in log.txt
    records = json.loads((tables.RESULTS / "runs.json").read_text(encoding="utf-8"))
    assert [record["status"] for record in records].count("failed") == 3
    assert {"train_accuracy": 97.0, "split": "test", "changes": {"cutout": 0}}.items() <= next(
        record.items() for record in records if record["variant"] == "no cutout"
    )
    assert "| constant LR 0.1 LRMAX | 0 (1 failed) |" in command.README.read_text(encoding="utf-8")

    assert execute("ablations", "--seeds", "1") == 0
    (tmp_path / "runs").rename(tmp_path / "elsewhere")  # as on another machine that has the records
    assert execute("ablations", "--seeds", "1") == 0
    assert len(trained) == 14


def test_seeds_and_variants_that_matter_most_get_ten_runs(execute, trained):
    assert execute("ablations") == 0
    counts = [sum(config.residual is kept for config in trained if config.seed >= 103) for kept in (True, False)]
    assert counts == [7, 7]
    assert len(trained) == 2 * 10 + 12 * 3
    seeds = [config.seed for config in trained]
    assert seeds == sorted(seeds)  # so that a time limit cuts the last


def test_a_run_that_another_process_holds_is_left_for_later(execute, trained, tmp_path):
    folder = tmp_path / "runs" / "recipe-64-seed100"
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.5, lock.release).start()
    assert execute("seeds", "--seeds", "2") == 0
    assert [config.seed for config in trained] == [101, 100]


def test_what_was_made_before_an_interruption_is_shown(execute, trained, tmp_path, monkeypatch):
    make = command.make

    def make_two(*args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return make(*args)

    monkeypatch.setattr(command, "make", make_two)
    assert execute("seeds") == 130
    assert len(json.loads((tmp_path / "runs" / "results" / "runs.json").read_text(encoding="utf-8"))) == 2


@pytest.mark.parametrize("change", [{"source": "digits", "classes": tuple("0123")}, {"train_labels": np.arange(9)}])
def test_only_all_of_cifar10_is_taken_but_for_a_trial(execute, trained, toy, monkeypatch, capsys, change):
    monkeypatch.setattr(command, "load_dataset", lambda folder: dataclasses.replace(toy, **change))
    assert execute("seeds") == 2
    assert "experiments need all of CIFAR-10, or --small" in capsys.readouterr().err
    assert not trained
    if "classes" in change:
        assert execute("seeds", "--small", "--seeds", "1") == 0
        assert trained[0].width == 8


@pytest.mark.parametrize("arguments", [["seeds", "--small"], ["table", "--small"], ["seeds", "--width", "32"]])
def test_what_may_not_be_published_is_refused(execute, trained, arguments):
    with pytest.raises(SystemExit):
        execute(*arguments, "--publish")
    assert not trained


def test_seeds_are_published_when_all_are_made_here(execute, trained, tmp_path, monkeypatch, capsys):
    published = []
    monkeypatch.setattr(report, "publish", lambda first, others: published.append((first.name, len(others))))
    assert execute("seeds", "--publish", "--budget-minutes", "0") == 0
    assert "the time is up, 10 runs are left" in capsys.readouterr().out
    assert not trained + published
    assert execute("seeds", "--publish") == 0
    (tmp_path / "runs").rename(tmp_path / "elsewhere")  # Results/ needs the weights of all runs, not only the records
    path = tables.RESULTS / "runs.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"a CPU"', '"another CPU"'), encoding="utf-8")
    assert execute("seeds", "--publish") == 0
    assert published == 2 * [("recipe-64-seed100", 9)]
    assert [record["device"] for record in json.loads(path.read_text(encoding="utf-8"))] == ["a CPU"] * 10


@pytest.mark.slow
def test_a_trial_really_trains(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_dataset", lambda folder: toy)
    assert command.main(["seeds", "--small", "--seeds", "1", "--device", "cpu", "--runs", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "results" / "runs.json").read_text(encoding="utf-8"))
    assert 0 <= record["test_accuracy"] <= 100
    assert record["lr_min"] < record["lr_max"]
    assert "60 train and 30 test images of toy images, width 8" in capsys.readouterr().out


# --- compare ----------------------------------------------------------------------------------------------------------


def test_comparing_runs_shows_settings_that_differ_results_and_curves(execute, tmp_path, capsys):
    assert execute("ablations", "--seeds", "1") == 0
    first, second = (tmp_path / "runs" / f"{name}-32-seed100" for name in ("recipe", "no-cutout"))
    metrics = json.loads((first / "metrics.json").read_text(encoding="utf-8"))
    del metrics["config"]["cutout"]  # as in a run that is older than the setting, and so had its default
    (first / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    capsys.readouterr()
    assert command.main(["compare", str(first), str(second)]) == 0
    settings, _, results = capsys.readouterr().out.partition("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in settings.splitlines()[2:]}
    assert rows == {"cutout": ["8", "0"], "eval_every": ["1", str(Config().epochs)]}
    assert "A: recipe-32-seed100" in settings
    assert "89.7" in results
    assert (first / "compare.png").stat().st_size > 10_000
    assert command.main(["compare", str(first), str(second), "--out", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").exists()
    assert command.main(["compare", str(first), str(tmp_path)]) == 1
    assert "metrics.json: a run writes it when it is finished" in capsys.readouterr().err
