"""Augmentation twice: image by image with Albumentations (the reference), and whole batches at once (the fast twin).

Both do the same thing to a 32x32 image: pad 4 pixels on each side, crop 32x32 at random, flip left-right half of the
time, fill one 8x8 square with the mean colour (cutout, DeVries & Taylor 2017, https://arxiv.org/abs/1708.04552), and
normalize. Tests hold the two against each other: equal pixels for equal draws, equal distributions for free draws.

The channel statistics live here and nowhere else.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

# Albumentations asks a server for its newest version when it is imported; a lesson must also open offline.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor

# Mean and standard deviation of each channel (R, G, B) over the 50,000 CIFAR-10 train images, pixels in [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

# The mean colour as pixel values: what cutout and constant padding fill with, close to 0 once normalized.
MEAN_PIXEL = tuple(round(255 * mean) for mean in MEAN)

_ALBUMENTATIONS_BORDER = {"reflect": cv2.BORDER_REFLECT_101, "constant": cv2.BORDER_CONSTANT}


def train_transform(
    pad: int = 4, pad_mode: str = "reflect", flip: bool = True, cutout: int = 8, size: int = 32, seed: int | None = None
) -> A.Compose:
    """The reference train pipeline: pad, random crop, horizontal flip, cutout, normalize, tensor.

    Args:
        pad: pixels added on each side before the crop.
        pad_mode: ``"reflect"`` mirrors the image at its border, ``"constant"`` pads with the mean colour.
        flip: mirror left-right with probability 1/2.
        cutout: side of the filled square, in pixels; 0 for none.
        size: side of the image and of the crop.
        seed: Albumentations ignores global seeds; this is its own.

    Returns:
        A callable: ``transform(image=<(size, size, 3) uint8>)["image"]`` is a (3, size, size) float32 tensor.
    """
    steps = [
        A.PadIfNeeded(
            min_height=size + 2 * pad,
            min_width=size + 2 * pad,
            border_mode=_ALBUMENTATIONS_BORDER[pad_mode],
            fill=MEAN_PIXEL,
        ),
        A.RandomCrop(height=size, width=size),
    ]
    if flip:
        steps.append(A.HorizontalFlip(p=0.5))
    if cutout:
        steps.append(
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(cutout, cutout),
                hole_width_range=(cutout, cutout),
                fill=MEAN_PIXEL,
                p=1.0,
            )
        )
    return A.Compose([*steps, *_to_normalized_tensor()], seed=seed)


def test_transform() -> A.Compose:
    """The reference test pipeline: normalize, tensor. Nothing is random.

    Returns:
        A callable: ``transform(image=<(H, W, 3) uint8>)["image"]`` is a (3, H, W) float32 tensor.
    """
    return A.Compose(_to_normalized_tensor())


test_transform.__test__ = False  # pytest: the name is the field's, this is no test


def _to_normalized_tensor() -> list:
    return [A.Normalize(mean=MEAN, std=STD, max_pixel_value=255.0), ToTensorV2()]


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels to normalized floats, ready for the network: (pixel / 255 - mean) / std.

    Args:
        images: (N, H, W, 3) uint8.
        dtype: the result's; the arithmetic is in float32.

    Returns:
        (N, 3, H, W) on the same device. The memory stays in NHWC order, which is what torch calls channels_last and
        what convolutions on tensor cores (and oneDNN) like best: no transposing copy is made.
    """
    mean, std = _constant(MEAN, torch.float32, images.device), _constant(STD, torch.float32, images.device)
    scaled = images.float().mul_(1 / (255 * std)).sub_(mean / std)
    return scaled.to(dtype).permute(0, 3, 1, 2)


