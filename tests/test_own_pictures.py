"""The README's commands for your own pictures: train on them, predict, test."""

import json
import os
import subprocess
import sys

import pytest

from tests.pictures import BLUE, GREEN, RED, draw
from utils.runtime import PROJECT_ROOT

COLOURS = {"cornflower": BLUE, "fern": GREEN, "poppy": RED}
SETTINGS = "--profile quick --epochs 3 --peak-epoch 1 --batch-size 8 --width 16 --range-test-steps 30"


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory):
    """A folder as in the README, half PNG, half JPEG, of several sizes; ``new/`` holds one more picture per class."""
    folder = tmp_path_factory.mktemp("own")
    for split, count in {"train": 30, "test": 10, "new": 1}.items():
        for name, colour in COLOURS.items():
            for number in range(count):
                shade = tuple(max(value - 3 * number, 40 + number) for value in colour)
                draw(folder / split / name, shade, 1, (".jpg", ".png")[number % 2], (40 + number, 32))
    return folder


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    """A command of the project, which must end with this exit code."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_train_and_predict_with_three_classes_of_own_pictures(own_pictures, tmp_path):
    run_dir = tmp_path / "run"
    done = run("train.py", "--data-dir", own_pictures, "--run-dir", run_dir, "--device", "cpu", *SETTINGS.split())
    assert "own images in 3 classes" in done.stdout
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["per_class_accuracy"]) == list(COLOURS)
    assert metrics["test_accuracy"] > 60  # chance is 33.3

    weights = ("--weights", run_dir / "custom_resnet.safetensors")
    pictures = [next((own_pictures / "new" / name).iterdir()) for name in COLOURS]
    (own_pictures / "new" / "broken.jpg").write_bytes(b"<html>404</html>")
    done = run("predict.py", *weights, *pictures, own_pictures / "new" / "broken.jpg", code=1)
    answers = [line for line in done.stdout.splitlines() if ".jpg: " in line]
    for answer, picture in zip(answers, pictures, strict=True):
        assert answer.startswith(f"{picture}: ")
        assert answer.split(": ")[1].split()[0] in COLOURS
    assert "broken.jpg: not a picture" in done.stderr

    *_, measured, stored = run("predict.py", *weights, "--test", "--data-dir", own_pictures).stdout.splitlines()
    assert measured.removeprefix("measured now: ") == stored.removeprefix("metrics.json: ")
