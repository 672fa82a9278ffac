"""Batches for training and testing: the whole set stays on the device, and many images are augmented at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from utils.config import Config
from utils.dataset import ImageDataset
from utils.runtime import ConfigError, Precision
from utils.transforms import BatchAugment, Draws, normalize

EVAL_BATCH = 1000  # images per test batch: larger than in training, since there are no gradients
# Batches augmented at once: on a GPU, few large operations are faster than many small ones.
CHUNK_BATCHES = 16
CHUNK_IMAGES = 16 * 512  # an upper limit, about 100 MB of floats


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch, unrelated to its neighbours': a resumed run need not replay the epochs before."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class BatchedLoader:
    """Yields images, (B, 3, 32, 32) normalized floats in channels_last, and labels, (B,) int64, on the device.

    Each pass is an epoch with its own order and augmentations. They depend only on ``seed`` and ``epoch``, the number of
    the next pass, not on the device.

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
            yields the rows ``rank::world``.
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
        order, draws = self._draw(self.epoch)
        self.epoch += 1
        size = len(range(self.rank, self.batch_size, self.world))  # this process's rows of a full batch
        at_once = size * max(1, min(CHUNK_BATCHES, CHUNK_IMAGES // size))
        for first in range(0, len(order), at_once):
            chunk = slice(first, first + at_once)
            index = order[chunk]
            if draws is None:
                pixels = self.images[index]
            else:
                pixels = self.augment.apply(self.images, index, Draws(*(each[chunk] for each in draws)))
            yield from zip(normalize(pixels, self.dtype).split(size), self.labels[index].split(size))

    def _draw(self, epoch: int) -> tuple[Tensor, Draws | None]:
        """Everything random of one epoch, for this process's images: their order, and their augmentations."""
        device, count = self.images.device, len(self.labels)
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        draws = self.augment.draw(count, generator) if self.augment else None
        if draws and self.augment.flip and self.alternate_flip:
            # From the seed alone: the same images are mirrored in all even epochs, the others in all odd ones.
            in_even_epochs = torch.randint(2, (count,), generator=torch.Generator().manual_seed(self.seed)).bool()
            draws = draws._replace(flips=in_even_epochs[order] ^ bool(epoch % 2))
        mine = torch.arange(count) % self.batch_size % self.world == self.rank
        return order[mine].to(device), draws and Draws(*(each[mine].to(device) for each in draws))


def make_loaders(dataset: ImageDataset, config: Config, precision: Precision, rank: int = 0, world: int = 1):
    """``(train, test)``, the loaders of a run; only train is shuffled, augmented and shared among processes.

    Raises ConfigError if a batch has more images than there are.
    """
    count = len(dataset.train_labels)
    if config.batch_size > count:
        raise ConfigError(f"batch_size is {config.batch_size}, but there are only {count} images: lower it")
    train = (dataset.train_images, dataset.train_labels, config.batch_size)
    test = (dataset.test_images, dataset.test_labels, min(EVAL_BATCH, len(dataset.test_labels)))
    augment = BatchAugment(config.pad, config.flip, config.cutout)
    draws = dict(augment=augment, alternate_flip=config.alternate_flip, shuffle=True, seed=config.seed)
    both = dict(device=precision.device, dtype=precision.dtype)
    return BatchedLoader(*train, **draws, **both, rank=rank, world=world), BatchedLoader(*test, **both)
