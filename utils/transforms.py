"""Augmentation, twice: image by image with Albumentations (the reference), and many images at once (the fast twin).

Both pad a 32x32 image by 4 pixels on each side, crop 32x32 at random, flip left-right half of the time, fill one 8x8
square with the mean colour (cutout, DeVries & Taylor 2017, https://arxiv.org/abs/1708.04552), and normalize. The tests
compare them: equal pixels for equal draws, and equal distributions of the draws.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import NamedTuple

# On import, Albumentations asks a server for its newest version; the lesson must also work offline.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor

from models.custom_resnet import IMAGE_SIZE

# Mean and standard deviation of each channel (R, G, B) over CIFAR-10's 50,000 train images, pixels in [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

# The mean colour, for cutout; close to 0 once normalized.
MEAN_PIXEL = tuple(round(255 * mean) for mean in MEAN)


def train_transform(pad: int = 4, flip: bool = True, cutout: int = 8, seed: int | None = None) -> A.Compose:
    """The reference train pipeline: pad, random crop, horizontal flip, cutout, normalize, tensor.

    Args:
        pad: pixels added on each side before the crop, by mirroring the image at its border.
        flip: mirror left-right with probability 1/2.
        cutout: side of the filled square, in pixels; 0: none.
        seed: for Albumentations, which ignores global seeds.

    ``train_transform()(image=<(32, 32, 3) uint8>)["image"]`` is a (3, 32, 32) float32 tensor.
    """
    padded, hole = IMAGE_SIZE + 2 * pad, (cutout, cutout)
    steps = [
        A.PadIfNeeded(min_height=padded, min_width=padded, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(height=IMAGE_SIZE, width=IMAGE_SIZE),
    ]
    if flip:
        steps.append(A.HorizontalFlip(p=0.5))
    if cutout:
        steps.append(A.CoarseDropout((1, 1), hole, hole, fill=MEAN_PIXEL, p=1.0))
    steps += [A.Normalize(mean=MEAN, std=STD, max_pixel_value=255.0), ToTensorV2()]
    return A.Compose(steps, seed=seed)


def test_transform() -> A.Compose:
    """The reference test pipeline, called alike: normalize, tensor."""
    return A.Compose([A.Normalize(mean=MEAN, std=STD, max_pixel_value=255.0), ToTensorV2()])


test_transform.__test__ = False  # despite its name, not a test for pytest


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, H, W, 3) uint8 pixels to (N, 3, H, W) normalized floats: (pixel / 255 - mean) / std, computed in float32.

    They are in torch's channels_last format: the memory stays in NHWC order, on which convolutions are fastest.
    """
    mean, std = _constant(MEAN, torch.float32, images.device), _constant(STD, torch.float32, images.device)
    scaled = images.float().mul_(1 / (255 * std)).sub_(mean / std)
    return scaled.to(dtype).permute(0, 3, 1, 2)


@functools.cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to each device once: a copy from the host would wait for all work that the device has queued."""
    return torch.tensor(values, dtype=dtype, device=device)


def denormalize(images: Tensor) -> np.ndarray:
    """The exact pixels behind normalized floats: (3, H, W) or (N, 3, H, W) -> (H, W, 3) or (N, H, W, 3) uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = (images.detach().cpu().float() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().numpy()


class Draws(NamedTuple):
    """The random choices for N images, all (N,) tensors."""

    crop_y: Tensor  # int64, top left corner of the crop in the padded image, 0 to 2 * pad
    crop_x: Tensor
    flips: Tensor  # bool, True: mirrored
    hole_y: Tensor  # int64, top left corner of the cutout square, 0 to 32 - cutout
    hole_x: Tensor


@dataclass(frozen=True)
class BatchAugment:
    """The batched twin of ``train_transform``: the same settings, the same distribution.

    Instead of padding and slicing, it computes which input pixel each output pixel shows: an offset for the crop, a
    reversal for the flip, a reflection at the border. Then one indexing operation moves all pixels.
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 8

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Draw for ``count`` images, on the CPU, so that a seed gives the same augmentations on every device."""

        def integers(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        return Draws(
            crop_y=integers(2 * self.pad + 1),
            crop_x=integers(2 * self.pad + 1),
            flips=integers(2).bool() if self.flip else torch.zeros(count, dtype=torch.bool),
            hole_y=integers(IMAGE_SIZE - self.cutout + 1),
            hole_x=integers(IMAGE_SIZE - self.cutout + 1),
        )

    def apply(self, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """Augment ``images[index]``: (N, 32, 32, 3) uint8.

        Args:
            images: (M, 32, 32, 3) uint8, the whole set; not changed.
            index: (N,) int64, the images of this batch.
            draws: for these N images, on the same device.
        """
        device, position = images.device, torch.arange(IMAGE_SIZE, device=images.device)
        columns = torch.where(draws.flips[:, None], IMAGE_SIZE - 1 - position, position)
        rows = _reflect(position + draws.crop_y[:, None] - self.pad)  # (N, 32), from -pad to 31 + pad before reflection
        columns = _reflect(columns + draws.crop_x[:, None] - self.pad)
        # With one pixel per row of a (M * 32 * 32, 3) table, a single index_select moves them all.
        pixel = (index[:, None, None] * IMAGE_SIZE + rows[:, :, None]) * IMAGE_SIZE + columns[:, None, :]
        batch = images.view(-1, 3).index_select(0, pixel.flatten()).view(*pixel.shape, 3)
        if self.cutout:
            image, side = torch.arange(len(index), device=device), torch.arange(self.cutout, device=device)
            hole_rows, hole_columns = draws.hole_y[:, None] + side, draws.hole_x[:, None] + side
            hole = image[:, None, None], hole_rows[:, :, None], hole_columns[:, None, :]
            batch[hole] = _constant(MEAN_PIXEL, torch.uint8, device)
        return batch


def _reflect(positions: Tensor) -> Tensor:
    """Mirror positions outside 0 to 31 at the border pixel, without repeating it (OpenCV's BORDER_REFLECT_101)."""
    last = IMAGE_SIZE - 1
    return last - (last - positions.abs()).abs()
