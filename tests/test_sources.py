"""Images, image folders, the official archive, its download and the digits: right pixels, or a clear message."""

import contextlib
import hashlib
import http.server
import io
import itertools
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
import types
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


def load_as_nobody(folder, closed, mode):
    """Load a copy of ``folder`` in which ``closed`` has the permissions ``mode``, as a user with no special rights."""
    with tempfile.TemporaryDirectory() as public:  # pytest's own folders may be closed to other users
        copy = shutil.copytree(folder, Path(public) / folder.name)
        for path in (Path(public), copy, *copy.rglob("*")):
            path.chmod(0o755)
        (copy / closed).chmod(mode)
        root = os.geteuid() == 0
        os.seteuid(65534) if root else None
        try:
            load_dataset(copy)
        finally:
            os.seteuid(0) if root else None
            (copy / closed).chmod(0o755)


# --- one image ------------------------------------------------------------------------------------------------------

UPRIGHT = np.zeros((32, 32, 3), np.uint8)
UPRIGHT[:16, :16], UPRIGHT[:16, 16:], UPRIGHT[16:, :16] = RED, BLUE, WHITE


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned by 90 degrees (EXIF 2.32, tag 274)
    how = {"jpg": dict(quality=100, subsampling=0), "webp": dict(lossless=True)}.get(suffix, {})
    Image.fromarray(np.rot90(UPRIGHT).copy()).save(tmp_path / f"phone.{suffix}", exif=exif, **how)
    np.testing.assert_allclose(read_image(tmp_path / f"phone.{suffix}"), UPRIGHT, atol=2)


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


def test_a_dark_16_bit_scan_stays_dark_and_invalid_floats_are_black(tmp_path):
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(tmp_path / "dark.png")
    assert (read_image(tmp_path / "dark.png") == 1).all()
    values = np.ones((32, 32), np.float32)
    values[:, 0], values[:, 1] = np.nan, -3
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    image = read_image(tmp_path / "odd.tiff")
    assert (image[:, :2] == 0).all()
    assert (image[:, 2:] == 255).all()


def plain(mode, colour):
    return Image.new("RGB", (32, 32), colour).convert(mode)


def palette_with_a_hole():
    picture = Image.new("P", (32, 32), 0)
    picture.putpalette([0, 0, 0, *RED])
    picture.paste(1, (16, 0, 32, 32))
    picture.info["transparency"] = 0  # black, and invisible
    return picture


BLUE_FOLLOWS = dict(save_all=True, append_images=[plain("RGB", BLUE)])
SHOWN = {  # file: the image as saved, how, and the colours of its left and right half as read
    "half transparent.png": (Image.new("RGBA", (32, 32), (*RED, 128)), {}, (255, 127, 127), (255, 127, 127)),
    "invisible.webp": (Image.new("RGBA", (32, 32), (0, 0, 0, 0)), dict(lossless=True), WHITE, WHITE),
    "invisible grey.png": (Image.new("LA", (32, 32), (0, 0)), {}, WHITE, WHITE),
    "palette with a hole.png": (palette_with_a_hole(), {}, WHITE, RED),
    "palette with a hole.gif": (palette_with_a_hole(), {}, WHITE, RED),
    "grey.png": (plain("L", WHITE), {}, WHITE, WHITE),
    "black and white.png": (plain("1", WHITE), {}, WHITE, WHITE),
    "palette.png": (plain("P", RED), {}, RED, RED),
    "cmyk.jpg": (plain("CMYK", RED), {}, RED, RED),
    "cmyk.tiff": (plain("CMYK", RED), {}, RED, RED),
    "animated.gif": (plain("RGB", RED), BLUE_FOLLOWS, RED, RED),
    "animated.png": (plain("RGB", RED), BLUE_FOLLOWS, RED, RED),
    "pages.tiff": (plain("RGB", RED), BLUE_FOLLOWS, RED, RED),
    "pages.jpg": (plain("RGB", RED), dict(format="MPO", **BLUE_FOLLOWS), RED, RED),
}


