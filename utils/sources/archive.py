"""CIFAR-10's official archive, which torchvision reads: download, unpack, load."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import shutil
import socket
import tarfile
import tempfile
import threading
import time
import urllib.parse
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import requests
import urllib3
from torchvision.datasets import CIFAR10
from tqdm.auto import tqdm

from utils.sources import CIFAR10_CLASSES, Arrays, DatasetError, printable, sole_writer

ARCHIVE_BYTES = 170_498_071
# Byte-identical copies (the checksum is enforced). The official host, throttled since June 2026, comes last.
ARCHIVE_URLS = (
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
OFFLINE_AFTER_SECONDS = 8.0  # a host that has not answered by then is taken for out of reach
STALL_SECONDS = 30.0

pooch.get_logger().setLevel("WARNING")  # that a download starts, the progress bar says


class OfflineError(DatasetError):
    """No host of the archive answered in time."""


def load(folder: Path) -> Arrays:
    """Read ``folder/cifar-10-batches-py``, every file's checksum verified.

    Raises:
        DatasetError: a file is missing or damaged.
        PermissionError: a file may not be read.
    """
    try:
        train = CIFAR10(folder, train=True, download=False)
        test = CIFAR10(folder, train=False, download=False)
    except PermissionError:
        raise  # nothing is wrong with the data
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise DatasetError(
            f"{printable(folder / CIFAR10.base_folder)} is damaged or incomplete ({error}): "
            "delete that folder and run again to fetch or unpack a fresh copy"
        ) from error
    return Arrays(
        train_images=np.ascontiguousarray(train.data),  # torchvision gives a transposed view
        train_labels=np.array(train.targets, dtype=np.int64),
        test_images=np.ascontiguousarray(test.data),
        test_labels=np.array(test.targets, dtype=np.int64),
        classes=CIFAR10_CLASSES,
    )


@dataclass(frozen=True)
class Fetcher:
    """A downloader for ``pooch`` that leaves a host which sends too slowly, or more than the archive.

    Attributes:
        least_rate: bytes a second, averaged over ``window_seconds``.
        most_bytes: the longest body that is taken.
    """

    least_rate: float = 50_000
    window_seconds: float = 30.0
    most_bytes: int = ARCHIVE_BYTES

    def __call__(self, url: str, output_file: str, pooch_instance, check_only: bool = False) -> None:
        """Stream ``url`` into ``output_file`` with a progress bar; the proxies that the environment names are used.

        Raises:
            OSError, ValueError, urllib3.exceptions.HTTPError: the host, or the disk, let it down.
        """
        # "identity" and the raw stream: a host that calls the .gz an encoding must not have it unpacked on the way.
        with (
            requests.get(url, stream=True, timeout=STALL_SECONDS, headers={"Accept-Encoding": "identity"}) as response,
            open(output_file, "wb") as file,
        ):
            response.raise_for_status()
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=f"CIFAR-10 from {_host(url)}") as bar:
                window_began, received_before = time.monotonic(), 0
                while chunk := response.raw.read1(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if bar.n > self.most_bytes:
                        raise ValueError(f"it sends more than the archive's {self.most_bytes:,} bytes")
                    seconds = time.monotonic() - window_began
                    if seconds >= self.window_seconds:
                        rate = (bar.n - received_before) / seconds
                        if rate < self.least_rate:
                            raise ValueError(
                                f"it sends {rate / 1000:,.1f} kB/s, too slow: {self.least_rate / 1000:,.0f} are needed"
                            )
                        window_began, received_before = time.monotonic(), bar.n


def download(folder: Path, urls: tuple[str, ...] = ARCHIVE_URLS, fetch: Fetcher = Fetcher()) -> None:
    """Fetch the official archive and unpack it in ``folder``; each URL is tried in turn, the checksum always.

    Nothing unfinished is ever left under a final name, and what a killed download left is removed by the next one.

    Args:
        folder: where ``cifar-10-batches-py`` appears; made if need be.
        urls: copies of the archive, the best host first.
        fetch: how patient to be.

    Raises:
        OfflineError: no host answered within ``OFFLINE_AFTER_SECONDS``.
        DatasetError: hosts answered, but none delivered the right bytes; or they cannot be stored here.
    """
    reachable = _reachable(urls)
    if not reachable:
        hosts = ", ".join(sorted({_host(url) for url in urls}))
        raise OfflineError(
            f"no answer from {hosts} within {OFFLINE_AFTER_SECONDS:.0f} s: connect to the internet, or set "
            "$CIFAR10_DIR to a folder that holds CIFAR-10"
        )
    problems = []
    with _scratch(folder) as scratch:
        if (folder / CIFAR10.base_folder).is_dir():
            return  # another process fetched it while this one waited
        for url in reachable:
            try:
                pooch.retrieve(url, f"md5:{CIFAR10.tgz_md5}", fname=CIFAR10.filename, path=scratch, downloader=fetch)
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                problems.append(f"{url}: {error}")
            else:
                _extract(scratch / CIFAR10.filename, scratch, folder)
                return
    raise DatasetError(
        "CIFAR-10 could not be downloaded:\n  " + "\n  ".join(problems) + "\nTry again later, or put a good copy of "
        f"{CIFAR10.filename} in a folder and set $CIFAR10_DIR to it"
    )


def unpack(folder: Path) -> None:
    """Check ``folder/cifar-10-python.tar.gz`` and unpack it beside itself.

    Raises:
        DatasetError: it is damaged or another file, or there is no room for its content.
        PermissionError: it may not be read.
    """
    archive = folder / CIFAR10.filename
    with open(archive, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 != CIFAR10.tgz_md5:
        raise DatasetError(
            f"{printable(archive)} is damaged or another file: its MD5 is {md5}, expected {CIFAR10.tgz_md5}; "
            f"delete it and fetch {CIFAR10.filename} again"
        )
    with _scratch(folder) as scratch:
        _extract(archive, scratch, folder)


@contextlib.contextmanager
def _scratch(folder: Path):
    """A folder of this process's own in ``folder``, gone afterwards."""
    try:
        with (
            sole_writer(folder),
            tempfile.TemporaryDirectory(dir=folder, prefix=".cifar-10-", suffix=".s10part") as scratch,
        ):
            yield Path(scratch)
    except OSError as error:
        raise DatasetError(
            f"CIFAR-10 cannot be stored in {printable(folder)} ({error.strerror or error}): make it writable and keep "
            "400 MB free there, or set $CIFAR10_DIR to a folder that holds CIFAR-10"
        ) from error


