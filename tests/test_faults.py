"""Each fault, caused for real: one clear message, and everything computed before it is kept."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure

import train
from tests.small_runs import (
    EPOCHS,
    KILLED,
    STEPS,
    RunProcess,
    TinyNet,
    after_save,
    arguments,
    at_step,
    epochs_kept,
    identical,
    outcome,
    shrink,
)
from utils import loaders
from utils.runs import figures, report
from utils.runs.checkpoint import decode
from utils.runs.folder import NEWEST, PREVIOUS, RunFolder, RunLockedError
from utils.runs.machine import CompileError, LoaderError, OutOfMemoryError, explain_failures
from utils.runs.weights import WEIGHTS_NAME
from utils.runtime import PROJECT_ROOT, ConfigError

LOADER = ("--pipeline", "albumentations", "--num-workers", "1")


@pytest.fixture
def run(toy, monkeypatch, capsys):
    """``run(argv)`` -> (exit code, train.py's own lines on stderr, stdout), with the tiny network."""
    shrink(toy, monkeypatch.setattr)

    def run(argv):
        code = train.main(argv)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        messages = [line for line in captured.err.splitlines() if line.startswith("train.py:")]
        return code, messages, captured.out

    return run


@pytest.fixture
def one_message(run):
    """``one_message(argv)``: the only message of a run that fails with exit code 1."""

    def one_message(argv):
        code, messages, _ = run(argv)
        assert code == 1
        assert len(messages) == 1
        return messages[0]

    return one_message


@pytest.fixture(scope="module")
def expected(toy, tmp_path_factory):
    """The outcome of an undisturbed run."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert RunProcess(arguments(run_dir), toy).wait() == 0
    return outcome(run_dir)


# --- the disk ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(disk):
    """A disk; yields what fills it, and what makes room again."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]).returncode:
        pytest.skip("needs the right to mount a small file system")

    def fill(folder):
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield fill, lambda: (disk / "filler").unlink()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextlib.contextmanager
def limited_file_size(disk):
    """Yields what limits files to half of a checkpoint, and what lifts the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lift = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))

    def limit(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (folder.checkpoint.stat().st_size // 2, hard))

    try:
        yield limit, lift
    finally:
        lift()


@pytest.mark.parametrize(
    ("fault", "reason"), [(full_disk, "No space left on device"), (limited_file_size, "File too large")]
)
def test_without_room_the_checkpoints_before_are_kept_and_with_room_again_it_resumes(
    fault, reason, tmp_path, run, one_message, monkeypatch, expected
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with fault(run_dir) as (take_room, give_back):
        with monkeypatch.context() as patch:
            after_save(3, take_room, patch.setattr)
            message = one_message(arguments(run_dir))
        give_back()
        kept = "the checkpoint of epoch 2 is still there. To continue, free "
        assert f"could not be written ({reason}); {kept}" in message
        assert (decode(run_dir / NEWEST).epochs, decode(run_dir / PREVIOUS).epochs) == (2, 1)
        assert not list(run_dir.glob(".*.s10part"))
        assert run(arguments(run_dir, "--resume"))[0] == 0
        assert identical(outcome(run_dir), expected)


def test_results_that_could_not_be_written_are_written_by_resuming(tmp_path, run, one_message, expected):
    run_dir = tmp_path / "run"
    (run_dir / WEIGHTS_NAME).mkdir(parents=True)
    message = one_message(arguments(run_dir))
    assert "the results could not be written (Is a directory" in message
    assert f"All {EPOCHS} epochs are kept in {run_dir / NEWEST}" in message
    assert "add --resume to the same command" in message
    assert epochs_kept(run_dir) == EPOCHS

    (run_dir / WEIGHTS_NAME).rmdir()
    code, _, out = run(arguments(run_dir, "--resume"))
    assert code == 0
    assert f"resuming after epoch {EPOCHS} of {EPOCHS}" in out
    assert identical(outcome(run_dir), expected)


def test_a_figure_that_cannot_be_written_is_only_a_warning(tmp_path, run, monkeypatch):
    (tmp_path / "run" / "mis.png").mkdir(parents=True)
    monkeypatch.setattr(figures, "draw_all", lambda inputs: {"mis.png": Figure(), "test.png": Figure()})
    code, messages, _ = run(arguments(tmp_path / "run"))
    assert code == 0
    assert len(messages) == 1
    assert messages[0].startswith("train.py: warning: mis.png could not be written (Is a directory)")
    assert report.read_metrics(tmp_path / "run")["epochs"] == EPOCHS
    assert (tmp_path / "run" / "test.png").stat().st_size


def test_a_file_in_place_of_the_run_folder_is_refused(tmp_path, one_message):
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    message = one_message(arguments(tmp_path / "run"))
    assert "cannot be used as a run folder (File exists): choose another one" in message


def test_a_deleted_run_folder_that_cannot_be_created_again_ends_the_run(tmp_path, one_message, monkeypatch):
    def replace_by_file(folder):
        shutil.rmtree(folder.path.parent)
        folder.path.parent.write_text("a file", encoding="utf-8")

    after_save(2, replace_by_file, monkeypatch.setattr)
    assert "cannot be used as a run folder" in one_message(arguments(tmp_path / "runs" / "run"))


# --- outputs ----------------------------------------------------------------------------------------------------------


STREAMS = {1: "stdout", 2: "stderr"}


def _broken_pipe(number: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    setattr(sys, STREAMS[number], open(writing, "w", encoding="utf-8"))


def _full(number: int) -> None:
    setattr(sys, STREAMS[number], open("/dev/full", "w", encoding="utf-8"))


def _closed(number: int) -> None:
    os.close(number)
    setattr(sys, STREAMS[number], None)  # as Python itself does if it starts without one


def _ascii(number: int) -> None:
    getattr(sys, STREAMS[number]).reconfigure(encoding="ascii", errors="strict")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("break_stream", [_broken_pipe, _full, _closed, _ascii])
def test_outputs_that_nobody_can_read_end_no_run(tmp_path, toy, expected, break_stream):
    run_dir = tmp_path / "Läufe" / "run"

    assert RunProcess(arguments(run_dir), toy, partial(_on_both, break_stream)).wait() == 0
    assert identical(outcome(run_dir), expected)


def _on_both(break_stream) -> None:
    os.environ["TQDM_DISABLE"] = "0"  # the progress bar writes as well
    for number in (1, 2):
        break_stream(number)


# --- the computation --------------------------------------------------------------------------------------------------


def _poison(folder):
    forward = TinyNet.forward
    TinyNet.forward = lambda self, x: forward(self, x) * float("nan")


def _hunger(folder):
    forward = TinyNet.forward
    TinyNet.forward = lambda self, x: forward(self, x) + torch.empty(1 << 58)[0]


def _kill_a_loader(folder):
    def kill_newest():
        os.kill(max(process.pid for process in multiprocessing.active_children() if process.daemon), signal.SIGKILL)

    at_step(1, kill_newest)


LOWER = "start again in another --run-dir with --lr-min 1.00e-03 --lr-max 3.33e-03"
RESUME = "add --resume to the same command to continue"


@pytest.mark.parametrize(
    ("fault", "words", "next_step"),
    [
        (_poison, f"epoch 2/{EPOCHS}: the loss is not finite at step 1, where the LR was ", LOWER),
        (_hunger, "out of memory with batch_size 10: start anew with a smaller one, such as 5", RESUME),
        (_kill_a_loader, "a DataLoader worker died", RESUME),
    ],
)
def test_a_fault_during_a_run_is_one_message_and_keeps_the_epochs_before(tmp_path, toy, fault, words, next_step):
    log, argv = tmp_path / "log", arguments(tmp_path / "run", *(LOADER if fault is _kill_a_loader else ()))
    assert RunProcess(argv, toy, partial(after_save, 2, fault), log).wait() == 1
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("train.py:")] == [lines[-1]]
    assert words in lines[-1]
    assert lines[-1].endswith(f"1 of {EPOCHS} epochs are kept in {tmp_path / 'run'}: {next_step}")
    kept = decode(tmp_path / "run" / NEWEST)
    assert kept.epochs == 1
    assert torch.isfinite(kept.state["model"]["fc.weight"]).all()


def _take_over(folder):
    def refuse(self, checkpoint):
        raise RunLockedError("another run is there now: start again in another run folder")

    RunFolder.save = refuse


def test_a_run_whose_folder_was_taken_over_claims_no_epochs(tmp_path, toy):
    log = tmp_path / "log"
    assert RunProcess(arguments(tmp_path / "run"), toy, partial(after_save, 2, _take_over), log).wait() == 1
    last = log.read_text(encoding="utf-8").splitlines()[-1]
    assert last == "train.py: another run is there now: start again in another run folder"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemoryError, "such as 256"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), OutOfMemoryError, "such as 256"),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), OutOfMemoryError, "such as 256"),
        (RuntimeError("FIND was unable to find an engine to execute"), OutOfMemoryError, "such as 256"),
        (RuntimeError("could not create a primitive"), OutOfMemoryError, "such as 256"),
        (
            RuntimeError("you must set CUBLAS_WORKSPACE_CONFIG=:4096:8"),
            ConfigError,
            "^deterministic is True, .* restart",
        ),
        (MemoryError(), OutOfMemoryError, "such as 256"),
        (RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "), LoaderError, "died .*: resume"),
        (
            RuntimeError("DataLoader worker is killed by signal: Bus error. It is possible"),
            LoaderError,
            "shared memory",
        ),
        (RuntimeError("unable to allocate shared memory(shm) for file"), LoaderError, "smaller --num-workers"),
        (ConnectionResetError(104, "Connection reset by peer"), LoaderError, "died .*: resume"),
        (EOFError(), LoaderError, "died .*: resume"),
        (RuntimeError("shapes do not match"), RuntimeError, "^shapes do not match$"),
    ],
)
def test_every_kind_of_machine_failure_is_explained_in_one_line(error, kind, words):
    with pytest.raises(kind, match=words) as caught, explain_failures(512):
        raise error
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (OutOfMemoryError, LoaderError, CompileError, ConfigError)) == (
        kind is not RuntimeError
    )


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("to", ["the process", "its loaders too"])
def test_an_interrupt_ends_the_run_at_once_with_the_last_epoch_kept(tmp_path, toy, expected, number, code, to):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    group = to == "its loaders too"
    flags = LOADER if group else ()
    process = RunProcess(arguments(run_dir, *flags), toy, partial(at_step, 2 * (STEPS + 1) + 2, signal.pause), log)
    while not (run_dir / NEWEST).exists() or epochs_kept(run_dir) < 2:
        assert process.is_alive
        time.sleep(0.02)
    time.sleep(0.1)  # well into epoch 3, where it waits
    (os.killpg if group else os.kill)(process.pid, number)
    assert process.wait() == code
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[-1] == (
        f"train.py: interrupted; 2 of {EPOCHS} epochs are kept in {run_dir}: add --resume to the same command to continue"
    )
    assert not any("Traceback" in line or "done" in line for line in lines)
    assert epochs_kept(run_dir) == 2
    if not group:
        assert RunProcess(arguments(run_dir, "--resume"), toy).wait() == 0
        assert identical(outcome(run_dir), expected)


DROPPED = """
class Left:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

left = Left()
del left
time.sleep(20)
"""
IN_A_LOCK = """
import atexit, threading
lock, over = threading.Lock(), []
atexit.register(over.append, True)

class WaitsForTheLock:
    def __del__(self):
        over or lock.acquire()

def work(loader):
    lock.acquire()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)

