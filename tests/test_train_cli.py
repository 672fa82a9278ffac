"""train.py as its user meets it: settings, exit codes, messages of one line."""

import subprocess
import sys

import pytest

import train
from tests.small_runs import EPOCHS, GIVEN_LRS, arguments, shrink
from utils import engine
from utils.lr_finder import LRRange
from utils.runs import report
from utils.runs.checkpoint import decode
from utils.runs.folder import NEWEST
from utils.runs.weights import WEIGHTS_NAME, load_model
from utils.runtime import PROJECT_ROOT, pick_device, write_atomically


@pytest.fixture
def tiny(toy, monkeypatch):
    shrink(toy, monkeypatch.setattr)


def make_config(flags: str):
    return train.make_config(train.make_parser().parse_args(flags.split()))


def test_help_explains_every_flag():
    parser = train.make_parser()
    text = parser.format_help()
    for words in ("examples:", "exit codes:", "$S10_RUN_DIR", "$CIFAR10_DIR", "24 epochs", "130 Ctrl-C"):
        assert words in text
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help"
        assert action.option_strings[-1] in text


def test_flags_reach_the_config():
    flags = (
        "--profile full --seed 3 --train-images 500 --test-images 50 --batch-size 32 --epochs 9 --peak-epoch 3 "
        "--range-test-steps 33 --pipeline albumentations --num-workers 1 --precision bf16 --deterministic"
    )
    config = make_config(flags)
    assert (config.profile, config.seed, config.train_images, config.test_images) == ("full", 3, 500, 50)
    assert (config.batch_size, config.epochs, config.peak_epoch, config.range_test_steps) == (32, 9, 3, 33)
    assert (config.pipeline, config.num_workers, config.precision) == ("albumentations", 1, "bf16")
    assert config.deterministic
    assert make_config("").profile == ("full" if pick_device().type == "cuda" else "quick")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch-size 0", "batch_size is 0: it should be greater than or equal to 1"),
        ("--device tpu", "device is 'tpu'"),
        ("--threads 0", "threads is 0: choose between 1 and"),
        ("--train-images 5000 --batch-size 100", "batch_size is 100, but there are only 60 images: lower it to 60"),
        (
            "--publish",
            "this run cannot be published in Results/, because it uses a profile or subset other than the full",
        ),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_a_wrong_setting_is_named_with_exit_code_2_before_anything_is_computed(
    tmp_path, capsys, flags, words, monkeypatch
):
    monkeypatch.setattr(report, "publish", lambda run_dir: pytest.fail("published"))
    assert train.main(arguments(tmp_path / "run", *flags.split())) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"train.py: {words}")
    assert message.count("\n") == 1
    assert not (tmp_path / "run" / NEWEST).exists()


