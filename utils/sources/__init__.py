"""Where the pixels come from. Every source returns ``Arrays``; ``utils.dataset`` chooses among them.

``archive``    CIFAR-10's official archive: download, unpack, read
``pictures``   pictures in class folders
``digits``     scikit-learn's digits, the stand-in when there is no network
``find``       which of them, and in which folder
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from utils.runtime import Session10Error

CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class DatasetError(Session10Error):
    """The data cannot be used; the message names the file or folder, the reason and the fix."""


class Arrays(NamedTuple):
    """Labelled images: (N, 32, 32, 3) uint8 RGB; labels: (N,) int64, indices into ``classes``."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]


def printable(path: str | os.PathLike) -> str:
    """A path as text that every stream can print, even if its bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")
