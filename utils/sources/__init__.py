"""Where the pixels come from. Every source returns plain arrays; ``utils.dataset`` chooses among them.

``archive``        CIFAR-10's official archive: download, unpack, read
``image_folder``   images in class folders
``digits``         scikit-learn's digits, the stand-in when there is no network
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from utils.runtime import Session10Error

CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32


class DatasetError(Session10Error):
    """The data cannot be used; the message names the file or folder, the reason and the fix."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """A labelled image set, split into train and test.

    Attributes:
        train_images, test_images: (N, 32, 32, 3) uint8, RGB.
        train_labels, test_labels: (N,) int64, indices into ``classes``.
        classes: the class names.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]


def printable(path: str | os.PathLike) -> str:
    """``path`` for a message. Bytes that are not UTF-8 appear as ``\\xNN``, since no terminal prints them."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def sole_writer(folder: Path):
    """Lock ``folder``, creating it if needed, so that only one process at a time writes large files there.

    Temporary files end in ``.s10part``. Any found here were left by a killed process and are removed.

    Raises:
        OSError: the folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".s10lock"):
        for left in folder.glob(".*.s10part"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
