"""Resume is exact, damage is noticed, foreign files are refused, nothing is unpickled."""

import copy
import functools
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import (
    EPOCHS,
    FP32,
    STEPS,
    TinyNet,
    arguments,
    at_step,
    child,
    die,
    in_save,
    tiny_config,
    tiny_state,
)
from utils.checkpoint import (
    MAGIC,
    CheckpointError,
    RunFolder,
    RunLockedError,
    decode,
    load_weights,
    run_folder_from_environment,
    save_weights,
    write_atomically,
)

from benchmarks.kill_resume import KILLED, identical, outcome
from models import CustomResNet
from utils import checkpoint
from utils.engine import fit

DATA = "fingerprint of the data"


def everything(state) -> dict:
    """What a checkpoint must bring back: the state, the history but its wall times, and the generators."""
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "ema": state.ema.state_dict(),
        "history": {name: value for name, value in state.history.to_dict().items() if name != "seconds"},
        "draws": [random.random(), float(np.random.rand()), float(torch.rand(()))],
    }


@pytest.fixture
def config():
    return tiny_config()


@pytest.fixture
def saved(tmp_path, toy, config):
    """A folder with the checkpoints of epochs 1 and 2."""
    state, train_loader, test_loader = tiny_state(toy, config)
    folder = RunFolder(tmp_path / "run")

    def save_two(state):
        if state.history.epochs <= 2:
            folder.save(state, config, DATA)

    with folder:
        fit(state, train_loader, test_loader, config, precision=FP32, after_epoch=save_two)
        yield folder


# --- exactness ------------------------------------------------------------------------------------------------------


def test_resuming_after_any_epoch_ends_as_if_never_stopped(tmp_path, toy, config):
    folder = RunFolder(tmp_path / "run")
    state, train_loader, test_loader = tiny_state(toy, config)
    states = {}

    def save(state):
        folder.save(state, config, DATA)
        states[state.history.epochs] = folder.checkpoint.read_bytes()

    with folder:
        fit(state, train_loader, test_loader, config, precision=FP32, after_epoch=save)
    uninterrupted = copy.deepcopy(everything(state))

    for epoch, content in states.items():
        folder.checkpoint.write_bytes(content)
        state, train_loader, test_loader = tiny_state(toy, config)
        torch.rand(epoch)  # the generators stand elsewhere in a fresh process
        assert folder.load(state, config, DATA)
        assert state.history.epochs == epoch
        fit(state, train_loader, test_loader, config, precision=FP32)
        assert identical(everything(state), uninterrupted), f"differs when resumed after epoch {epoch}"


KILLS = {
    "in epoch 1": functools.partial(at_step, 2, die),
    "while testing after epoch 1": functools.partial(at_step, STEPS + 1, die),
    "in epoch 3": functools.partial(at_step, 2 * (STEPS + 1) + 3, die),
    "half-way through the first checkpoint": functools.partial(in_save, 1, "half-written"),
    "half-way through a later checkpoint": functools.partial(in_save, 3, "half-written"),
    "before the renames": functools.partial(in_save, 2, "before-renames"),
    "between the renames": functools.partial(in_save, 3, "between-renames"),
    "while writing the last checkpoint": functools.partial(in_save, EPOCHS, "half-written"),
}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, toy):
    run_dir = tmp_path_factory.mktemp("runs") / "never-killed"
    assert child(arguments(run_dir), toy).wait() == 0
    return outcome(run_dir)


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_process_resumes_to_the_same_bits(moment, tmp_path, toy, never_killed):
    run_dir = tmp_path / "run"
    assert child(arguments(run_dir), toy, KILLS[moment]).wait() == KILLED
    assert child(arguments(run_dir, "--resume"), toy).wait() == 0
    assert identical(outcome(run_dir), never_killed)
    assert not list(run_dir.glob("*.part"))


