"""Resuming is exact after a kill at any moment; files of other runs are refused; nothing is unpickled."""

import hashlib
import pickle
import shutil
import signal
import types
from functools import partial

import pytest
import torch

from tests.small_runs import (
    EPOCHS,
    KILLED,
    STEPS,
    Payload,
    RunProcess,
    arguments,
    at_step,
    die,
    epochs_kept,
    identical,
    in_save,
    outcome,
    shrink,
    small_checkpoint,
    tiny_config,
)
from utils import engine
from utils.runs import figures
from utils.runs.checkpoint import FORMAT, MAGIC, CheckpointError, decode
from utils.runs.folder import NEWEST, RunFolder
from utils.runs.job import Job, is_finished, run_job
from utils.runs.report import ResultsError

CPU = torch.device("cpu")  # elsewhere neither the moments of saving nor the last bits are the same

# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, toy):
    run_dir = tmp_path_factory.mktemp("runs") / "never-killed"
    assert RunProcess(arguments(run_dir), toy).wait() == 0
    return outcome(run_dir)


def test_resuming_after_any_epoch_ends_as_if_never_stopped(tmp_path, toy, monkeypatch):
    shrink(toy, monkeypatch.setattr)
    saved, save = [], RunFolder.save

    def keep(self, checkpoint):
        save(self, checkpoint)
        saved.append(self.checkpoint.read_bytes())

    monkeypatch.setattr(RunFolder, "save", keep)
    config, dataset = tiny_config(lr_min=None, lr_max=None, range_test_end=10.0), toy.subset(40, 20)
    run_job(config, dataset, tmp_path / "whole", device=torch.device("cpu"))
    for epochs, content in enumerate(saved[: EPOCHS + 1]):  # the first is from right after the range test
        (tmp_path / f"after-{epochs}").mkdir()
        (tmp_path / f"after-{epochs}" / NEWEST).write_bytes(content)
        torch.rand(epochs)  # a new process has other generator states
        metrics = run_job(config, dataset, tmp_path / f"after-{epochs}", device=torch.device("cpu"))
        assert identical(outcome(tmp_path / f"after-{epochs}"), outcome(tmp_path / "whole"))
        assert metrics["lr_max"] == decode(tmp_path / "whole" / NEWEST).record["lr_range"]["lr_max"]


KILLS = {
    "in epoch 1": partial(at_step, 2, die),
    "while testing after epoch 1": partial(at_step, STEPS + 1, die),
    "in epoch 3": partial(at_step, 2 * (STEPS + 1) + 3, die),
    "half-way through the first checkpoint": partial(in_save, 1, "half-written"),
    "half-way through a later checkpoint": partial(in_save, 3, "half-written"),
    "before the renames": partial(in_save, 2, "before-renames"),
    "between the renames": partial(in_save, 3, "between-renames"),
    "while writing the last checkpoint": partial(in_save, EPOCHS + 1, "half-written"),
}
AGAIN_AND_AGAIN = ("half-way through the first checkpoint", "in epoch 1", "in epoch 3", "before the renames")


@pytest.mark.parametrize("moments", [*((moment,) for moment in KILLS), AGAIN_AND_AGAIN], ids=", ".join)
def test_a_killed_process_resumes_to_the_same_bits(moments, tmp_path, toy, never_killed):
    argv = arguments(tmp_path / "run", "--resume")
    for moment in moments:
        assert RunProcess(argv, toy, KILLS[moment]).wait() == KILLED
    assert RunProcess(argv, toy).wait() == 0
    assert identical(outcome(tmp_path / "run"), never_killed)
    assert not list((tmp_path / "run").glob(".*.s10part"))


def test_a_kill_amid_loader_processes_frees_the_folder_and_resumes_to_the_same_bits(tmp_path, toy):
    flags = ("--pipeline", "albumentations", "--num-workers", "1")
    assert RunProcess(arguments(tmp_path / "left-alone", *flags), toy).wait() == 0
    assert RunProcess(arguments(tmp_path / "run", *flags), toy, KILLS["in epoch 3"]).wait() == KILLED
    # At once: orphans must not keep the lock.
    assert RunProcess(arguments(tmp_path / "run", "--resume", *flags), toy).wait() == 0
    assert identical(outcome(tmp_path / "run"), outcome(tmp_path / "left-alone"))


