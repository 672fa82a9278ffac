"""Images in class folders, ``train/<class>/*.png`` and ``test/<class>/*.png``: your own, or CIFAR-10 as files."""

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

# By Pillow's names. No others are tried: some of its plugins start other programs (PostScript) or fail oddly on damage.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif")
READING_RULES = 2  # version of read_image's rules; raise it when they change, so that cached images are decoded again
_SHORT_NAMES = {"airplane": "plane", "automobile": "car"}


def load(folder: Path, cache_folder: Path) -> Arrays:
    """Read ``folder/train`` and ``folder/test``; images are decoded only once.

    Images are sorted by file name across all classes, which for CIFAR-10's numbered files is the official order. The
    classes are sorted alphabetically; CIFAR-10's ten keep their official order.

    Args:
        folder: holds ``train/<class>/`` and ``test/<class>/``.
        cache_folder: where the decoded images are kept.

    Raises:
        DatasetError: an image is unreadable, a class has no images, or train and test have different classes.
        OSError: a folder cannot be listed.
    """
    files = {split: _list_images(folder / split) for split in ("train", "test")}
    in_train, in_test = (sorted({path.parent.name for path in paths}) for paths in files.values())
    _check_classes(folder, in_train, in_test)
    classes = tuple(_SHORT_NAMES.get(name, name) for name in in_train)
    if set(classes) == set(CIFAR10_CLASSES):
        classes = CIFAR10_CLASSES
    label_of = {name: classes.index(_SHORT_NAMES.get(name, name)) for name in in_train}
    train_labels, test_labels = (
        np.array([label_of[path.parent.name] for path in paths], dtype=np.int64) for paths in files.values()
    )
    images = _decode_cached(folder, files, cache_folder)
    return Arrays(images["train"], train_labels, images["test"], test_labels, classes)


def _check_classes(folder: Path, in_train: list[str], in_test: list[str]) -> None:
    if unknown := sorted(set(in_test) - set(in_train)):
        raise DatasetError(
            f"{printable(folder / 'test' / unknown[0])}: class {unknown[0]!r} has no folder in "
            f"{printable(folder / 'train')}, which has {', '.join(in_train)}; add train images for it or remove it"
        )
    if len(in_train) < 2:
        raise DatasetError(
            f"{printable(folder / 'train')} has only the class {in_train[0]!r}: a classifier needs two or more"
        )
    for long_name, short_name in _SHORT_NAMES.items():
        if {long_name, short_name} <= set(in_train):
            raise DatasetError(
                f"{printable(folder / 'train')} has both {long_name} and {short_name}, two names for the same class: "
                "put their images into one folder"
            )
    if untested := sorted(set(in_train) - set(in_test)):
        warnings.warn(
            f"{printable(folder / 'test')} has no images of {', '.join(untested)}: add some to measure how well they "
            "are recognized",
            stacklevel=3,
        )


def _list_images(folder: Path) -> list[Path]:
    """The images in the class folders of ``folder``, sorted by file name. Hidden files and folders are ignored."""
    found = []
    for class_folder in sorted(folder.iterdir()):
        name = class_folder.name
        if name.startswith(".") or not class_folder.is_dir():
            continue
        if name.encode(errors="replace").decode() != name:
            raise DatasetError(f"{printable(class_folder)}: the class name is not UTF-8 text; rename the folder")
        entries = sorted(entry for entry in os.listdir(class_folder) if not entry.startswith("."))
        images = [class_folder / entry for entry in entries if entry.lower().endswith(SUFFIXES)]
        if not images:
            raise DatasetError(
                f"{printable(class_folder)} holds {', '.join(map(printable, entries[:3])) or 'nothing'}"
                f"{', ...' if len(entries) > 3 else ''}, but no images: put the images of this class directly into it "
                f"(formats: {', '.join(SUFFIXES)}), or remove the folder"
            )
        found += images
    if not found:
        raise DatasetError(
            f"{printable(folder)} holds no images: expected {folder.name}/<class>/*.png, one folder per class "
            f"(formats: {', '.join(SUFFIXES)})"
        )
    return sorted(found, key=lambda path: (path.name, path.parent.name))