def test_killed_again_and_again_the_run_still_ends_in_the_same_bits(tmp_path, toy, never_killed):
    run_dir = tmp_path / "run"
    for moment in ("in epoch 1", "half-way through the first checkpoint", "in epoch 3", "before the renames"):
        assert child(arguments(run_dir, "--resume"), toy, KILLS[moment]).wait() == KILLED
    assert child(arguments(run_dir, "--resume"), toy).wait() == 0
    assert identical(outcome(run_dir), never_killed)


def test_a_kill_amid_loader_processes_frees_the_folder_and_resumes_to_the_same_bits(tmp_path, toy):
    flags = ("--pipeline", "albumentations", "--num-workers", "1")
    assert child(arguments(tmp_path / "left-alone", *flags), toy).wait() == 0
    assert child(arguments(tmp_path / "run", *flags), toy, KILLS["in epoch 3"]).wait() == KILLED
    assert child(arguments(tmp_path / "run", "--resume", *flags), toy).wait() == 0  # at once: orphans hold no lock
    assert identical(outcome(tmp_path / "run"), outcome(tmp_path / "left-alone"))


def test_the_same_seed_gives_the_same_bits_in_another_process(tmp_path, toy, never_killed):
    run_dir = tmp_path / "run"
    assert child(arguments(run_dir), toy).wait() == 0
    assert identical(outcome(run_dir), never_killed)


def test_another_seed_ends_elsewhere(tmp_path, toy, never_killed):
    run_dir = tmp_path / "run"
    assert child(arguments(run_dir, "--seed", "1"), toy).wait() == 0
    assert not identical(outcome(run_dir)["model"], never_killed["model"])


# --- damage ---------------------------------------------------------------------------------------------------------


def restored_history(folder, toy, config):
    state, _, _ = tiny_state(toy, config)
    assert folder.load(state, config, DATA)
    return state.history.epochs


def damaged_versions(content: bytes, count: int):
    """Every second one cut off, every other one with a byte changed, at ``count`` places spread over the file."""
    places = np.unique(np.linspace(0, len(content) - 1, count).astype(int))
    for number, place in enumerate(places):
        if number % 2:
            yield place, content[:place]
        else:
            yield place, content[:place] + bytes([content[place] ^ (1 << number % 8)]) + content[place + 1 :]


def test_damage_anywhere_in_the_newest_checkpoint_falls_back_to_the_one_before(saved, toy, config):
    content = saved.checkpoint.read_bytes()
    header = content.index(b"\n") + 1
    versions = [*damaged_versions(content[:header], header), *damaged_versions(content, 220)]
    assert len(versions) >= 200 + header
    expected = decode(saved.previous)
    state, _, _ = tiny_state(toy, config)
    for place, damaged in versions:
        if len(damaged) == header and damaged == content[:header]:
            continue
        saved.checkpoint.write_bytes(damaged)
        with pytest.warns(
            UserWarning, match=r"checkpoint\.pt .*damaged.*going on from checkpoint\.previous\.pt.*epoch 1"
        ):
            assert saved.load(state, config, DATA)
        assert identical(state.model.state_dict(), expected["model"]), f"wrong weights, damaged at byte {place}"
        assert state.history.epochs == 1


def test_the_save_after_a_fallback_does_not_keep_the_damaged_file(saved, toy, config):
    saved.checkpoint.write_bytes(saved.checkpoint.read_bytes()[:-1])
    good = saved.previous.read_bytes()
    state, _, _ = tiny_state(toy, config)
    with pytest.warns(UserWarning, match="going on from"):
        saved.load(state, config, DATA)
    saved.save(state, config, DATA)
    assert saved.previous.read_bytes() == good
    saved.save(state, config, DATA)  # from here on as ever: the one before is kept
    assert decode(saved.previous)["history"]["lr"] == state.history.lr


