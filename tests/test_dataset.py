"""Finding the data: folders, downloads, the stand-in; and what is said when something is wrong with it."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import struct
import tarfile
import threading
import urllib.request
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from utils import dataset as dataset_module
from utils.dataset import (
    ARCHIVE_MD5,
    ARCHIVE_NAME,
    ARCHIVE_URLS,
    CIFAR10_CLASSES,
    OFFLINE_AFTER_SECONDS,
    DatasetError,
    ImageDataset,
    OfflineError,
    balanced_indices,
    download,
    load_dataset,
    read_image,
)

BATCHES = CIFAR10.base_folder


@pytest.fixture(autouse=True)
def project_root(tmp_path, monkeypatch):
    """A project folder of the test's own, so that no cache or download lands in the real one."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setattr(dataset_module, "PROJECT_ROOT", root)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    return root


def save_images(folder, sizes, colours):
    """One plain PNG for each of ``sizes`` in ``folder/<class>/`` for each of ``colours``, numbered across classes."""
    index = 0
    for size in sizes:
        for name, colour in colours.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, colour).save(folder / name / f"{index:05d}.png")
            index += 1


# --- image folders --------------------------------------------------------------------------------------------------


def test_an_image_folder_comes_back_pixel_for_pixel_in_the_order_of_its_numbers(image_folder, toy):
    dataset = load_dataset(image_folder)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(toy, name))
    assert dataset.classes == CIFAR10_CLASSES
    assert dataset.source == "image-folder"
    assert "60 train and 30 test images" in dataset.description
    assert not dataset.is_stand_in


def test_long_class_names_become_the_short_ones_in_the_official_order(image_folder, toy):
    for split in ("train", "test"):
        (image_folder / split / "plane").rename(image_folder / split / "airplane")
        (image_folder / split / "car").rename(image_folder / split / "automobile")
    dataset = load_dataset(image_folder)
    assert dataset.classes == CIFAR10_CLASSES
    np.testing.assert_array_equal(dataset.train_labels, toy.train_labels)


def test_a_class_by_both_its_names_is_refused(image_folder):
    (image_folder / "train" / "airplane").mkdir()
    Image.new("RGB", (32, 32)).save(image_folder / "train" / "airplane" / "00060.png")
    with pytest.raises(DatasetError, match="the classes airplane and plane, which are one class by two names: put"):
        load_dataset(image_folder)


def test_images_are_uint8_and_labels_int64_in_every_source(image_folder):
    for dataset in (load_dataset(image_folder), load_dataset(source="digits")):
        for split in ("train", "test"):
            images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
            assert images.dtype == np.uint8
            assert images.shape == (len(labels), 32, 32, 3)
            assert images.flags["C_CONTIGUOUS"]
            assert labels.dtype == np.int64


def test_own_classes_in_other_sizes_are_cropped_to_a_square_and_resized(tmp_path):
    colours = {"poppy": (200, 30, 30), "cornflower": (40, 60, 210), "daisy": (250, 250, 240)}
    sizes = [(32, 32), (64, 40), (20, 90), (7, 7)]
    save_images(tmp_path / "own" / "train", sizes, colours)
    save_images(tmp_path / "own" / "test", sizes[:1], colours)
    dataset = load_dataset(tmp_path / "own")
    assert dataset.classes == ("cornflower", "daisy", "poppy")
    assert dataset.train_images.shape == (12, 32, 32, 3)
    assert dataset.description.startswith("own images in 3 classes")
    for image, label in zip(dataset.train_images, dataset.train_labels):
        assert (image == colours[dataset.classes[label]]).all()


def test_the_crop_is_the_central_square(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :32], wide[:, 32:64], wide[:, 64:] = 10, 100, 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png") == 100).all()
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (read_image(tmp_path / "tall.png") == 100).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode).save(tmp_path / f"image.{suffix}")
    image = read_image(tmp_path / f"image.{suffix}")
    assert image.shape == (32, 32, 3)
    assert (image == 255).all()


