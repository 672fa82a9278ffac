"""Pictures, image folders, the official archive and its download, the digits: pixels come out, or clear words."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import shutil
import socket
import struct
import tarfile
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from utils.dataset import CIFAR10_CLASSES, DatasetError, OfflineError, load_dataset
from utils.sources import archive, image_folder
from utils.sources.image_folder import read_image

BATCHES = CIFAR10.base_folder
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)

pytestmark = pytest.mark.usefixtures("project_root")


@contextlib.contextmanager
def not_root():
    """Root reads everything; so within this, the process is nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public_folder():
    """A folder that every user may enter, as pytest's own may not be."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


# --- one picture ----------------------------------------------------------------------------------------------------

UPRIGHT = np.zeros((32, 32, 3), np.uint8)
UPRIGHT[:16, :16], UPRIGHT[:16, 16:], UPRIGHT[16:, :16] = RED, BLUE, WHITE
# How a camera stores the upright picture under each EXIF orientation (EXIF 2.32, tag 274: what row 0 and column 0 are).
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: np.rot90(UPRIGHT, 2).transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"jpg": dict(quality=100, subsampling=0), "webp": dict(lossless=True)}.get(suffix, {})
    path = tmp_path / f"phone.{suffix}"
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif, **lossless)
    np.testing.assert_allclose(read_image(path), UPRIGHT, atol=2)


RAMP = np.arange(1024).reshape(32, 32) / 1023


@pytest.mark.parametrize(
    ("suffix", "dtype", "white"),
    [("png", "uint16", 65_535), ("tiff", "uint16", 65_535)]
    + [("tiff", "int32", white) for white in (255, 65_535, 2**31 - 1)]
    + [("tiff", "float32", white) for white in (1, 255, 65_535)],
)
def test_grey_of_more_than_8_bits_keeps_its_shades(tmp_path, suffix, dtype, white):
    values = RAMP * white if dtype == "float32" else (RAMP * white).round()
    Image.fromarray(values.astype(dtype)).save(tmp_path / f"scan.{suffix}")
    image = read_image(tmp_path / f"scan.{suffix}")
    assert (image == image[..., :1]).all()
    np.testing.assert_allclose(image[..., 0], RAMP * 255, atol=1)
    assert (image[0, 0, 0], image[-1, -1, 0]) == (0, 255)


def test_a_dim_16_bit_scan_stays_dim_and_odd_floats_are_black(tmp_path):
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(tmp_path / "dim.png")
    assert (read_image(tmp_path / "dim.png") == 1).all()
    values = np.ones((32, 32), np.float32)
    values[:, 0], values[:, 1] = np.nan, -3
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    image = read_image(tmp_path / "odd.tiff")
    assert (image[:, :2] == 0).all()
    assert (image[:, 2:] == 255).all()


def palette_with_a_hole():
    picture = Image.new("P", (32, 32), 0)
    picture.putpalette([0, 0, 0, *RED])
    picture.paste(1, (16, 0, 32, 32))
    picture.info["transparency"] = 0  # black, and invisible
    return picture


TRANSPARENT = {
    "half.png": (Image.new("RGBA", (32, 32), (*RED, 128)), (255, 127, 127), (255, 127, 127)),
    "invisible.webp": (Image.new("RGBA", (32, 32), (0, 0, 0, 0)), WHITE, WHITE),
    "grey.png": (Image.new("LA", (32, 32), (0, 0)), WHITE, WHITE),
    "palette.png": (palette_with_a_hole(), WHITE, RED),
    "palette.gif": (palette_with_a_hole(), WHITE, RED),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_shows_through_is_white(tmp_path, name):
    picture, left, right = TRANSPARENT[name]
    picture.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    image = read_image(tmp_path / name)
    assert (image[:, :16] == left).all()
    assert (image[:, 16:] == right).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "colour"),
    [("L", "png", WHITE), ("1", "png", WHITE), ("P", "png", RED), ("CMYK", "jpg", RED), ("CMYK", "tiff", RED)],
)
def test_other_colour_modes_become_rgb(tmp_path, mode, suffix, colour):
    Image.new("RGB", (32, 32), colour).convert(mode).save(tmp_path / f"image.{suffix}")
    np.testing.assert_allclose(read_image(tmp_path / f"image.{suffix}"), np.full((32, 32, 3), colour), atol=2)


@pytest.mark.parametrize(("suffix", "format"), [("gif", "GIF"), ("png", "PNG"), ("tiff", "TIFF"), ("jpg", "MPO")])
def test_of_several_pictures_in_a_file_the_first_counts(tmp_path, suffix, format):
    first, second = (Image.new("RGB", (32, 32), colour) for colour in (RED, BLUE))
    first.save(tmp_path / f"many.{suffix}", format=format, save_all=True, append_images=[second])
    np.testing.assert_allclose(read_image(tmp_path / f"many.{suffix}"), np.full((32, 32, 3), RED), atol=2)


def test_the_crop_is_the_central_square(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :32], wide[:, 32:64], wide[:, 64:] = 10, 100, 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png") == 100).all()
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (read_image(tmp_path / "tall.png") == 100).all()


def claimed_size(side):
    """A PNG of a few bytes that claims to be ``side`` x ``side``."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10)))


