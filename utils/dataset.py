"""CIFAR-10 in; uint8 arrays, class names and loaders out.

``load_dataset`` finds the data, in this order: a folder you name (``root`` or ``$CIFAR10_DIR``), an earlier download
in ``data/``, a download, and, with no network, scikit-learn's bundled digits as a loudly announced stand-in.

All images stay uint8 in memory, 184 MB; batches become floats one at a time.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.client
import os
import shutil
import socket
import tarfile
import tempfile
import threading
import urllib.parse
import urllib.request
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets import CIFAR10
from tqdm.auto import tqdm

from utils.config import Config
from utils.runtime import PROJECT_ROOT
from utils.transforms import BatchAugment, normalize, test_transform, train_transform

CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 32

ARCHIVE_NAME = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
# Byte-identical copies (the checksum is enforced). The official host, throttled since June 2026, comes last.
ARCHIVE_URLS = (
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
OFFLINE_AFTER_SECONDS = 8.0  # a host that has not answered by then is taken for out of reach
DOWNLOAD_STALL_SECONDS = 30.0

# Known contents, by the SHA-256 of their pixels and labels, and what a result on them must be called.
KNOWN_FINGERPRINTS = {
    "14089befcce147b97e13ef6f9161324f71389bd2591d18b6d1b86965282b686c": (
        "CIFAR-10, offline copy (59,029 of 60,000 images bit-exact, 971 as JPEG copies)"
    ),
}

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_LONG_NAMES = {"airplane": "plane", "automobile": "car"}


class DatasetError(RuntimeError):
    """The data cannot be used; the message names the file or folder, the reason and the fix."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A labelled image set, split into train and test.

    Attributes:
        train_images, test_images: (N, 32, 32, 3) uint8, RGB.
        train_labels, test_labels: (N,) int64, indices into ``classes``.
        classes: the class names.
        source: ``"official"``, ``"image-folder"`` or ``"digits"``.
        description: the data in words, for logs and reports.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    source: str
    description: str

    @property
    def is_stand_in(self) -> bool:
        """True for the digits, whose results must never be mistaken for CIFAR-10's."""
        return self.source == "digits"

    def fingerprint(self) -> str:
        """SHA-256 of all pixels, labels and class names: two runs with the same one saw the same data."""
        digest = hashlib.sha256(",".join(self.classes).encode())
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> ImageDataset:
        """A class-balanced random subset of at most ``train`` and ``test`` images; None keeps a split whole."""
        changes = {}
        for split, count in (("train", train), ("test", test)):
            labels = getattr(self, f"{split}_labels")
            if count is not None and count < len(labels):
                chosen = balanced_indices(labels, count, seed)
                changes[f"{split}_images"] = getattr(self, f"{split}_images")[chosen]
                changes[f"{split}_labels"] = labels[chosen]
        return dataclasses.replace(self, **changes)

    def holdout(self, count: int = 5000, seed: int = 0) -> ImageDataset:
        """Train split again, test untouched: ``count`` class-balanced train images become the test set.

        Every choice is made on such a split, so that the real test set is opened only for final results.
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
        )


def balanced_indices(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` sorted indices, drawn so that the classes' shares differ by at most one image.

    Where a class has fewer images than its share (own images need not be balanced), all of them are taken and the
    others make up for it, evenly again.

    Args:
        labels: (N,) int.
        count: how many, at most N.
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
        wanted = shares[unfinished] + even + (np.arange(len(unfinished)) < rest)
        shares[unfinished] = np.minimum(wanted, sizes[unfinished])
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == name), share, replace=False) for name, share in zip(names, shares)]
    return np.sort(np.concatenate(chosen))


# --- finding the data ---------------------------------------------------------------------------------------------


def load_dataset(root: str | os.PathLike | None = None, source: str = "auto") -> ImageDataset:
    """Load CIFAR-10, or a set of your own images in class folders.

    Args:
        root: a folder with torchvision's ``cifar-10-batches-py``, or with ``train/<class>/*.png`` and
            ``test/<class>/*.png``. None: ``$CIFAR10_DIR`` if set, else ``data/`` in the project, downloading as needed.
        source: ``"auto"`` takes what is there; ``"official"``, ``"image-folder"`` or ``"digits"`` insists.

    Returns:
        An ``ImageDataset``.

    Raises:
        DatasetError: the folder is missing, empty, damaged or not understood, or every download was damaged.
        ValueError: ``source`` is none of the above.
    """
    if source not in ("auto", "official", "image-folder", "digits"):
        raise ValueError(f"source is {source!r}: choose 'auto', 'official', 'image-folder' or 'digits'")
    if source == "digits":
        return load_digits()

    named = root if root is not None else os.environ.get("CIFAR10_DIR") or None
    if named is not None:
        return _load_folder(Path(named).expanduser(), source)
    if source == "image-folder":
        raise DatasetError("source is 'image-folder', but no folder is named: pass root=... or set $CIFAR10_DIR")

    data = PROJECT_ROOT / "data"
    if not (data / CIFAR10.base_folder).is_dir():
        try:
            download(data)
        except OfflineError as error:
            if source == "official":
                raise
            _announce_stand_in(error)
            return load_digits()
    return _load_official(data)


def _load_folder(folder: Path, source: str) -> ImageDataset:
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}: check the path given as root, --data-dir or $CIFAR10_DIR")
    if folder.name == CIFAR10.base_folder:
        folder = folder.parent
    is_official = (folder / CIFAR10.base_folder).is_dir()
    is_image_folder = (folder / "train").is_dir() and (folder / "test").is_dir()
    if is_official and source in ("auto", "official"):
        return _load_official(folder)
    if is_image_folder and source in ("auto", "image-folder"):
        return _load_image_folder(folder)
    archive = folder / ARCHIVE_NAME
    if archive.is_file() and source in ("auto", "official"):
        _check_md5(archive)
        _extract(archive, folder)
        return _load_official(folder)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise DatasetError(
        f"{folder} holds {found}: expected torchvision's {CIFAR10.base_folder}/, or image folders "
        "train/<class>/*.png and test/<class>/*.png"
    )


def _load_official(folder: Path) -> ImageDataset:
    try:
        train = CIFAR10(folder, train=True, download=False)
        test = CIFAR10(folder, train=False, download=False)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise DatasetError(
            f"{folder / CIFAR10.base_folder} is damaged or incomplete ({error}): "
            "delete that folder and run again to fetch a fresh copy"
        ) from error
    return ImageDataset(
        train_images=train.data,
        train_labels=np.array(train.targets, dtype=np.int64),
        test_images=test.data,
        test_labels=np.array(test.targets, dtype=np.int64),
        classes=CIFAR10_CLASSES,
        source="official",
        description="CIFAR-10, official archive (checksums verified)",
    )


# --- image folders ------------------------------------------------------------------------------------------------


def _load_image_folder(folder: Path) -> ImageDataset:
    listings = {split: _list_images(folder / split) for split in ("train", "test")}
    long_names = sorted({name for name, _ in listings["train"]})
    if set(long_names) == set(CIFAR10_CLASSES):
        long_names = list(CIFAR10_CLASSES)  # by the short names the alphabet would number them otherwise than CIFAR-10
    unknown = sorted({name for name, _ in listings["test"]} - set(long_names))
    if unknown:
        raise DatasetError(
            f"{folder / 'test' / unknown[0]}: class {unknown[0]!r} has no folder in {folder / 'train'}, which has "
            f"{', '.join(long_names)}; add train images for it or remove it"
        )
    if len(long_names) < 2:
        raise DatasetError(f"{folder / 'train'} has only the class {long_names[0]!r}: a classifier needs two or more")
    for long_name, short_name in _LONG_NAMES.items():
        if {long_name, short_name} <= set(long_names):
            raise DatasetError(
                f"{folder / 'train'} has the classes {long_name} and {short_name}, which are one class by two names: "
                "put their images into one folder"
            )
    label_of = {name: label for label, name in enumerate(long_names)}

    arrays = _decode_cached(folder, listings)
    labels = {
        split: np.array([label_of[name] for name, _ in listing], dtype=np.int64) for split, listing in listings.items()
    }
    dataset = ImageDataset(
        train_images=arrays["train"],
        train_labels=labels["train"],
        test_images=arrays["test"],
        test_labels=labels["test"],
        classes=tuple(_LONG_NAMES.get(name, name) for name in long_names),
        source="image-folder",
        description="",
    )
    count = f"{len(dataset.train_labels):,} train and {len(dataset.test_labels):,} test images"
    if dataset.classes == CIFAR10_CLASSES:
        words = KNOWN_FINGERPRINTS.get(dataset.fingerprint(), f"CIFAR-10 as an image folder, {count}")
    else:
        words = f"own images in {len(dataset.classes)} classes, {count}"
    return dataclasses.replace(dataset, description=words)


def _list_images(folder: Path) -> list[tuple[str, Path]]:
    """(class, file) of every image below ``folder``, by file name: for numbered files, the official order."""
    found = [
        (entry.name, Path(image.path))
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
        for image in os.scandir(entry.path)
        if image.name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not found:
        raise DatasetError(
            f"{folder} holds no images: expected {folder.name}/<class>/*.png "
            f"(one folder a class; {', '.join(IMAGE_SUFFIXES)} are read)"
        )
    return sorted(found, key=lambda item: (item[1].name, item[0]))


def _decode_cached(folder: Path, listings: dict[str, list[tuple[str, Path]]]) -> dict[str, np.ndarray]:
    """The pixels of all images; decoded once, then read from ``data/``.

    The cache's name is a digest of the folder's path, and one of every file's path, size and modification time. So a
    changed, added or removed file is noticed and all are decoded anew, into a cache that replaces the folder's old one.
    """
    of_folder = f"decoded-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
    digest = hashlib.sha256()
    for listing in listings.values():
        for _, path in listing:
            stat = path.stat()
            digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = PROJECT_ROOT / "data" / f"{of_folder}-{digest.hexdigest()[:16]}.npz"
    if cache.is_file():
        try:
            with np.load(cache, allow_pickle=False) as stored:
                arrays = {split: stored[split] for split in listings}
            if all(
                arrays[split].shape == (len(listing), IMAGE_SIZE, IMAGE_SIZE, 3) for split, listing in listings.items()
            ):
                return arrays
        except Exception as error:  # zip, CRC, format and I/O errors alike: the pictures are still there
            warnings.warn(f"{cache} is damaged ({error}); decoding the images again", stacklevel=2)

    files = [path for listing in listings.values() for _, path in listing]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        decoded = list(
            tqdm(
                pool.map(read_image, files, chunksize=256), total=len(files), desc="Decoding images (once)", unit="img"
            )
        )
    split_at = len(listings["train"])
    arrays = {"train": np.stack(decoded[:split_at]), "test": np.stack(decoded[split_at:])}
    try:
        _save_atomically(cache, arrays)
        for old in cache.parent.glob(f"{of_folder}-*.npz"):
            if old != cache:
                old.unlink()
    except OSError as error:
        warnings.warn(
            f"the decoded images could not be kept in {cache.parent} ({error}); next time takes as long", stacklevel=2
        )
    return arrays


def _save_atomically(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            np.savez(file, **arrays)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read_image(path: str | os.PathLike) -> np.ndarray:
    """One picture file as the network wants it.

    Returns:
        (32, 32, 3) uint8, RGB; other sizes are cropped to their central square and resized.

    Raises:
        DatasetError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except UnidentifiedImageError:
        raise DatasetError(f"{path} is not an image that Pillow can read: use PNG or JPEG, or remove it") from None
    except FileNotFoundError:
        raise DatasetError(f"no file {path}: check the path") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path} is damaged ({error}): replace it with a good copy or remove it") from error
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize(
            (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
    return np.asarray(image)


# --- download -------------------------------------------------------------------------------------------------------


class OfflineError(DatasetError):
    """No host of the archive answered in time."""


def download(folder: str | os.PathLike, urls: tuple[str, ...] = ARCHIVE_URLS, md5: str = ARCHIVE_MD5) -> None:
    """Fetch the official archive and unpack it in ``folder``; each URL is tried in turn, the checksum always.

    Nothing partial is ever left under a final name: an interrupted download leaves no file at all.

    Raises:
        OfflineError: no host answered within ``OFFLINE_AFTER_SECONDS``.
        DatasetError: hosts answered, but none delivered the right bytes.
    """
    folder = Path(folder)
    reachable = _reachable(urls)
    if not reachable:
        hosts = ", ".join(sorted({urllib.parse.urlsplit(url).netloc for url in urls}))
        raise OfflineError(
            f"no answer from {hosts} within {OFFLINE_AFTER_SECONDS:.0f} s: connect to the internet, or set "
            "$CIFAR10_DIR to a folder that holds CIFAR-10"
        )
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in reachable:
        part = tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False)
        try:
            with part:
                actual = _fetch(url, part)
            if actual != md5:
                problems.append(f"{url}: its MD5 is {actual}, expected {md5}")
                continue
            _extract(Path(part.name), folder)
            return
        except (OSError, http.client.HTTPException) as error:  # OSError: urllib's own errors too
            problems.append(f"{url}: {error}")
        finally:
            os.unlink(part.name)
    raise DatasetError(
        "CIFAR-10 could not be downloaded:\n  " + "\n  ".join(problems) + "\nTry again later, or put a good copy of "
        f"{ARCHIVE_NAME} in a folder and set $CIFAR10_DIR to it"
    )


def _reachable(urls: tuple[str, ...]) -> list[str]:
    """The URLs whose host, or whose proxy where the environment names one, accepts a connection, in the given order.

    All are asked at once, in threads: looking a name up has no time limit of its own, and a learner without a network
    should not wait for it.
    """
    answered = {}

    def knock(url: str) -> None:
        parts = _proxy_of(urllib.parse.urlsplit(url))
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        try:
            if parts.scheme != "file":
                socket.create_connection((parts.hostname, port), timeout=OFFLINE_AFTER_SECONDS).close()
            answered[url] = True
        except OSError:
            answered[url] = False

    threads = [threading.Thread(target=knock, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(OFFLINE_AFTER_SECONDS / len(threads))
    return [url for url in urls if answered.get(url)]


def _proxy_of(url: urllib.parse.SplitResult) -> urllib.parse.SplitResult:
    """Whom urllib connects to for ``url``: the proxy that $http_proxy or $https_proxy names, else its own host."""
    proxy = urllib.request.getproxies().get(url.scheme)
    if not proxy or urllib.request.proxy_bypass(url.netloc):
        return url
    return urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _fetch(url: str, file) -> str:
    """Stream ``url`` into an open file, with a progress bar; returns the MD5 of what came."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=DOWNLOAD_STALL_SECONDS) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(
            total=total, unit="B", unit_scale=True, desc=f"CIFAR-10 from {urllib.parse.urlsplit(url).netloc}"
        ) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


def _check_md5(archive: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with open(archive, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != ARCHIVE_MD5:
        raise DatasetError(
            f"{archive} is damaged or another file: its MD5 is {digest.hexdigest()}, expected {ARCHIVE_MD5}; "
            f"delete it and fetch {ARCHIVE_NAME} again"
        )


def _extract(archive: Path, folder: Path) -> None:
    """Unpack next to the destination, then rename: the batches folder appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder, suffix=".part") as scratch:
        try:
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(scratch, filter="data")
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DatasetError(
                f"{archive} is not a whole tar.gz archive ({error}): delete it and fetch {ARCHIVE_NAME} again"
            ) from error
        batches = Path(scratch) / CIFAR10.base_folder
        if not batches.is_dir():
            raise DatasetError(f"{archive} holds no {CIFAR10.base_folder}/: it is not CIFAR-10's python archive")
        target = folder / CIFAR10.base_folder
        shutil.rmtree(target, ignore_errors=True)
        os.replace(batches, target)


# --- the stand-in ---------------------------------------------------------------------------------------------------


def load_digits() -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits, enlarged to 32x32 RGB: a stand-in that needs no network."""
    from sklearn.datasets import load_digits as sklearn_digits  # slow to import, and rarely needed

    digits = sklearn_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 8x8, values 0 to 16
    images = np.repeat(np.repeat(pixels, 4, axis=1), 4, axis=2)[..., None].repeat(3, axis=3)
    labels = digits.target.astype(np.int64)
    test = balanced_indices(labels, 300, seed=0)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return ImageDataset(
        train_images=np.ascontiguousarray(images[train]),
        train_labels=labels[train],
        test_images=np.ascontiguousarray(images[test]),
        test_labels=labels[test],
        classes=tuple(str(digit) for digit in range(10)),
        source="digits",
        description="scikit-learn digits, a stand-in: NOT CIFAR-10",
    )


def _announce_stand_in(reason: Exception) -> None:
    line = "*" * 100
    print(
        f"{line}\n  NOT CIFAR-10. {reason}.\n  Until then everything runs on scikit-learn's handwritten digits: the code "
        f"works the same,\n  its numbers say nothing about CIFAR-10, and nothing is written to Results/.\n{line}",
        flush=True,
    )


# --- loaders --------------------------------------------------------------------------------------------------------


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed an epoch, far apart for neighbours: an epoch can be repeated without replaying those before it."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_batch_size(batch_size: int, count: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if batch_size > count:
        raise ValueError(f"batch_size is {batch_size}, but there are only {count} images: lower it to {count} or less")


class BatchedLoader:
    """The fast loader: the whole set lives on the device as uint8 and is augmented a batch at a time.

    It iterates like a ``DataLoader`` over ``(images, labels)``: (B, 3, 32, 32) floats, channels_last and normalized,
    and (B,) int64. Each pass is an epoch with its own order and augmentations, which depend only on ``seed`` and the
    epoch's number, never on the device.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) int64.
        batch_size: images a batch; the last batch is smaller unless ``drop_last``.
        augment: the augmentation, or None for plain normalization.
        alternate_flip: mirror each image in every other epoch, half of them in the even ones, where ``augment`` would
            toss a coin: two epochs in a row then show both sides of every image (K. Jordan, *94% on CIFAR-10 in 3.29
            seconds*, 2024, https://arxiv.org/abs/2404.00498).
        shuffle: a new order each epoch.
        drop_last: leave the smaller last batch out.
        seed: of order and augmentation.
        device: where the set lives and the batches appear.
        dtype: of the images.

    Attributes:
        epoch: the number of the next pass, from 0; set it to go on where another run stopped.

    Raises:
        ValueError: ``batch_size`` is below 1 or above N.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        augment: BatchAugment | None = None,
        alternate_flip: bool = False,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        _check_batch_size(batch_size, len(labels))
        self.images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        self.labels = torch.from_numpy(np.ascontiguousarray(labels)).to(device)
        self.batch_size = batch_size
        self.augment = augment
        self.alternate_flip = alternate_flip
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.dtype = dtype
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self):
        device, count = self.images.device, len(self.labels)
        epoch, self.epoch = self.epoch, self.epoch + 1
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        # Everything random is drawn here, once an epoch; the loop below only slices it.
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        draws = self.augment.draw(count, generator) if self.augment else None
        if draws and self.augment.flip and self.alternate_flip:
            # Of the seed alone: the same images are mirrored in all even epochs, the others in all odd ones.
            in_even_epochs = torch.randint(2, (count,), generator=torch.Generator().manual_seed(self.seed)).bool()
            draws = dataclasses.replace(draws, flips=in_even_epochs[order] ^ bool(epoch % 2))
        order = order.to(device)
        draws = draws.to(device) if draws else None
        for step in range(len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            index = order[batch]
            pixels = self.augment.apply(self.images, index, draws[batch]) if self.augment else self.images[index]
            yield normalize(pixels, self.dtype), self.labels[index]


class AlbumentationsDataset(Dataset):
    """One augmented image at a time: ``dataset[i]`` is a (3, 32, 32) float32 tensor and an int label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform):
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(image=self.images[index])["image"], int(self.labels[index])


def _seed_worker(worker_id: int) -> None:
    """Give each loader process its own Albumentations stream: as copies of one pipeline, all would draw alike."""
    get_worker_info().dataset.transform.set_random_seed(torch.initial_seed() % 2**32)


class AlbumentationsLoader(DataLoader):
    """The reference loader: a torch ``DataLoader`` over Albumentations, with the ``epoch`` of ``BatchedLoader``.

    Order and augmentations depend on the seed, the epoch and the number of workers.

    Raises:
        ValueError: ``batch_size`` is below 1 or above the number of images.
    """

    def __init__(self, images, labels, batch_size, transform, *, shuffle=False, seed=0, num_workers=0, **options):
        _check_batch_size(batch_size, len(labels))
        super().__init__(
            AlbumentationsDataset(images, labels, transform),
            batch_size,
            shuffle=shuffle,
            num_workers=num_workers,
            worker_init_fn=_seed_worker,
            generator=torch.Generator(),
            **options,
        )
        self.seed = seed
        self.epoch = 0

    def __iter__(self):
        seed = epoch_seed(self.seed, self.epoch)
        self.epoch += 1
        self.generator.manual_seed(seed)  # the order, and through the workers' base seed their augmentations
        if self.num_workers == 0:
            self.dataset.transform.set_random_seed(seed % 2**32)
        return super().__iter__()


def make_loaders(dataset: ImageDataset, config: Config, device: torch.device, dtype: torch.dtype = torch.float32):
    """The train and the test loader of a run.

    Returns:
        ``(train, test)``; train is shuffled and augmented as ``config`` says, test is neither.
    """
    settings = dict(pad=config.pad, pad_mode=config.pad_mode, flip=config.flip, cutout=config.cutout)
    train, test = (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)
    test_batch = min(config.eval_batch_size, len(dataset.test_labels))
    if config.pipeline == "albumentations":
        shared = dict(num_workers=config.num_workers, pin_memory=device.type == "cuda")
        return (
            AlbumentationsLoader(
                *train, config.batch_size, train_transform(**settings), shuffle=True, seed=config.seed, **shared
            ),
            AlbumentationsLoader(*test, test_batch, test_transform(), **shared),
        )
    shared = dict(device=device, dtype=dtype)
    return (
        BatchedLoader(
            *train,
            config.batch_size,
            augment=BatchAugment(**settings),
            alternate_flip=config.alternate_flip,
            shuffle=True,
            seed=config.seed,
            **shared,
        ),
        BatchedLoader(*test, test_batch, **shared),
    )
