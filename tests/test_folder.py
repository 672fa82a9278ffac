"""The run's folder: one process at a time, always an intact checkpoint, and a copy on a drive that may fail."""

import os
import shutil
import signal
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.small_runs import KILLED, RunProcess, arguments, at_step, identical, small_checkpoint
from utils.runs import folder as folders
from utils.runs.checkpoint import MAGIC, CheckpointError, decode
from utils.runs.folder import NEWEST, PREVIOUS, RunFolder, RunLockedError, mirror_from_environment
from utils.runtime import write_atomically


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of epochs 1 and 2, locked by this process."""
    with RunFolder(tmp_path / "run") as folder:
        folder.save(small_checkpoint(1))
        folder.save(small_checkpoint(2))
        yield folder


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged_versions(content: bytes, count: int):
    """``content`` damaged at ``count`` places spread over the file: cut off and with one bit flipped in turn."""
    places = np.unique(np.linspace(0, len(content) - 1, count).astype(int))
    for number, place in enumerate(places):
        if number % 2:
            yield place, content[:place]
        else:
            yield place, content[:place] + bytes([content[place] ^ (1 << number % 8)]) + content[place + 1 :]


@pytest.mark.filterwarnings("ignore:.*damaged|.*is not a Session 10")
def test_damage_anywhere_in_the_newest_checkpoint_falls_back_to_the_one_before(saved):
    content = saved.checkpoint.read_bytes()
    header = content.index(b"\n") + 1
    for place, damaged in [*damaged_versions(content[:header], header), *damaged_versions(content, 220)]:
        saved.checkpoint.write_bytes(damaged)
        if damaged.startswith(MAGIC + b" 6 "):  # the flip made it a later version's, which is refused: see below
            continue
        assert identical(vars(saved.load()), vars(small_checkpoint(1))), f"wrong content, damaged at byte {place}"


def test_a_damaged_checkpoint_is_reported_and_never_replaces_the_good_one(saved):
    saved.checkpoint.write_bytes(saved.checkpoint.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"{NEWEST} is damaged: .*; continuing from {PREVIOUS}, which holds 1 epochs"):
        assert saved.load().epochs == 1
    saved.save(small_checkpoint(2))
    assert (decode(saved.checkpoint).epochs, decode(saved.previous).epochs) == (2, 1)
    saved.save(small_checkpoint(3))  # as always: the previous one is kept
    assert decode(saved.previous).epochs == 2


def test_if_both_are_damaged_the_message_names_both_and_the_way_out(saved):
    for path in (saved.checkpoint, saved.previous):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt.*checkpoint\.previous\.pt.*delete .*start again"):
        saved.load()


def test_a_crash_between_the_renames_leaves_the_previous_checkpoint_in_use(saved):
    saved.checkpoint.unlink()
    assert saved.holds_checkpoint
    assert saved.load().epochs == 1


def test_a_checkpoint_that_cannot_get_its_name_leaves_the_newest_in_place(saved, monkeypatch):
    def busy(source, target, replace=os.replace):
        if str(source).endswith(".s10part"):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", busy)
        with pytest.raises(CheckpointError, match="the checkpoint of epoch 2 is still there"):
            saved.save(small_checkpoint(3))
    assert decode(saved.checkpoint).epochs == 2
    assert not list(saved.path.glob(".*.s10part"))


def test_a_later_formats_checkpoint_is_refused_and_kept(saved):
    content = saved.checkpoint.read_bytes().replace(MAGIC + b" 2 ", MAGIC + b" 3 ", 1)
    saved.checkpoint.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a later version of this project \(format 3; this version reads 2\)"):
        saved.load()
    assert saved.checkpoint.read_bytes() == content


def test_half_written_files_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    ours = {".checkpoint.pt.123.s10part", ".metrics.json.7.s10part"}
    foreign = {"thesis.part", "checkpoint.pt.part", ".mine.s10part", "notes.txt"}
    for name in ours | foreign:
        (tmp_path / name).write_bytes(b"half")
    with RunFolder(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} - {".lock"} == foreign


@pytest.mark.parametrize("name", [NEWEST, PREVIOUS])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_something_else_in_place_of_a_checkpoint_is_refused_before_any_work(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(
        CheckpointError, match=f"{name} is not a file, so no checkpoint can be kept there: move it away"
    ):
        RunFolder(tmp_path).__enter__()


def test_a_checkpoint_without_read_permission_is_not_called_damaged(toy):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        run_dir, log = Path(name) / "run", Path(name) / "log"
        with RunFolder(run_dir) as folder:
            folder.save(small_checkpoint(1))
        for path in (Path(name), run_dir, run_dir / ".lock"):
            path.chmod(0o777)
        folder.checkpoint.chmod(0)
        log.touch()
        log.chmod(0o666)
        assert RunProcess(arguments(run_dir, "--resume"), toy, _leave_root, log).wait() == 1
        folder.checkpoint.chmod(0o600)
        message = log.read_text(encoding="utf-8").splitlines()[-1]
        assert "checkpoint.pt cannot be read (Permission denied), but it may be intact: make it readable" in message
        assert "damaged" not in message
        assert decode(folder.checkpoint).epochs == 1


def _leave_root() -> None:
    if os.geteuid() == 0:
        os.setuid(65534)


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_the_same_process_may_enter_again_another_may_not_until_the_first_is_dead(tmp_path, toy):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with RunFolder(run_dir), RunFolder(run_dir):  # a notebook's cell run twice
        assert RunProcess(arguments(run_dir), toy, log=log).wait() == 1
    message = log.read_text(encoding="utf-8").splitlines()[-1]
    assert "in use by another process: wait for it, stop it, or choose another" in message
    assert "epoch" not in message  # nothing is said of what it kept
    holder = RunProcess(arguments(run_dir), toy, partial(at_step, 1, signal.pause))
    while not (run_dir / NEWEST).exists():
        assert holder.is_alive
        time.sleep(0.01)
    try:
        with pytest.raises(RunLockedError, match="in use by another process"):
            RunFolder(run_dir).__enter__()
    finally:
        holder.send(signal.SIGKILL)
        assert holder.wait() == KILLED
    with RunFolder(run_dir):
        pass


@pytest.mark.parametrize("lost", ["the folder", "the lock"])
@pytest.mark.parametrize("other", ["is running", "has ended", "never came"])
def test_a_run_whose_lock_was_deleted_never_saves_over_another(tmp_path, toy, lost, other):
    """Another process may have begun in the folder of a run that is still going."""
    run_dir = tmp_path / "run"
    with RunFolder(run_dir) as mine:
        mine.save(small_checkpoint(1))
        shutil.rmtree(run_dir) if lost == "the folder" else (run_dir / ".lock").unlink()
        if other == "never came":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                mine.save(small_checkpoint(2))
            words = f"{run_dir} was deleted during the run: it is created again, with the checkpoint after epoch 2"
            assert [str(warning.message) for warning in caught] == [words] * (lost == "the folder")
            assert decode(mine.checkpoint).epochs == 2
            return
        for path in run_dir.glob("*.pt"):
            path.unlink()  # so that the other begins
        theirs = RunProcess(
            arguments(run_dir), toy, partial(at_step, 1, signal.pause) if other == "is running" else None
        )
        try:
            if other == "has ended":
                assert theirs.wait() == 0
            while not (run_dir / NEWEST).exists():
                time.sleep(0.01)
            found = decode(run_dir / NEWEST).run_id
            with pytest.raises(RunLockedError, match=r"stops without saving epoch 2\. Start it again in another"):
                mine.save(small_checkpoint(2))
            assert decode(run_dir / NEWEST).run_id == found != "this-run"
        finally:
            theirs.send(signal.SIGKILL) if theirs.is_alive else None
            theirs.wait()


# --- the drive --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """Sets $S10_RUN_DIR to a drive's folder, and retries without waiting; returns where "run" is copied."""
    (tmp_path / "drive").mkdir()
    monkeypatch.setenv("S10_RUN_DIR", str(tmp_path / "drive" / "session10"))
    monkeypatch.setattr(folders, "COPY_WAIT_SECONDS", 0.0)
    return tmp_path / "drive" / "session10" / "run"