def test_other_files_and_hidden_folders_are_passed_over(image_folder, toy):
    (image_folder / "train" / "notes.txt").write_text("bought at the market")
    (image_folder / "train" / "cat" / "Thumbs.db").write_bytes(b"\0")
    (image_folder / "train" / ".thumbnails").mkdir()
    shutil.copy(next((image_folder / "train" / "cat").glob("*.png")), image_folder / "train" / ".thumbnails")
    assert len(load_dataset(image_folder).train_labels) == len(toy.train_labels)


# --- the cache of decoded images ------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The files that were really decoded, in a list that grows."""
    files = []

    def counting(path):
        files.append(path)
        return read_image(path)

    monkeypatch.setattr(dataset_module, "read_image", counting)
    return files


def test_images_are_decoded_once_and_then_come_from_the_cache(image_folder, decoded, project_root):
    first = load_dataset(image_folder)
    assert len(decoded) == 90
    second = load_dataset(image_folder)
    assert len(decoded) == 90
    assert first.fingerprint() == second.fingerprint()
    assert [path.suffix for path in (project_root / "data").iterdir()] == [".npz"]  # nothing partial beside it


def test_a_changed_added_or_removed_image_is_decoded_anew(image_folder, decoded, project_root):
    load_dataset(image_folder)
    changed = sorted((image_folder / "train" / "cat").glob("*.png"))[0]
    Image.new("RGB", (32, 32), (1, 2, 3)).save(changed)
    index = int(changed.stem)
    assert (load_dataset(image_folder).train_images[index] == (1, 2, 3)).all()
    assert len(decoded) == 180

    shutil.copy(changed, changed.with_name("00060.png"))
    assert len(load_dataset(image_folder).train_labels) == 61
    changed.unlink()
    assert len(load_dataset(image_folder).train_labels) == 60
    assert len(list((project_root / "data").iterdir())) == 1  # caches of what the folder once held are gone


def test_folders_keep_a_cache_each(image_folder, decoded, tmp_path):
    shutil.copytree(image_folder, tmp_path / "other")
    for folder in (image_folder, tmp_path / "other", image_folder):
        load_dataset(folder)
    assert len(decoded) == 180


@pytest.mark.parametrize("damage", ["flipped bytes", "cut short", "emptied", "another shape"])
def test_a_damaged_cache_is_announced_and_rebuilt(image_folder, decoded, project_root, damage):
    expected = load_dataset(image_folder).fingerprint()
    (cache,) = (project_root / "data").iterdir()
    content = bytearray(cache.read_bytes())
    if damage == "another shape":
        np.savez(cache, train=np.zeros((1, 32, 32, 3), np.uint8), test=np.zeros((1, 32, 32, 3), np.uint8))
        assert load_dataset(image_folder).fingerprint() == expected
    else:
        if damage == "flipped bytes":
            content[len(content) // 2] ^= 0xFF
        else:
            content = content[: len(content) // 2] if damage == "cut short" else b""
        cache.write_bytes(content)
        with pytest.warns(UserWarning, match="is damaged .*decoding the images again"):
            assert load_dataset(image_folder).fingerprint() == expected
    assert len(decoded) == 180
    assert load_dataset(image_folder).fingerprint() == expected
    assert len(decoded) == 180  # the rebuilt cache works


def test_where_no_cache_can_be_kept_the_images_still_load(image_folder, project_root, toy):
    (project_root / "data").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="could not be kept"):
        dataset = load_dataset(image_folder)
    np.testing.assert_array_equal(dataset.train_images, toy.train_images)


# --- what can be wrong with a folder --------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match=r"no folder .*nowhere: check the path given as root, --data-dir or \$CIFAR"):
        load_dataset(tmp_path / "nowhere")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path / "gone"))
    with pytest.raises(DatasetError, match=r"no folder .*gone"):
        load_dataset()


def test_an_empty_folder_is_told_what_it_should_hold(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DatasetError, match="empty holds nothing: expected torchvision's cifar-10-batches-py/, or image"
    ):
        load_dataset(tmp_path / "empty")


