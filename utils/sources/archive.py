"""CIFAR-10's official archive: download, unpack, read. Nothing is opened before its checksum is verified."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pooch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_md5

from utils.runtime import progress_bar
from utils.sources import CIFAR10_CLASSES, Arrays, DatasetError, printable

# Identical copies, tried in order. The official host has been slow since June 2026.
MIRROR = "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz"
ARCHIVE_URLS = (MIRROR, CIFAR10.url)
NAMES = (CIFAR10.base_folder, CIFAR10.filename)  # unpacked, packed
SECONDS = (5, 30)  # the longest wait for a connection, and for the next byte

pooch.get_logger().setLevel("WARNING")  # the progress bar already shows that a download starts


class OfflineError(DatasetError):
    """None of the archive's hosts could be reached."""


def load(folder: Path) -> Arrays:
    """Read ``folder/cifar-10-batches-py``; DatasetError if a file is missing or its checksum is wrong."""
    try:  # torchvision verifies every checksum before it unpickles
        train, test = (CIFAR10(folder, train=train) for train in (True, False))
    except RuntimeError as error:
        raise DatasetError(
            f"{printable(folder / CIFAR10.base_folder)} is damaged or incomplete: delete it and run again for a fresh copy"
        ) from error
    images = [np.ascontiguousarray(part.data) for part in (train, test)]  # torchvision returns a transposed view
    labels = [np.array(part.targets, dtype=np.int64) for part in (train, test)]
    return Arrays(images[0], labels[0], images[1], labels[1], CIFAR10_CLASSES)


def unpack(folder: Path) -> None:
    """Unpack ``folder/cifar-10-python.tar.gz`` in the same folder, where a half-unpacked copy never appears.

    Raises DatasetError if its checksum is wrong.
    """
    archive, target = folder / CIFAR10.filename, folder / CIFAR10.base_folder
    if not check_md5(archive, CIFAR10.tgz_md5):
        raise DatasetError(
            f"{printable(archive)} is damaged or another file (its MD5 is not {CIFAR10.tgz_md5}): delete it and "
            f"download {CIFAR10.filename} again"
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as scratch, tarfile.open(archive) as tar:
        tar.extractall(scratch, filter="data")
        if not target.exists():  # another process may have been faster
            os.replace(Path(scratch, CIFAR10.base_folder), target)


def download(folder: Path) -> None:
    """Download the archive into ``folder``, which is created if needed; an unfinished file never has its name.

    Raises OfflineError if no host could be reached, DatasetError if one answered but none sent the right file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    headers = {"Accept-Encoding": "identity"}  # some hosts call the .gz an encoding, to be undone on the way
    options = dict(chunk_size=1 << 16, timeout=SECONDS, headers=headers)
    problems, answered = [], False
    for url in ARCHIVE_URLS:
        try:
            with progress_bar(None, "CIFAR-10", total=1, unit="B", unit_scale=True, delay=1) as bar:
                fetch = pooch.HTTPDownloader(progressbar=bar, **options)  # it sets the total
                pooch.retrieve(url, f"md5:{CIFAR10.tgz_md5}", CIFAR10.filename, folder, downloader=fetch)
            return
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None):  # this machine's disk, not the host
                raise
            is_answer = isinstance(error, ValueError) or getattr(error, "response", None) is not None
            answered |= is_answer
            problems.append(f"{url}: {error if is_answer else type(error).__name__}")
    raise (DatasetError if answered else OfflineError)(
        "CIFAR-10 could not be downloaded:\n  " + "\n  ".join(problems) + "\n  Connect to the internet, put "
        f"{CIFAR10.filename} into {printable(folder)}, or set $CIFAR10_DIR to a folder that holds CIFAR-10"
    )