def test_when_both_are_damaged_the_message_names_both_and_the_way_out(saved, toy, config):
    for path in (saved.checkpoint, saved.previous):
        path.write_bytes(b"")
    state, _, _ = tiny_state(toy, config)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt.*checkpoint\.previous\.pt.*delete .*start again"):
        saved.load(state, config, DATA)


def test_the_previous_checkpoint_is_kept_and_used_when_a_crash_left_no_newest(saved, toy, config):
    assert len(decode(saved.checkpoint)["history"]["lr"]) == 2
    saved.checkpoint.unlink()
    assert saved.holds_checkpoint
    assert restored_history(saved, toy, config) == 1


def test_a_changed_figure_in_the_record_is_noticed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_record({"lr_range": {"lr_max": 0.0125}})
    assert folder.read_record() == {"lr_range": {"lr_max": 0.0125}}
    folder.record.write_text(folder.record.read_text().replace("0.0125", "0.0725"))
    with pytest.raises(CheckpointError, match=r"run\.json is damaged.*checksum.*range test"):
        folder.read_record()
    folder.record.write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        folder.read_record()


def test_a_record_without_checksum_and_fingerprint_is_still_read(tmp_path, config):
    folder = RunFolder(tmp_path)
    record = {"config": config.to_dict(), "lr_range": {}}
    folder.record.write_text(json.dumps(record))
    assert folder.read_record(config, DATA) == record


# --- what belongs to another run --------------------------------------------------------------------------------------


def test_another_config_is_refused_with_what_differs(saved, toy):
    other = tiny_config(batch_size=30, seed=5)
    state, _, _ = tiny_state(toy, other)
    with pytest.raises(CheckpointError, match=r"batch_size 20 there, 30 here; seed 0 there, 5 here"):
        saved.load(state, other, DATA)
    assert state.history.epochs == 0


def test_a_setting_that_the_checkpoint_does_not_know_had_its_default(saved, toy, config):
    content = decode(saved.checkpoint)
    del content["config"]["cycle_beta1"]
    _write_checkpoint(saved.checkpoint, content)
    assert restored_history(saved, toy, config) == 2


def test_another_dataset_is_refused(saved, toy, config):
    state, _, _ = tiny_state(toy, config)
    with pytest.raises(CheckpointError, match="trained on other images"):
        saved.load(state, config, "another fingerprint")


def test_another_model_is_refused_with_the_first_tensor_that_differs(saved, toy, config):
    state, _, _ = tiny_state(toy, config)
    state.model.fc = torch.nn.Linear(8 * 4 * 4, 7)
    with pytest.raises(CheckpointError, match=r"another model \(fc.weight is \(10, 128\) there, \(7, 128\) here\)"):
        saved.load(state, config, DATA)


@pytest.mark.parametrize("part", ["config", "model", "history", "rng"])
def test_a_whole_file_that_lacks_a_part_is_refused_with_a_message(saved, toy, config, part):
    content = decode(saved.checkpoint)
    del content[part]
    _write_checkpoint(saved.checkpoint, content)
    state, _, _ = tiny_state(toy, config)
    with pytest.raises(CheckpointError, match="another version of this project"):
        saved.load(state, config, DATA)


def _write_checkpoint(path, content) -> None:
    torch.save(content, path)
    _wrap(path, path.read_bytes())