def saved_as(format):
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, format)
    return buffer.getvalue()


UNREADABLE = {
    "90 megapixels": (lambda: claimed_size(9_500), "more than 89 million pixels, the most that is read: save a small"),
    "256 megapixels": (
        lambda: claimed_size(16_000),
        "more than 89 million pixels, the most that is read: save a small",
    ),
    "a terapixel": (lambda: claimed_size(10**6), "more than 89 million pixels, the most that is read: save a smaller"),
    "cut short": (lambda: saved_as("PNG")[:-50], r"is damaged \(.*\): replace it with a good copy or remove it"),
    "cut short WebP": (lambda: saved_as("WEBP")[:-20], "image.png is "),
    "cut short TIFF": (lambda: saved_as("TIFF")[:300], r"is damaged \(.*\): replace it with a good copy or remove it"),
    "web page": (
        lambda: b"<html>404</html>",
        r"is not an image in a format that is read \(PNG, JPEG, BMP, WEBP, TIFF, G",
    ),
    "empty": (lambda: b"", r"is not an image in a format that is read .*: save it as PNG or JPEG, or remove it"),
    "PostScript": (lambda: saved_as("EPS"), "is not an image in a format that is read"),  # would start Ghostscript
    "cut short DDS": (lambda: saved_as("DDS")[:90], "is not an image in a format that is read"),
    "damaged AVIF": (lambda: saved_as("AVIF")[:200] + bytes(100), "is not an image in a format that is read"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, case):
    content, words = UNREADABLE[case]
    (tmp_path / "image.png").write_bytes(content())
    with pytest.raises(DatasetError, match=words) as error:
        read_image(tmp_path / "image.png")
    assert str(tmp_path / "image.png") in str(error.value)


@pytest.mark.timeout(60)  # opening a pipe waits for its writer
def test_what_is_no_regular_file_is_said_so(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone")
    for name, words in {
        "pipe.png": "pipe.png is a pipe, a socket or a device: name an image file",
        "folder.png": "folder.png is a folder: name an image file",
        "link.png": "no file .*link.png: check the path, or where it links to",
        "gone.png": "no file .*gone.png: check the path",
    }.items():
        with pytest.raises(DatasetError, match=words):
            read_image(tmp_path / name)


@given(
    format=st.sampled_from(list(image_folder.FORMATS)),
    position=st.integers(0, 10_000),
    value=st.integers(0, 255),
    cut=st.booleans(),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own words on what it could still read
def test_any_damage_gives_pixels_or_a_message(tmp_path, format, position, value, cut):
    content = bytearray(saved_as(format))
    position %= len(content)
    if cut:
        content = content[:position]
    else:
        content[position] = value
    (tmp_path / "damaged").write_bytes(content)
    with contextlib.suppress(DatasetError):
        assert read_image(tmp_path / "damaged").shape == (32, 32, 3)


# --- image folders --------------------------------------------------------------------------------------------------


def save_images(folder, sizes, colours):
    """One plain PNG for each of ``sizes`` in ``folder/<class>/`` for each of ``colours``, numbered across classes."""
    index = 0
    for size in sizes:
        for name, colour in colours.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, colour).save(folder / name / f"{index:05d}.png")
            index += 1


def test_an_image_folder_comes_back_pixel_for_pixel_in_the_order_of_its_numbers(image_folder, toy):
    dataset = load_dataset(image_folder)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(toy, name))
    assert dataset.classes == CIFAR10_CLASSES


def test_long_class_names_become_the_short_ones_in_the_official_order(image_folder, toy):
    for split in ("train", "test"):
        (image_folder / split / "plane").rename(image_folder / split / "airplane")
    (image_folder / "train" / "car").rename(image_folder / "train" / "automobile")
    (image_folder / "test" / "car").rename(image_folder / "test" / "automobile")
    dataset = load_dataset(image_folder)
    assert dataset.classes == CIFAR10_CLASSES
    np.testing.assert_array_equal(dataset.train_labels, toy.train_labels)


def test_own_classes_in_other_sizes_are_cropped_to_a_square_and_resized(tmp_path):
    colours = {"poppy": (200, 30, 30), "cornflower": (40, 60, 210), "daisy": (250, 250, 240)}
    sizes = [(32, 32), (64, 40), (20, 90), (7, 7)]
    save_images(tmp_path / "own" / "train", sizes, colours)
    save_images(tmp_path / "own" / "test", sizes[:1], colours)
    dataset = load_dataset(tmp_path / "own")
    assert dataset.classes == ("cornflower", "daisy", "poppy")
    assert dataset.train_images.shape == (12, 32, 32, 3)
    for image, label in zip(dataset.train_images, dataset.train_labels):
        assert (image == colours[dataset.classes[label]]).all()


def test_other_and_hidden_files_and_folders_are_passed_over(image_folder, toy):
    (image_folder / "train" / "notes.txt").write_text("bought at the market")
    (image_folder / "train" / "cat" / "Thumbs.db").write_bytes(b"\0")
    (image_folder / "train" / "cat" / "._00001.png").write_bytes(b"\0")  # as macOS leaves them on foreign disks
    (image_folder / "train" / ".thumbnails").mkdir()
    shutil.copy(next((image_folder / "train" / "cat").glob("0*.png")), image_folder / "train" / ".thumbnails")
    assert len(load_dataset(image_folder).train_labels) == len(toy.train_labels)


def test_file_names_in_another_encoding_work_and_class_names_are_refused(image_folder, toy):
    path = next((image_folder / "train" / "cat").iterdir())
    path.rename(path.with_name(os.fsdecode(b"caf\xe9.png")))
    assert len(load_dataset(image_folder).train_labels) == len(toy.train_labels)
    path.with_name(os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"caf\\xe9.png is not an image"):
        load_dataset(image_folder)
    (image_folder / "train" / "cat").rename(image_folder / "train" / os.fsdecode(b"Stra\xdfe"))
    with pytest.raises(DatasetError, match=r"Stra\\xdfe: the class's name is not UTF-8 text; rename the folder"):
        load_dataset(image_folder)


def twice_named(folder):
    (folder / "train" / "airplane").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "train" / "airplane" / "00060.png")