@pytest.mark.usefixtures("tiny")
def test_a_cycle_that_rises_within_one_step_is_refused_before_the_range_test(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.lr_finder.find_range", lambda *args: pytest.fail("the range test has begun"))
    argv = [flag for flag in arguments(tmp_path / "run", "--batch-size", "40") if flag not in GIVEN_LRS]
    assert train.main(argv) == 2
    assert "within a single step" in capsys.readouterr().err


def test_an_unknown_flag_has_exit_code_2():
    with pytest.raises(SystemExit) as stop:
        train.main(["--no-such-flag"])
    assert stop.value.code == 2


def test_an_unknown_data_folder_ends_a_real_process_with_one_line(tmp_path):
    missing = tmp_path / "no-such-folder"
    process = subprocess.run(
        [sys.executable, "train.py", *arguments(tmp_path / "run", "--data-dir", str(missing))],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert process.stderr.startswith(f"train.py: no folder {missing}: check the path")
    assert process.stderr.count("\n") == 1


@pytest.mark.usefixtures("tiny")
def test_a_run_with_a_range_test_ends_with_a_summary_in_one_line(tmp_path, capsys):
    argv = [flag for flag in arguments(tmp_path / "run", "--range-test-end", "10") if flag not in GIVEN_LRS]
    assert train.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("done: test accuracy ")
    assert lines[-1].endswith(f"results in {tmp_path / 'run'}")
    metrics = report.read_metrics(tmp_path / "run")
    assert len(metrics["history"]["lr"]) == EPOCHS
    assert metrics["lr_rule"] == "onset-minimum"
    assert (tmp_path / "run" / WEIGHTS_NAME).exists()
    assert (tmp_path / "run" / report.LOG_NAME).exists()


@pytest.mark.usefixtures("tiny")
def test_only_a_run_that_asks_for_it_is_published(tmp_path, capsys, monkeypatch):
    published = []
    monkeypatch.setattr(report, "check_publishable", lambda config, dataset: None)
    monkeypatch.setattr(report, "publish", published.append)
    assert train.main(arguments(tmp_path / "private")) == 0
    assert train.main(arguments(tmp_path / "run", "--publish")) == 0
    assert published == [tmp_path / "run"]
    assert capsys.readouterr().out.endswith(f"results in {report.RESULTS}\n")


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_is_neither_overwritten_nor_continued_with_another_setting(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run")) == 0
    before = (tmp_path / "run" / NEWEST).read_bytes()
    assert train.main(arguments(tmp_path / "run")) == 1
    assert "already holds a run: add --resume to continue it, or choose another --run-dir" in capsys.readouterr().err
    assert train.main(arguments(tmp_path / "run", "--resume", "--batch-size", "20")) == 1
    message = capsys.readouterr().err
    assert "belongs to another run: batch_size 10 there, 20 here" in message
    assert "--resume" not in message  # it would not help
    assert (tmp_path / "run" / NEWEST).read_bytes() == before


@pytest.mark.usefixtures("tiny")
def test_a_run_continued_on_another_machine_says_that_it_is_not_bit_identical(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", "--resume")) == 0
    assert "nothing to resume in" in capsys.readouterr().out
    found = decode(tmp_path / "run" / NEWEST)
    assert found.epochs == EPOCHS
    found.record["device"] = "another processor"
    write_atomically(tmp_path / "run" / NEWEST, found.encode())
    assert train.main(arguments(tmp_path / "run", "--resume")) == 0
    assert "another processor then, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ("--compile default", "--compile off", "compile default then, off now"),
        ("--num-workers 1", "--num-workers 0", ""),
        (
            "--pipeline albumentations --num-workers 1",
            "--pipeline albumentations --num-workers 0",
            "num_workers 1 then, 0 now",
        ),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_a_run_that_failed_on_the_machine_resumes_with_other_settings_of_the_machine(
    tmp_path, capsys, monkeypatch, then, now, words
):
    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", fail)
        assert train.main(arguments(tmp_path / "run", *then.split())) == 1
    assert "but no epoch yet: add --resume to the same command" in capsys.readouterr().err
    assert train.main(arguments(tmp_path / "run", "--resume", *now.split())) == 0
    out = capsys.readouterr().out
    assert ("the run began differently" in out) == bool(words)
    assert words in out
    assert decode(tmp_path / "run" / NEWEST).epochs == EPOCHS


def test_the_lower_learning_rates_that_are_advised_make_a_cycle():
    assert train.lower_lrs(LRRange.given(1e-3, 1e-2)) == "--lr-min 1.00e-03 --lr-max 3.33e-03"
    assert train.lower_lrs(LRRange.given(6e-3, 9e-3)) == "--lr-min 2.00e-03 --lr-max 3.00e-03"


@pytest.mark.slow
def test_the_real_network_narrowed_on_real_files_ends_with_figures_and_loadable_weights(tmp_path, image_folder, capsys):
    flags = "--train-images 20 --test-images 20 --epochs 2 --width 16"
    assert train.main(arguments(tmp_path / "run", "--data-dir", str(image_folder), *flags.split())) == 0
    assert "CIFAR-10 as an image folder, 60 train and 30 test images" in capsys.readouterr().out
    model, about = load_model(tmp_path / "run" / WEIGHTS_NAME)
    assert (model.fc.in_features, model.fc.out_features) == (8 * 16, len(about["classes"]))
    assert (tmp_path / "run" / "model_viz.png").stat().st_size > 10_000