def mirrored(run_dir) -> RunFolder:
    return RunFolder(run_dir, mirror_from_environment(run_dir))


def test_a_new_machine_continues_from_the_drive_and_a_folder_behind_takes_the_newer_copy(tmp_path, drive, capsys):
    with mirrored(tmp_path / "here" / "run") as here:
        here.save(small_checkpoint(1))
        shutil.copytree(here.path, tmp_path / "behind" / "run")
        here.save(small_checkpoint(2))
        for name in (NEWEST, PREVIOUS):
            assert (drive / name).read_bytes() == (here.path / name).read_bytes()
    for place in ("there", "behind"):
        with mirrored(tmp_path / place / "run") as folder:
            assert f"fetched the checkpoint after epoch 2 from {drive}" in capsys.readouterr().out
            assert folder.load().epochs == 2
    (drive / NEWEST).write_bytes((drive / NEWEST).read_bytes()[:-1])  # its header is intact, its content is not
    with mirrored(tmp_path / "fourth" / "run") as folder:
        assert folder.load().epochs == 1
        folder.save(small_checkpoint(3))
    with mirrored(tmp_path / "here" / "run") as here:
        assert here.load().epochs == 3


def test_a_folder_ahead_of_the_drive_is_kept(tmp_path, drive):
    with mirrored(tmp_path / "here" / "run") as folder:
        folder.save(small_checkpoint(2))
    (drive / NEWEST).write_bytes(b"something else")
    with mirrored(tmp_path / "here" / "run") as folder:
        assert folder.load().epochs == 2