@pytest.mark.parametrize("name", SHOWN)
def test_transparency_colour_modes_and_several_pages(tmp_path, name):
    picture, how, left, right = SHOWN[name]
    picture.save(tmp_path / name, **how)
    expected = np.array([left] * 16 + [right] * 16)[None].repeat(32, axis=0)
    np.testing.assert_allclose(read_image(tmp_path / name), expected, rtol=0, atol=2 if name.endswith(".jpg") else 0)


def test_the_crop_is_the_central_square(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :32], wide[:, 32:64], wide[:, 64:] = 10, 100, 200
    for picture in (wide, wide.transpose(1, 0, 2)):
        Image.fromarray(picture).save(tmp_path / "image.png")
        assert (read_image(tmp_path / "image.png") == 100).all()


def saved_as(format):
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, format)
    return buffer.getvalue()


def claimed_size(side):
    """A small PNG whose header claims ``side`` x ``side`` pixels."""
    content = bytearray(saved_as("PNG"))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


TOO_LARGE = "has more than 89 million pixels, the limit: save a smaller copy"
DAMAGED = r"is damaged \(.*\): replace it with a good copy or remove it"
OTHER_FORMAT = r"is not an image in a supported format \(PNG, JPEG, BMP, WEBP, TIFF, GIF\): save it as PNG or JPEG, or"
UNREADABLE = {  # the content, or what makes the file, and the message
    "90 megapixels": (claimed_size(9_500), TOO_LARGE),
    "256 megapixels": (claimed_size(16_000), TOO_LARGE),
    "cut short": (saved_as("PNG")[:-50], DAMAGED),
    "cut short WebP": (saved_as("WEBP")[:-20], "is "),  # one message or the other, by Pillow's version
    "cut short TIFF": (saved_as("TIFF")[:300], DAMAGED),
    "web page": (b"<html>404</html>", OTHER_FORMAT),
    "empty": (b"", OTHER_FORMAT),
    "PostScript": (saved_as("EPS"), OTHER_FORMAT),  # would start Ghostscript
    "cut short DDS": (saved_as("DDS")[:90], OTHER_FORMAT),
    "pipe": (os.mkfifo, "is a pipe, a socket or a device: name an image file"),
    "folder": (os.mkdir, "is a folder: name an image file"),
    "broken link": (lambda path: os.symlink("gone", path), "check the path, or where it links to"),
    "missing": (lambda path: None, "check the path"),
}


@pytest.mark.timeout(60)  # opening a pipe waits for its writer
@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_image_is_named_with_the_reason(tmp_path, case):
    content, words = UNREADABLE[case]
    path = tmp_path / "image.png"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(DatasetError, match=f"{path}:? {words}"):
        read_image(path)


@given(
    format=st.sampled_from(image_folder.FORMATS),
    position=st.integers(0, 10_000),
    value=st.integers(0, 255),
    cut=st.booleans(),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, on what it could still read
def test_any_damage_gives_pixels_or_a_message(tmp_path, format, position, value, cut):
    content = bytearray(saved_as(format))
    position %= len(content)
    content[position:] = b"" if cut else bytes([value]) + content[position + 1 :]
    (tmp_path / "damaged").write_bytes(content)
    with contextlib.suppress(DatasetError):
        assert read_image(tmp_path / "damaged").shape == (32, 32, 3)


# --- image folders --------------------------------------------------------------------------------------------------


def test_an_image_folder_gives_the_exact_pixels_in_the_official_order(image_folder, toy):
    def check(dataset):
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            np.testing.assert_array_equal(getattr(dataset, name), getattr(toy, name))
        assert dataset.classes == CIFAR10_CLASSES

    check(load_dataset(image_folder))
    for split in ("train", "test"):  # CIFAR-10's long names mean the same classes
        (image_folder / split / "plane").rename(image_folder / split / "airplane")
        (image_folder / split / "car").rename(image_folder / split / "automobile")
    check(load_dataset(image_folder))


def test_own_images_of_any_size_are_cropped_to_a_square_and_resized(tmp_path):
    colours = {"poppy": (200, 30, 30), "cornflower": (40, 60, 210), "daisy": (250, 250, 240)}
    for split, sizes in {"train": [(32, 32), (64, 40), (20, 90), (7, 7)], "test": [(32, 32)]}.items():
        for index, (size, name) in enumerate(itertools.product(sizes, colours)):
            folder = tmp_path / "own" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, colours[name]).save(folder / f"{index:05d}.png")
    dataset = load_dataset(tmp_path / "own")
    assert dataset.classes == ("cornflower", "daisy", "poppy")
    assert dataset.train_images.shape == (12, 32, 32, 3)
    for image, label in zip(dataset.train_images, dataset.train_labels):
        assert (image == colours[dataset.classes[label]]).all()


