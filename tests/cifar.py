"""Real CIFAR-10 for tests: a folder of 60,000 picture files is decoded once and then read from one file."""

from __future__ import annotations

import os
import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np

from utils.dataset import ImageDataset, load_dataset

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def load_cifar10(folder: str | os.PathLike) -> ImageDataset:
    """``load_dataset(folder)``, by way of a copy in the temporary folder if ``folder`` holds pictures.

    The copy goes by the folder's path and the times of its class folders, which change when files come or go.
    """
    times = sorted(f"{path} {path.stat().st_mtime_ns}" for path in Path(folder).resolve().glob("t*/*"))
    if not times:
        return load_dataset(folder)
    key = sha256("\n".join(times).encode()).hexdigest()[:16]
    copy = Path(tempfile.gettempdir(), f"cifar10-for-tests-{os.getuid()}", f"{key}.npz")
    if not copy.exists():
        dataset = load_dataset(folder)
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        part = copy.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **{name: getattr(dataset, name) for name in ARRAYS}, classes=dataset.classes)
        os.replace(part, copy)
    with np.load(copy, allow_pickle=False) as stored:
        return ImageDataset(*(stored[name] for name in ARRAYS), tuple(stored["classes"].tolist()), "image-folder")