def test_two_runs_of_one_name_never_mix_on_the_drive(tmp_path, drive):
    with mirrored(tmp_path / "A" / "run") as first, RunFolder(tmp_path / "B" / "run", drive) as second:
        first.save(small_checkpoint(1))
        with pytest.warns(UserWarning, match="could not be copied to .*another run's checkpoint is there"):
            second.save(small_checkpoint(5, "another-run"))
        assert second.mirror_is_stale
        first.save(small_checkpoint(2))
        assert {decode(drive / name).run_id for name in (NEWEST, PREVIOUS)} == {"this-run"}
    with pytest.raises(CheckpointError, match=r"holds another run than .*set \$S10_RUN_DIR to another folder"):
        mirrored(tmp_path / "B" / "run").__enter__()


def test_a_drive_is_never_set_back_to_an_earlier_epoch(tmp_path, drive):
    with mirrored(tmp_path / "here" / "run") as folder:
        folder.save(small_checkpoint(1))
        write_atomically(drive / NEWEST, small_checkpoint(4).encode())  # by the machine that seemed lost
        with pytest.warns(UserWarning, match="a later checkpoint is there"):
            folder.save(small_checkpoint(2))
        assert decode(drive / NEWEST).epochs == 4


def test_a_failing_drive_is_retried_then_warned_about_and_never_ends_the_run(tmp_path, drive, monkeypatch):
    with mirrored(tmp_path / "here" / "run") as folder:
        drive.parent.write_bytes(b"")  # a file in its place: as with a dropped mount, all access below it fails
        with pytest.warns(UserWarning, match=r"epoch 1 could not be copied to .*the run continues.*checkpoint\.pt"):
            folder.save(small_checkpoint(1))
        assert folder.mirror_is_stale
        assert decode(folder.checkpoint).epochs == 1

        monkeypatch.setattr(folders.time, "sleep", lambda seconds: drive.parent.unlink())  # it is back
        folder.save(small_checkpoint(2))
        assert not folder.mirror_is_stale
    assert (drive / NEWEST).read_bytes() == folder.checkpoint.read_bytes()


def test_a_drive_that_cannot_be_read_at_the_start_is_not_mistaken_for_an_empty_one(tmp_path, drive):
    drive.parent.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"could not be read.*check that the drive is mounted.*unset \$S10_RUN_DIR"
    ):
        mirrored(tmp_path / "run").__enter__()
    with RunFolder(tmp_path / "run"):  # unlocked again
        pass


def test_a_drive_that_is_not_mounted_gets_no_folders(tmp_path, monkeypatch):
    mount_point = tmp_path / "content" / "drive"
    monkeypatch.setenv("S10_RUN_DIR", str(mount_point / "MyDrive" / "session10"))
    with (
        mirrored(tmp_path / "run") as folder,
        pytest.warns(UserWarning, match=r"could not be copied to .*No such file"),
    ):
        folder.save(small_checkpoint(1))
    assert not mount_point.exists()


def test_nothing_is_copied_without_the_variable_or_if_it_names_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("S10_RUN_DIR", raising=False)
    assert mirror_from_environment(tmp_path / "run") is None
    monkeypatch.setenv("S10_RUN_DIR", str(tmp_path))
    assert mirror_from_environment(tmp_path / "run") is None
