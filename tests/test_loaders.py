"""Both loaders: interchangeable, every image once per epoch, and randomness that repeats exactly for a seed."""

import hashlib
import multiprocessing
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from utils.config import Config, quick
from utils.dataset import ImageDataset
from utils.loaders import CHUNK_BATCHES, AlbumentationsLoader, BatchedLoader, make_loaders
from utils.runtime import ConfigError
from utils.transforms import BatchAugment, denormalize, normalize, test_transform, train_transform

PIPELINES = ("batched", "albumentations")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")


def make_loader(pipeline, images, labels, batch_size, *, augment=True, shuffle=True, seed=0, **options):
    """A train loader of either pipeline, with the same settings."""
    options |= dict(shuffle=shuffle, seed=seed)
    if pipeline == "batched":
        return BatchedLoader(images, labels, batch_size, augment=BatchAugment() if augment else None, **options)
    transform = train_transform() if augment else test_transform()
    return AlbumentationsLoader(images, labels, batch_size, transform, **options)


def epoch_of(loader):
    """All images and labels of one pass."""
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture(scope="module")
def noise():
    """50 images of noise, each labelled with its own number: augmentation makes no two of them equal."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8), np.arange(50)


@pytest.fixture(scope="module")
def noise_dataset(noise):
    """The same images as a dataset."""
    return ImageDataset(*noise, *noise, tuple(map(str, noise[1])), "image-folder", "noise")


@pytest.fixture(scope="module")
def copies():
    """48 copies of one image of noise: any difference between two batches comes from the augmentation."""
    image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    return image.repeat(48, axis=0), np.zeros(48, dtype=np.int64)


# --- one protocol ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("batch_size", "sizes"), [(16, [16, 16, 16, 2]), (25, [25, 25]), (50, [50]), (1, [1] * 50)])
def test_batches_have_the_sizes_that_len_promises(noise, pipeline, batch_size, sizes):
    loader = make_loader(pipeline, *noise, batch_size)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == sizes
    assert [len(images) for images, _ in batches] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_batch_has_channels_last_images_of_the_dtype_and_int64_labels(noise, pipeline, dtype):
    for images, labels in make_loader(pipeline, *noise, 8, dtype=dtype):
        assert images.shape == (len(labels), 3, 32, 32)
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_gpu)])
def test_batches_appear_on_the_device(noise, pipeline, device):
    # "meta" stands in for a device on machines without one.
    for images, labels in make_loader(pipeline, *noise, 16, augment=False, shuffle=False, device=device):
        assert images.device.type == labels.device.type == device


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_without_augmentation_and_shuffling_the_set_stays_as_it_is(noise, pipeline):
    images, labels = epoch_of(make_loader(pipeline, *noise, 16, augment=False, shuffle=False))
    np.testing.assert_array_equal(labels, noise[1])
    np.testing.assert_array_equal(denormalize(images), noise[0])


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_epoch_shows_every_image_once_in_a_new_order(noise, pipeline):
    loader = make_loader(pipeline, *noise, 16, augment=False)
    orders = []
    for _ in range(3):
        images, labels = epoch_of(loader)
        assert sorted(labels.tolist()) == list(range(50))
        np.testing.assert_array_equal(denormalize(images), noise[0][labels])  # each image with its own label
        orders.append(labels.tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) != orders[0]


@given(count=st.integers(1, 60), batch_size=st.integers(1, 60), seed=st.integers(0, 2**40))
@settings(max_examples=40)
def test_any_batch_size_up_to_the_set_covers_it(count, batch_size, seed):
    assume(batch_size <= count)
    loader = BatchedLoader(
        np.zeros((count, 32, 32, 3), np.uint8), np.arange(count), batch_size, shuffle=True, seed=seed
    )
    batches = [labels for _, labels in loader]
    assert len(batches) == len(loader)
    assert sorted(torch.cat(batches).tolist()) == list(range(count))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(
    ("batch_size", "options", "words"),
    [
        (0, {}, "batch_size is 0: it must be at least 1"),
        (51, {}, "batch_size is 51, but there are only 50 images: lower it to 50 or less"),
        (3, dict(rank=0, world=4), "rank 0 of 4 processes with batch_size 3: each process needs at least one image"),
        (8, dict(rank=2, world=2), "rank 2 of 2 processes .* ranks count from 0"),
    ],
)
def test_batch_sizes_that_cannot_work_are_refused(noise, pipeline, batch_size, options, words):
    with pytest.raises(ConfigError, match=words):
        make_loader(pipeline, *noise, batch_size, **options)


# --- randomness -----------------------------------------------------------------------------------------------------

# Worker processes take seconds to start on some systems, so only these tests use them.
WORKERS = [("batched", {}), ("albumentations", {}), ("albumentations", {"num_workers": 2})]


@pytest.mark.parametrize(("pipeline", "options"), WORKERS)
def test_epochs_differ_reruns_agree_and_an_epoch_can_be_set(copies, pipeline, options):
    first, second = (
        images for images, _ in (epoch_of(loader) for loader in [make_loader(pipeline, *copies, 16, **options)] * 2)
    )
    assert not torch.equal(first, second)

    rerun = make_loader(pipeline, *copies, 16, **options)
    torch.manual_seed(99)  # the global generators do not matter
    np.random.seed(99)
    assert torch.equal(epoch_of(rerun)[0], first)
    assert rerun.epoch == 1

    resumed = make_loader(pipeline, *copies, 16, **options)
    resumed.epoch = 1
    assert torch.equal(epoch_of(resumed)[0], second)


@pytest.mark.parametrize(("pipeline", "options"), WORKERS)
def test_the_images_of_an_epoch_get_different_augmentations(copies, pipeline, options):
    # With two workers, batches 0 and 1 come from different processes; copies of one generator would draw the same.
    images, _ = epoch_of(make_loader(pipeline, *copies, 8, **options))
    # One of the 9 * 9 * 2 * 25 * 25 draws may repeat by chance; a copied generator would repeat 24 of the 48.
    assert len({image.numpy().tobytes() for image in images}) >= 46


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_seeds_differ_in_order_and_in_augmentation(noise, copies, pipeline):
    orders = [epoch_of(make_loader(pipeline, *noise, 16, seed=seed))[1] for seed in (0, 1)]
    assert not torch.equal(*orders)
    pictures = [epoch_of(make_loader(pipeline, *copies, 16, seed=seed))[0] for seed in (0, 1)]
    assert not torch.equal(*pictures)


def test_epoch_one_of_a_seed_is_not_epoch_zero_of_the_next(noise):
    later = make_loader("batched", *noise, 16, seed=0)
    later.epoch = 1
    assert not torch.equal(epoch_of(later)[1], epoch_of(make_loader("batched", *noise, 16, seed=1))[1])


def test_an_abandoned_pass_does_not_change_the_next(noise):
    loader, whole = (make_loader("batched", *noise, 16) for _ in range(2))
    next(iter(loader))
    epoch_of(whole)
    assert torch.equal(epoch_of(loader)[0], epoch_of(whole)[0])


@pytest.fixture
def child_handler(monkeypatch):
    """``child_handler(handler)`` sets the one of SIGCHLD; the one before the test comes back."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # torch sets its own once in a process
    yield lambda handler: signal.signal(signal.SIGCHLD, handler)
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("another_loader_before", [False, True])
def test_a_loader_process_that_dies_is_noticed_where_its_batch_is_awaited(noise, child_handler, another_loader_before):
    child_handler(signal.SIG_DFL)
    if another_loader_before:
        list(DataLoader(range(2), num_workers=1))
        assert signal.getsignal(signal.SIGCHLD) != signal.SIG_DFL
    batches = iter(make_loader("albumentations", *noise, 1, num_workers=1))
    next(batches)
    loader = next(child for child in multiprocessing.active_children() if child.daemon)
    loader.kill()
    time.sleep(0.5)  # whatever the program does meanwhile goes on undisturbed
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        list(batches)


