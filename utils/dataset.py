"""CIFAR-10 as uint8 arrays and class names.

``load_dataset`` uses the first of these: a folder you name (``root`` or ``$CIFAR10_DIR``), an earlier download in
``data/``, a new download, or, without a network, scikit-learn's digits, announced as a stand-in.

All images stay in memory as uint8, 184 MB; the loaders convert a few batches at a time to floats.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

from utils.runtime import PROJECT_ROOT
from utils.sources import CIFAR10_CLASSES, Arrays, DatasetError, archive, digits, image_folder, printable
from utils.sources.archive import OfflineError

HELD_OUT = "held out for validation"  # ends the description of every validation split

# Descriptions of known data, by fingerprint.
KNOWN_FINGERPRINTS = {
    "14089befcce147b97e13ef6f9161324f71389bd2591d18b6d1b86965282b686c": (
        "CIFAR-10, offline copy (59,029 of 60,000 images bit-exact, 971 as JPEG copies)"
    ),
}


@dataclass(frozen=True, eq=False)
class ImageDataset(Arrays):
    """The images and labels of ``Arrays``, and where they come from.

    Attributes:
        source: ``"official"``, ``"image-folder"`` or ``"digits"``.
        description: for logs and reports; derived from the data if not given.
    """

    source: str
    description: str = ""

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
        return KNOWN_FINGERPRINTS.get(self.fingerprint, f"CIFAR-10 as an image folder, {count}")

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
            description=f"{self.description}; {count:,} train images {HELD_OUT}",
        )


def balanced_indices(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` sorted random indices, balanced: the numbers of images per class differ by at most one.

    If a class has too few images for that, all of them are taken, and the other classes share the rest evenly.

    Args:
        labels: (N,) int.
        count: at most N.
        seed: the same seed draws the same indices.

    Raises:
        DatasetError: ``count`` is above N.
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


# --- finding the data ---------------------------------------------------------------------------------------------


def load_dataset(root: str | os.PathLike | None = None, source: str = "auto") -> ImageDataset:
    """Load CIFAR-10, or your own images in class folders.

    Args:
        root: a folder with torchvision's ``cifar-10-batches-py``, or with ``train/<class>/*.png`` and
            ``test/<class>/*.png``. None: ``$CIFAR10_DIR`` if set, else ``data/`` in the project, downloading as needed.
        source: ``"official"``, ``"image-folder"`` or ``"digits"`` accepts only that; ``"auto"`` accepts any.

    Raises:
        DatasetError: the folder is missing, empty, damaged, unreadable or not understood, or every download failed.
        ValueError: another ``source``.
    """
    if source not in ("auto", "official", "image-folder", "digits"):
        raise ValueError(f"source is {source!r}: choose 'auto', 'official', 'image-folder' or 'digits'")
    if source == "digits":
        return _named(digits.load(), source)
    named = root if root is not None else os.environ.get("CIFAR10_DIR") or None
    if named is None and source == "image-folder":
        raise DatasetError("source is 'image-folder', but no folder is named: pass root=... or set $CIFAR10_DIR")
    cache = PROJECT_ROOT / "data"
    try:
        if named is None:
            return _load_downloaded(cache, source)
        return _load_folder(Path(os.path.expanduser(named)), source, cache)  # pathlib's fails on unknown users
    except OSError as error:
        raise DatasetError(
            f"{printable(error.filename or named or cache)} cannot be read ({error.strerror or error}): check its "
            "permissions, or name another folder"
        ) from error


def _load_folder(folder: Path, source: str, cache: Path) -> ImageDataset:
    if not folder.is_dir():
        raise DatasetError(f"no folder {printable(folder)}: check the path given as root, --data-dir or $CIFAR10_DIR")
    if folder.name == CIFAR10.base_folder:
        folder = folder.parent
    if source in ("auto", "official") and (folder / CIFAR10.base_folder).is_dir():
        return _named(archive.load(folder), "official")
    if source in ("auto", "image-folder") and (folder / "train").is_dir() and (folder / "test").is_dir():
        return _named(image_folder.load(folder, cache), "image-folder")
    if source in ("auto", "official") and (folder / CIFAR10.filename).is_file():
        archive.unpack(folder)
        return _named(archive.load(folder), "official")
    found = ", ".join(printable(name) for name in sorted(os.listdir(folder))[:5]) or "nothing"
    raise DatasetError(
        f"{printable(folder)} holds {found}: expected torchvision's {CIFAR10.base_folder}/, or image folders "
        "train/<class>/*.png and test/<class>/*.png"
    )


def _load_downloaded(folder: Path, source: str) -> ImageDataset:
    if not (folder / CIFAR10.base_folder).is_dir():
        try:
            archive.download(folder)
        except OfflineError as error:
            if source == "official":
                raise
            _announce_stand_in(error)
            return _named(digits.load(), "digits")
    return _named(archive.load(folder), "official")


def _named(arrays: Arrays, source: str) -> ImageDataset:
    return ImageDataset(**vars(arrays), source=source)


def _announce_stand_in(reason: Exception) -> None:
    line = "*" * 100
    print(
        f"{line}\n  NOT CIFAR-10. {reason}.\n"
        "  Until then everything runs on scikit-learn's handwritten digits: the code "
        f"works the same,\n  its numbers say nothing about CIFAR-10, and nothing is written to Results/.\n{line}",
        flush=True,
    )