def _wrap(path, payload: bytes) -> None:
    """A valid header around any payload."""
    path.write_bytes(MAGIC + b" " + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


# --- code in a file ---------------------------------------------------------------------------------------------------


class Payload:
    """Pickles into a call that leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("writer", [pickle.dumps, "torch.save"])
@pytest.mark.parametrize("header", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path, toy, config, writer, header):
    folder, trace = RunFolder(tmp_path), tmp_path / "executed"
    if writer == "torch.save":
        torch.save({"model": Payload(trace)}, folder.checkpoint)
        payload = folder.checkpoint.read_bytes()
    else:
        payload = pickle.dumps({"model": Payload(trace)})
    folder.checkpoint.write_bytes(payload)
    if header:
        _wrap(folder.checkpoint, payload)
    state, _, _ = tiny_state(toy, config)
    with pytest.raises(CheckpointError, match="could run code" if header else "not a Session 10 checkpoint"):
        folder.load(state, config, DATA)
    assert not trace.exists()


def test_weights_that_would_run_code_are_refused_and_do_not(tmp_path):
    trace = tmp_path / "executed"
    for name, content in (("pickle", pickle.dumps(Payload(trace))), ("empty", b"")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            load_weights(TinyNet(), path)
    torch.save({"fc.weight": Payload(trace)}, tmp_path / "torch.pt")
    with pytest.raises(CheckpointError, match="refused, since they can run code"):
        load_weights(TinyNet(), tmp_path / "torch.pt")
    assert not trace.exists()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_come_back_as_float16_rounds_them(tmp_path):
    model, path = TinyNet(), tmp_path / "tiny.safetensors"
    save_weights(model, path, {"classes": "a,b"})
    loaded = load_weights(TinyNet(), path)
    for name, value in model.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], expected)
    assert all(value.dtype in (torch.float16, torch.int64) for value in load_file(path).values())


def test_the_full_network_fits_16_megabytes(tmp_path):
    path = tmp_path / "full.safetensors"
    save_weights(CustomResNet(), path)
    assert path.stat().st_size < 16_000_000
    CustomResNet().load_state_dict(load_file(path))


def test_one_changed_byte_anywhere_in_the_weights_is_noticed(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_weights(TinyNet(), path)
    content = path.read_bytes()
    original = load_weights(TinyNet(), path).state_dict()
    refused = 0
    for _, damaged in damaged_versions(content, 220):
        path.write_bytes(damaged)
        try:
            assert identical(load_weights(TinyNet(), path).state_dict(), original)  # a byte that means nothing
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_weights_of_another_model_a_missing_file_and_too_large_weights_are_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match=r"no weights at .*train first"):
        load_weights(TinyNet(), path)
    save_file({"fc.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"another model \(fc.weight is \(3, 3\) there, \(10, 128\) here\)"):
        load_weights(TinyNet(), path)
    model = TinyNet()
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e6
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"fc.weight does not fit float16.*diverged"):
        save_weights(model, path)
    assert path.read_bytes() == before


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_same_process_may_enter_again_another_may_not(tmp_path, toy):
    run_dir = tmp_path / "run"
    with RunFolder(run_dir), RunFolder(run_dir):  # a notebook's cell run twice
        assert child(arguments(run_dir), toy).wait() == 1
    assert child(arguments(run_dir), toy).wait() == 0


def test_a_living_process_holds_the_folder_and_a_dead_one_does_not(tmp_path, toy):
    run_dir = tmp_path / "run"
    holder = child(arguments(run_dir), toy, functools.partial(at_step, 1, signal.pause))
    while not (run_dir / "run.json").exists():
        assert holder.is_alive
        time.sleep(0.01)
    try:
        with pytest.raises(RunLockedError, match="in use by another process: wait for it, stop it, or choose another"):
            RunFolder(run_dir).__enter__()
    finally:
        holder.kill()
        assert holder.wait() == KILLED
    with RunFolder(run_dir):
        pass


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / "checkpoint.pt.123.part").write_bytes(b"half")
    with RunFolder(tmp_path):
        assert not list(tmp_path.glob("*.part"))


def test_a_failing_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new", keep=tmp_path / "kept")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


# --- the drive --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """A drive's folder in $S10_RUN_DIR, and a copy that is retried without waiting."""
    (tmp_path / "drive").mkdir()
    monkeypatch.setenv("S10_RUN_DIR", str(tmp_path / "drive" / "session10"))
    monkeypatch.setattr(checkpoint, "COPY_WAIT_SECONDS", 0.0)
    return tmp_path / "drive" / "session10" / "run"


def save_epochs(folder, toy, config, epochs):
    """Train from where the folder stands to ``epochs``, saving each."""
    state, train_loader, test_loader = tiny_state(toy, config)
    with folder:
        folder.load(state, config, DATA)

        def save(state):
            if state.history.epochs <= epochs:
                folder.save(state, config, DATA)

        fit(state, train_loader, test_loader, config, precision=FP32, after_epoch=save)
    return state


def test_every_file_is_copied_to_the_drive_and_a_new_machine_goes_on_from_there(tmp_path, toy, config, drive):
    here = run_folder_from_environment(tmp_path / "here" / "run")
    with here:
        here.write_record({"config": config.to_dict()})
    uninterrupted = save_epochs(here, toy, config, epochs=3)
    for path in (here.record, here.checkpoint, here.previous):
        assert (drive / path.name).read_bytes() == path.read_bytes()

    there = run_folder_from_environment(tmp_path / "there" / "run")
    resumed = save_epochs(there, toy, config, epochs=4)
    assert there.read_record() == {"config": config.to_dict()}
    assert identical(resumed.model.state_dict(), uninterrupted.model.state_dict())
    assert len(decode(drive / "checkpoint.pt")["history"]["lr"]) == 4


def test_the_local_run_counts_where_both_exist(tmp_path, toy, config, drive):
    folder = run_folder_from_environment(tmp_path / "here" / "run")
    save_epochs(folder, toy, config, epochs=2)
    (drive / "checkpoint.pt").write_bytes(b"something else")
    state, _, _ = tiny_state(toy, config)
    with folder:
        assert folder.load(state, config, DATA)


def test_a_drive_that_drops_is_tried_again_then_warned_about_and_never_ends_the_run(
    tmp_path, toy, config, drive, monkeypatch
):
    state, _, _ = tiny_state(toy, config)
    with run_folder_from_environment(tmp_path / "here" / "run") as folder:
        folder.write_record({"config": config.to_dict()})
        shutil.rmtree(drive.parent)
        drive.parent.write_bytes(b"")  # a file in its place: as with a dropped mount, all access below it fails
        with pytest.warns(UserWarning, match=r"checkpoint\.pt could not be copied to .*the run goes on.*whole file is"):
            folder.save(state, config, DATA)
        assert identical(decode(folder.checkpoint)["model"], state.model.state_dict())

        monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: drive.parent.unlink())  # it comes back meanwhile
        folder.save(state, config, DATA)
    for path in (folder.record, folder.checkpoint):
        assert (drive / path.name).read_bytes() == path.read_bytes()


