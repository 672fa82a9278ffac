"""train.py as its user meets it: settings, exit codes, messages that fit on a screen, one line that sums up."""

import json
import subprocess
import sys

import pytest
import torch
from small_runs import EPOCHS, arguments, epochs_kept, shrink
from utils.report import WEIGHTS_NAME

import train
from utils import checkpoint
from utils.runtime import PROJECT_ROOT


@pytest.fixture(autouse=True)
def _threads_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def test_without_arguments_it_is_the_run_that_fits_this_machine():
    config = make_config("")
    assert config.profile == ("full" if torch.cuda.is_available() else "quick")
    assert config.seed == 0


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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch-size 0", "batch_size is 0: it must be at least 1"),
        ("--batch-size 41", "batch_size is 41: it is larger than the train set of 40 images"),
        ("--epochs 1", "epochs is 1: the LR peaks at epoch 1"),
        ("--peak-epoch 0", "peak_epoch is 0"),
        ("--lr-max 1e-4", "lr_min is 0.001: it must be positive and below lr_max"),
        ("--range-test-steps 5", "range_test_steps is 5"),
        ("--seed -1", "seed is -1"),
        ("--num-workers -1", "num_workers is -1"),
        ("--device tpu", "device is 'tpu'"),
        ("--precision fp16", "precision is 'fp16' on a CPU"),
        ("--threads 0", "threads is 0: it must be at least 1"),
    ],
)
def test_a_wrong_setting_is_named_with_exit_code_2_before_anything_is_done(tmp_path, capsys, flags, words):
    assert train.main(arguments(tmp_path / "run", *flags.split())) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"train.py: {words}")
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_one_lr_without_the_other_is_a_wrong_setting(capsys):
    assert train.main(["--profile", "quick", "--lr-max", "0.01"]) == 2
    assert "give both to skip the range test" in capsys.readouterr().err


def test_a_batch_larger_than_the_whole_train_set_is_a_wrong_setting(tmp_path, tiny, capsys):
    assert train.main(arguments(tmp_path / "run", "--train-images", "5000", "--batch-size", "100")) == 2
    assert "batch_size is 100, but there are only 60 images: lower it to 60 or less" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--no-such-flag", "--epochs=many", "--profile=medium"])
def test_what_argparse_refuses_has_exit_code_2(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([flag])
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


def test_a_run_with_a_range_test_ends_with_one_line_that_sums_up(tmp_path, tiny, capsys):
    argv = [flag for flag in arguments(tmp_path / "run") if flag not in ("--lr-min", "1e-3", "--lr-max", "1e-2")]
    assert train.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("done: test accuracy ")
    assert lines[-1].endswith(f"results in {tmp_path / 'run'}")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["history"]["lr"]) == EPOCHS
    assert metrics["lr_rule"] == "steepest-minimum"
    assert (tmp_path / "run" / WEIGHTS_NAME).exists()
    assert (tmp_path / "run" / "training_logs.md").exists()


def test_a_finished_run_is_not_overwritten_without_resume(tmp_path, tiny, capsys):
    assert train.main(arguments(tmp_path / "run")) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert train.main(arguments(tmp_path / "run")) == 1
    assert "already holds a run: add --resume to go on with it, or choose another --run-dir" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_resuming_with_another_setting_is_refused_with_what_differs(tmp_path, tiny, capsys):
    assert train.main(arguments(tmp_path / "run")) == 0
    assert train.main(arguments(tmp_path / "run", "--resume", "--batch-size", "20")) == 1
    assert "belongs to another run: batch_size 10 there, 20 here" in capsys.readouterr().err


def test_resuming_where_nothing_is_starts_at_the_beginning(tmp_path, tiny, capsys):
    assert train.main(arguments(tmp_path / "run", "--resume")) == 0
    assert "nothing to resume in" in capsys.readouterr().out
    assert epochs_kept(tmp_path / "run") == EPOCHS


def test_a_range_test_of_other_settings_with_no_epoch_behind_it_is_repeated(tmp_path, tiny, capsys):
    assert train.main(arguments(tmp_path / "run", "--lr-max", "5e-3")) == 0
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / "run" / name).unlink()
    assert train.main(arguments(tmp_path / "run")) == 0
    assert "LRMAX 1.00e-02" in capsys.readouterr().out.rsplit("one cycle:", 1)[1]


def test_a_run_that_goes_on_elsewhere_says_that_it_is_not_bit_identical(tmp_path, tiny, capsys):
    assert train.main(arguments(tmp_path / "run")) == 0
    folder = checkpoint.RunFolder(tmp_path / "run")
    folder.write_record({**folder.read_record(), "device": "another processor"})
    assert train.main(arguments(tmp_path / "run", "--resume")) == 0
    assert "another processor then, " in capsys.readouterr().out


def test_a_drive_gets_a_copy_of_the_checkpoints(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("S10_RUN_DIR", str(tmp_path / "drive"))
    assert train.main(arguments(tmp_path / "run")) == 0
    for name in ("run.json", "checkpoint.pt", "checkpoint.previous.pt"):
        assert (tmp_path / "drive" / "run" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.slow
def test_the_real_network_on_real_files_ends_with_figures_and_loadable_weights(tmp_path, image_folder, capsys):
    flags = "--train-images 20 --test-images 20 --epochs 2"
    assert train.main(arguments(tmp_path / "run", "--data-dir", str(image_folder), *flags.split())) == 0
    assert "CIFAR-10 as an image folder, 60 train and 30 test images" in capsys.readouterr().out
    model = checkpoint.load_weights(train.CustomResNet(), tmp_path / "run" / WEIGHTS_NAME)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_573_130
    assert (tmp_path / "run" / "model_viz.png").stat().st_size > 10_000