def _extract(archive: Path, scratch: Path, folder: Path) -> None:
    """Unpack in ``scratch``, then rename: the batches folder appears in ``folder`` whole or not at all."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(scratch, filter="data")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DatasetError(
            f"{printable(archive)} is not a whole tar.gz archive ({error}): delete it and fetch {CIFAR10.filename} again"
        ) from error
    batches = scratch / CIFAR10.base_folder
    if not batches.is_dir():
        raise DatasetError(f"{printable(archive)} holds no {CIFAR10.base_folder}/: it is not CIFAR-10's python archive")
    target = folder / CIFAR10.base_folder
    shutil.rmtree(target, ignore_errors=True)
    os.replace(batches, target)


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc


def _reachable(urls: tuple[str, ...]) -> list[str]:
    """The URLs whose host, or whose proxy where the environment names one, accepts a connection, in the given order.

    All are asked at once, in threads: looking a name up has no time limit of its own, and a learner without a network
    should not wait for it.
    """
    answered = {}

    def knock(url: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a proxy's address that is none
            proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
            parts = urllib.parse.urlsplit(requests.utils.prepend_scheme_if_needed(proxy or url, "http"))
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 1080)  # 1080: SOCKS
            socket.create_connection((parts.hostname, port), timeout=OFFLINE_AFTER_SECONDS).close()
            answered[url] = True

    threads = [threading.Thread(target=knock, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(OFFLINE_AFTER_SECONDS / len(threads))
    return [url for url in urls if url in answered]
