"""The official archive, its download and the digits: right pixels, or a clear message."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import resource
import shutil
import socket
import tarfile
import threading
import types

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from utils.dataset import load_dataset
from utils.sources import CIFAR10_CLASSES, DatasetError, archive
from utils.sources.archive import OfflineError

BATCHES = CIFAR10.base_folder

pytestmark = pytest.mark.usefixtures("project_root")


# --- the official archive ---------------------------------------------------------------------------------------------


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


@pytest.fixture
def data(project_root):
    """Where downloads go."""
    (project_root / "data").mkdir()
    return project_root / "data"


def test_an_archive_put_into_data_by_hand_is_used(official, data, toy, monkeypatch):
    monkeypatch.setattr(archive, "ARCHIVE_URLS", ())
    (data / CIFAR10.filename).write_bytes(official)
    assert_toy(load_dataset(), toy)
    assert_toy(load_dataset(data / BATCHES), toy)
    shutil.rmtree(data / BATCHES)
    (data / CIFAR10.filename).write_bytes(official[:-100])
    with pytest.raises(DatasetError, match=f"{CIFAR10.filename} is damaged or another file .*delete it and download"):
        load_dataset()
    assert os.listdir(data) == [CIFAR10.filename]


class Trap:
    """Unpickled, it creates a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_batch_is_noticed_before_it_is_unpickled(official, tmp_path, damage):
    (tmp_path / CIFAR10.filename).write_bytes(official)
    load_dataset(tmp_path)
    batch = tmp_path / BATCHES / "data_batch_3"
    batch.unlink() if damage == "missing" else batch.write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    with pytest.raises(DatasetError, match=f"{BATCHES} is damaged or incomplete: delete it and run again"):
        load_dataset(tmp_path)
    assert not (tmp_path / "trap").exists()


# --- download ---------------------------------------------------------------------------------------------------------

ANSWERS = {  # what a host answers: status, and body
    "good": lambda content: (200, content),
    "gone": lambda content: (404, b""),
    "other": lambda content: (200, content[:-1] + b"x"),
    "dropped": lambda content: (200, content[:1000]),
}


@pytest.fixture
def host(official):
    """A web server on this machine: ``host.url(name)`` gives that one of ``ANSWERS``; ``host.requests`` grows."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path.lstrip("/"))
            status, body = ANSWERS[requests[-1]](official)
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", str(len(official) if body else 0))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield types.SimpleNamespace(requests=requests, url=lambda name: f"http://127.0.0.1:{server.server_port}/{name}")
    server.shutdown()
    server.server_close()


@pytest.fixture
def publish(monkeypatch):
    """``publish(*urls)`` puts other hosts in the place of the real ones."""
    return lambda *urls: monkeypatch.setattr(archive, "ARCHIVE_URLS", urls)


def test_the_archive_is_downloaded_once(host, data, publish, toy):
    publish(host.url("good"))
    for _ in range(2):
        assert_toy(load_dataset(), toy)
    assert host.requests == ["good"]
    assert sorted(os.listdir(data)) == [BATCHES, CIFAR10.filename]


@pytest.mark.parametrize(("failing", "words"), [("gone", "404"), ("other", "hash")])
def test_after_a_failing_host_the_next_one_is_tried_but_never_the_digits(host, data, publish, toy, failing, words):
    publish(host.url(failing))
    with pytest.raises(DatasetError, match=rf"could not be downloaded:\s+http.*/{failing}: .*{words}") as error:
        load_dataset()
    assert f"put {CIFAR10.filename} into {data}" in str(error.value)
    assert os.listdir(data) == []
    publish(host.url("dropped"), host.url(failing), host.url("good"))
    assert_toy(load_dataset(), toy)


def test_a_full_disk_is_not_blamed_on_the_hosts(host, data, publish):
    publish(host.url("good"), host.url("good"))
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            load_dataset()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert host.requests == ["good"]
    assert os.listdir(data) == []


def test_offline_the_digits_stand_in_with_a_banner_unless_the_official_images_are_required(publish, capsys):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        publish(f"http://127.0.0.1:{unused.getsockname()[1]}/archive", "http://no-such-host.invalid/archive")
        dataset = load_dataset()
        banner = capsys.readouterr().out
        for words in ("NOT CIFAR-10", "127.0.0.1", "$CIFAR10_DIR", "nothing is written to Results/"):
            assert words in banner
        with pytest.raises(OfflineError, match="Connect to the internet, put"):
            load_dataset(source="official")
    assert dataset.is_stand_in
    assert dataset.classes == tuple("0123456789")
    assert (dataset.train_images.shape, dataset.test_images.shape) == ((1497, 32, 32, 3), (300, 32, 32, 3))
    assert (np.bincount(dataset.test_labels) == 30).all()
    assert (dataset.train_images.min(), dataset.train_images.max()) == (0, 255)


# --- real images ------------------------------------------------------------------------------------------------------


def test_real_cifar10_is_complete(cifar10):
    assert cifar10.classes == CIFAR10_CLASSES
    assert np.bincount(cifar10.train_labels).tolist() == [5_000] * 10
    assert np.bincount(cifar10.test_labels).tolist() == [1_000] * 10
    # The first labels of the official archive: frog, truck, truck, deer, car; cat, ship, ship, plane, frog.
    np.testing.assert_array_equal(cifar10.train_labels[:5], [6, 9, 9, 4, 1])
    np.testing.assert_array_equal(cifar10.test_labels[:5], [3, 8, 8, 0, 6])
    assert cifar10.description.startswith("CIFAR-10")