def test_a_program_s_own_handler_of_ended_children_stays(noise, child_handler):
    child_handler(own := lambda number, frame: None)
    list(make_loader("albumentations", *noise, 25, num_workers=1))
    assert signal.getsignal(signal.SIGCHLD) is own


# SHA-256 of the first two batches of two epochs, recorded when the published run was trained: a seed must keep its
# order, draws and pixels. For Albumentations, which may change its arithmetic, of the pixels instead of the floats.
RECORDED = {
    ("batched", 0): "0ff2c5935ec85714ded9963a2598ae3318ce1b3b5c22628a727b132b28b05771",
    ("batched", 7): "0a4a70b839d76f60eb96076a8f107e43d6c4093f0d030b7739f190791d9348b4",
    ("coin", 7): "3f5f6830ea176833da034f1b6457e54261868306e0c01eb9fe544d4da0f98564",
    ("constant", 7): "cf6f11c1e5fee2d3746a091b6a9e131247dc12f283ccf067eaba46244bf303db",
    ("albumentations", 7): "de6f246dcc8f1ae22f4242286571b9cd5cd5d445937d244979a6d5bf1ee06c7b",
    ("workers", 7): "2e69876c06c484d475189935b3ad7913a74bff86f085d12f4728c703be9c1e4f",
}
SETTINGS = {
    "batched": {},
    "coin": dict(alternate_flip=False),
    "constant": dict(pad_mode="constant"),
    "albumentations": dict(pipeline="albumentations", num_workers=0),
    "workers": dict(pipeline="albumentations", num_workers=2),
}


