"""A run's folder: one process at a time, always an intact checkpoint, nothing unpickled, a copy on a drive that may fail."""

import hashlib
import os
import pickle
import signal
import time
import warnings

import pytest
import torch
from torch import nn

from tests.small_runs import exit_code, start_process, tiny_config
from utils import engine
from utils.runs.checkpoint import (
    NEWEST,
    PREVIOUS,
    CheckpointError,
    RunFolder,
    RunLockedError,
    copy_from_environment,
)
from utils.runtime import pick_device, pick_precision


def state_after(epochs: int) -> engine.TrainState:
    """A run of a single layer whose weights are the number of its epochs."""
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, float(epochs))
    precision = pick_precision("fp32", pick_device("cpu"))
    state = engine.start(model, tiny_config(), (1e-3, 1e-2), 4, precision)
    state.history.lr = [1e-3] * epochs
    return state


def epochs_in(folder: RunFolder) -> int:
    content = folder.load()
    assert content["model"]["weight"].unique().tolist() == [content["record"]["epochs"]]
    return content["record"]["epochs"]


def save(folder: RunFolder, *epochs: int) -> None:
    for count in epochs:
        folder.save(state_after(count), {"epochs": count})


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of epochs 1 and 2, locked by this process."""
    with RunFolder(tmp_path / "run") as folder:
        save(folder, 1, 2)
        yield folder


class Payload:
    """Pickles into a call that leaves a trace, a folder."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


# --- damage and code --------------------------------------------------------------------------------------------------


def flipped(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        *(lambda content, place=place: flipped(content, place) for place in (0, 500, -500, -40, -1)),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_never_replaces_the_good_one_before_it(saved, damage):
    newest = saved.path / NEWEST
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{NEWEST} is damaged: continuing from {PREVIOUS}"):
        assert epochs_in(saved) == 1
    save(saved, 3)
    assert epochs_in(saved) == 3
    newest.unlink()
    assert epochs_in(saved) == 1


def test_if_both_are_damaged_the_message_names_both_and_the_way_out(saved):
    for name in (NEWEST, PREVIOUS):
        (saved.path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{NEWEST} and .*{PREVIOUS}: damaged, .*delete .* and start again"):
        saved.load()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path, write):
    path, trace = tmp_path / NEWEST, tmp_path / "executed"
    with open(path, "wb") as file:
        write({"model": Payload(str(trace))}, file)
    path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())
    with pytest.raises(CheckpointError, match=NEWEST):
        RunFolder(tmp_path).load()
    assert not trace.exists()


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.json", "photo.jpg", "training_logs.md", "src/"])
def test_a_folder_that_holds_something_else_than_a_run_is_refused_and_left_alone(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name.endswith("/") else path.touch()
    with pytest.raises(CheckpointError, match=f"holds '{path.name}' but no checkpoint .*: choose a new --run-dir"):
        RunFolder(tmp_path).open()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_with_a_log_a_notebook_or_hidden_files_is_new(tmp_path):
    for name in ("log.txt", "Session10.ipynb", "variant.json", ".DS_Store"):
        (tmp_path / name).touch()
    with RunFolder(tmp_path) as folder:
        assert not folder.holds_run


def hold(path):
    with RunFolder(path):
        (path / "held").touch()
        signal.pause()


def enter(path):
    with RunFolder(path):
        pass


def test_a_second_process_is_refused_until_the_first_is_dead_and_the_same_may_enter_again(tmp_path):
    holder = start_process(hold, tmp_path / "run")
    while not (tmp_path / "run" / "held").exists():
        assert holder.is_alive()
        time.sleep(0.01)
    (tmp_path / "run" / "held").unlink()
    with pytest.raises(RunLockedError, match="in use by another process: wait for it, stop it, or choose another"):
        RunFolder(tmp_path / "run").open()
    holder.kill()
    assert exit_code(holder) == -signal.SIGKILL
    with RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run"):  # a notebook's cell run twice
        pass


# --- the drive --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """$S10_COPY_TO is a folder, still to be made, on a mounted drive; returns where "run" is copied."""
    (tmp_path / "drive").mkdir()
    monkeypatch.setenv("S10_COPY_TO", str(tmp_path / "drive" / "session10"))
    return tmp_path / "drive" / "session10" / "run"


def copied(run_dir) -> RunFolder:
    return RunFolder(run_dir, copy_from_environment(run_dir))


def test_a_new_machine_continues_from_the_drive_even_if_its_newest_copy_is_damaged(tmp_path, drive, capsys):
    with copied(tmp_path / "here" / "run") as here:
        save(here, 1, 2)
    with copied(tmp_path / "there" / "run") as there:
        assert f"fetched {NEWEST} from {drive}" in capsys.readouterr().out
        assert epochs_in(there) == 2
    (drive / NEWEST).write_bytes(b"half")
    with copied(tmp_path / "elsewhere" / "run") as elsewhere, pytest.warns(UserWarning, match="is damaged"):
        assert epochs_in(elsewhere) == 1
    (drive / NEWEST).write_bytes(b"half")
    with copied(tmp_path / "here" / "run") as here:  # nothing is fetched over a checkpoint
        assert epochs_in(here) == 2


def test_a_failing_drive_is_warned_of_once_and_never_ends_the_run(tmp_path, drive):
    with copied(tmp_path / "run") as folder:
        drive.rmdir()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            save(folder, 1, 2, 3)
        assert [str(warning.message)[:40] for warning in caught] == ["the run goes on, but is not copied: [Err"]
        drive.mkdir()
        save(folder, 4)
    assert (drive / NEWEST).read_bytes() == (folder.path / NEWEST).read_bytes()


def test_a_drive_that_is_not_mounted_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("S10_COPY_TO", str(tmp_path / "drive" / "MyDrive" / "session10"))
    with pytest.raises(FileNotFoundError, match="MyDrive/session10"):
        copied(tmp_path / "run").open()
    assert not (tmp_path / "drive").exists()


def test_nothing_is_copied_without_the_variable_or_onto_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("S10_COPY_TO", raising=False)
    assert copy_from_environment(tmp_path / "run") is None
    monkeypatch.setenv("S10_COPY_TO", str(tmp_path))
    assert copy_from_environment(tmp_path / "run") is None