def test_another_seed_ends_elsewhere(tmp_path, toy, never_killed):
    assert RunProcess(arguments(tmp_path / "run", "--seed", "1"), toy).wait() == 0
    assert not identical(outcome(tmp_path / "run")["model"], never_killed["model"])


# --- files of other runs, or of none ----------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, toy, monkeypatch):
    """``job(dataset, **changes)`` in a folder whose run stopped after the range test."""
    shrink(toy, monkeypatch.setattr)

    def job(dataset=toy, **changes) -> Job:
        return Job(tiny_config(train_images=None, test_images=None, **changes), dataset, tmp_path / "run", device=CPU)

    with job() as first:
        first.find_range()
    return job


@pytest.mark.parametrize("again", ["the cell of the range test", "the cell of the training"])
def test_an_interrupted_cell_run_again_continues_from_the_checkpoint(tmp_path, toy, job, again, monkeypatch):
    with Job(tiny_config(train_images=None, test_images=None), toy, tmp_path / "left-alone", device=CPU) as expected:
        expected.fit()
    with job() as interrupted, monkeypatch.context() as patch:
        at_step(STEPS + 7, lambda: signal.raise_signal(signal.SIGINT), patch.setattr)
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit()
        if again == "the cell of the range test":
            interrupted.find_range()
        interrupted.fit()
        interrupted.find_range()
    assert identical(interrupted.state.model.state_dict(), expected.state.model.state_dict())
    assert epochs_kept(tmp_path / "run") == EPOCHS


def test_a_cell_run_again_after_its_first_save_failed_saves_the_untrained_network(tmp_path, toy, job, monkeypatch):
    config = tiny_config(train_images=None, test_images=None)
    with Job(config, toy, tmp_path / "left-alone", device=CPU) as expected:
        expected.fit()

    def full(*args):
        raise CheckpointError("the disk is full")

    with Job(config, toy, tmp_path / "full", device=CPU) as again:
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save", full)
            with pytest.raises(CheckpointError):
                again.find_range()
        with monkeypatch.context() as patch:
            at_step(2, lambda: signal.raise_signal(signal.SIGINT), patch.setattr)
            with pytest.raises(KeyboardInterrupt):
                again.fit()
        assert epochs_kept(tmp_path / "full") == 0
        again.fit()
    assert identical(again.state.model.state_dict(), expected.state.model.state_dict())


def test_a_trained_network_never_becomes_epoch_0_of_a_run_whose_folder_was_deleted(tmp_path, job, monkeypatch):
    with job() as interrupted:

        def delete_and_interrupt():
            shutil.rmtree(tmp_path / "run")
            signal.raise_signal(signal.SIGINT)

        at_step(2, delete_and_interrupt, monkeypatch.setattr)
        with pytest.raises(KeyboardInterrupt):
            interrupted.fit()
        with pytest.raises(CheckpointError, match="was deleted during the run"):
            interrupted.fit()
    assert not (tmp_path / "run" / NEWEST).exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_no_results_are_written_of_a_run_that_is_not_finished(tmp_path, job, interrupted, monkeypatch):
    with job() as unfinished:
        unfinished.find_range()
        kept = "the start of the run is kept in .*, but no epoch yet"
        if interrupted:
            at_step(STEPS + 7, lambda: signal.raise_signal(signal.SIGINT), monkeypatch.setattr)
            with pytest.raises(KeyboardInterrupt):
                unfinished.fit()
            kept = f"1 of {EPOCHS} epochs are kept in .*"
        with pytest.raises(ResultsError, match=rf"^the run is not finished: {kept}; call fit\(\) first$"):
            unfinished.finish()
    assert not is_finished(tmp_path / "run")