def test_a_drive_that_cannot_be_read_at_the_start_is_not_taken_for_an_empty_one(tmp_path, drive):
    drive.parent.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"could not be fetched.*see that the drive is mounted.*unset \$S10_RUN_DIR"
    ):
        run_folder_from_environment(tmp_path / "run").__enter__()
    with RunFolder(tmp_path / "run"):  # unlocked again
        pass


def test_a_drive_that_is_not_mounted_gets_no_folders(tmp_path, toy, config, monkeypatch):
    mount_point = tmp_path / "content" / "drive"
    monkeypatch.setenv("S10_RUN_DIR", str(mount_point / "MyDrive" / "session10"))
    with pytest.warns(UserWarning, match=r"could not be copied to .*No such file"):
        save_epochs(run_folder_from_environment(tmp_path / "run"), toy, config, epochs=1)
    assert not mount_point.exists()


def test_without_the_variable_or_with_one_that_names_the_same_folder_nothing_is_copied(tmp_path, monkeypatch):
    monkeypatch.delenv("S10_RUN_DIR", raising=False)
    assert run_folder_from_environment(tmp_path / "run").mirror is None
    monkeypatch.setenv("S10_RUN_DIR", str(tmp_path))
    assert run_folder_from_environment(tmp_path / "run").mirror is None