def test_a_folder_of_something_else_is_told_what_was_found(tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.mp4").touch()
    with pytest.raises(DatasetError, match=r"holiday holds beach.mp4: expected"):
        load_dataset(tmp_path / "holiday")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_images_is_named(image_folder, split):
    shutil.rmtree(image_folder / split)
    (image_folder / split / "cat").mkdir(parents=True)
    with pytest.raises(DatasetError, match=rf"{split} holds no images: expected {split}/<class>/\*.png"):
        load_dataset(image_folder)


def test_a_test_class_that_train_does_not_have_is_named(image_folder):
    (image_folder / "test" / "truck").rename(image_folder / "test" / "tractor")
    with pytest.raises(DatasetError, match=r"class 'tractor' has no folder in .*train, which has plane, car"):
        load_dataset(image_folder)


def test_a_single_class_is_refused(tmp_path):
    for split in ("train", "test"):
        save_images(tmp_path / "one" / split, [(32, 32)], {"rose": (255, 0, 0)})
    with pytest.raises(DatasetError, match="only the class 'rose': a classifier needs two or more"):
        load_dataset(tmp_path / "one")


def test_a_truncated_png_is_named(image_folder):
    path = image_folder / "train" / "frog" / "00006.png"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DatasetError, match=r"00006.png is damaged \(.*\): replace it with a good copy or remove it"):
        load_dataset(image_folder)


def test_a_file_that_is_no_image_is_named(image_folder):
    (image_folder / "train" / "frog" / "00006.png").write_text("<html>404</html>")
    with pytest.raises(DatasetError, match=r"00006.png is not an image that Pillow can read"):
        load_dataset(image_folder)


def test_a_png_that_claims_to_be_gigantic_is_named(tmp_path):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0))
    (tmp_path / "gigantic.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10))))
    with pytest.raises(DatasetError, match=r"gigantic.png is damaged .*exceeds limit"):
        read_image(tmp_path / "gigantic.png")


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"no file .*gone.png: check the path"):
        read_image(tmp_path / "gone.png")


@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_png_gives_pixels_or_a_message(tmp_path, position, value, cut):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    position %= len(content)
    if cut:
        content = content[:position]
    else:
        content[position] = value
    (tmp_path / "damaged.png").write_bytes(content)
    try:
        image = read_image(tmp_path / "damaged.png")
    except DatasetError:
        return
    assert image.shape == (32, 32, 3)


def test_a_source_is_insisted_on(image_folder):
    with pytest.raises(DatasetError, match="expected torchvision's"):
        load_dataset(image_folder, source="official")
    with pytest.raises(DatasetError, match=r"no folder is named: pass root=... or set \$CIFAR10_DIR"):
        load_dataset(source="image-folder")
    with pytest.raises(ValueError, match="source is 'mnist': choose 'auto', 'official', 'image-folder' or 'digits'"):
        load_dataset(image_folder, source="mnist")


def test_the_environment_names_a_folder_and_an_argument_overrides_it(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", str(image_folder))
    assert len(load_dataset().train_labels) == 60
    save_images(tmp_path / "own" / "train", [(32, 32)], {"a": (1, 1, 1), "b": (2, 2, 2)})
    save_images(tmp_path / "own" / "test", [(32, 32)], {"a": (1, 1, 1), "b": (2, 2, 2)})
    assert load_dataset(tmp_path / "own").classes == ("a", "b")


# --- the official archive -------------------------------------------------------------------------------------------


def md5_of(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class FakeArchive:
    """A tiny archive in the official layout, of 60 images, and its checksum."""

    def __init__(self, toy, monkeypatch):
        files = {}
        names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
        images = [*np.split(toy.train_images[:50], 5), toy.test_images[:10]]
        labels = [*np.split(toy.train_labels[:50], 5), toy.test_labels[:10]]
        for name, pixels, targets in zip(names, images, labels):
            rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)  # as CIFAR-10 stores them: channel by channel
            files[name] = pickle.dumps({"data": rows, "labels": targets.tolist()})
        files["batches.meta"] = pickle.dumps({"label_names": ["airplane", "automobile", *CIFAR10_CLASSES[2:]]})

        md5s = {name: md5_of(content) for name, content in files.items()}
        monkeypatch.setattr(CIFAR10, "train_list", [[name, md5s[name]] for name in names[:5]])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5s["test_batch"]]])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5s["batches.meta"]})

        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(f"{BATCHES}/{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        self.content = buffer.getvalue()
        self.md5 = md5_of(self.content)


@pytest.fixture
def archive(toy, monkeypatch):
    return FakeArchive(toy, monkeypatch)


class Host:
    """A web server on this machine. ``host.url(name)`` is served from ``host.files[name]``."""

    def __init__(self):
        self.files = {}
        self.requests = []
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                host.requests.append(name)
                if name == "garbage":
                    self.wfile.write(b"this is no HTTP\r\n\r\n")
                    return
                if name not in host.files:
                    self.send_error(404)
                    return
                content = host.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if name == "dropped" else content)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def url(self, name):
        return f"http://127.0.0.1:{self.server.server_port}/{name}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def host(archive):
    host = Host()
    host.files["good"] = archive.content
    yield host
    host.close()


