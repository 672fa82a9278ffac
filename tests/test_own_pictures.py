"""The README's walk-through with your own pictures: put them in folders, train, predict. Each step as a command."""

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
TRAIN, TEST = 150, 20  # pictures of each class


def pictures_of_three_classes():
    """``{name: (N, H, W, 3) uint8}``: of real photographs where there are any, else of coloured noise."""
    if os.environ.get("CIFAR10_DIR"):
        dataset = load_dataset()
        numbers = {name: dataset.classes.index(name) for name in CLASSES}
        return {name: dataset.train_images[dataset.train_labels == number] for name, number in numbers.items()}
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 120, (len(CLASSES), TRAIN + TEST + 3, 40, 60, 3))
    noise[np.arange(3), ..., np.arange(3)] += 100  # one channel a class
    return dict(zip(CLASSES, noise.astype(np.uint8)))


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory):
    """A folder as the README describes it, half PNG, half JPEG, and three pictures that are in neither split."""
    folder = tmp_path_factory.mktemp("own")
    for name, images in pictures_of_three_classes().items():
        splits = {"train": images[:TRAIN], "test": images[TRAIN : TRAIN + TEST], "new": images[-3:-2]}
        for split, chosen in splits.items():
            target = folder / split / name
            target.mkdir(parents=True)
            for index, image in enumerate(chosen):
                suffix = ".png" if index % 2 else ".jpg"
                Image.fromarray(image).save(
                    target / f"IMG_{index:04d}{suffix}", **({} if index % 2 else {"quality": 95})
                )
    return folder


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )


@pytest.mark.slow
def test_train_and_predict_with_three_classes_of_own_pictures(own_pictures, tmp_path):
    run_dir = tmp_path / "run"
    settings = "--profile quick --epochs 3 --peak-epoch 1 --batch-size 32 --width 16 --range-test-steps 40"
    done = command(
        "train.py",
        "--data-dir",
        own_pictures,
        "--run-dir",
        run_dir,
        "--device",
        "cpu",
        "--threads",
        1,
        *settings.split(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "own images in 3 classes" in done.stdout
    metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["per_class_accuracy"]) == list(CLASSES)
    assert metrics["test_accuracy"] > 45  # chance is 33.3

    pictures = [next((own_pictures / "new" / name).iterdir()) for name in CLASSES]
    weights = ("--weights", run_dir / "custom_resnet.safetensors")
    done = command("predict.py", *weights, *pictures)
    assert done.returncode == 0, done.stderr[-2000:]
    *answers, reminder = done.stdout.splitlines()
    assert len(answers) == 3
    for answer, picture in zip(answers, pictures):
        assert answer.startswith(f"{picture}: ")
        assert answer.split(": ")[1].split()[0] in CLASSES
    assert "It knows 3 classes (frog, ship, truck)" in reminder

    done = command("predict.py", *weights, "--test", "--data-dir", own_pictures)
    assert done.returncode == 0, done.stderr[-2000:]
    found, stored = (
        line.removeprefix("test accuracy").removeprefix("metrics.json").strip() for line in done.stdout.splitlines()[1:]
    )
    assert stored.startswith(found)  # the same figures to the last digit shown
