"""Where to look for the images, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

from torchvision.datasets import CIFAR10

from utils.runtime import PROJECT_ROOT, say
from utils.sources import Arrays, DatasetError, archive, digits, pictures, printable

SOURCES = ("official", "image-folder", "digits")


def find(root: str | os.PathLike | None, source: str) -> tuple[Arrays, str]:
    """The images, and which of ``SOURCES`` they are from; see ``utils.dataset.load_dataset``."""
    if source not in ("auto", *SOURCES):
        raise ValueError(f"source is {source!r}: choose one of auto, {', '.join(SOURCES)}")
    if source == "digits":
        return digits.load(), source
    if named := root or os.environ.get("CIFAR10_DIR"):
        return _load_folder(Path(os.path.expanduser(named)), source)
    folder = PROJECT_ROOT / "data"
    try:
        if source != "image-folder" and not any((folder / name).exists() for name in archive.NAMES):
            archive.download(folder)
    except archive.OfflineError as error:
        if source == "official":
            raise
        line = "*" * 100
        say(
            f"{line}\n  NOT CIFAR-10. {error}.\n  Until then everything runs on scikit-learn's handwritten digits: the code "
            f"works the same,\n  its numbers say nothing about CIFAR-10, and nothing is written to Results/.\n{line}"
        )
        return digits.load(), "digits"
    return _load_folder(folder, source)


def _load_folder(folder: Path, source: str) -> tuple[Arrays, str]:
    if not folder.is_dir():
        raise DatasetError(f"no folder {printable(folder)}: check the path given as root, --data-dir or $CIFAR10_DIR")
    folder = folder.parent if folder.name == CIFAR10.base_folder else pictures.inner(folder)
    is_unpacked = (folder / CIFAR10.base_folder).is_dir()
    if source != "image-folder" and (is_unpacked or (folder / CIFAR10.filename).is_file()):
        if not is_unpacked:
            archive.unpack(folder)
        return archive.load(folder), "official"
    if source != "official" and (folder / "train").is_dir() and (folder / "test").is_dir():
        return pictures.load(folder), "image-folder"
    found = ", ".join(printable(name) for name in sorted(os.listdir(folder))[:5]) or "nothing"
    raise DatasetError(
        f"{printable(folder)} holds {found}: expected torchvision's {CIFAR10.base_folder}/, {CIFAR10.filename}, or "
        "pictures as train/<class>/*.png and test/<class>/*.png"
    )
