"""A run ends the same however often it is stopped; another run's folder is left alone."""

import csv
import os
import signal
from functools import partial

import pytest
import torch

from tests.small_runs import (
    EPOCHS,
    STEPS,
    arguments,
    at_call,
    at_step,
    exit_code,
    identical,
    outcome,
    shrink,
    start_run,
    tiny_config,
)
from utils.runs.checkpoint import NEWEST, PREVIOUS, CheckpointError
from utils.runs.job import Job, run_job
from utils.runs.report import METRICS_NAME, ResultsError, read_metrics

CPU = torch.device("cpu")


@pytest.fixture
def small(toy, monkeypatch):
    """40 train and 20 test images; runs draw no figures."""
    shrink(toy, monkeypatch.setattr)
    return toy.subset(40, 20)


@pytest.fixture
def begin(tmp_path, small):
    """``begin(dataset, **changes)``: a job in the folder that all of them share."""
    return lambda dataset=small, **changes: Job(tiny_config(**changes), dataset, tmp_path / "run", device=CPU)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def die_in(name: str, number: int):
    """Be killed just before the ``number``th call of ``os.fsync`` or ``os.replace``."""
    at_call(os, name, number, die)


# Where a process is killed, in the order in which one run meets them: each resumes, and gets a little further.
KILLS = [
    partial(at_step, 10, die),  # in the range test
    partial(die_in, "fsync", 1),  # in the first checkpoint, which no other precedes
    partial(die_in, "fsync", 2),  # in the checkpoint of epoch 1
    partial(at_step, 1, die),  # in epoch 1
    partial(die_in, "replace", 2),  # between the renames of the checkpoint of epoch 1
    partial(at_step, 2 * STEPS + 2, die),  # in epoch 3
    partial(die_in, "fsync", 1),  # in the checkpoint of epoch 3
    partial(die_in, "fsync", 3),  # in the first of the results
]


def test_a_run_killed_again_and_again_ends_like_one_that_never_was(tmp_path, toy):
    flags = ("--resume", "--range-test-end", "10", "--range-test-steps", "40")
    argv = arguments(tmp_path / "run", *flags, lrs=())
    assert exit_code(start_run([*argv, "--run-dir", str(tmp_path / "undisturbed")], toy)) == 0
    for kill in KILLS:
        assert exit_code(start_run(argv, toy, kill)) == -signal.SIGKILL
        assert not (tmp_path / "run" / METRICS_NAME).exists()
    assert exit_code(start_run(argv, toy)) == 0
    assert identical(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


def test_another_seed_ends_elsewhere(tmp_path, small):
    for seed in (0, 1):
        run_job(tiny_config(seed=seed), small, tmp_path / str(seed), device=CPU)
    assert not identical(outcome(tmp_path / "0")["model"], outcome(tmp_path / "1")["model"])


@pytest.mark.parametrize("again", ["the cell of the range test", "the cell of the training"])
def test_an_interrupted_cell_run_again_continues_from_the_checkpoint(tmp_path, small, begin, again, monkeypatch):
    run_job(tiny_config(), small, tmp_path / "undisturbed", device=CPU)
    with begin() as job:
        with monkeypatch.context() as patch:
            at_step(STEPS + 2, interrupt, patch.setattr)
            with pytest.raises(KeyboardInterrupt):
                job.fit()
        with pytest.raises(ResultsError, match=r"not finished: call fit\(\) first"):
            job.finish()
        if again == "the cell of the range test":
            job.find_lr()
        job.fit()
        job.finish()
    assert identical(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


def test_a_finished_run_leaves_its_results_and_one_checkpoint(tmp_path, small):
    metrics = run_job(tiny_config(), small, tmp_path / "run", device=CPU)
    assert (tmp_path / "run" / METRICS_NAME).exists()
    assert read_metrics(tmp_path / "run") == metrics
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == [str(epoch + 1) for epoch in range(EPOCHS)]
    assert float(rows[-1]["test_accuracy"]) == metrics["test_accuracy"]
    assert (tmp_path / "run" / NEWEST).exists()
    assert not (tmp_path / "run" / PREVIOUS).exists()


def test_a_setting_of_the_machine_may_change_and_others_or_other_images_may_not(tmp_path, small, begin):
    with begin() as job:
        job.find_lr()
    before = (tmp_path / "run" / NEWEST).read_bytes()
    for change, words in (
        (dict(batch_size=20, seed=5), "is of another run: batch_size 10 there, 20 here; seed 0 there, 5 here"),
        (dict(dataset=small.holdout(10)), "other images"),
    ):
        with pytest.raises(CheckpointError, match=words):
            begin(**change).open()
        assert (tmp_path / "run" / NEWEST).read_bytes() == before
    with begin(recorded="off") as job:  # unlocked again
        assert job.is_resumed


def test_an_epoch_of_few_steps_is_warned_of(begin):
    with pytest.warns(UserWarning, match="an epoch has only 2 steps: a smaller batch_size"):
        begin(batch_size=20).open().close()


def test_results_that_could_not_be_written_are_written_by_resuming(tmp_path, small, begin, monkeypatch):
    with monkeypatch.context() as patch, begin() as job:
        job.fit()
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            job.finish()
    assert not (tmp_path / "run" / METRICS_NAME).exists()
    with begin() as job:
        assert job.resumed_epochs == EPOCHS
        job.fit()
        job.finish()
    assert (tmp_path / "run" / METRICS_NAME).exists()


def full_disk(descriptor):
    raise OSError(28, "No space left on device")


def test_results_reach_the_drive_with_the_checkpoint(tmp_path, small, monkeypatch):
    monkeypatch.setenv("S10_COPY_TO", str(tmp_path / "drive"))
    run_job(tiny_config(), small, tmp_path / "run", device=CPU)
    for path in (tmp_path / "run").glob("[!.]*"):
        assert (tmp_path / "drive" / "run" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "drive" / "run" / PREVIOUS).exists()
    with Job(tiny_config(), small, tmp_path / "another machine" / "run", device=CPU) as job:
        assert job.resumed_epochs == EPOCHS
