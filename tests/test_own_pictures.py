"""The README's commands for your own pictures: train on them, predict, test."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from utils.dataset import load_dataset
from utils.runtime import PROJECT_ROOT

CLASSES = ("frog", "ship", "truck")
TRAIN, TEST = 150, 20  # pictures per class


def pictures_of_three_classes():
    """``{name: (N, H, W, 3) uint8}``: from CIFAR-10 if available, else coloured noise."""
    if os.environ.get("CIFAR10_DIR"):
        dataset = load_dataset()
        numbers = {name: dataset.classes.index(name) for name in CLASSES}
        return {name: dataset.train_images[dataset.train_labels == number] for name, number in numbers.items()}
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 120, (len(CLASSES), TRAIN + TEST + 3, 40, 60, 3))
    noise[np.arange(3), ..., np.arange(3)] += 100  # one channel per class
    return dict(zip(CLASSES, noise.astype(np.uint8)))


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory):
    """A folder as in the README, half PNG, half JPEG; ``new/`` holds one more picture per class."""
    folder = tmp_path_factory.mktemp("own")
    for name, images in pictures_of_three_classes().items():
        splits = {"train": images[:TRAIN], "test": images[TRAIN : TRAIN + TEST], "new": images[-3:-2]}
        for split, chosen in splits.items():
            target = folder / split / name
            target.mkdir(parents=True)
            for index, image in enumerate(chosen):
                Image.fromarray(image).save(target / f"IMG_{index:04d}.{('jpg', 'png')[index % 2]}", quality=95)
    return folder


def run(*arguments: object) -> list[str]:
    """The lines that a command prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_train_and_predict_with_three_classes_of_own_pictures(own_pictures, tmp_path):
    run_dir = tmp_path / "run"
    settings = "--device cpu --threads 1 --profile quick --epochs 3 --peak-epoch 1 --batch-size 32 --width 16 --range-test-steps 40"
    printed = run("train.py", "--data-dir", own_pictures, "--run-dir", run_dir, *settings.split())
    assert any("own images in 3 classes" in line for line in printed)
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["per_class_accuracy"]) == list(CLASSES)
    assert metrics["test_accuracy"] > 45  # chance is 33.3

    weights = ("--weights", run_dir / "custom_resnet.safetensors")
    pictures = [next((own_pictures / "new" / name).iterdir()) for name in CLASSES]
    *answers, reminder = run("predict.py", *weights, *pictures)
    assert len(answers) == 3
    for answer, picture in zip(answers, pictures):
        assert answer.startswith(f"{picture}: ")
        assert answer.split(": ")[1].split()[0] in CLASSES
    assert "It knows 3 classes (frog, ship, truck)" in reminder

    _, *lines = run("predict.py", *weights, "--test", "--data-dir", own_pictures)
    found, stored = (line.removeprefix("test accuracy").removeprefix("metrics.json").strip() for line in lines)
    assert stored.startswith(found)  # the same numbers to the last digit shown