def test_other_and_hidden_files_and_folders_are_ignored(image_folder, toy):
    (image_folder / "train" / "notes.txt").write_text("bought at the market")
    (image_folder / "train" / "cat" / "Thumbs.db").write_bytes(b"\0")
    (image_folder / "train" / "cat" / "._00001.png").write_bytes(b"\0")  # macOS leaves such files on foreign disks
    shutil.copytree(image_folder / "train" / "cat", image_folder / "train" / ".thumbnails")
    assert len(load_dataset(image_folder).train_labels) == len(toy.train_labels)


def test_file_names_in_another_encoding_work_and_class_names_are_refused(image_folder, toy):
    path = next((image_folder / "train" / "cat").iterdir())
    path = path.rename(path.with_name(os.fsdecode(b"caf\xe9.png")))
    assert len(load_dataset(image_folder).train_labels) == len(toy.train_labels)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"caf\\xe9.png is not an image"):
        load_dataset(image_folder)
    path.parent.rename(image_folder / "train" / os.fsdecode(b"Stra\xdfe"))
    with pytest.raises(DatasetError, match=r"Stra\\xdfe: the class name is not UTF-8 text; rename the folder"):
        load_dataset(image_folder)


UNUSABLE = {  # what makes a good folder unusable, and the message
    "two names": (
        lambda folder: shutil.copytree(folder / "train/plane", folder / "train/airplane"),
        "train has both airplane and plane, two names for the same class: put their images into one folder",
    ),
    "other files": (
        lambda folder: [path.rename(path.with_suffix(".heic")) for path in (folder / "train/cat").iterdir()],
        r"train/cat holds 00003.heic, 00013.heic, 00023.heic, \.\.\., but no images: put the images of this class",
    ),
    "nested": (
        lambda folder: shutil.copytree(folder / "test/cat", folder / "test/kitten/2024"),
        r"test/kitten holds 2024, but no images: put .* directly into it \(formats: .*\), or remove the folder",
    ),
    "empty class": (lambda folder: (folder / "train/kitten").mkdir(), "train/kitten holds nothing, but no images: put"),
    "empty train": (
        lambda folder: [shutil.rmtree(path) for path in (folder / "train").iterdir()],
        r"train holds no images: expected train/<class>/\*.png",
    ),
    "unknown class": (
        lambda folder: (folder / "test/truck").rename(folder / "test/tractor"),
        r"class 'tractor' has no folder in .*train, which has bird, car",
    ),
    "one class": (
        lambda folder: [shutil.rmtree(path) for path in folder.glob("*/*") if path.name != "cat"],
        "only the class 'cat': a classifier needs two or more",
    ),
    "pipe": (lambda folder: os.mkfifo(folder / "train/cat/a.png"), "a.png is a pipe, a socket or a device"),
    "not an image": (
        lambda folder: (folder / "train/frog/00006.png").write_text("<html>404</html>"),
        "frog/00006.png is not an image",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_folder_is_named_with_the_reason(image_folder, case):
    spoil, words = UNUSABLE[case]
    spoil(image_folder)
    with pytest.raises(DatasetError, match=words):
        load_dataset(image_folder)


def test_a_class_without_test_images_gives_a_warning(image_folder, toy):
    shutil.rmtree(image_folder / "test" / "cat")
    with pytest.warns(UserWarning, match="test has no images of cat: add some to measure how well they are recognized"):
        dataset = load_dataset(image_folder)
    assert dataset.classes == toy.classes
    assert 3 not in dataset.test_labels


@pytest.mark.parametrize("closed", [".", "train/cat", "train/cat/00003.png"])
def test_a_closed_folder_or_image_is_not_called_damaged(image_folder, closed):
    path = image_folder.name if closed == "." else closed
    with pytest.raises(DatasetError, match=rf"{path}.* cannot be read \(Permission denied\)"):
        load_as_nobody(image_folder, closed, 0)


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


def visible(folder):
    return sorted(name for name in os.listdir(folder) if name != ".s10lock")


def test_images_are_decoded_once_per_folder(image_folder, decoded, project_root, tmp_path):
    first = load_dataset(image_folder)
    assert len(decoded) == 90
    assert load_dataset(image_folder).fingerprint == first.fingerprint
    assert len(decoded) == 90
    assert [Path(name).suffix for name in visible(project_root / "data")] == [".npz"]
    shutil.copytree(image_folder, tmp_path / "other")
    for folder in (tmp_path / "other", image_folder):
        load_dataset(folder)
    assert len(decoded) == 180


def test_a_changed_added_or_removed_image_replaces_the_cache(image_folder, decoded, project_root):
    load_dataset(image_folder)
    changed = sorted((image_folder / "train" / "cat").glob("*.png"))[0]
    Image.new("RGB", (32, 32), (1, 2, 3)).save(changed)
    (project_root / "data" / ".decoded-0.npz.99999.s10part").touch()  # left by a killed process
    assert (load_dataset(image_folder).train_images[int(changed.stem)] == (1, 2, 3)).all()
    assert len(decoded) == 180

    shutil.copy(changed, changed.with_name("00060.png"))
    assert len(load_dataset(image_folder).train_labels) == 61
    changed.unlink()
    assert len(load_dataset(image_folder).train_labels) == 60
    assert len(visible(project_root / "data")) == 1  # the older caches and the unfinished one are gone


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "emptied", "floats", "other images"])
def test_a_damaged_cache_is_rebuilt(image_folder, decoded, project_root, damage):
    expected = load_dataset(image_folder).fingerprint
    (cache,) = (project_root / "data").glob("*.npz")
    content = bytearray(cache.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    with np.load(cache) as stored:
        floats = {split: pixels.astype(np.float32) for split, pixels in stored.items()}
        fewer = {split: pixels[1:] for split, pixels in stored.items()}
    if damage in ("floats", "other images"):
        np.savez(cache, **{"floats": floats, "other images": fewer}[damage])
    else:
        cache.write_bytes({"flipped byte": content, "cut short": content[:middle], "emptied": b""}[damage])
    with pytest.warns(UserWarning, match="cannot be used .*decoding the images again"):
        assert load_dataset(image_folder).fingerprint == expected
    assert load_dataset(image_folder).fingerprint == expected
    assert len(decoded) == 180  # the rebuilt cache works


def test_without_room_for_a_cache_the_images_still_load(image_folder, project_root, toy):
    (project_root / "data").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be stored"):
        dataset = load_dataset(image_folder)
    np.testing.assert_array_equal(dataset.train_images, toy.train_images)


# --- the official archive -------------------------------------------------------------------------------------------


def md5_of(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def official(toy, monkeypatch):
    """The bytes of a tiny archive of 60 images in the official layout; its checksums become the expected ones."""
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    images = [*np.split(toy.train_images[:50], 5), toy.test_images[:10]]
    labels = [*np.split(toy.train_labels[:50], 5), toy.test_labels[:10]]
    files = {}
    for name, pixels, targets in zip(names, images, labels):
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)  # CIFAR-10 stores them channel by channel
        files[name] = pickle.dumps({"data": rows, "labels": targets.tolist()})
    files["batches.meta"] = pickle.dumps({"label_names": ["airplane", "automobile", *CIFAR10_CLASSES[2:]]})

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{BATCHES}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    md5s = {name: md5_of(content) for name, content in files.items()}
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


def test_a_folder_that_holds_the_archive_or_is_the_batches_folder_works(own, toy):
    assert_toy(load_dataset(own), toy)
    assert visible(own) == [BATCHES, CIFAR10.filename]
    assert_toy(load_dataset(own / BATCHES), toy)


def test_a_damaged_archive_is_named_and_leaves_nothing(own, official):
    (own / CIFAR10.filename).write_bytes(official[: len(official) // 2])
    with pytest.raises(DatasetError, match=f"{CIFAR10.filename} is damaged or a different file: .*delete it"):
        load_dataset(own)
    assert visible(own) == [CIFAR10.filename]


@pytest.mark.parametrize("damage", ["changed", "missing"])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_official_batch_is_noticed_by_its_checksum(own, name, damage):
    load_dataset(own)
    path = own / BATCHES / name
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DatasetError, match=f"{BATCHES} is damaged or incomplete .*delete that folder and run again"):
        load_dataset(own)


CLOSED = {  # what is closed in a folder with the archive: its permissions, and the message
    CIFAR10.filename: (0, rf"{CIFAR10.filename} cannot be read \(Permission denied\): check its permissions"),
    f"{BATCHES}/test_batch": (0, r"test_batch cannot be read \(Permission denied\): check its permissions"),
    ".": (0o555, r"CIFAR-10 cannot be stored in .*own \(Permission denied\): make it writable"),
}


@pytest.mark.parametrize("closed", CLOSED)
def test_without_permission_nothing_is_called_damaged(own, closed):
    if BATCHES in closed:
        load_dataset(own)
    mode, words = CLOSED[closed]
    with pytest.raises(DatasetError, match=words):
        load_as_nobody(own, closed, mode)


# --- download -------------------------------------------------------------------------------------------------------


def slowly(chunks, seconds):
    for chunk in chunks:
        time.sleep(seconds)
        yield chunk


# What a host answers: status, headers, body in chunks. Content-Length is the archive's unless stated.
REDIRECT = {"Content-Length": 0}
GOOD = {
    "good": lambda content: (200, {}, [content]),
    "gzip-as-encoding": lambda content: (200, {"Content-Encoding": "gzip"}, [content]),  # as some hosts do
    "moved": lambda content: (302, {**REDIRECT, "Location": "/good"}, []),
    "late": lambda content: (200, {}, slowly([content], 0.5)),
}
FAILING = {  # and what the message about it says
    "missing": (lambda content: (404, REDIRECT, []), "404"),
    "other": (lambda content: (200, {}, [content[:-1] + b"x"]), "MD5 hash of downloaded file"),
    "dropped": (lambda content: (200, {}, [content[:1000]]), ""),
    "garbage": (lambda content: (None, {}, [b"this is not HTTP\r\n\r\n"]), ""),
    "bad-length": (lambda content: (200, {"Content-Length": "abc"}, [content]), "abc"),
    "bad-location": (lambda content: (302, {**REDIRECT, "Location": "http://[half-an-address/"}, []), "Invalid IPv6"),
    "other-scheme": (lambda content: (302, {**REDIRECT, "Location": "file:///etc/passwd"}, []), "file:///etc/passwd"),
    "circle": (lambda content: (302, {**REDIRECT, "Location": "/circle"}, []), "30 redirects"),
    "trickle": (
        lambda content: (200, {}, slowly((bytes([byte]) for byte in content), 0.05)),
        "it sends 0.0 kB/s, too slow: 50 are needed",
    ),
    "endless": (
        lambda content: (200, {"Content-Length": None}, itertools.repeat(bytes(1 << 16))),
        "it sends more than the archive's",
    ),
}
ANSWERS = {**GOOD, **{name: answer for name, (answer, _) in FAILING.items()}}


@pytest.fixture
def host(official):
    """A web server on this machine: ``host.url(name)`` gives that one of ``ANSWERS``; ``host.requests`` grows."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            requests.append(name)
            if name.startswith("http:"):  # a client that takes this for a proxy
                name = "good"
            status, headers, chunks = ANSWERS[name](official)
            with contextlib.suppress(ConnectionError):  # the client gave up
                if status:
                    self.send_response(status)
                    for header, value in {"Content-Length": len(official), **headers}.items():
                        self.send_header(header, value) if value is not None else None
                    self.end_headers()
                for chunk in chunks:
                    self.wfile.write(chunk)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    yield types.SimpleNamespace(requests=requests, address=address, url=lambda name: f"http://{address}/{name}")
    server.shutdown()
    server.server_close()


@pytest.fixture
def data(project_root):
    """Where downloads go."""
    return project_root / "data"


@pytest.fixture
def publish(monkeypatch):
    """``publish(*urls)`` puts other hosts in the place of the real ones."""
    return lambda *urls: monkeypatch.setattr(archive, "ARCHIVE_URLS", urls)


@pytest.mark.parametrize("name", ["good", "moved", "gzip-as-encoding"])
def test_the_archive_is_downloaded_once_into_data(host, data, publish, toy, name):
    publish(host.url(name), host.url("good"))
    assert_toy(load_dataset(), toy)
    asked = list(host.requests)
    assert asked == ([name, "good"] if name == "moved" else [name])
    assert_toy(load_dataset(source="official"), toy)
    assert host.requests == asked  # it was there already
    assert visible(data) == [BATCHES]  # neither the archive nor an unfinished file is left


@pytest.mark.timeout(120)
@pytest.mark.parametrize("failing", FAILING)
def test_a_failing_host_is_reported_and_the_next_one_tried(host, official, data, publish, toy, monkeypatch, failing):
    monkeypatch.setattr(archive, "STALL_SECONDS", 2.0)  # enough on a busy machine
    monkeypatch.setattr(archive, "ARCHIVE_BYTES", len(official))
    publish(host.url(failing))
    with pytest.raises(DatasetError, match="CIFAR-10 could not be downloaded") as error:
        load_dataset()  # never the digits: the host answered
    assert not isinstance(error.value, OfflineError)
    for words in (f"/{failing}: ", FAILING[failing][1], f"put a good copy of {CIFAR10.filename} in a folder"):
        assert words in str(error.value)
    assert visible(data) == []

    publish(host.url(failing), host.url("good"))
    assert_toy(load_dataset(), toy)
    assert visible(data) == [BATCHES]


def test_an_interrupted_download_leaves_no_file(host, data, publish, monkeypatch):
    class InterruptedBar(archive.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(archive, "tqdm", InterruptedBar)
    publish(host.url("good"))
    with pytest.raises(KeyboardInterrupt):
        load_dataset()
    assert visible(data) == []


@pytest.mark.timeout(60)
def test_what_a_killed_download_left_is_removed_and_nothing_else(host, data, publish):
    data.mkdir()
    (data / "tmp0123.part").write_text("somebody else's")
    publish(host.url("trickle"))

    def download():
        archive.tqdm.set_lock(threading.RLock())  # it may be killed while holding one that it shares with this process
        archive.download(data)

    victim = multiprocessing.get_context("fork").Process(target=download)
    victim.start()
    while not any(path.is_file() for path in data.rglob(".cifar-10-*/*")):
        time.sleep(0.01)
    victim.kill()
    victim.join()
    assert len(visible(data)) == 2
    publish(host.url("good"))
    archive.download(data)
    assert visible(data) == [BATCHES, "tmp0123.part"]


def test_two_processes_that_need_it_download_it_once(host, data, publish, toy):
    publish(host.url("late"))
    threads = [threading.Thread(target=archive.download, args=(data,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert host.requests == ["late"]
    assert_toy(load_dataset(), toy)


def test_a_folder_where_nothing_can_be_stored_is_named(host, data, publish):
    data.write_text("a file where the folder should be")
    publish(host.url("good"))
    with pytest.raises(DatasetError, match=r"cannot be stored in .*data \(File exists\): make it writable and k"):
        load_dataset()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_not_blamed_on_the_hosts(host, publish, monkeypatch):
    monkeypatch.setattr(archive, "open", lambda path, mode: open("/dev/full", "wb", buffering=0), raising=False)
    publish(host.url("good"), host.url("good"))
    with pytest.raises(DatasetError, match=r"cannot be stored in .*data \(No space left on device\)"):
        load_dataset()
    assert host.requests == ["good"]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_proxy_that_the_environment_sets_is_used(host, tmp_path, publish, monkeypatch):
    url = "http://archive.invalid/cifar.tar.gz"  # a name that no resolver knows
    publish(url)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", host.address)
    archive.download(tmp_path / "first")
    assert host.requests == [url]
    assert (tmp_path / "first" / BATCHES).is_dir()
    monkeypatch.setenv("no_proxy", "archive.invalid")
    with pytest.raises(OfflineError):
        archive.download(tmp_path / "second")
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://proxy:no-port")
    with pytest.raises(OfflineError):
        archive.download(tmp_path / "second")


# --- no network -----------------------------------------------------------------------------------------------------


def test_offline_the_digits_stand_in_with_a_banner_unless_the_official_images_are_required(
    publish, project_root, capsys
):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        publish(f"http://127.0.0.1:{unused.getsockname()[1]}/archive")
        assert load_dataset().source == "digits"
        banner = capsys.readouterr().out
        for words in ("NOT CIFAR-10", "no answer from 127.0.0.1", "$CIFAR10_DIR", "nothing is written to Results/"):
            assert words in banner
        with pytest.raises(OfflineError, match=r"no answer from 127.0.0.1.* connect to the internet, or set"):
            load_dataset(source="official")
    assert os.listdir(project_root) == []


@pytest.fixture
def hanging(monkeypatch):
    """A URL whose name lookup hangs, as it may without a network; no time limit applies to it."""
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
def test_a_hanging_name_lookup_delays_neither_another_host_nor_the_stand_in(hanging, host, publish, toy, monkeypatch):
    assert archive.CONNECT_SECONDS < 10
    monkeypatch.setattr(archive, "CONNECT_SECONDS", 2.0)
    publish(hanging, hanging)
    assert load_dataset().source == "digits"
    publish(hanging, host.url("good"))
    assert_toy(load_dataset(), toy)


def test_a_host_may_take_the_whole_time_to_answer_even_if_another_refuses_at_once(host, publish, toy, monkeypatch):
    connect = socket.create_connection

    def late(address, *args, **kwargs):
        if address[0].endswith(".invalid"):
            raise ConnectionRefusedError
        time.sleep(1.5)
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(archive, "CONNECT_SECONDS", 2.5)
    monkeypatch.setattr(socket, "create_connection", late)
    publish(host.url("good"), "https://refuses.invalid/archive")
    assert_toy(load_dataset(), toy)


def test_the_digits_are_shaped_like_cifar10():
    dataset = load_dataset(source="digits")
    assert dataset.classes == tuple("0123456789")
    assert len(dataset.train_labels) + len(dataset.test_labels) == 1797
    assert (np.bincount(dataset.test_labels) == 30).all()
    assert (dataset.train_images.min(), dataset.train_images.max()) == (0, 255)
    assert dataset.train_images.shape[1:] == dataset.test_images.shape[1:] == (32, 32, 3)
    assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (np.uint8, np.int64)


# --- real images ----------------------------------------------------------------------------------------------------


def test_real_cifar10_is_complete(cifar10):
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
