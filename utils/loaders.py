"""Batches for training and testing, by two pipelines with one protocol.

``BatchedLoader`` keeps the whole set on the device and augments many images at once; ``AlbumentationsLoader`` goes image
by image. From both come pairs of images, (B, 3, 32, 32) normalized floats in channels_last, and labels, (B,) int64, on
the device; both have ``epoch`` and ``len``.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.config import Config, ConfigError
from utils.dataset import ImageDataset
from utils.transforms import BatchAugment, normalize, test_transform, train_transform


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed an epoch, far apart for neighbours: an epoch can be repeated without replaying those before it."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


# How much is augmented at once: a GPU waits less between few large operations; a CPU takes as long either way.
CHUNK_BATCHES = 16
CHUNK_IMAGES = 16 * 512  # with larger batches fewer of them, to stay near 100 MB of floats


def _check_batches(batch_size: int, count: int, rank: int, world: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
    if batch_size > count:
        raise ConfigError(f"batch_size is {batch_size}, but there are only {count} images: lower it to {count} or less")
    if not 0 <= rank < world <= batch_size:
        raise ConfigError(
            f"rank {rank} of {world} processes with batch_size {batch_size}: each process needs at least one image of "
            "a batch, and ranks count from 0"
        )


class BatchedLoader:
    """The fast loader: the whole set lives on the device as uint8 and is augmented many images at a time.

    It iterates like a ``DataLoader`` over ``(images, labels)``: (B, 3, 32, 32) floats, channels_last and normalized,
    and (B,) int64. Each pass is an epoch with its own order and augmentations, which depend only on ``seed`` and the
    epoch's number, never on the device.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) int64.
        batch_size: images a batch, over all processes; the last batch is smaller unless ``drop_last``.
        augment: the augmentation, or None for plain normalization.
        alternate_flip: mirror each image in every other epoch, half of them in the even ones, where ``augment`` would
            toss a coin: two epochs in a row then show both sides of every image (K. Jordan, *94% on CIFAR-10 in 3.29
            seconds*, 2024, https://arxiv.org/abs/2404.00498).
        shuffle: a new order each epoch.
        drop_last: leave the smaller last batch out.
        seed: of order and augmentation.
        device: where the set lives and the batches appear.
        dtype: of the images.
        rank, world: this process, and how many there are. All draw the same batches, and each yields its rows of them,
            ``rank::world``; of a last batch smaller than ``world``, that may be none.

    Attributes:
        epoch: the number of the next pass, from 0; set it to go on where another run stopped.

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
        drop_last: bool = False,
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
        self.drop_last = drop_last
        self.seed = seed
        self.dtype = dtype
        self.rank = rank
        self.world = world
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self):
        device, count = self.images.device, len(self.labels)
        epoch, self.epoch = self.epoch, self.epoch + 1
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        # Everything random is drawn here, once an epoch; what follows only slices it.
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        draws = self.augment.draw(count, generator) if self.augment else None
        if draws and self.augment.flip and self.alternate_flip:
            # Of the seed alone: the same images are mirrored in all even epochs, the others in all odd ones.
            in_even_epochs = torch.randint(2, (count,), generator=torch.Generator().manual_seed(self.seed)).bool()
            draws = dataclasses.replace(draws, flips=in_even_epochs[order] ^ bool(epoch % 2))
        mine = torch.arange(count) % self.batch_size % self.world == self.rank
        order = order[mine].to(device)
        draws = draws[mine].to(device) if draws else None

        size = len(range(self.rank, self.batch_size, self.world))  # this process's rows of a whole batch
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
    """One augmented image at a time: ``dataset[i]`` is a (3, 32, 32) float32 tensor and an int label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform):
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(image=self.images[index])["image"], int(self.labels[index])


def _prepare_worker(worker_id: int) -> None:
    """Give each loader process its own Albumentations stream: as copies of one pipeline, all would draw alike.

    Ctrl-C reaches every process, but the parent alone answers it: a loader process ends quietly when the parent does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print_exception = sys.excepthook

    def unless_parent_is_gone(kind, error, traceback):
        if not issubclass(kind, (ConnectionError, EOFError)):
            print_exception(kind, error, traceback)

    sys.excepthook = unless_parent_is_gone
    # torch's own watchdog never notices a parent that was gone before it began to watch.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    get_worker_info().dataset.transform.set_random_seed(torch.initial_seed() % 2**32)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class AlbumentationsLoader(DataLoader):
    """The reference loader: a torch ``DataLoader`` over Albumentations, with the protocol of ``BatchedLoader``.

    Order and augmentations depend on the seed, the epoch and the number of workers.

    Args:
        images, labels, batch_size, shuffle, seed, device, dtype: as for ``BatchedLoader``.
        transform: an ``albumentations.Compose``, as ``train_transform`` makes it.
        num_workers: processes that augment; 0 for none but this one.
        rank, world: as for ``BatchedLoader``. Since the augmentations of a batch follow from one another, every process
            makes the whole batch and yields its rows.
        options: of the ``DataLoader``.

    Raises:
        ConfigError: as for ``BatchedLoader``.
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
        **options,
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
            **options,
        )
        self.dtype = dtype
        self.rows = slice(rank, None, world)
        self.seed = seed
        self.epoch = 0

    def __iter__(self):
        seed = epoch_seed(self.seed, self.epoch)
        self.epoch += 1
        self.generator.manual_seed(seed)  # the order, and through the workers' base seed their augmentations
        if self.num_workers == 0:
            self.dataset.transform.set_random_seed(seed % 2**32)
        for images, labels in super().__iter__():
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
        rank, world: this process, and how many share each batch.

    Returns:
        ``(train, test)``; train is shuffled and augmented as ``config`` says, test is neither.

    Raises:
        ConfigError: the batch size does not suit the data or the number of processes.
    """
    settings = dict(pad=config.pad, pad_mode=config.pad_mode, flip=config.flip, cutout=config.cutout)
    train, test = (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)
    test_batch = min(config.eval_batch_size, len(dataset.test_labels))
    shared = dict(device=device, dtype=dtype, rank=rank, world=world)
    if config.pipeline == "albumentations":
        shared["num_workers"] = config.num_workers
        return (
            AlbumentationsLoader(
                *train, config.batch_size, train_transform(**settings), shuffle=True, seed=config.seed, **shared
            ),
            AlbumentationsLoader(*test, test_batch, test_transform(), **shared),
        )
    return (
        BatchedLoader(
            *train,
            config.batch_size,
            augment=BatchAugment(**settings),
            alternate_flip=config.alternate_flip,
            shuffle=True,
            seed=config.seed,
            **shared,
        ),
        BatchedLoader(*test, test_batch, **shared),
    )
