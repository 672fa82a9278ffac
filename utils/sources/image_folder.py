"""Pictures in class folders, ``train/<class>/*.png`` and ``test/<class>/*.png``: your own, or CIFAR-10 as files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from utils.runtime import write_atomically
from utils.sources import CIFAR10_CLASSES, IMAGE_SIZE, Arrays, DatasetError, printable, sole_writer

# The formats that are read, by Pillow's names, and what their files are called. No others are ever tried: some of
# Pillow's plugins start other programs (PostScript) or fail in ways of their own on damaged files.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
READING_RULES = 2  # of read_image; raised when they change, so that pictures decoded by older ones are decoded again
_LONG_NAMES = {"airplane": "plane", "automobile": "car"}


def load(folder: Path, cache_folder: Path) -> Arrays:
    """Read ``folder/train`` and ``folder/test``, decoding the pictures only once.

    Files are ordered by name, whatever their class: for CIFAR-10's numbered files, that is the official order. The
    classes are in alphabetical order, CIFAR-10's ten in the official one.

    Args:
        folder: holds ``train/<class>/`` and ``test/<class>/``.
        cache_folder: where the decoded pictures are kept.

    Raises:
        DatasetError: a picture cannot be read, a class has none, or the classes of train and test do not match.
        OSError: a folder cannot be listed.
    """
    listings = {split: _list_images(folder / split) for split in ("train", "test")}
    in_train, in_test = (sorted({name for name, _ in listings[split]}) for split in ("train", "test"))
    if unknown := sorted(set(in_test) - set(in_train)):
        raise DatasetError(
            f"{printable(folder / 'test' / unknown[0])}: class {unknown[0]!r} has no folder in "
            f"{printable(folder / 'train')}, which has {', '.join(in_train)}; add train images for it or remove it"
        )
    if len(in_train) < 2:
        raise DatasetError(
            f"{printable(folder / 'train')} has only the class {in_train[0]!r}: a classifier needs two or more"
        )
    for long_name, short_name in _LONG_NAMES.items():
        if {long_name, short_name} <= set(in_train):
            raise DatasetError(
                f"{printable(folder / 'train')} has the classes {long_name} and {short_name}, which are one class by "
                "two names: put their images into one folder"
            )
    if untested := sorted(set(in_train) - set(in_test)):
        warnings.warn(
            f"{printable(folder / 'test')} has no images of {', '.join(untested)}: how well they are recognized stays "
            "unknown; add some to find out",
            stacklevel=2,
        )
    classes = tuple(_LONG_NAMES.get(name, name) for name in in_train)
    if set(classes) == set(CIFAR10_CLASSES):
        classes = CIFAR10_CLASSES
    label_of = {name: classes.index(_LONG_NAMES.get(name, name)) for name in in_train}
    labels = {
        split: np.array([label_of[name] for name, _ in listing], dtype=np.int64) for split, listing in listings.items()
    }
    images = _decode_cached(folder, listings, cache_folder)
    return Arrays(images["train"], labels["train"], images["test"], labels["test"], classes)


def _list_images(folder: Path) -> list[tuple[str, Path]]:
    """(class, file) of every picture in the class folders of ``folder``, by file name; hidden ones are passed over."""
    read = f"{', '.join(IMAGE_SUFFIXES)} are read"
    found, without = [], []
    for class_folder in folder.iterdir():
        name = class_folder.name
        if name.startswith(".") or not class_folder.is_dir():
            continue
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DatasetError(
                f"{printable(class_folder)}: the class's name is not UTF-8 text; rename the folder"
            ) from None
        files = [entry for entry in os.listdir(class_folder) if not entry.startswith(".")]
        pictures = [entry for entry in files if entry.lower().endswith(IMAGE_SUFFIXES)]
        found += [(name, class_folder / entry) for entry in pictures]
        if not pictures:
            without.append((class_folder, sorted(files)))
    if not found and not any(files for _, files in without):
        raise DatasetError(
            f"{printable(folder)} holds no images: expected {folder.name}/<class>/*.png (one folder a class; {read})"
        )
    for class_folder, files in without:
        raise DatasetError(
            f"{printable(class_folder)} holds {', '.join(map(printable, files[:3])) or 'nothing'}"
            f"{', ...' if len(files) > 3 else ''}, and no image of its class: put them directly into it ({read}), or "
            "remove the folder"
        )
    return sorted(found, key=lambda item: (item[1].name, item[0]))


def _decode_cached(
    folder: Path, listings: dict[str, list[tuple[str, Path]]], cache_folder: Path
) -> dict[str, np.ndarray]:
    """The pixels of all images, (N, 32, 32, 3) uint8 a split; decoded once, then read from ``cache_folder``.

    The cache's name is a digest of the folder's path, and one of every file's path, size and modification time. So a
    changed, added or removed file is noticed and all are decoded anew, into a cache that replaces the folder's old one.
    """
    of_folder = f"decoded-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}"
    digest = hashlib.sha256(f"rules {READING_RULES}\n".encode())
    for listing in listings.values():
        for _, path in listing:
            status = _stat_file(path)
            digest.update(os.fsencode(path.relative_to(folder)))
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    cache = cache_folder / f"{of_folder}-{digest.hexdigest()[:16]}.npz"
    shapes = {split: (len(listing), IMAGE_SIZE, IMAGE_SIZE, 3) for split, listing in listings.items()}
    try:
        with np.load(cache, allow_pickle=False) as stored:
            images = {split: stored[split] for split in listings}
        if all(images[split].shape == shape and images[split].dtype == np.uint8 for split, shape in shapes.items()):
            return images
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # zip, CRC, format and I/O errors alike: the pictures are still there
        warnings.warn(f"{cache} cannot be used ({error}); decoding the images again", stacklevel=3)

    images = {split: np.empty(shape, np.uint8) for split, shape in shapes.items()}
    into = [row for split in listings for row in images[split]]
    files = [path for listing in listings.values() for _, path in listing]
    with _refusing_bombs(), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        decoded = tqdm(pool.map(_decode, files), total=len(files), desc="Decoding images (once)", unit="img")
        for row, pixels in zip(into, decoded):
            row[:] = pixels
    try:
        content = io.BytesIO()
        np.savez(content, **images)
        with sole_writer(cache_folder):
            write_atomically(cache, content.getbuffer())
            for old in cache_folder.glob(f"{of_folder}-*.npz"):
                if old != cache:
                    old.unlink()
    except OSError as error:
        warnings.warn(
            f"the decoded images could not be kept in {cache_folder} ({error}); next time takes as long", stacklevel=3
        )
    return images


# --- one picture ----------------------------------------------------------------------------------------------------


def read_image(path: str | os.PathLike) -> np.ndarray:
    """One picture file as the network wants it.

    - Formats: PNG, JPEG, BMP, WebP, TIFF and GIF, by content, whatever the file is called.
    - A picture that says how it was held (EXIF orientation, as phones write it) is turned upright.
    - An animation or a file of several pages shows its first picture.
    - Transparent pixels are laid over white.
    - CMYK, palette, grey and black-and-white become RGB as Pillow converts them, without colour profiles.
    - 16-bit grey: 65,535 is white.
    - 32-bit grey, whole numbers or floats, says nothing of its range: white is the smallest of 1, 255, 65,535 and
      2**31 - 1 that no value exceeds. Negative values and NaN are black.
    - Other sizes than 32x32 are cropped to their central square and resized (Lanczos).

    Returns:
        (32, 32, 3) uint8, RGB.

    Raises:
        DatasetError: the file is missing, no regular file, of more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (89
            million), damaged, or of another format; the message names the file, the reason and the fix.
    """
    with _refusing_bombs():
        return _decode(path)


@contextlib.contextmanager
def _refusing_bombs():
    """Within it, Pillow refuses pictures of more than ``MAX_IMAGE_PIXELS``, of which it would only warn.

    Apart from ``_decode``, because Python's warning filters belong to the whole process: threads must not change them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _decode(path: str | os.PathLike) -> np.ndarray:
    _stat_file(path)
    name = printable(path)
    try:
        with Image.open(path, formats=list(FORMATS)) as image:
            image = _to_rgb(ImageOps.exif_transpose(image))
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.resize(
                (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
            )
        return np.asarray(image)
    except PermissionError as error:
        raise DatasetError(f"{name} may not be read ({error.strerror}): make it readable, or remove it") from None
    except UnidentifiedImageError:
        raise DatasetError(
            f"{name} is not an image in a format that is read ({', '.join(FORMATS)}): save it as PNG or JPEG, or remove it"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DatasetError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels, the most that is read: save a "
            "smaller copy, or remove it"
        ) from None
    except Exception as error:  # damaged bytes make Pillow's plugins raise nearly anything
        raise DatasetError(
            f"{name} is damaged ({error or type(error).__name__}): replace it with a good copy or remove it"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, by the rules that ``read_image`` states."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        whites = (65_535,) if image.mode.startswith("I;16") else (1, 255, 65_535, 2**31 - 1)
        white = next((white for white in whites if values.max() <= white), whites[-1])
        return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _stat_file(path: str | os.PathLike) -> os.stat_result:
    """The status of a regular file. Opening anything else could wait forever, as a pipe does for its writer.

    Raises:
        DatasetError: it is missing, may not be looked at, or is something else.
    """
    name = printable(path)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"no file {name}: check the path, or where it links to") from None
    except OSError as error:
        raise DatasetError(f"{name} may not be read ({error.strerror}): make it readable, or remove it") from None
    if stat.S_ISDIR(status.st_mode):
        raise DatasetError(f"{name} is a folder: name an image file")
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(f"{name} is a pipe, a socket or a device: name an image file, or remove it")
    return status
