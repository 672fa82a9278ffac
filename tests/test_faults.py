"""Each fault, brought about for real: one clear message, and what was computed before it is still there."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from small_runs import EPOCHS, STEPS, TinyNet, after_save, arguments, at_step, child, epochs_kept, shrink
from utils.checkpoint import RunFolder, decode
from utils.report import WEIGHTS_NAME

import train
from benchmarks.kill_resume import identical, outcome
from utils.runtime import LoaderError, OutOfMemoryError, clear_failures

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the faults are made with POSIX means")


@pytest.fixture
def run(toy, monkeypatch, capsys):
    """``run(argv)`` -> (exit code, train.py's own lines on stderr, stdout), with the tiny network."""
    shrink(toy, monkeypatch.setattr)
    threads = torch.get_num_threads()

    def run(argv):
        code = train.main(argv)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        messages = [line for line in captured.err.splitlines() if line.startswith("train.py:")]
        return code, messages, captured.out

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def one_message(run):
    """Run into a fault: exit code 1 and exactly one message, which is returned."""

    def one_message(argv):
        code, messages, _ = run(argv)
        assert code == 1
        assert len(messages) == 1
        return messages[0]

    return one_message


@pytest.fixture
def expected(run, tmp_path_factory):
    """The outcome of a run to which nothing happened."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(arguments(run_dir))[0] == 0
    return outcome(run_dir)


@contextlib.contextmanager
def mounted(folder, options: str):
    """A tmpfs at ``folder``; skips where this user may not mount."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a small file system: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_checkpoint_before_and_resumes_once_there_is_room(
    tmp_path, run, one_message, monkeypatch, expected
):
    disk = tmp_path / "disk"
    with mounted(disk, "size=2m"):

        def fill(folder, state):
            with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        with monkeypatch.context() as patch:
            after_save(2, fill, patch.setattr)
            message = one_message(arguments(disk / "run"))
        assert "checkpoint.pt could not be written (No space left on device)" in message
        assert "the checkpoint of epoch 2 is still there" in message
        assert "MB there and resume" in message
        assert epochs_kept(disk / "run") == 2
        assert len(decode(disk / "run" / "checkpoint.previous.pt")["history"]["lr"]) == 1
        assert not list((disk / "run").glob("*.part"))

        (disk / "filler").unlink()
        assert run(arguments(disk / "run", "--resume"))[0] == 0
        assert identical(outcome(disk / "run"), expected)