@functools.cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once a device: every copy from the host makes it wait for the work that the device has queued."""
    return torch.tensor(values, dtype=dtype, device=device)


def denormalize(images: Tensor) -> np.ndarray:
    """The uint8 pictures behind normalized floats, exactly: nothing to clip, nothing smeared.

    Args:
        images: (3, H, W) or (N, 3, H, W) float32, as the transforms return them.

    Returns:
        (H, W, 3) or (N, H, W, 3) uint8.
    """
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    pixels = (images.detach().cpu().float() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().numpy()


@dataclass(frozen=True)
class Draws:
    """The random choices for N images, all (N,) tensors; slicing gives those of a batch.

    Attributes:
        crop_y, crop_x: int64, where the crop starts in the padded image, 0 to 2 * pad.
        flips: bool, mirrored or not.
        hole_y, hole_x: int64, top left corner of the cutout square, 0 to size - cutout.
    """

    crop_y: Tensor
    crop_x: Tensor
    flips: Tensor
    hole_y: Tensor
    hole_x: Tensor

    def __getitem__(self, batch) -> Draws:
        return Draws(*(getattr(self, name)[batch] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> Draws:
        return Draws(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class BatchAugment:
    """The batched twin of ``train_transform``: the same settings, the same distribution, one gather a batch.

    Instead of padding and slicing, it computes for each output pixel the input pixel that it shows: an offset for the
    crop, a reversal for the flip, a reflection at the border. Then one indexing operation moves all pixels at once.
    """

    pad: int = 4
    pad_mode: str = "reflect"
    flip: bool = True
    cutout: int = 8
    size: int = 32

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Draw for ``count`` images, on the CPU: the same seed gives the same augmentations on every device."""

        def integers(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        return Draws(
            crop_y=integers(2 * self.pad + 1),
            crop_x=integers(2 * self.pad + 1),
            flips=integers(2).bool() if self.flip else torch.zeros(count, dtype=torch.bool),
            hole_y=integers(self.size - self.cutout + 1),
            hole_x=integers(self.size - self.cutout + 1),
        )

    def apply(self, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """Augment ``images[index]``.

        Args:
            images: (M, size, size, 3) uint8, the resident dataset; it is only read.
            index: (N,) int64, the images of this batch.
            draws: N draws, on the same device.

        Returns:
            (N, size, size, 3) uint8.
        """
        position = torch.arange(self.size, device=images.device)
        columns = torch.where(draws.flips[:, None], self.size - 1 - position, position)
        rows = position + draws.crop_y[:, None] - self.pad  # (N, size), from -pad to size - 1 + pad
        columns = columns + draws.crop_x[:, None] - self.pad

        if self.pad_mode == "reflect":
            source_rows, source_columns = self._reflect(rows), self._reflect(columns)
        else:
            source_rows, source_columns = rows.clamp(0, self.size - 1), columns.clamp(0, self.size - 1)
        # Pixels as rows of a flat (M * size * size, 3) table: one index_select instead of a three-way gather.
        pixel = (index[:, None, None] * self.size + source_rows[:, :, None]) * self.size + source_columns[:, None, :]
        batch = images.view(-1, 3).index_select(0, pixel.flatten()).view(*pixel.shape, 3)

        fill = _constant(MEAN_PIXEL, torch.uint8, images.device)
        if self.pad_mode == "constant" and self.pad:
            outside_rows, outside_columns = rows != source_rows, columns != source_columns
            outside = outside_rows[:, :, None] | outside_columns[:, None, :]
            batch = torch.where(outside[..., None], fill, batch)
        if self.cutout:
            image = torch.arange(len(index), device=images.device)[:, None, None]
            side = torch.arange(self.cutout, device=images.device)
            hole_rows, hole_columns = draws.hole_y[:, None] + side, draws.hole_x[:, None] + side
            batch[image, hole_rows[:, :, None], hole_columns[:, None, :]] = fill
        return batch

    def _reflect(self, positions: Tensor) -> Tensor:
        """Mirror positions outside 0..size-1 at the border pixel, without repeating it (OpenCV's BORDER_REFLECT_101)."""
        last = self.size - 1
        return last - (last - positions.abs()).abs()
