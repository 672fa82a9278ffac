"""predict.py as its user meets it: answers in the run's own classes, and one line for each error."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from models import CustomResNet
from utils.dataset import load_dataset
from utils.runs import report
from utils.runs.weights import WEIGHTS_NAME, save_weights
from utils.runtime import PROJECT_ROOT

CLASSES = ["kite", "slide", "swing"]
WIDTH = 8  # a small network: its answers do not matter here


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / WEIGHTS_NAME
    about = {"classes": CLASSES, "width": WIDTH, "logit_scale": 0.125, "data": "own images in 3 classes"}
    save_weights(CustomResNet(len(CLASSES), width=WIDTH), path, about)
    return path


@pytest.fixture
def run(weights, capsys):
    """``run(*arguments)`` -> (exit code, lines on stdout, lines on stderr), with the weights of three classes."""

    def run(*arguments):
        code = predict.main([*map(str, arguments), "--weights", str(weights), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three test images and six train images of each of the three classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in CLASSES:
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(tmp_path / "own" / split / name / f"{name}{index}.png")
    return tmp_path / "own"


def test_the_answers_use_the_class_names_of_the_weights_file(run, picture):
    code, out, err = run(picture, "--top", "9")
    assert (code, err) == (0, [])
    answer, reminder = out
    assert answer.startswith(f"{picture}: ")
    assert sorted(part.split()[0] for part in answer.split(": ")[1].split(", ")) == sorted(CLASSES)
    assert reminder.startswith("It knows 3 classes (kite, slide, swing) and names one of them")
    assert run(picture, "--top", "1")[1][0].count("%") == 1


def test_one_bad_picture_does_not_stop_the_rest(run, picture, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    missing = tmp_path / "missing.png"
    code, out, err = run(tmp_path / "notes.png", missing, tmp_path, picture)
    assert code == 1
    assert out[0].startswith(f"{picture}: ")
    assert [line.startswith("predict.py: ") for line in err] == [True] * 4
    assert "notes.png" in err[0]
    assert str(missing) in err[1]
    assert err[2].endswith(f"{tmp_path} is a folder: name the pictures in it, such as {tmp_path / 'picture.jpg'}")
    assert err[3].endswith("3 of 4 pictures could not be classified")
    code, out, err = run(missing)
    assert (code, out, len(err)) == (1, [], 1)


def test_a_huge_picture_is_refused_and_a_transparent_one_is_read_on_white(run, tmp_path):
    Image.new("1", (16_000, 16_000)).save(tmp_path / "huge.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    code, out, err = run(tmp_path / "huge.png", tmp_path / "clear.png", tmp_path / "white.png")
    assert code == 1
    assert "huge.png" in err[0]
    assert "pixels" in err[0]
    assert out[0].split(": ")[1] == out[1].split(": ")[1]


def test_answers_that_are_not_numbers_are_refused(run, picture, monkeypatch):
    monkeypatch.setattr(CustomResNet, "predict_proba", lambda self, x: torch.full((len(x), 3), torch.nan))
    code, out, err = run(picture)
    assert (code, out) == (1, [])
    assert "gives NaN instead of probabilities" in err[0]


@pytest.mark.parametrize("arguments", [["--test", "--data-dir"], []])
def test_too_little_memory_is_one_message_that_names_the_fix(
    run, picture, folder, project_root, monkeypatch, arguments
):
    def hungry(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(CustomResNet, "forward", hungry)
    code, out, err = run(*arguments, folder if arguments else picture)
    assert (code, out) == (1, [])
    assert err[-1] == "predict.py: out of memory: free what other programs use, or add --device cpu"


def test_missing_weights_are_named(tmp_path, picture, capsys):
    assert predict.main([str(picture), "--weights", str(tmp_path / "other.safetensors")]) == 1
    assert f"no weights at {tmp_path}" in capsys.readouterr().err


def test_contradictory_options_are_wrong_settings(run, picture):
    for arguments in ([], [picture, "--test"], [picture, "--top", "0"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2


def test_the_weights_are_tested_on_their_runs_data_beside_its_metrics(run, weights, folder, project_root, capsys):
    dataset = load_dataset(folder).subset(None, 6)
    capsys.readouterr()  # the progress of decoding, which is shown once
    model, _ = predict.load_model(weights)
    plain, tta = report.final_test(model, dataset)
    metrics = {
        "test_accuracy": plain.accuracy,
        "test_accuracy_tta": tta.accuracy,
        "test_loss": plain.loss,
        "test_images": 6,
        "data": dataset.description,
        "source": dataset.source,
        "config": {"train_images": None, "test_images": 6},
        "history": {},
    }
    stored = weights.parent / report.METRICS_NAME
    stored.write_text(json.dumps(metrics))
    try:
        code, out, err = run("--test", "--data-dir", folder)
        assert (code, err) == (0, [])
        assert out[0].startswith("6 test images of own images in 3 classes")
        figures = f"{plain.accuracy:.2f}%, with flip TTA {tta.accuracy:.2f}%, loss {plain.loss:.4f}"
        assert out[1] == f"test accuracy {figures}"
        assert out[2].startswith(f"metrics.json  {figures} (6 test images of own images in 3 classes")
        stored.write_text(json.dumps({**metrics, "data": dataset.holdout(3).description}))
        code, out, err = run("--test", "--data-dir", folder)
        assert (code, out) == (1, [])
        assert "3 train images held out for validation: the test set is for final results" in err[-1]
        stored.write_text("{}")
        code, _, err = run("--test", "--data-dir", folder)
        assert code == 1
        assert "metrics.json is not what a finished run writes" in err[-1]
    finally:
        stored.unlink()
    for split in ("train", "test"):
        (folder / split / "kite").rename(folder / split / "ball")
    code, _, err = run("--test", "--data-dir", folder)
    assert code == 1
    assert "knows 3 classes (kite, slide, swing), but own images in 3 classes" in err[-1]
    assert "--data-dir" in err[-1]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_closed_outputs_end_in_no_traceback(weights, picture):
    command = f"'{sys.executable}' predict.py '{picture}' --weights '{weights}' --device cpu"
    done = subprocess.run(
        f"{command} | true; echo ${{PIPESTATUS[0]}}; {command} 2>&-; echo $?",
        shell=True,
        executable="/bin/bash",
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("0", "0")
    assert lines[1].startswith(f"{picture}: ")