def _decode_cached(folder: Path, files: dict[str, list[Path]], cache_folder: Path) -> dict[str, np.ndarray]:
    """The pixels of all images, (N, 32, 32, 3) uint8 per split; decoded once, then read from ``cache_folder``.

    The cache's name holds a digest of the folder's path, and one of every file's path, size and modification time. A
    changed, added or removed file therefore leads to a new cache, which replaces the folder's old one.
    """
    of_folder = f"decoded-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}"
    digest = hashlib.sha256(f"rules {READING_RULES}\n".encode())
    paths = [path for split in files.values() for path in split]
    for path in paths:
        status = _stat_file(path)
        digest.update(os.fsencode(path.relative_to(folder)))
        digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    cache = cache_folder / f"{of_folder}-{digest.hexdigest()[:16]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as stored:
            images = {split: stored[split] for split in files}
        for split, pixels in images.items():
            if pixels.dtype != np.uint8 or pixels.shape != (len(files[split]), IMAGE_SIZE, IMAGE_SIZE, 3):
                raise ValueError(f"{split} is {pixels.dtype} of shape {pixels.shape}")
        return images
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # zip, CRC, format and I/O errors alike: the image files are still there
        warnings.warn(f"{cache} cannot be used ({error}); decoding the images again", stacklevel=3)

    with _bombs_refused(), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        decoded = tqdm(pool.map(_decode, paths), total=len(paths), desc="Decoding images (once)", unit="img")
        pixels = np.stack(list(decoded))
    images = dict(zip(files, np.split(pixels, [len(files["train"])])))
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
            f"the decoded images could not be stored in {cache_folder} ({error}) and will be decoded again next time",
            stacklevel=3,
        )
    return images


# --- one image --------------------------------------------------------------------------------------------------------


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read one image file as the network's input.

    - Formats: PNG, JPEG, BMP, WebP, TIFF and GIF, recognized by content, not by file name.
    - EXIF orientation, which phones write, is applied.
    - Animations and files with several pages: the first image.
    - Transparent pixels are laid over white.
    - CMYK, palette, grey and black-and-white: converted to RGB by Pillow, without colour profiles.
    - 16-bit grey: 65,535 is white.
    - 32-bit grey (integers or floats) does not state its range. White is the smallest of 1, 255, 65,535 and 2**31 - 1
      that no value exceeds; negative values and NaN are black.
    - Sizes other than 32x32: the central square, resized (Lanczos).

    Returns:
        (32, 32, 3) uint8, RGB.

    Raises:
        DatasetError: the file is missing, not a regular file, larger than ``PIL.Image.MAX_IMAGE_PIXELS`` (89 million
            pixels), damaged, or in another format; the message names the file, the reason and the fix.
    """
    with _bombs_refused():
        return _decode(path)


@contextlib.contextmanager
def _bombs_refused():
    """Make Pillow refuse images above ``MAX_IMAGE_PIXELS``, instead of only warning.

    Separate from ``_decode``, since warning filters belong to the whole process and threads must not change them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _decode(path: str | os.PathLike) -> np.ndarray:
    _stat_file(path)
    name = printable(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = _to_rgb(ImageOps.exif_transpose(image))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS, box))
    except PermissionError as error:
        raise DatasetError(f"{name} cannot be read ({error.strerror}): make it readable, or remove it") from None
    except UnidentifiedImageError:
        raise DatasetError(
            f"{name} is not an image in a supported format ({', '.join(FORMATS)}): save it as PNG or JPEG, or remove it"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DatasetError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels, the limit: save a smaller copy, "
            "or remove it"
        ) from None
    except Exception as error:  # on damaged bytes, Pillow's plugins raise almost anything
        raise DatasetError(
            f"{name} is damaged ({error or type(error).__name__}): replace it with a good copy or remove it"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, by the rules in ``read_image``."""
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
    """The status of a regular file. Opening anything else may block forever: a pipe waits for its writer.

    Raises:
        DatasetError: it is missing, inaccessible, or not a regular file.
    """
    name = printable(path)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"no file {name}: check the path, or where it links to") from None
    except OSError as error:
        raise DatasetError(f"{name} cannot be read ({error.strerror}): make it readable, or remove it") from None
    if stat.S_ISDIR(status.st_mode):
        raise DatasetError(f"{name} is a folder: name an image file")
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(f"{name} is a pipe, a socket or a device: name an image file, or remove it")
    return status