@pytest.mark.parametrize(("seconds", "saves"), [(10.0, 1), (0.0, EPOCHS)])
def test_a_gpu_saves_now_and_then_and_after_the_last_epoch(tmp_path, job, monkeypatch, seconds, saves):
    """A CPU's run believes it is on a GPU; its epochs take far less than 10 seconds."""
    written, save = [], RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda self, checkpoint: (written.append(self), save(self, checkpoint)))
    monkeypatch.setattr("utils.runs.job.SAVE_SECONDS_ON_GPU", seconds)
    with job() as first:
        first.find_range()
        first.device = types.SimpleNamespace(type="cuda")
        first.fit()
    assert len(written) == saves
    assert epochs_kept(tmp_path / "run") == EPOCHS


def test_a_run_stopped_while_it_draws_is_not_finished(tmp_path, job, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "draw_all", stop)
    with job() as interrupted:
        interrupted.fit()
        with pytest.raises(KeyboardInterrupt):
            interrupted.finish()
    assert not is_finished(tmp_path / "run")
    monkeypatch.setattr(figures, "draw_all", lambda inputs: {})
    with job() as again:
        again.find_range()
        again.fit()
        again.finish()
    assert is_finished(tmp_path / "run")


def refused(job: Job) -> str:
    """The message with which the job refuses to start or to continue."""
    before = job.folder.checkpoint.read_bytes()
    with pytest.raises(CheckpointError) as caught, job:
        job.find_range()
    assert job.folder.checkpoint.read_bytes() == before
    with RunFolder(job.folder.path):  # unlocked again
        pass
    return str(caught.value)


def test_another_config_other_images_or_another_network_is_refused_with_what_differs(job, toy, monkeypatch):
    found = refused(job(batch_size=30, seed=5))
    assert "belongs to another run: batch_size 10 there, 30 here; seed 0 there, 5 here. Choose another" in found
    assert "other images" in refused(job(toy.subset(40)))
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 7, 3))
    monkeypatch.setattr(engine, "build_model", lambda *args: other)
    assert "is of another model (conv.weight is (8, 3, 3, 3) there, missing here)" in refused(job())


@pytest.mark.parametrize(
    "part", ["record", "record.config", "record.lr_range", "state.model", "state.rng", "state.history"]
)
@pytest.mark.parametrize("what", ["missing", "[]"])
def test_a_file_with_a_part_missing_or_of_another_type_is_refused(job, part, what):
    path = job().folder.checkpoint
    content = vars(decode(path))
    *outer, name = part.split(".")
    holder = content[outer[0]] if outer else content
    if what == "missing":
        del holder[name]
    else:
        holder[name] = []
    _write(path, content)
    assert any(words in refused(job()) for words in ("another version of this project", "not a Session 10 checkpoint"))


def test_a_setting_newer_than_the_checkpoint_had_its_default(job):
    path = job().folder.checkpoint
    content = vars(decode(path))
    del content["record"]["config"]["cycle_beta1"]
    _write(path, content)
    with job() as resumed:
        resumed.find_range()


def _write(path, content) -> None:
    torch.save(content, path)
    _wrap(path, path.read_bytes(), content["run_id"], content["epochs"])


def _wrap(path, payload: bytes, run_id: str = "run", epochs: int = 0) -> None:
    """A valid header around any payload."""
    path.write_bytes(MAGIC + f" {FORMAT} {hashlib.sha256(payload).hexdigest()} {run_id} {epochs}\n".encode() + payload)


def test_a_first_line_from_another_checkpoint_is_noticed(tmp_path):
    path = tmp_path / NEWEST
    path.write_bytes(small_checkpoint(2).encode().replace(b" 2\n", b" 9\n", 1))
    with pytest.raises(CheckpointError, match="damaged: its first line belongs to another checkpoint"):
        decode(path)


# --- code in a file ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", [pickle.dump, torch.save])
@pytest.mark.parametrize("header", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path, writer, header):
    path, trace = tmp_path / NEWEST, tmp_path / "executed"
    with open(path, "wb") as file:
        writer({"state": Payload(trace)}, file)
    if header:
        _wrap(path, path.read_bytes())
    with pytest.raises(CheckpointError, match="could run code" if header else "not a Session 10 checkpoint"):
        RunFolder(tmp_path).load()
    assert not trace.exists()
