"""CIFAR-10 as uint8 arrays and class names.

``load_dataset`` uses the first of these: a folder you name (``root`` or ``$CIFAR10_DIR``), the archive in ``data/``, a
new download, or, without a network, scikit-learn's digits, announced as a stand-in.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from dataclasses import dataclass

import numpy as np

from utils.sources import CIFAR10_CLASSES, DatasetError
from utils.sources.find import find

OFFLINE_COPY = "14089befcce147b97e13ef6f9161324f71389bd2591d18b6d1b86965282b686c"  # its fingerprint


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images and where they come from."""

    train_images: np.ndarray  # (N, 32, 32, 3) uint8, RGB
    train_labels: np.ndarray  # (N,) int64, indices into classes
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    source: str  # "official", "image-folder" or "digits"
    description: str = ""  # for logs and reports; derived from the data if not given
    split: str = "test"  # "validation" if the test images were held out from the train images

    def __post_init__(self):
        if not self.description:
            object.__setattr__(self, "description", self._describe())

    def _describe(self) -> str:
        if self.source == "official":
            return "CIFAR-10, official archive (checksums verified)"
        if self.source == "digits":
            return "scikit-learn digits, a stand-in: NOT CIFAR-10"
        count = f"{len(self.train_labels):,} train and {len(self.test_labels):,} test images"
        if self.classes != CIFAR10_CLASSES:
            return f"own images in {len(self.classes)} classes, {count}"
        if self.fingerprint == OFFLINE_COPY:
            return "CIFAR-10, offline copy (59,029 of 60,000 images bit-exact, 971 as JPEG copies)"
        return f"CIFAR-10 as an image folder, {count}"

    @property
    def is_stand_in(self) -> bool:
        """True for the digits: results on them must never pass for CIFAR-10's."""
        return self.source == "digits"

    @functools.cached_property  # computed once: the arrays are 184 MB
    def fingerprint(self) -> str:
        """SHA-256 of all pixels, labels and class names; equal for equal data."""
        digest = hashlib.sha256(",".join(self.classes).encode())
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> ImageDataset:
        """A random, class-balanced subset of at most ``train`` and ``test`` images; None keeps a split whole."""
        changes = {}
        for split, count in (("train", train), ("test", test)):
            labels = getattr(self, f"{split}_labels")
            if count is not None and count < len(labels):
                chosen = balanced_indices(labels, count, seed)
                changes[f"{split}_images"] = getattr(self, f"{split}_images")[chosen]
                changes[f"{split}_labels"] = labels[chosen]
        return dataclasses.replace(self, **changes)

    def holdout(self, count: int = 5000, seed: int = 0) -> ImageDataset:
        """A copy with ``count`` class-balanced train images as its test set; they are no longer in its train set.

        All choices are made on such splits, so that the real test set is used for final results only.
        """
        held = balanced_indices(self.train_labels, count, seed)
        kept = np.setdiff1d(np.arange(len(self.train_labels)), held)
        return dataclasses.replace(
            self,
            train_images=self.train_images[kept],
            train_labels=self.train_labels[kept],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
            description=f"{self.description}; {count:,} train images held out for validation",
            split="validation",
        )


def balanced_indices(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` sorted random indices, balanced: the numbers of images per class differ by at most one.

    If a class has too few images for that, all of them are taken, and the other classes share the rest evenly.
    """
    if count > len(labels):
        raise DatasetError(f"a subset of {count} images of {len(labels)}: ask for at most {len(labels)}")
    names, sizes = np.unique(labels, return_counts=True)
    shares = np.zeros_like(sizes)
    while missing := count - shares.sum():
        unfinished = np.flatnonzero(shares < sizes)
        even, rest = divmod(missing, len(unfinished))
        wanted = shares[unfinished] + (even or np.arange(len(unfinished)) < rest)
        shares[unfinished] = np.minimum(wanted, sizes[unfinished])
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == name), share, replace=False) for name, share in zip(names, shares)]
    return np.sort(np.concatenate(chosen))


def load_dataset(root: str | os.PathLike | None = None, source: str = "auto") -> ImageDataset:
    """Load CIFAR-10, or your own images in class folders.

    Args:
        root: a folder with CIFAR-10's archive, packed or unpacked, or with ``train/<class>/*.png`` and
            ``test/<class>/*.png``. None: ``$CIFAR10_DIR`` if set, else ``data/`` in the project, downloading as needed.
        source: ``"official"``, ``"image-folder"`` or ``"digits"`` accepts only that; ``"auto"`` accepts any.

    Raises DatasetError if the folder is missing, empty, damaged or not understood, or the download failed.
    """
    arrays, found = find(root, source)
    return ImageDataset(*arrays, found)