@pytest.fixture
def closed_port():
    """The URL of a port on this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}/archive"


def publish(monkeypatch, urls, md5):
    """Let ``load_dataset`` download from ``urls`` instead of the real hosts."""
    monkeypatch.setattr(dataset_module, "download", functools.partial(download, urls=tuple(urls), md5=md5))


def assert_toy(dataset, toy):
    assert dataset.source == "official"
    assert dataset.classes == CIFAR10_CLASSES
    np.testing.assert_array_equal(dataset.train_images, toy.train_images[:50])
    np.testing.assert_array_equal(dataset.train_labels, toy.train_labels[:50])
    np.testing.assert_array_equal(dataset.test_images, toy.test_images[:10])
    np.testing.assert_array_equal(dataset.test_labels, toy.test_labels[:10])
    assert dataset.train_labels.dtype == np.int64


def test_the_archive_is_downloaded_once_into_data(host, archive, project_root, toy, monkeypatch):
    publish(monkeypatch, [host.url("good")], archive.md5)
    assert_toy(load_dataset(), toy)
    assert_toy(load_dataset(source="official"), toy)
    assert host.requests == ["good"]  # the second time it was there already
    assert os.listdir(project_root / "data") == [BATCHES]  # neither the archive nor a partial file is left


def test_the_archive_is_read_from_a_file_url(archive, tmp_path, toy):
    (tmp_path / "copy.tar.gz").write_bytes(archive.content)
    download(tmp_path / "data", ((tmp_path / "copy.tar.gz").as_uri(),), archive.md5)
    assert_toy(load_dataset(tmp_path / "data"), toy)


def test_a_folder_that_holds_the_archive_or_is_the_batches_folder_works(archive, tmp_path, toy, monkeypatch):
    monkeypatch.setattr(dataset_module, "ARCHIVE_MD5", archive.md5)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / ARCHIVE_NAME).write_bytes(archive.content)
    assert_toy(load_dataset(tmp_path / "own"), toy)
    assert_toy(load_dataset(tmp_path / "own" / BATCHES), toy)


@pytest.mark.parametrize("first", ["other", "missing", "dropped", "garbage", "closed"])
def test_a_host_that_fails_is_passed_over_for_the_next(host, archive, tmp_path, toy, closed_port, first):
    host.files["other"] = archive.content + b"tail"  # a readable archive, of another checksum
    host.files["dropped"] = archive.content
    url = closed_port if first == "closed" else host.url(first)
    download(tmp_path / "data", (url, host.url("good")), archive.md5)
    assert_toy(load_dataset(tmp_path / "data"), toy)
    assert host.requests[-1] == "good"
    assert os.listdir(tmp_path / "data") == [BATCHES]


def test_a_good_host_is_the_only_one_asked(host, archive, tmp_path):
    download(tmp_path / "data", (host.url("good"), host.url("second")), archive.md5)
    assert host.requests == ["good"]


def test_a_wrong_md5_everywhere_is_reported_host_by_host_and_nothing_is_kept(host, archive, tmp_path, project_root):
    # A whole, readable archive with another checksum: taken by neither path.
    with pytest.raises(DatasetError, match="could not be downloaded") as error:
        download(tmp_path / "data", (host.url("good"), host.url("missing")), ARCHIVE_MD5)
    message = str(error.value)
    assert f"/good: its MD5 is {archive.md5}, expected {ARCHIVE_MD5}" in message
    assert "/missing: HTTP Error 404" in message
    assert f"put a good copy of {ARCHIVE_NAME} in a folder and set $CIFAR10_DIR" in message
    assert not isinstance(error.value, OfflineError)
    assert os.listdir(tmp_path / "data") == []


def test_damaged_downloads_are_an_error_and_never_replaced_by_digits(host, project_root, monkeypatch):
    publish(monkeypatch, [host.url("good")], "0" * 32)
    with pytest.raises(DatasetError, match="expected 0000"):
        load_dataset()


def test_an_interrupted_download_leaves_no_file(host, archive, tmp_path, monkeypatch):
    class InterruptedBar(dataset_module.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(dataset_module, "tqdm", InterruptedBar)
    with pytest.raises(KeyboardInterrupt):
        download(tmp_path / "data", (host.url("good"),), archive.md5)
    assert os.listdir(tmp_path / "data") == []


def test_the_real_archive_s_checksum_and_mirrors_are_the_defaults():
    assert download.__defaults__ == (ARCHIVE_URLS, ARCHIVE_MD5)
    assert CIFAR10.tgz_md5 == ARCHIVE_MD5
    assert ARCHIVE_URLS[-1] == CIFAR10.url.replace("http://", "https://")  # the throttled official host comes last
    assert len(ARCHIVE_URLS) > 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_a_corrupt_archive_is_named_and_leaves_nothing(archive, tmp_path, share, damage):
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / ARCHIVE_NAME
    at = int(share * len(archive.content))
    rest = b"" if damage == "cut short" else b"\xff" * 64 + archive.content[at + 64 :]
    path.write_bytes(archive.content[:at] + rest)
    with pytest.raises(DatasetError, match=f"{ARCHIVE_NAME} is damaged or another file: its MD5 is .*delete it and"):
        load_dataset(tmp_path / "own")
    assert os.listdir(tmp_path / "own") == [ARCHIVE_NAME]


@pytest.mark.parametrize("content", ["no gzip", "cut short", "overwritten", "no tar"])
def test_what_cannot_be_unpacked_is_no_whole_archive(archive, tmp_path, content):
    tar = gzip.decompress(archive.content)
    compressor = zlib.compressobj(wbits=31)
    damaged = {
        "no gzip": b"<html>captive portal</html>",
        "cut short": archive.content[: len(archive.content) // 2],
        # A good beginning, longer than any read buffer and up to a byte boundary, then what no deflate stream holds.
        "overwritten": compressor.compress(tar[:150_000]) + compressor.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 64,
        "no tar": gzip.compress(b"plain text" * 1000),
    }[content]
    (tmp_path / "copy.tar.gz").write_bytes(damaged)
    with pytest.raises(DatasetError, match=r"is not a whole tar.gz archive .*delete it and fetch"):
        download(tmp_path / "data", ((tmp_path / "copy.tar.gz").as_uri(),), md5_of(damaged))
    assert os.listdir(tmp_path / "data") == []


def save_archive(path, monkeypatch, member):
    """A valid archive of one empty file, under the checksum that is asked for."""
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(member))
    monkeypatch.setattr(dataset_module, "ARCHIVE_MD5", md5_of(path.read_bytes()))


def test_an_archive_of_something_else_is_refused(tmp_path, monkeypatch):
    save_archive(tmp_path / "own" / ARCHIVE_NAME, monkeypatch, "holiday/beach.jpg")
    with pytest.raises(DatasetError, match="holds no cifar-10-batches-py/: it is not CIFAR-10's python archive"):
        load_dataset(tmp_path / "own")
    assert os.listdir(tmp_path / "own") == [ARCHIVE_NAME]


def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    save_archive(tmp_path / "own" / ARCHIVE_NAME, monkeypatch, "../../escaped")
    with pytest.raises(DatasetError, match=r"is not a whole tar.gz archive"):
        load_dataset(tmp_path / "own")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("damage", ["changed", "missing"])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_official_batch_is_noticed_by_its_checksum(archive, tmp_path, name, damage):
    download_folder = tmp_path / "data"
    (tmp_path / "copy.tar.gz").write_bytes(archive.content)
    download(download_folder, ((tmp_path / "copy.tar.gz").as_uri(),), archive.md5)
    path = download_folder / BATCHES / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DatasetError, match=f"{BATCHES} is damaged or incomplete .*delete that folder and run again"):
        load_dataset(download_folder)


def test_behind_a_proxy_the_proxy_is_asked(host, archive, tmp_path, monkeypatch):
    url = "http://archive.invalid/cifar.tar.gz"  # a name that no resolver knows
    host.files[url] = archive.content
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{host.server.server_port}")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib reads the variables once a process
    download(tmp_path / "data", (url,), archive.md5)
    assert host.requests == [url]
    assert (tmp_path / "data" / BATCHES).is_dir()
    monkeypatch.setenv("no_proxy", "archive.invalid")
    with pytest.raises(OfflineError):
        download(tmp_path / "data", (url,), archive.md5)


# --- no network -----------------------------------------------------------------------------------------------------


def test_offline_the_digits_stand_in_with_a_banner(closed_port, project_root, monkeypatch, capsys):
    publish(monkeypatch, [closed_port], ARCHIVE_MD5)
    dataset = load_dataset()
    assert dataset.source == "digits"
    assert dataset.is_stand_in
    assert "NOT CIFAR-10" in dataset.description
    banner = capsys.readouterr().out
    assert "NOT CIFAR-10" in banner
    assert "no answer from 127.0.0.1" in banner
    assert "$CIFAR10_DIR" in banner
    assert "nothing is written to Results/" in banner
    assert os.listdir(project_root) == []


def test_offline_the_official_images_are_not_replaced_when_insisted_on(closed_port, monkeypatch):
    publish(monkeypatch, [closed_port], ARCHIVE_MD5)
    with pytest.raises(OfflineError, match=r"no answer from 127.0.0.1.* connect to the internet, or set \$CIFAR10_DIR"):
        load_dataset(source="official")


@pytest.mark.timeout(60)
def test_a_name_lookup_that_hangs_does_not_hold_up_the_stand_in(monkeypatch):
    released = threading.Event()

    def hang(*args, **kwargs):
        released.wait()  # as a resolver without a network can: no time limit reaches it
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setattr(dataset_module, "OFFLINE_AFTER_SECONDS", 0.1)
    try:
        assert load_dataset().source == "digits"
    finally:
        released.set()
    assert OFFLINE_AFTER_SECONDS < 10


def test_a_host_that_hangs_does_not_hide_one_that_answers(host, archive, tmp_path, toy, monkeypatch):
    released = threading.Event()
    connect = socket.create_connection

    def hang_for_one(address, *args, **kwargs):
        if address[0] == "hangs.invalid":
            released.wait()
            raise OSError
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", hang_for_one)
    monkeypatch.setattr(dataset_module, "OFFLINE_AFTER_SECONDS", 2.0)
    try:
        download(tmp_path / "data", ("https://hangs.invalid/archive", host.url("good")), archive.md5)
    finally:
        released.set()
    assert_toy(load_dataset(tmp_path / "data"), toy)


def test_the_digits_are_shaped_like_cifar10():
    dataset = load_dataset(source="digits")
    assert dataset.classes == tuple("0123456789")
    assert len(dataset.train_labels) + len(dataset.test_labels) == 1797
    assert (np.bincount(dataset.test_labels) == 30).all()
    assert dataset.train_images.max() == 255
    assert dataset.train_images.min() == 0


# --- subsets --------------------------------------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    count=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_balanced_indices_are_distinct_sorted_and_balanced(labels, count, seed):
    labels = np.array(labels)
    assume(count <= len(labels))
    chosen = balanced_indices(labels, count, seed)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    names, sizes = np.unique(labels, return_counts=True)
    shares = np.array([(labels[chosen] == name).sum() for name in names])
    unfinished = shares[shares < sizes]  # a class may have less than the others only if it gave all it has
    assert shares.max() - unfinished.min(initial=shares.max()) <= 1
    np.testing.assert_array_equal(chosen, balanced_indices(labels, count, seed))


def test_too_large_a_subset_names_the_limit():
    with pytest.raises(DatasetError, match="a subset of 56 images of 55: ask for at most 55"):
        balanced_indices(np.array([0] * 5 + [1] * 50), 56, seed=0)


def test_unbalanced_own_images_can_be_subset():
    labels = np.array([0] * 5 + [1] * 50 + [2] * 50)
    assert np.bincount(labels[balanced_indices(labels, 30, seed=0)]).tolist() == [5, 13, 12]


def numbered_dataset(count, classes=4):
    """Images that carry their own index, so that a split's pixels say which images it took."""
    index = np.arange(count)
    images = np.zeros((count, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = index % 256, index // 256
    names = tuple(f"class {number}" for number in range(classes))
    return ImageDataset(images, index % classes, images[:classes], index[:classes], names, "image-folder", "numbered")


def numbers_of(images):
    return images[:, 0, 0, 0].astype(int) + 256 * images[:, 0, 0, 1].astype(int)


@given(count=st.integers(40, 400), held=st.integers(4, 36), seed=st.integers(0, 100))
@settings(max_examples=40)
def test_a_holdout_takes_balanced_train_images_out_of_train(count, held, seed):
    dataset = numbered_dataset(count)
    split = dataset.holdout(held, seed)
    train, test = numbers_of(split.train_images), numbers_of(split.test_images)
    assert len(test) == held
    assert set(train) | set(test) == set(range(count))
    assert not set(train) & set(test)
    np.testing.assert_array_equal(split.train_labels, train % 4)  # every image keeps its label
    np.testing.assert_array_equal(split.test_labels, test % 4)
    shares = np.bincount(split.test_labels, minlength=4)
    assert shares.max() - shares.min() <= 1
    assert f"{held:,} train images held out" in split.description


@given(train=st.integers(4, 100), test=st.integers(4, 30), seed=st.integers(0, 100))
@settings(max_examples=40)
def test_a_subset_is_balanced_and_keeps_images_with_their_labels(train, test, seed):
    dataset = numbered_dataset(120)
    dataset = ImageDataset(
        dataset.train_images,
        dataset.train_labels,
        dataset.train_images[:40],
        dataset.train_labels[:40],
        dataset.classes,
        dataset.source,
        dataset.description,
    )
    small = dataset.subset(train, test, seed)
    for images, labels, count in (
        (small.train_images, small.train_labels, train),
        (small.test_images, small.test_labels, test),
    ):
        assert len(labels) == count == len(set(numbers_of(images)))
        np.testing.assert_array_equal(labels, numbers_of(images) % 4)
        shares = np.bincount(labels, minlength=4)
        assert shares.max() - shares.min() <= 1
        assert images.dtype == np.uint8


def test_a_subset_at_least_as_large_as_the_set_is_the_set(toy):
    for same in (toy.subset(), toy.subset(60, 30), toy.subset(10_000, 10_000)):
        assert same.train_images is toy.train_images
        assert same.test_images is toy.test_images


def test_a_fingerprint_changes_with_one_pixel_one_label_or_one_name(toy):
    def changed(**arrays):
        values = {**vars(toy), **arrays}
        return ImageDataset(**values).fingerprint()

    pixels, labels = toy.test_images.copy(), toy.train_labels.copy()
    pixels[7, 3, 5, 1] ^= 1
    labels[11] = (labels[11] + 1) % 10
    expected = toy.fingerprint()
    assert changed() == expected
    assert len({expected, changed(test_images=pixels), changed(train_labels=labels)}) == 3
    assert changed(classes=("ship", *toy.classes[1:])) != expected
    assert changed(description="another one", source="official") == expected  # the data alone


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
