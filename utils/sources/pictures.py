"""Pictures in class folders, ``train/<class>/*`` and ``test/<class>/*``: your own, or CIFAR-10 as files."""

from __future__ import annotations

import contextlib
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from models.custom_resnet import IMAGE_SIZE
from utils.runtime import progress_bar
from utils.sources import CIFAR10_CLASSES, Arrays, DatasetError, printable

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()
# Tried by content. No others: some of Pillow's plugins start other programs (PostScript) or take text for a picture.
FORMATS = [name for name in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "AVIF", "HEIF") if name in Image.OPEN]
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
HEIC_HINT = "; HEIC: export as JPEG, or `pip install pillow-heif`"
IGNORED = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}  # left by Finder, NAS boxes and Explorer
SHORT_NAMES = {"airplane": "plane", "automobile": "car"}  # of two classes of CIFAR-10
# What makes a picture upright whose EXIF orientation is 2, 3, ..., 8.
TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28  # long texts and profiles are no damage


def load(folder: Path) -> Arrays:
    """Read ``folder/train`` and ``folder/test``.

    Images are sorted by file name across all classes, which for CIFAR-10's numbered files is the official order. Classes
    are sorted by name; CIFAR-10's ten have their short names and their official order. Raises DatasetError if pictures are
    damaged, or missing for a class.
    """
    roots = {split: inner(folder / split) for split in ("train", "test")}
    files = [(split, *file) for split, root in roots.items() for file in _list_files(root)]
    files.sort(key=lambda file: (_text(file[2].name), *file))
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        decoded = pool.map(_decode, [path for _, _, path in files])
        results = list(progress_bar(decoded, "reading pictures", total=len(files), delay=2, unit=" files"))
    if damaged := [str(result) for result in results if isinstance(result, DatasetError)]:
        raise DatasetError("\n  ".join([f"damaged pictures: {len(damaged)}; replace or remove them:", *damaged[:5]]))

    found, unused = {split: [] for split in roots}, []
    for (split, name, path), pixels in zip(files, results):
        if name and pixels is not None:
            found[split].append((name, pixels))
        else:
            unused.append(path)
    if unused:
        kinds = Counter(path.suffix.lower() or "without suffix" for path in unused)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        why = f"no pictures, or in no class folder; such as {printable(unused[0])}"
        hint = HEIC_HINT if ".heic" in kinds else ""
        warnings.warn(f"{len(unused)} of {len(files)} files are not used ({listed}): {why}{hint}", stacklevel=2)
    return _to_arrays(roots, found)


def _to_arrays(roots: dict[str, Path], found: dict[str, list[tuple[str, np.ndarray]]]) -> Arrays:
    """Labels for the names; refuses classes without train images."""
    train, test = map(printable, roots.values())
    in_train, in_test = ({name for name, _ in pictures} for pictures in found.values())
    has = f"{train} has pictures of {', '.join(sorted(in_train)) or 'nothing'}"
    if missing := in_test.union(map(_text, _folders(roots["train"]))) - in_train:
        raise DatasetError(f"{has}, but not of {', '.join(sorted(missing))}: add some, or remove the class everywhere")
    if len(in_train) < 2 or not in_test:
        raise DatasetError(f"{has}, {test} of {len(in_test)} classes: two or more are needed, each a folder in both")
    if untested := in_train - in_test:
        warnings.warn(f"{test} has no pictures of {', '.join(sorted(untested))}: add some to test them", stacklevel=3)
    classes, short = tuple(sorted(in_train)), {}
    if sorted(SHORT_NAMES.get(name, name) for name in classes) == sorted(CIFAR10_CLASSES):
        classes, short = CIFAR10_CLASSES, SHORT_NAMES
    arrays = []
    for pictures in found.values():
        labels = [classes.index(short.get(name, name)) for name, _ in pictures]
        arrays += [np.stack([pixels for _, pixels in pictures]), np.array(labels, dtype=np.int64)]
    return Arrays(*arrays, classes)


def inner(folder: Path) -> Path:
    """``folder``, or the only folder in it if both have the same name, as some programs unpack a zip."""
    return inner(folder / folder.name) if _folders(folder) == [folder.name] else folder


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def _visible(folder: Path) -> list[os.DirEntry]:
    return [
        entry for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.name.lower() not in IGNORED
    ]


def _text(name: str) -> str:
    """A name in one Unicode form; macOS stores another than other systems do."""
    return unicodedata.normalize("NFC", printable(name))


def _list_files(folder: Path, name: str = "") -> Iterator[tuple[str, Path]]:
    """The class and the path of each visible file; the class is the first folder on the way to it, "" if there is none."""
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _list_files(Path(entry.path), name or _text(entry.name))
        else:
            yield name, Path(entry.path)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """One picture as the network's input: (32, 32, 3) uint8, RGB.

    It is upright by its EXIF orientation, over white where transparent, the first of several frames, and of other sizes
    the central square, resized (Lanczos). Raises DatasetError, which names the file and the reason.
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of faulty metadata; the filters are not for threads
        result = _decode(path)
    if isinstance(result, np.ndarray):
        return result
    hint = HEIC_HINT if str(path).lower().endswith(".heic") else ""
    raise result or DatasetError(f"{printable(path)}: not a picture in one of {', '.join(FORMATS)}{hint}")


def _decode(path: str | os.PathLike) -> np.ndarray | DatasetError | None:
    """The pixels, or what is wrong with the picture, or None for a file that is no picture by content and name."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            orientation = 1
            with contextlib.suppress(Exception):  # faulty metadata are no damage
                orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        if 2 <= orientation <= 8:
            image = image.transpose(Image.Transpose[TURNS[orientation - 2]])
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))  # 65,535 is white
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(ImageOps.fit(image.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))
    except UnidentifiedImageError:
        if Path(path).suffix.lower() not in SUFFIXES:
            return None
        reason = "not a picture"
    except Exception as error:  # on damaged bytes, Pillow's plugins raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DatasetError(f"{printable(path)}: {reason}")