@pytest.mark.parametrize(("name", "seed"), RECORDED)
def test_a_seed_keeps_its_meaning(noise_dataset, name, seed):
    dtype = torch.bfloat16 if name == "constant" else torch.float32
    train, _ = make_loaders(noise_dataset, Config(batch_size=16, seed=seed, **SETTINGS[name]), CPU, dtype)
    digest = hashlib.sha256()
    for _ in range(2):
        for step, (images, labels) in enumerate(train):
            if step < 2:
                own = type(train) is BatchedLoader
                digest.update((images.float().contiguous().numpy() if own else denormalize(images)).tobytes())
                digest.update(labels.numpy().tobytes())
    assert digest.hexdigest() == RECORDED[name, seed]


@pytest.mark.parametrize("batch_size", [7, 2, 50])
def test_batches_made_many_at_once_equal_those_made_one_by_one(noise, monkeypatch, batch_size):
    def epoch():
        return epoch_of(make_loader("batched", *noise, batch_size, alternate_flip=True))

    assert CHUNK_BATCHES > 1
    at_once = epoch()
    monkeypatch.setattr("utils.loaders.CHUNK_BATCHES", 1)
    for many, one in zip(at_once, epoch()):
        assert torch.equal(many, one)


def test_large_batches_are_not_made_many_at_once(noise, monkeypatch):
    monkeypatch.setattr("utils.loaders.CHUNK_IMAGES", 20)
    pictures, _ = next(iter(make_loader("batched", *noise, 8)))
    assert pictures.untyped_storage().nbytes() == 16 * 3 * 32 * 32 * 4  # two batches of 8 are at most 20


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize(("batch_size", "world"), [(16, 2), (16, 3), (49, 4)])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_rows_of_all_processes_make_the_whole_batch(noise, pipeline, batch_size, world, augment):
    def loader(**options):
        return make_loader(pipeline, *noise, batch_size, augment=augment, shuffle=augment, seed=3, **options)

    alone, shared = loader(), [loader(rank=rank, world=world) for rank in range(world)]
    for _ in range(2):
        steps = 0
        for whole, *parts in zip(alone, *shared, strict=True):
            for kind in (0, 1):  # images, labels
                together = torch.empty_like(whole[kind])
                for rank, part in enumerate(parts):
                    together[rank::world] = part[kind]
                assert torch.equal(together, whole[kind])
            steps += 1
        assert steps == len(alone) == len(shared[0])


# --- the set on the device ------------------------------------------------------------------------------------------


