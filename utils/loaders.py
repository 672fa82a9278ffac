"""Batches for training and testing, from two interchangeable loaders.

``BatchedLoader`` keeps the whole set on the device and augments many images at once; ``AlbumentationsLoader`` works
image by image. Both yield images, (B, 3, 32, 32) normalized floats in channels_last, and labels, (B,) int64, on the
device. Both have ``len`` and ``epoch``, the number of the next pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import sys
import threading

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.config import Config
from utils.dataset import ImageDataset
from utils.runtime import ConfigError
from utils.transforms import BatchAugment, normalize, test_transform, train_transform


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch, unrelated to its neighbours': a resumed run need not replay the epochs before."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


# Batches augmented at once: on a GPU, few large operations are faster than many small ones.
CHUNK_BATCHES = 16
CHUNK_IMAGES = 16 * 512  # an upper limit, about 100 MB of floats


def _check_batches(batch_size: int, count: int, rank: int, world: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
    if batch_size > count:
        raise ConfigError(f"batch_size is {batch_size}, but there are only {count} images: lower it to {count} or less")
    if not 0 <= rank < world <= batch_size:
        raise ConfigError(
            f"rank {rank} of {world} processes with batch_size {batch_size}: each process needs at least one image per "
            "batch, and ranks count from 0"
        )


class BatchedLoader:
    """The fast loader: the whole set lives on the device as uint8.

    Each pass is an epoch with its own order and augmentations. They depend only on ``seed`` and the epoch's number, not
    on the device.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) int64.
        batch_size: images per batch, over all processes; the last batch may be smaller.
        augment: the augmentation; None: normalization only.
        alternate_flip: where ``augment`` would flip at random, mirror each image in every other epoch, half of them in
            the even ones. Two epochs in a row then show both sides of every image (K. Jordan, *94% on CIFAR-10 in 3.29
            seconds*, 2024, https://arxiv.org/abs/2404.00498).
        shuffle: use a new order in each epoch.
        seed: for order and augmentation.
        device: where the set lives and the batches appear.
        dtype: of the images.
        rank, world: this process's number, from 0, and the number of processes. All draw the same batches, and each
            yields the rows ``rank::world``: none, for some, if the last batch is smaller than ``world``.

    Raises:
        ConfigError: ``batch_size`` is below 1, above N or below ``world``, or ``rank`` is not below ``world``.
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
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world: int = 1,
    ):
        _check_batches(batch_size, len(labels), rank, world)
        self.images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        self.labels = torch.from_numpy(np.ascontiguousarray(labels)).to(device)
        self.batch_size = batch_size
        self.augment = augment
        self.alternate_flip = alternate_flip
        self.shuffle = shuffle
        self.seed = seed
        self.dtype = dtype
        self.rank = rank
        self.world = world
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        device, count = self.images.device, len(self.labels)
        epoch, self.epoch = self.epoch, self.epoch + 1
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        # Everything random is drawn here, for the whole epoch.
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        draws = self.augment.draw(count, generator) if self.augment else None
        if draws and self.augment.flip and self.alternate_flip:
            # From the seed alone: the same images are mirrored in all even epochs, the others in all odd ones.
            in_even_epochs = torch.randint(2, (count,), generator=torch.Generator().manual_seed(self.seed)).bool()
            draws = dataclasses.replace(draws, flips=in_even_epochs[order] ^ bool(epoch % 2))
        mine = torch.arange(count) % self.batch_size % self.world == self.rank
        order = order[mine].to(device)
        draws = draws[mine].to(device) if draws else None

        size = len(range(self.rank, self.batch_size, self.world))  # this process's rows of a full batch
        at_once = max(1, min(CHUNK_BATCHES, CHUNK_IMAGES // size))
        for first in range(0, len(self), at_once):
            steps = min(at_once, len(self) - first)
            chunk = slice(first * size, (first + steps) * size)
            index = order[chunk]
            pixels = self.augment.apply(self.images, index, draws[chunk]) if self.augment else self.images[index]
            images, labels = normalize(pixels, self.dtype), self.labels[index]
            for step in range(steps):
                batch = slice(step * size, (step + 1) * size)
                yield images[batch], labels[batch]


class AlbumentationsDataset(Dataset):
    """``dataset[i]`` is a (3, 32, 32) float32 tensor, newly augmented, and an int label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform):
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(image=self.images[index])["image"], int(self.labels[index])


def _prepare_worker(worker_id: int) -> None:
    """Seed a loader process, which would otherwise draw the same augmentations as the others; let it end quietly."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; only the parent handles it
    get_worker_info().dataset.transform.set_random_seed(torch.initial_seed() % 2**32)
    print_exception = sys.excepthook

    def unless_parent_is_gone(kind, error, traceback):
        if not issubclass(kind, (ConnectionError, EOFError)):
            print_exception(kind, error, traceback)

    sys.excepthook = unless_parent_is_gone
    # torch's own watchdog misses a parent that ended before it began to watch.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _without_torch_handler():
    """Undo what starting loader processes does to SIGCHLD: torch sets a handler that raises when one of them dies.

    It would raise wherever this process is: in a destructor, or while another error is being explained. Without it
    torch still notices, within 5 seconds, where a batch of that process is awaited.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if handler is None or getattr(handler, "__module__", "").startswith("torch."):  # of another DataLoader
        handler = signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


class AlbumentationsLoader(DataLoader):
    """The reference loader: a torch ``DataLoader`` over Albumentations.

    Order and augmentations depend on the seed, the epoch and the number of workers.

    Args:
        images, labels, batch_size, shuffle, seed, device, dtype: see ``BatchedLoader``.
        transform: an ``albumentations.Compose``, from ``train_transform`` or ``test_transform``.
        num_workers: processes that augment; 0: this process does.
        rank, world: see ``BatchedLoader``. The augmentations of a batch are drawn one after the other, so every process
            makes the whole batch and yields its rows.

    Raises:
        ConfigError: see ``BatchedLoader``.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        transform,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world: int = 1,
    ):
        _check_batches(batch_size, len(labels), rank, world)
        self.device = torch.device(device)
        super().__init__(
            AlbumentationsDataset(images, labels, transform),
            batch_size,
            shuffle=shuffle,
            num_workers=num_workers,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
        )
        self.dtype = dtype
        self.rows = slice(rank, None, world)
        self.seed = seed
        self.epoch = 0

    def __iter__(self):
        seed = epoch_seed(self.seed, self.epoch)
        self.epoch += 1
        self.generator.manual_seed(seed)  # for the order, and for the seeds of the loader processes
        if self.num_workers == 0:
            self.dataset.transform.set_random_seed(seed % 2**32)
        with _without_torch_handler():
            batches = super().__iter__()
        for images, labels in batches:
            images = images[self.rows].to(self.device, non_blocking=True)
            yield (
                images.to(self.dtype, memory_format=torch.channels_last),
                labels[self.rows].to(self.device, non_blocking=True),
            )


def make_loaders(
    dataset: ImageDataset,
    config: Config,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
):
    """The train and the test loader of a run.

    Args:
        dataset: the images.
        config: batch sizes, pipeline, augmentation and seed.
        device: where the batches appear.
        dtype: of the images.
        rank, world: see ``BatchedLoader``.

    Returns:
        ``(train, test)``; only train is shuffled, augmented and shared among processes.

    Raises:
        ConfigError: the batch size does not suit the data or the number of processes.
    """
    train = (dataset.train_images, dataset.train_labels, config.batch_size)
    test = (dataset.test_images, dataset.test_labels, min(config.eval_batch_size, len(dataset.test_labels)))
    augmentation = dict(pad=config.pad, pad_mode=config.pad_mode, flip=config.flip, cutout=config.cutout)
    both = dict(device=device, dtype=dtype)
    shuffled = dict(shuffle=True, seed=config.seed, rank=rank, world=world)
    if config.pipeline == "albumentations":
        both["num_workers"] = config.num_workers
        return (
            AlbumentationsLoader(*train, train_transform(**augmentation), **shuffled, **both),
            AlbumentationsLoader(*test, test_transform(), **both),
        )
    augment = BatchAugment(**augmentation)
    return (
        BatchedLoader(*train, augment=augment, alternate_flip=config.alternate_flip, **shuffled, **both),
        BatchedLoader(*test, **both),
    )
