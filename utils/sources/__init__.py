"""Where pixels come from: the official archive, folders of pictures, scikit-learn's digits. Plain arrays come out.

``archive``        CIFAR-10's official archive: download, unpack, read
``image_folder``   pictures in class folders
``digits``         the stand-in for machines without a network

``utils.dataset`` chooses among them and names what comes.
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
    """``path`` for a message: bytes that are not UTF-8, which no terminal takes, appear as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def sole_writer(folder: Path):
    """Hold ``folder``, making it if need be, so that one process at a time writes large files into it; others wait.

    Unfinished files end in ``.s10part``. Those found here belonged to a process that was killed, and are removed.

    Raises:
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".s10lock"):
        for left in folder.glob(".*.s10part"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