def only_other_files(folder):
    for path in (folder / "train" / "cat").iterdir():
        path.rename(path.with_suffix(".heic"))


def nested(folder):
    (folder / "test" / "cat").rename(folder / "test" / "2024")
    (folder / "test" / "cat").mkdir()
    (folder / "test" / "2024").rename(folder / "test" / "cat" / "2024")


def emptied(folder, name):
    shutil.rmtree(folder / name)
    (folder / name).mkdir()


def one_class(folder):
    for split in ("train", "test"):
        for path in (folder / split).iterdir():
            if path.name != "cat":
                shutil.rmtree(path)


UNUSABLE = {
    "two names": (twice_named, "the classes airplane and plane, which are one class by two names: put"),
    "other files": (
        only_other_files,
        r"train/cat holds 00003.heic, 00013.heic, 00023.heic, \.\.\., and no image of its ",
    ),
    "nested": (
        nested,
        r"test/cat holds 2024, and no image of its class: put them directly into it \(\.png, .* are read",
    ),
    "empty class": (functools.partial(emptied, name="train/cat"), "train/cat holds nothing, and no image of its class"),
    "empty train": (functools.partial(emptied, name="train"), r"train holds no images: expected train/<class>/\*.png"),
    "empty test": (functools.partial(emptied, name="test"), r"test holds no images: expected test/<class>/\*.png"),
    "test alone": (
        lambda folder: (folder / "test" / "truck").rename(folder / "test" / "tractor"),
        r"class 'tractor' has no folder in .*train, which has bird, car",
    ),
    "one class": (one_class, "only the class 'cat': a classifier needs two or more"),
    "pipe": (lambda folder: os.mkfifo(folder / "train" / "cat" / "a.png"), "a.png is a pipe, a socket or a device"),
    "no picture": (
        lambda folder: (folder / "train" / "frog" / "00006.png").write_text("<html>404</html>"),
        r"frog/00006.png is not an image",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", UNUSABLE)
def test_a_folder_that_cannot_be_used_is_told_why(image_folder, case):
    spoil, words = UNUSABLE[case]
    spoil(image_folder)
    with pytest.raises(DatasetError, match=words):
        load_dataset(image_folder)


def test_a_class_without_test_images_is_announced(image_folder, toy):
    shutil.rmtree(image_folder / "test" / "cat")
    with pytest.warns(UserWarning, match="test has no images of cat: how well they are recognized stays unknown"):
        dataset = load_dataset(image_folder)
    assert dataset.classes == toy.classes
    assert 3 not in dataset.test_labels


@pytest.mark.parametrize("closed", ["images", "images/train/cat", "images/train/cat/00003.png"])
def test_what_may_not_be_read_is_not_called_damaged(image_folder, public_folder, closed):
    shutil.copytree(image_folder, public_folder / "images")
    os.chmod(public_folder / closed, 0)
    with (
        not_root(),
        pytest.raises(DatasetError, match=rf"{closed}.* (may not|cannot) be read \(Permission den") as error,
    ):
        load_dataset(public_folder / "images")
    os.chmod(public_folder / closed, 0o755)
    assert "damaged" not in str(error.value)


# --- the cache of decoded images ------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The files that were really decoded, in a list that grows."""
    files, decode = [], image_folder._decode

    def counting(path):
        files.append(path)
        return decode(path)

    monkeypatch.setattr("utils.sources.image_folder._decode", counting)
    return files


def caches(project_root):
    return [path for path in (project_root / "data").iterdir() if path.name != ".s10lock"]


def test_images_are_decoded_once_and_then_come_from_the_cache(image_folder, decoded, project_root):
    first = load_dataset(image_folder)
    assert len(decoded) == 90
    second = load_dataset(image_folder)
    assert len(decoded) == 90
    assert first.fingerprint() == second.fingerprint()
    assert [path.suffix for path in caches(project_root)] == [".npz"]  # nothing unfinished beside it


def test_a_changed_added_or_removed_image_is_decoded_anew(image_folder, decoded, project_root):
    load_dataset(image_folder)
    changed = sorted((image_folder / "train" / "cat").glob("*.png"))[0]
    Image.new("RGB", (32, 32), (1, 2, 3)).save(changed)
    index = int(changed.stem)
    (project_root / "data" / ".decoded-0.npz.99999.s10part").touch()  # of a process that was killed
    assert (load_dataset(image_folder).train_images[index] == (1, 2, 3)).all()
    assert len(decoded) == 180

    shutil.copy(changed, changed.with_name("00060.png"))
    assert len(load_dataset(image_folder).train_labels) == 61
    changed.unlink()
    assert len(load_dataset(image_folder).train_labels) == 60
    assert len(caches(project_root)) == 1  # caches of what the folder once held are gone, and the unfinished one


def test_folders_keep_a_cache_each(image_folder, decoded, tmp_path):
    shutil.copytree(image_folder, tmp_path / "other")
    for folder in (image_folder, tmp_path / "other", image_folder):
        load_dataset(folder)
    assert len(decoded) == 180


@pytest.mark.parametrize("damage", ["flipped bytes", "cut short", "emptied", "other shape", "other dtype"])
def test_a_damaged_cache_is_rebuilt(image_folder, decoded, project_root, damage):
    expected = load_dataset(image_folder).fingerprint()
    (cache,) = caches(project_root)
    content = bytearray(cache.read_bytes())
    announced = pytest.warns(UserWarning, match="cannot be used .*decoding the images again")
    if damage.startswith("other"):
        counts, dtype = ((1, 1), np.uint8) if damage == "other shape" else ((60, 30), np.int64)
        train, test = (np.zeros((count, 32, 32, 3), dtype) for count in counts)
        np.savez(cache, train=train, test=test)
        announced = contextlib.nullcontext()
    else:
        content[len(content) // 2] ^= 0xFF
        cache.write_bytes({"flipped bytes": content, "cut short": content[: len(content) // 2], "emptied": b""}[damage])
    with announced:
        assert load_dataset(image_folder).fingerprint() == expected
    assert len(decoded) == 180
    assert load_dataset(image_folder).fingerprint() == expected
    assert len(decoded) == 180  # the rebuilt cache works


def test_where_no_cache_can_be_kept_the_images_still_load(image_folder, project_root, toy):
    (project_root / "data").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be kept"):
        dataset = load_dataset(image_folder)
    np.testing.assert_array_equal(dataset.train_images, toy.train_images)


# --- the official archive -------------------------------------------------------------------------------------------


def md5_of(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def official(toy, monkeypatch):
    """The bytes of a tiny archive in the official layout, of 60 images, whose checksums are the expected ones."""
    files = {}
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    images = [*np.split(toy.train_images[:50], 5), toy.test_images[:10]]
    labels = [*np.split(toy.train_labels[:50], 5), toy.test_labels[:10]]
    for name, pixels, targets in zip(names, images, labels):
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)  # as CIFAR-10 stores them: channel by channel
        files[name] = pickle.dumps({"data": rows, "labels": targets.tolist()})
    files["batches.meta"] = pickle.dumps({"label_names": ["airplane", "automobile", *CIFAR10_CLASSES[2:]]})

    md5s = {name: md5_of(content) for name, content in files.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{BATCHES}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5s[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5s["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5s["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5_of(buffer.getvalue()))
    return buffer.getvalue()


def assert_toy(dataset, toy):
    assert dataset.source == "official"
    assert dataset.classes == CIFAR10_CLASSES
    np.testing.assert_array_equal(dataset.train_images, toy.train_images[:50])
    np.testing.assert_array_equal(dataset.train_labels, toy.train_labels[:50])
    np.testing.assert_array_equal(dataset.test_images, toy.test_images[:10])
    np.testing.assert_array_equal(dataset.test_labels, toy.test_labels[:10])
    assert dataset.train_images.flags["C_CONTIGUOUS"]


@pytest.fixture
def own(official, tmp_path):
    """A folder that holds the archive."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / CIFAR10.filename).write_bytes(official)
    return tmp_path / "own"


def visible(folder):
    return sorted(name for name in os.listdir(folder) if name != ".s10lock")


def test_a_folder_that_holds_the_archive_or_is_the_batches_folder_works(own, toy):
    assert_toy(load_dataset(own), toy)
    assert visible(own) == [BATCHES, CIFAR10.filename]
    assert_toy(load_dataset(own / BATCHES), toy)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_a_corrupt_archive_is_named_and_leaves_nothing(own, official, share, damage):
    at = int(share * len(official))
    rest = b"" if damage == "cut short" else b"\xff" * 64 + official[at + 64 :]
    (own / CIFAR10.filename).write_bytes(official[:at] + rest)
    with pytest.raises(
        DatasetError, match=f"{CIFAR10.filename} is damaged or another file: its MD5 is .*delete it and"
    ):
        load_dataset(own)
    assert visible(own) == [CIFAR10.filename]


def tar_of(member):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo(member))
    return buffer.getvalue()


def overwritten(content):
    # A good beginning, longer than any read buffer and up to a byte boundary, then what no deflate stream holds.
    compressor = zlib.compressobj(wbits=31)
    start = compressor.compress(gzip.decompress(content)[:150_000]) + compressor.flush(zlib.Z_FULL_FLUSH)
    return start + b"\xff" * 64


NO_WHOLE_ARCHIVE = "is not a whole tar.gz archive .*delete it and fetch"
NOT_UNPACKED = {
    "no gzip": (lambda content: b"<html>captive portal</html>", NO_WHOLE_ARCHIVE),
    "cut short": (lambda content: content[: len(content) // 2], NO_WHOLE_ARCHIVE),
    "overwritten": (overwritten, NO_WHOLE_ARCHIVE),
    "no tar": (lambda content: gzip.compress(b"plain text" * 1000), NO_WHOLE_ARCHIVE),
    "escaping": (lambda content: tar_of("../../escaped"), NO_WHOLE_ARCHIVE),
    "something else": (
        lambda content: tar_of("holiday/beach.jpg"),
        f"holds no {BATCHES}/: it is not CIFAR-10's python",
    ),
}


@pytest.mark.parametrize("case", NOT_UNPACKED)
def test_an_archive_that_cannot_be_unpacked_leaves_nothing(own, official, tmp_path, monkeypatch, case):
    make, words = NOT_UNPACKED[case]
    content = make(official)
    (own / CIFAR10.filename).write_bytes(content)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5_of(content))
    with pytest.raises(DatasetError, match=words):
        load_dataset(own)
    assert visible(own) == [CIFAR10.filename]
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("damage", ["changed", "missing"])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_official_batch_is_noticed_by_its_checksum(own, name, damage):
    load_dataset(own)
    path = own / BATCHES / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DatasetError, match=f"{BATCHES} is damaged or incomplete .*delete that folder and run again"):
        load_dataset(own)


@pytest.mark.parametrize("closed", [CIFAR10.filename, f"{BATCHES}/test_batch"])
def test_an_archive_that_may_not_be_read_is_not_called_damaged(own, public_folder, closed):
    if closed != CIFAR10.filename:
        load_dataset(own)
    shutil.copytree(own, public_folder / "own")
    os.chmod(public_folder / "own" / BATCHES, 0o755) if closed != CIFAR10.filename else None
    os.chmod(public_folder / "own" / closed, 0)
    with (
        not_root(),
        pytest.raises(DatasetError, match=rf"{closed} cannot be read \(Permission denied\): see to its perm"),
    ):
        load_dataset(public_folder / "own")


def test_where_the_archive_cannot_be_unpacked_the_folder_is_named(own, public_folder):
    shutil.copytree(own, public_folder / "own")
    with (
        not_root(),
        pytest.raises(DatasetError, match=r"cannot be stored in .*own \(Permission denied\): make it writable"),
    ):
        load_dataset(public_folder / "own")


# --- download -------------------------------------------------------------------------------------------------------


class Host:
    """A web server on this machine. ``host.url(name)`` answers as the method of that name does, or with 404."""

    def __init__(self, content):
        self.content = content
        self.requests = []
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                host.requests.append(name)
                answer = getattr(host, name.replace("-", "_"), None)
                if name.startswith("http:"):  # as a proxy is asked
                    answer = host.good
                with contextlib.suppress(ConnectionError):  # given up on by the client
                    answer(self) if answer else self.send_error(404)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def answer(self, request, content, code=200, **headers):
        request.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(content)

    def good(self, request):
        self.answer(request, self.content)

    def gzip_as_encoding(self, request):  # some hosts call the .gz of a file its encoding
        self.answer(request, self.content, **{"Content-Encoding": "gzip"})

    def moved(self, request):
        self.answer(request, b"", 302, Location="/good")

    def slow_start(self, request):
        time.sleep(0.5)
        self.good(request)

    def other(self, request):
        self.answer(request, self.content[:-1] + b"x")

    def dropped(self, request):
        self.answer(request, self.content[:1000], **{"Content-Length": str(len(self.content))})

    def garbage(self, request):
        request.wfile.write(b"this is no HTTP\r\n\r\n")

    def bad_length(self, request):
        self.answer(request, self.content, **{"Content-Length": "abc"})

    def bad_location(self, request):
        self.answer(request, b"", 302, Location="http://[half-an-address/")

    def other_scheme(self, request):
        self.answer(request, b"", 302, Location="file:///etc/passwd")

    def circle(self, request):
        self.answer(request, b"", 302, Location="/circle")

    def trickle(self, request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(self.content)))
        request.end_headers()
        for byte in self.content:
            request.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def endless(self, request):
        request.send_response(200)
        request.end_headers()
        while True:
            request.wfile.write(bytes(1 << 16))

    def url(self, name):
        return f"http://127.0.0.1:{self.server.server_port}/{name}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def host(official):
    host = Host(official)
    yield host
    host.close()


@pytest.fixture
def closed_port():
    """The URL of a port on this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}/archive"


def impatient(official):
    return archive.Fetcher(least_rate=50_000, window_seconds=2.0, most_bytes=len(official))


def publish(monkeypatch, *urls):
    """Let ``load_dataset`` download from ``urls`` instead of the real hosts."""
    monkeypatch.setattr(archive, "download", functools.partial(archive.download, urls=urls))


@pytest.mark.parametrize("name", ["good", "moved", "gzip-as-encoding"])
def test_the_archive_is_downloaded_once_into_data(host, official, project_root, toy, monkeypatch, name):
    publish(monkeypatch, host.url(name), host.url("second"))
    assert_toy(load_dataset(), toy)
    asked = list(host.requests)
    assert asked[0] == name
    assert "second" not in asked
    assert_toy(load_dataset(source="official"), toy)
    assert host.requests == asked  # it was there already
    assert visible(project_root / "data") == [BATCHES]  # neither the archive nor an unfinished file is left


FAILING = {
    "missing": "404",
    "other": "MD5 hash of downloaded file",
    "dropped": "",
    "garbage": "",
    "bad-length": "abc",
    "bad-location": "Invalid IPv6 URL",
    "other-scheme": "file:///etc/passwd",
    "circle": "30 redirects",
    "trickle": "it sends 0.0 kB/s, too slow: 50 are needed",
    "endless": "it sends more than the archive's",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("failing", FAILING)
def test_a_host_that_fails_is_reported_and_left_for_the_next(host, official, tmp_path, toy, failing):
    with pytest.raises(DatasetError, match="CIFAR-10 could not be downloaded") as error:
        archive.download(tmp_path / "data", (host.url(failing),), impatient(official))
    assert not isinstance(error.value, OfflineError)
    assert f"/{failing}: " in str(error.value)
    assert FAILING[failing] in str(error.value)
    assert f"put a good copy of {CIFAR10.filename} in a folder and set $CIFAR10_DIR" in str(error.value)
    assert visible(tmp_path / "data") == []

    archive.download(tmp_path / "data", (host.url(failing), host.url("good")), impatient(official))
    assert_toy(load_dataset(tmp_path / "data"), toy)
    assert visible(tmp_path / "data") == [BATCHES]


def test_damaged_downloads_are_never_replaced_by_digits(host, monkeypatch):
    publish(monkeypatch, host.url("other"))
    with pytest.raises(DatasetError, match="could not be downloaded"):
        load_dataset()


def test_an_interrupted_download_leaves_no_file(host, tmp_path, monkeypatch):
    class InterruptedBar(archive.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(archive, "tqdm", InterruptedBar)
    with pytest.raises(KeyboardInterrupt):
        archive.download(tmp_path / "data", (host.url("good"),))
    assert visible(tmp_path / "data") == []


@pytest.mark.timeout(60)
def test_what_a_killed_download_left_goes_with_the_next_and_nothing_else(host, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "tmp0123.part").write_text("somebody's own")
    victim = multiprocessing.get_context("fork").Process(target=archive.download, args=(folder, (host.url("trickle"),)))
    victim.start()
    while not any(path.is_file() for path in folder.rglob(".cifar-10-*/*")):
        time.sleep(0.01)
    victim.kill()
    victim.join()
    assert len(visible(folder)) == 2
    archive.download(folder, (host.url("good"),))
    assert visible(folder) == [BATCHES, "tmp0123.part"]


def test_two_processes_that_want_it_download_it_once(host, tmp_path, toy):
    urls = (host.url("slow-start"),)
    threads = [threading.Thread(target=archive.download, args=(tmp_path / "data", urls)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host.requests == ["slow-start"]
    assert_toy(load_dataset(tmp_path / "data"), toy)


def test_where_a_download_cannot_be_stored_the_folder_is_named(host, tmp_path):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(
        DatasetError, match=r"cannot be stored in .*data \(File exists\): make it writable and keep 400"
    ):
        archive.download(tmp_path / "data", (host.url("good"),))


def test_a_full_disk_is_not_blamed_on_the_hosts(host, tmp_path, monkeypatch):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full, a device that is always full")
    monkeypatch.setattr(archive, "open", lambda path, mode: open(full, "wb", buffering=0), raising=False)
    with pytest.raises(DatasetError, match=r"cannot be stored in .*data \(No space left on device\)"):
        archive.download(tmp_path / "data", (host.url("good"), host.url("good")))
    assert host.requests == ["good"]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_behind_a_proxy_the_proxy_is_asked(host, tmp_path, monkeypatch):
    url = "http://archive.invalid/cifar.tar.gz"  # a name that no resolver knows
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{host.server.server_port}")
    archive.download(tmp_path / "data", (url,))
    assert host.requests == [url]
    assert (tmp_path / "data" / BATCHES).is_dir()
    monkeypatch.setenv("no_proxy", "archive.invalid")
    with pytest.raises(OfflineError):
        archive.download(tmp_path / "other", (url,))
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://proxy:no-port")
    with pytest.raises(OfflineError):
        archive.download(tmp_path / "other", (url,))


# --- no network -----------------------------------------------------------------------------------------------------


def test_offline_the_digits_stand_in_with_a_banner(closed_port, project_root, monkeypatch, capsys):
    publish(monkeypatch, closed_port)
    dataset = load_dataset()
    assert dataset.is_stand_in
    assert "NOT CIFAR-10" in dataset.description
    banner = capsys.readouterr().out
    for words in ("NOT CIFAR-10", "no answer from 127.0.0.1", "$CIFAR10_DIR", "nothing is written to Results/"):
        assert words in banner
    assert os.listdir(project_root) == []


def test_offline_the_official_images_are_not_replaced_when_insisted_on(closed_port, monkeypatch):
    publish(monkeypatch, closed_port)
    with pytest.raises(OfflineError, match=r"no answer from 127.0.0.1.* connect to the internet, or set \$CIFAR10_DIR"):
        load_dataset(source="official")


@pytest.fixture
def hanging(monkeypatch):
    """Looking up a name that ends in .invalid hangs, as without a network it can: no time limit reaches it."""
    released, connect = threading.Event(), socket.create_connection

    def hang(address, *args, **kwargs):
        if str(address[0]).endswith(".invalid"):
            released.wait()
            raise OSError
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", hang)
    yield "https://hangs.invalid/archive"
    released.set()


@pytest.mark.timeout(60)
def test_a_name_lookup_that_hangs_does_not_hold_up_the_stand_in(hanging, monkeypatch):
    assert archive.OFFLINE_AFTER_SECONDS < 10
    monkeypatch.setattr(archive, "OFFLINE_AFTER_SECONDS", 0.1)
    publish(monkeypatch, hanging, hanging)
    assert load_dataset().source == "digits"


@pytest.mark.timeout(60)
def test_a_host_that_hangs_does_not_hide_one_that_answers(hanging, host, tmp_path, toy, monkeypatch):
    monkeypatch.setattr(archive, "OFFLINE_AFTER_SECONDS", 2.0)
    archive.download(tmp_path / "data", (hanging, host.url("good")))
    assert_toy(load_dataset(tmp_path / "data"), toy)


def test_the_digits_are_shaped_like_cifar10():
    dataset = load_dataset(source="digits")
    assert dataset.classes == tuple("0123456789")
    assert len(dataset.train_labels) + len(dataset.test_labels) == 1797
    assert (np.bincount(dataset.test_labels) == 30).all()
    assert (dataset.train_images.min(), dataset.train_images.max()) == (0, 255)
    assert dataset.train_images.shape[1:] == dataset.test_images.shape[1:] == (32, 32, 3)
    assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (np.uint8, np.int64)


# --- real images ----------------------------------------------------------------------------------------------------


def test_real_cifar10_is_whole(cifar10):
    assert cifar10.train_images.shape == (50_000, 32, 32, 3)
    assert cifar10.test_images.shape == (10_000, 32, 32, 3)
    assert cifar10.train_images.dtype == np.uint8
    assert cifar10.classes == CIFAR10_CLASSES
    assert (np.bincount(cifar10.train_labels) == 5_000).all()
    assert (np.bincount(cifar10.test_labels) == 1_000).all()
    # The first labels of the official archive: frog, truck, truck, deer, car; cat, ship, ship, plane, frog.
    np.testing.assert_array_equal(cifar10.train_labels[:5], [6, 9, 9, 4, 1])
    np.testing.assert_array_equal(cifar10.test_labels[:5], [3, 8, 8, 0, 6])
    assert cifar10.description.startswith("CIFAR-10")