def test_the_set_on_the_device_is_the_uint8_array_itself(noise):
    loader = make_loader("batched", *noise, 16)
    assert loader.images.dtype == torch.uint8
    assert loader.images.data_ptr() == noise[0].ctypes.data  # on the CPU not even a copy
    tensors = [value for value in vars(loader).values() if isinstance(value, torch.Tensor)]
    assert not any(tensor.is_floating_point() for tensor in tensors)
    before = noise[0].copy()
    epoch_of(loader)
    np.testing.assert_array_equal(noise[0], before)


# --- the loaders of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_train_is_shuffled_and_augmented_and_test_is_neither(toy, pipeline):
    config = quick(train_images=None, batch_size=16, pipeline=pipeline, num_workers=0)
    train, test = make_loaders(toy, config, CPU)
    assert len(train) == 4
    train_images, train_labels = epoch_of(train)
    train_labels = train_labels.numpy()
    assert not np.array_equal(train_labels, toy.train_labels)
    np.testing.assert_array_equal(np.sort(train_labels), np.sort(toy.train_labels))
    assert not np.array_equal(denormalize(train_images), toy.train_images[np.argsort(train_labels, kind="stable")])

    assert len(test) == 1  # eval_batch_size is larger than the test set
    for _ in range(2):
        images, labels = epoch_of(test)
        np.testing.assert_array_equal(labels, toy.test_labels)
        np.testing.assert_array_equal(denormalize(images), toy.test_images)


def mirrored_in(loader, noise, epoch):
    """(50,) bool, in the order of the set: the noise images that epoch ``epoch`` shows mirrored."""
    images = noise[0]
    loader.epoch = epoch
    pictures, order = epoch_of(loader)
    assert loader.epoch == epoch + 1
    same = (denormalize(pictures) == images[order]).all(axis=(1, 2, 3))
    mirrored = (denormalize(pictures) == images[order][:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    return mirrored[np.argsort(order)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_augmentation_is_the_one_in_the_config(noise, noise_dataset, pipeline):
    settings = dict(batch_size=16, pipeline=pipeline, num_workers=0, pad=0, cutout=0)
    plain, _ = make_loaders(noise_dataset, Config(**settings, flip=False), CPU)
    pictures, order = epoch_of(plain)
    np.testing.assert_array_equal(denormalize(pictures), noise[0][order])
    flipped, _ = make_loaders(noise_dataset, Config(**settings, flip=True), CPU)
    assert 0 < mirrored_in(flipped, noise, 0).sum() < 50


def test_alternating_flips_show_both_sides_in_any_two_epochs(noise, noise_dataset):
    def mirrored(*epochs, **settings):
        loader, _ = make_loaders(noise_dataset, Config(batch_size=16, pad=0, cutout=0, **settings), CPU)
        return [mirrored_in(loader, noise, epoch) for epoch in epochs]

    even, odd, next_even = mirrored(0, 1, 2, seed=5)
    assert (even != odd).all()
    assert (next_even == even).all()
    assert 10 < even.sum() < 40
    assert (mirrored(0, seed=6)[0] != even).any()
    once, again = mirrored(0, 1, alternate_flip=False)
    assert 10 < (once == again).sum() < 40
    assert not np.any(mirrored(0, 1, flip=False))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_train_loaders_of_a_run_share_its_batches(toy, pipeline):
    config = quick(train_images=None, batch_size=20, eval_batch_size=8, pipeline=pipeline, num_workers=0)
    for rank in (0, 1):
        train, test = make_loaders(toy, config, CPU, rank=rank, world=2)
        assert [len(labels) for _, labels in train] == [10, 10, 10]
        assert torch.equal(epoch_of(test)[1], torch.from_numpy(toy.test_labels))  # one process runs every test
    make_loaders(toy.subset(test=1), config, CPU, rank=0, world=2)


def test_both_pipelines_normalize_alike(noise):
    ours, theirs = (epoch_of(make_loader(name, *noise, 16, augment=False, shuffle=False))[0] for name in PIPELINES)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, normalize(torch.from_numpy(noise[0])))