def test_a_limit_on_file_size_keeps_the_checkpoint_before(tmp_path, one_message, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(folder, state):
        resource.setrlimit(resource.RLIMIT_FSIZE, (folder.checkpoint.stat().st_size // 2, hard))

    after_save(1, limit, monkeypatch.setattr)
    try:
        message = one_message(arguments(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written (File too large); the checkpoint of epoch 1 is still there" in message
    assert epochs_kept(tmp_path / "run") == 1


def test_read_only_results_say_where_the_run_is_and_how_to_retry(tmp_path, run, one_message, monkeypatch, expected):
    results, run_dir = tmp_path / "Results", tmp_path / "run"
    monkeypatch.setattr(train, "results_folder", lambda *args: results)
    with mounted(results, "ro"):
        message = one_message(arguments(run_dir, "--publish"))
    assert "the results could not be written: [Errno 30] Read-only file system" in message
    assert f"All {EPOCHS} epochs are kept in {run_dir / 'checkpoint.pt'}" in message
    assert "--resume" in message
    assert epochs_kept(run_dir) == EPOCHS

    code, _, out = run(arguments(run_dir, "--publish", "--resume"))
    assert code == 0
    assert f"resuming after epoch {EPOCHS} of {EPOCHS}" in out
    assert (results / WEIGHTS_NAME).read_bytes() == expected["weights"]


def test_a_folder_in_place_of_the_weights_file_is_no_reason_to_lose_the_run(tmp_path, one_message):
    (tmp_path / "run" / WEIGHTS_NAME).mkdir(parents=True)
    assert "the results could not be written" in one_message(arguments(tmp_path / "run"))
    assert epochs_kept(tmp_path / "run") == EPOCHS


def test_a_file_in_place_of_the_run_folder_is_refused(tmp_path, one_message):
    (tmp_path / "run").write_text("a file")
    message = one_message(arguments(tmp_path / "run"))
    assert "cannot be used as a run folder (File exists): choose another one" in message


def test_a_run_folder_deleted_in_mid_run_is_made_anew_and_the_run_goes_on(tmp_path, run, monkeypatch, expected):
    run_dir = tmp_path / "run"
    after_save(2, lambda folder, state: shutil.rmtree(folder.path), monkeypatch.setattr)
    code, messages, _ = run(arguments(run_dir))
    assert code == 0
    assert len(messages) == 1
    assert "was deleted while the run was going: it is made anew, with the checkpoint after epoch 3" in messages[0]
    assert (run_dir / "run.json").exists()
    assert identical(outcome(run_dir), expected)


def test_a_deleted_run_folder_that_cannot_be_made_anew_ends_the_run(tmp_path, one_message, monkeypatch):
    def replace_by_file(folder, state):
        shutil.rmtree(folder.path.parent)
        folder.path.parent.write_text("a file")

    after_save(1, replace_by_file, monkeypatch.setattr)
    assert "cannot be used as a run folder" in one_message(arguments(tmp_path / "runs" / "run"))


# --- the computation --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_with_its_epoch_and_lr(tmp_path, one_message):
    message = one_message(arguments(tmp_path / "run", "--lr-max", "1e38"))
    assert "epoch 1: the loss is not finite at step" in message
    assert "lower lr_max" in message
    assert "no epoch was finished yet" in message
    assert "--lr-min and --lr-max, in another --run-dir" in message
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_later_keeps_the_epochs_before(tmp_path, one_message, monkeypatch):
    def poison(folder, state):
        with torch.no_grad():
            state.model.fc.weight[0, 0] = float("nan")

    after_save(2, poison, monkeypatch.setattr)
    message = one_message(arguments(tmp_path / "run"))
    assert "epoch 3: the loss is not finite at step 1 of this epoch" in message
    assert f"2 of {EPOCHS} epochs are kept in {tmp_path / 'run'}" in message
    assert epochs_kept(tmp_path / "run") == 2
    assert torch.isfinite(decode(tmp_path / "run" / "checkpoint.pt")["model"]["fc.weight"]).all()


def test_running_out_of_memory_names_a_smaller_batch_and_keeps_the_epochs_before(tmp_path, one_message, monkeypatch):
    forward = TinyNet.forward

    def hungry(folder, state):
        monkeypatch.setattr(TinyNet, "forward", lambda self, x: forward(self, x) + torch.empty(1 << 58)[0])

    after_save(1, hungry, monkeypatch.setattr)
    message = one_message(arguments(tmp_path / "run"))
    assert "out of memory with batch_size 10: start anew with a smaller one, such as 5" in message
    assert f"1 of {EPOCHS} epochs are kept in" in message
    assert epochs_kept(tmp_path / "run") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.6 GiB"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_what_a_gpu_says_when_its_memory_is_full_is_understood(error):
    words = "batch_size 512: start anew with a smaller one, such as 256"
    with pytest.raises(OutOfMemoryError, match=words), clear_failures(512):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
)
def test_every_way_in_which_a_dead_loader_process_shows_is_understood(error):
    words = r"a loader process died \(.+\), often for lack of memory: resume"
    with pytest.raises(LoaderError, match=words), clear_failures(512), clear_failures(512):
        raise error


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match=r"^shapes do not match$") as caught, clear_failures(512):
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, (OutOfMemoryError, LoaderError))


def test_a_dead_loader_process_ends_the_run_and_keeps_the_epochs_before(tmp_path, one_message, monkeypatch):
    def kill_newest_loader():
        loaders = [process.pid for process in multiprocessing.active_children() if process.daemon]
        os.kill(max(loaders), signal.SIGKILL)

    at_step(STEPS + 1 + 1, kill_newest_loader, monkeypatch.setattr)  # the first batch of epoch 2; testing took one
    message = one_message(arguments(tmp_path / "run", "--pipeline", "albumentations", "--num-workers", "1"))
    assert message.count("a loader process died") == 1
    assert "batched pipeline, which needs none" in message
    assert f"1 of {EPOCHS} epochs are kept in" in message
    assert epochs_kept(tmp_path / "run") == 1


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _ctrl_c_works():
    """Python's own handler: a test run started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_works")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_run_at_once_with_the_last_epoch_kept(tmp_path, run, monkeypatch, expected, number, code):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(2 * (STEPS + 1) + 2, lambda: os.kill(os.getpid(), number), patch.setattr)
        found, messages, out = run(arguments(run_dir))
    assert found == code
    assert messages == [
        f"train.py: interrupted; 2 of {EPOCHS} epochs are kept in {run_dir}: add --resume to the same command to go on"
    ]
    assert "done" not in out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert epochs_kept(run_dir) == 2

    assert run(arguments(run_dir, "--resume"))[0] == 0
    assert identical(outcome(run_dir), expected)


@pytest.mark.usefixtures("_ctrl_c_works")
def test_an_interrupt_in_the_first_epoch_says_to_run_again(tmp_path, run, monkeypatch):
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch.setattr)
    code, messages, _ = run(arguments(tmp_path / "run"))
    assert code == 130
    assert messages == ["train.py: interrupted; no epoch was finished yet: run the same command again"]
    with RunFolder(tmp_path / "run") as folder:  # unlocked again
        assert not folder.holds_checkpoint


# --- two at once, and a damaged checkpoint ----------------------------------------------------------------------------


def test_a_second_process_on_the_same_folder_is_refused(tmp_path, toy, run):
    run_dir = tmp_path / "run"
    with RunFolder(run_dir):
        assert child(arguments(run_dir), toy).wait() == 1
    assert not (run_dir / "run.json").exists()


def test_a_torn_newest_checkpoint_is_reported_and_the_run_still_ends_in_the_same_bits(tmp_path, run, expected):
    run_dir = tmp_path / "run"
    assert run(arguments(run_dir))[0] == 0
    content = (run_dir / "checkpoint.pt").read_bytes()
    (run_dir / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    code, messages, out = run(arguments(run_dir, "--resume"))
    assert code == 0
    assert len(messages) == 1
    assert messages[0].startswith("train.py: warning: ")
    assert f"going on from checkpoint.previous.pt, which holds epoch {EPOCHS - 1}" in messages[0]
    assert f"resuming after epoch {EPOCHS - 1} of {EPOCHS}" in out
    assert identical(outcome(run_dir), expected)
