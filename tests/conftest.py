"""Shared fixtures: small synthetic data, and real CIFAR-10 where available."""

import os
import signal

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from tests.cifar import load_cifar10
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.sources import find as sources_find

# Fixed, since bit-identical CPU runs need the same number; one, since two threads beside other work are ten times slower.
THREADS = 1

# The same examples in every run, so that failures repeat; no deadline, since machines differ.
settings.register_profile("session10", derandomize=True, deadline=None)
settings.load_profile("session10")


@pytest.fixture(scope="session", autouse=True)
def _fixed_threads():
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _seed():
    """A test's random weights do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """Shells let the commands that they start in the background ignore Ctrl-C, which tests send."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cifar10() -> ImageDataset:
    """Real CIFAR-10; skips the test unless $CIFAR10_DIR is set."""
    folder = os.environ.get("CIFAR10_DIR")
    if not folder:
        pytest.skip("needs real CIFAR-10: set CIFAR10_DIR to a folder that holds it")
    return load_cifar10(folder)


@pytest.fixture(scope="session")
def toy() -> ImageDataset:
    """60 train and 30 test images in ten classes. Each class is a colour with noise, so that it can be learned."""
    rng = np.random.default_rng(0)

    def split(count: int):
        labels = np.arange(count, dtype=np.int64) % 10
        colour = np.stack([labels * 25, 255 - labels * 25, (labels % 3) * 100], axis=1)[:, None, None, :]
        noise = rng.integers(-20, 20, (count, 32, 32, 3))
        return np.clip(colour + noise, 0, 255).astype(np.uint8), labels

    return ImageDataset(*split(60), *split(30), CIFAR10_CLASSES, "image-folder", "toy images")


@pytest.fixture
def project_root(tmp_path, monkeypatch):
    """An empty project folder, so that caches and downloads never reach the real one; $CIFAR10_DIR is unset."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setattr(sources_find, "PROJECT_ROOT", root)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    return root


@pytest.fixture
def image_folder(tmp_path, toy):
    """A folder with the toy images as ``{train,test}/<class>/<index>.png``."""
    splits = {"train": (toy.train_images, toy.train_labels), "test": (toy.test_images, toy.test_labels)}
    for split, (images, labels) in splits.items():
        for index, (image, label) in enumerate(zip(images, labels)):
            folder = tmp_path / "images" / split / toy.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:05d}.png")
    return tmp_path / "images"