work(WaitsForTheLock())
"""
IN_A_NEW_LOADER = """
if os.fork() == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
_, status = os.wait()
assert os.waitstatus_to_exitcode(status) == 143
"""


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [
        (DROPPED, 130, "work: interrupted; all that was there\n"),
        (IN_A_LOCK, 130, "work: interrupted; all that was there\n"),
        (IN_A_NEW_LOADER, 0, ""),
    ],
    ids=["Python dropped it", "it left a lock closed", "a loader process had just started"],
)
def test_an_interrupt_is_answered_once_by_the_run_itself(work, code, words):
    program = (
        "import os, signal, sys, time\nfrom utils.runs.door import run_door\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(run_door('work', lambda: exec({work!r}, globals()), lambda _: 'all that was there'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=PROJECT_ROOT)
    assert (done.returncode, done.stderr) == (code, words)


def test_a_loader_process_ends_with_a_run_that_died_while_starting_it(tmp_path, toy):
    log = tmp_path / "log"
    process = RunProcess(arguments(tmp_path / "run", *LOADER), toy, _die_once_a_loader_waits, log)
    assert process.wait() == KILLED  # returns once no process holds its pipes any more


def _die_once_a_loader_waits():
    """The loader process starts work only after its parent is gone."""
    prepare = loaders._prepare_worker

    def late(worker_id):
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
        prepare(worker_id)

    loaders._prepare_worker = late


def test_an_interrupt_in_the_first_epoch_says_that_the_start_is_kept(tmp_path, run, monkeypatch):
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch.setattr)
    code, messages, _ = run(arguments(tmp_path / "run"))
    assert code == 130
    kept = f"the start of the run is kept in {tmp_path / 'run'}, but no epoch yet"
    assert f"interrupted; {kept}: add --resume" in messages[0]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with RunFolder(tmp_path / "run") as folder:  # unlocked again
        assert folder.load().epochs == 0


# --- the drive --------------------------------------------------------------------------------------------------------


def test_a_drive_that_cannot_be_written_is_named_again_at_the_end(tmp_path, run, monkeypatch):
    (tmp_path / "drive").mkdir()
    monkeypatch.setenv("S10_RUN_DIR", str(tmp_path / "drive"))
    monkeypatch.setattr("utils.runs.folder.COPY_WAIT_SECONDS", 0.0)
    after_save(2, lambda folder: (shutil.rmtree(folder.mirror), folder.mirror.touch()), monkeypatch.setattr)
    code, messages, out = run(arguments(tmp_path / "run"))
    assert code == 0
    assert len(messages) == EPOCHS - 1
    assert out.splitlines()[-1].startswith(f"the copy in {tmp_path / 'drive' / 'run'} is not up to date")
