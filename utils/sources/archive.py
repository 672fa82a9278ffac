"""CIFAR-10's official archive: download, unpack, read."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tarfile
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pooch
import requests
import urllib3
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5
from tqdm.auto import tqdm

from utils.sources import CIFAR10_CLASSES, Arrays, DatasetError, printable, sole_writer

# Identical copies (the checksum is always verified), tried in order. The official host has been slow since June 2026.
ARCHIVE_URLS = (
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
ARCHIVE_BYTES = 170_498_071
CONNECT_SECONDS = 8.0  # a host that has not answered by then counts as unreachable
STALL_SECONDS = 30.0  # the longest wait for the next byte, and the time over which the rate is averaged
LEAST_RATE = 50_000  # bytes per second; a slower host is abandoned

pooch.get_logger().setLevel("WARNING")  # the progress bar already shows that a download starts


class OfflineError(DatasetError):
    """None of the archive's hosts answered in time."""


def load(folder: Path) -> Arrays:
    """Read ``folder/cifar-10-batches-py`` and verify the checksum of every file.

    Raises:
        DatasetError: a file is missing or damaged.
        OSError: a file cannot be read.
    """
    try:
        train = CIFAR10(folder, train=True, download=False)
        test = CIFAR10(folder, train=False, download=False)
    except RuntimeError as error:
        raise DatasetError(
            f"{printable(folder / CIFAR10.base_folder)} is damaged or incomplete ({error}): "
            "delete that folder and run again to fetch or unpack a fresh copy"
        ) from error
    return Arrays(
        train_images=np.ascontiguousarray(train.data),  # torchvision returns a transposed view
        train_labels=np.array(train.targets, dtype=np.int64),
        test_images=np.ascontiguousarray(test.data),
        test_labels=np.array(test.targets, dtype=np.int64),
        classes=CIFAR10_CLASSES,
    )


def download(folder: Path) -> None:
    """Download the official archive and unpack it in ``folder``, which is created if needed.

    No unfinished file ever has a final name. What a killed download leaves behind, the next one removes.

    Raises:
        OfflineError: no host answered within ``CONNECT_SECONDS``.
        DatasetError: hosts answered, but none sent the right bytes, or the files cannot be stored.
    """
    reachable = _reachable()
    if not reachable:
        hosts = ", ".join(sorted({_host(url) for url in ARCHIVE_URLS}))
        raise OfflineError(
            f"no answer from {hosts} within {CONNECT_SECONDS:.0f} s: connect to the internet, or set "
            "$CIFAR10_DIR to a folder that holds CIFAR-10"
        )
    problems = []
    with _scratch(folder) as scratch:
        if (folder / CIFAR10.base_folder).is_dir():
            return  # another process downloaded it while this one waited for the lock
        for url in reachable:
            try:
                pooch.retrieve(url, f"md5:{CIFAR10.tgz_md5}", fname=CIFAR10.filename, path=scratch, downloader=_fetch)
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # no other host would help
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
    """Verify ``folder/cifar-10-python.tar.gz`` and unpack it in the same folder.

    Raises:
        DatasetError: it is damaged or a different file, or its contents cannot be stored.
        OSError: it cannot be read.
    """
    archive = folder / CIFAR10.filename
    md5 = calculate_md5(archive)
    if md5 != CIFAR10.tgz_md5:
        raise DatasetError(
            f"{printable(archive)} is damaged or a different file: its MD5 is {md5}, expected {CIFAR10.tgz_md5}; "
            f"delete it and download {CIFAR10.filename} again"
        )
    with _scratch(folder) as scratch:
        _extract(archive, scratch, folder)


@contextlib.contextmanager
def _scratch(folder: Path):
    """A temporary folder inside ``folder``, for this process alone."""
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
    """Unpack a verified archive in ``scratch``, then rename, so that ``folder`` never holds half of the batches."""
    with tarfile.open(archive, "r:gz") as tar:
        tar.extractall(scratch, filter="data")
    target = folder / CIFAR10.base_folder
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch / CIFAR10.base_folder, target)


def _fetch(url: str, output_file: str, pooch_instance) -> None:
    """Download one file for ``pooch``, through the proxy that the environment sets, if any.

    Raises:
        OSError, ValueError, urllib3.exceptions.HTTPError: the host failed, is too slow or sends too much; or the disk
            failed.
    """
    # Some hosts call the .gz an encoding. "identity" and the raw stream keep it from being unpacked on the way.
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
                if bar.n > ARCHIVE_BYTES:
                    raise ValueError(f"it sends more than the archive's {ARCHIVE_BYTES:,} bytes")
                seconds = time.monotonic() - window_began
                if seconds < STALL_SECONDS:
                    continue
                rate = (bar.n - received_before) / seconds
                if rate < LEAST_RATE:
                    raise ValueError(f"it sends {rate / 1000:,.1f} kB/s, too slow: {LEAST_RATE / 1000:,.0f} are needed")
                window_began, received_before = time.monotonic(), bar.n


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc


def _reachable() -> list[str]:
    """The archive's URLs whose host, or the proxy set for it, accepts a connection; in order.

    All are tried at once, each in a thread: name lookups have no time limit, and offline they may hang.
    """
    answered = set()

    def connect(url: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a malformed proxy address
            proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
            parts = urllib.parse.urlsplit(requests.utils.prepend_scheme_if_needed(proxy or url, "http"))
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 1080)  # 1080: SOCKS
            socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
            answered.add(url)

    threads = [threading.Thread(target=connect, args=(url,), daemon=True) for url in ARCHIVE_URLS]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + CONNECT_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [url for url in ARCHIVE_URLS if url in answered]
