"""train.py as its user meets it: settings, exit codes, messages of one line, and what is kept."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

import train
from tests.small_runs import (
    EPOCHS,
    STEPS,
    arguments,
    at_step,
    exit_code,
    identical,
    outcome,
    shrink,
    start_run,
)
from utils.runs import report
from utils.runs.checkpoint import NEWEST, RunFolder
from utils.runs.weights import WEIGHTS_NAME, load_model
from utils.runtime import PROJECT_ROOT


@pytest.fixture
def run(toy, monkeypatch, capsys):
    """``run(argv)`` -> (exit code, train.py's own lines on stderr, stdout); no figures are drawn."""
    shrink(toy, monkeypatch.setattr)

    def run(argv):
        code = train.main(argv)
        captured = capsys.readouterr()
        return code, [line for line in captured.err.splitlines() if line.startswith("train.py:")], captured.out

    return run


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """What a run leaves that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert exit_code(start_run(arguments(run_dir), toy)) == 0
    return outcome(run_dir)


def command(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_help_names_what_no_flag_says():
    text = train.make_parser().format_help()
    for words in ("torchrun", "exit codes:", "$S10_COPY_TO", "$CIFAR10_DIR", "130 Ctrl-C", "--batch-size", "quick: 64"):
        assert words in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch-size 0", "batch_size is "),
        ("--device tpu", "device is 'tpu'"),
        ("--threads 0", "threads is 0"),
        ("--train-images 5000 --batch-size 100", "batch_size is 100, but there are only 60 images"),
        ("--batch-size 40", "the LR would rise within a single step"),
        ("--publish", "only the full recipe on CIFAR-10 can be published"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line_before_anything_is_computed(tmp_path, run, flags, words):
    code, lines, _ = run(arguments(tmp_path / "run", *flags.split(), lrs=()))
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"train.py: {words}")
    assert not (tmp_path / "run" / NEWEST).exists()


def test_an_unknown_data_folder_ends_a_real_process_with_one_line(tmp_path):
    done = command("train.py", *arguments(tmp_path / "run", "--data-dir", str(tmp_path / "none")))
    assert done.returncode == 1
    assert done.stderr.startswith(f"train.py: no folder {tmp_path / 'none'}: check the path")
    assert done.stderr.count("\n") == 1


def test_a_python_without_the_requirements_is_told_how_to_get_them():
    done = command("-S", "train.py")  # without site-packages
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: No module named")
    assert "`make run`" in done.stderr
    assert done.stderr.count("\n") == 1


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_with_a_range_test_ends_with_a_summary_in_one_line(tmp_path, run):
    code, lines, out = run(arguments(tmp_path / "run", "--range-test-end", "10", lrs=()))
    assert (code, lines) == (0, [])
    assert out.splitlines()[-1].startswith("done: test accuracy ")
    assert out.splitlines()[-1].endswith(f"results in {tmp_path / 'run'}")
    metrics = report.read_metrics(tmp_path / "run")
    assert len(metrics["history"]["lr"]) == EPOCHS
    assert metrics["lr_rule"] == "onset-minimum"


@pytest.mark.slow
def test_own_pictures_end_as_figures_and_loadable_weights(tmp_path, image_folder, capsys):
    flags = "--train-images 20 --test-images 20 --epochs 2"
    assert train.main(arguments(tmp_path / "run", "--data-dir", str(image_folder), *flags.split())) == 0
    assert "CIFAR-10 as an image folder, 60 train and 30 test images" in capsys.readouterr().out
    model, about = load_model(tmp_path / "run" / WEIGHTS_NAME)
    assert model.fc.out_features == len(about["classes"]) == 10
    assert (tmp_path / "run" / "model_viz.png").stat().st_size > 10_000


def test_only_a_run_that_asks_for_it_is_published(tmp_path, run, monkeypatch):
    published = []
    monkeypatch.setattr(report, "check_publishable", lambda config, dataset: None)
    monkeypatch.setattr(report, "publish", published.append)
    assert run(arguments(tmp_path / "private"))[0] == 0
    code, _, out = run(arguments(tmp_path / "run", "--publish"))
    assert code == 0
    assert published == [tmp_path / "run"]
    assert out.endswith(f"results in {report.RESULTS}\n")


# --- another run's folder ---------------------------------------------------------------------------------------------


def test_a_finished_run_is_neither_overwritten_nor_continued_with_another_setting(tmp_path, run):
    run_dir = tmp_path / "run"
    assert run(arguments(run_dir))[0] == 0
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    for flags, words in (
        ((), "holds a run: add --resume, or choose another --run-dir"),
        (("--resume", "--batch-size", "20"), "is of another run: batch_size 10 there, 20 here"),
        (("--resume", "--train-images", "50"), "train_images 40 there, 50 here; other images"),
    ):
        code, lines, _ = run(arguments(run_dir, *flags))
        assert code == 1
        assert len(lines) == 1
        assert words in lines[0]
        assert "are kept" not in lines[0]
    (run_dir / NEWEST).unlink()  # as to save space
    code, lines, _ = run(arguments(run_dir, "--seed", "1"))
    assert code == 1
    assert "choose a new --run-dir" in lines[0]
    del before[run_dir / NEWEST]
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize("run_dir", ["Results", ".", ""])
def test_a_folder_of_the_project_is_no_run_folder(run, run_dir, monkeypatch):
    monkeypatch.chdir(PROJECT_ROOT)
    before = {path: path.stat().st_mtime_ns for folder in (".", "Results") for path in PROJECT_ROOT.glob(f"{folder}/*")}
    code, lines, _ = run([*arguments(PROJECT_ROOT), "--run-dir", run_dir])
    assert code == 1
    assert "nothing there is overwritten: choose a new --run-dir" in lines[0]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_run_at_once_and_it_resumes(tmp_path, run, undisturbed, number, code, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(2 * STEPS + 2, lambda: signal.raise_signal(number), patch.setattr)
        ended, lines, out = run(arguments(tmp_path / "run"))
    assert ended == code
    kept = f"2 of {EPOCHS} epochs are kept in {tmp_path / 'run'}: add --resume to the same command to continue"
    assert lines == [f"train.py: interrupted; {kept}"]
    assert "done" not in out
    assert run(arguments(tmp_path / "run", "--resume"))[0] == 0
    assert identical(outcome(tmp_path / "run"), undisturbed)


def test_a_full_disk_keeps_the_epochs_before_and_with_room_again_the_run_resumes(
    tmp_path, run, undisturbed, monkeypatch
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():  # from here on, no file may be as large as a checkpoint
        size = (tmp_path / "run" / NEWEST).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))

    try:
        with monkeypatch.context() as patch:
            at_step(2 * STEPS + 1, fill, patch.setattr)
            code, lines, _ = run(arguments(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert len(lines) == 1
    assert f"File too large; 2 of {EPOCHS} epochs are kept in {tmp_path / 'run'}: add --resume" in lines[0]
    assert {path.name for path in (tmp_path / "run").glob("*")} == {".lock", NEWEST, "checkpoint.previous.pt"}
    assert run(arguments(tmp_path / "run", "--resume"))[0] == 0
    assert identical(outcome(tmp_path / "run"), undisturbed)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "smaller --batch-size"),
        (MemoryError(), "smaller --batch-size"),
        (PermissionError(13, "Permission denied", "runs/x"), "Permission denied: 'runs/x'"),
    ],
)
def test_a_failure_of_the_machine_is_one_line_with_what_to_do(tmp_path, run, error, words, monkeypatch):
    def fail():
        raise error

    at_step(STEPS + 1, fail, monkeypatch.setattr)
    code, lines, _ = run(arguments(tmp_path / "run"))
    assert code == 1
    assert len(lines) == 1
    assert words in lines[0]
    assert f"1 of {EPOCHS} epochs are kept" in lines[0]


def test_any_other_error_keeps_its_traceback(tmp_path, run, monkeypatch):
    def fail():
        raise RuntimeError("shapes do not match")

    at_step(1, fail, monkeypatch.setattr)
    with pytest.raises(RuntimeError, match="shapes"):
        run(arguments(tmp_path / "run"))


def test_a_run_that_diverges_names_a_lower_cycle(tmp_path, run, monkeypatch):
    original = torch.nn.Linear.forward
    at_step(
        STEPS + 1,
        lambda: monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: original(self, x) * float("nan")),
        monkeypatch.setattr,
    )
    code, lines, _ = run(arguments(tmp_path / "run"))
    assert code == 1
    assert "the loss is not finite at step 2" in lines[0]
    assert "start again in another --run-dir with --lr-min 3.3e-04 --lr-max 3.3e-03" in lines[0]
    assert RunFolder(tmp_path / "run").load()["model"]["fc.weight"].isfinite().all()


def test_a_range_test_without_an_answer_names_what_to_change(tmp_path, run):
    code, lines, _ = run(arguments(tmp_path / "run", "--range-test-end", "1e-5", lrs=()))
    assert code == 1
    assert len(lines) == 1
    assert lines[0].endswith("the flags are --lr-min and --lr-max")


def leave():
    """As `| head` does: nobody reads stdout."""
    reading, writing = os.pipe()
    os.close(reading)
    sys.stdout = open(writing, "w")


def test_a_reader_that_leaves_ends_the_run_in_one_line(tmp_path, toy):
    assert exit_code(start_run(arguments(tmp_path / "run"), toy, leave, tmp_path / "log")) == 1
    assert (tmp_path / "log").read_text(encoding="utf-8") == "train.py: [Errno 32] Broken pipe\n"
