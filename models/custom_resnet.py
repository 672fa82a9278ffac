"""The Session 10 network: a small ResNet for 32x32 images, 6,573,130 parameters with ten classes.

Read it bottom-up: ``CustomResNet`` stacks four ``CustomLayer``s, each made of ``ConvLayer``s.

The architecture is the ResNet-9 of D. Page, *How to train your ResNet* (2018); the residual connection is from He et
al., *Deep Residual Learning for Image Recognition* (2015), https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

IMAGE_SIZE = 32


class ConvLayer(nn.Module):
    """3x3 convolution -> (max-pool) -> batch norm -> ReLU -> dropout.

    Pooling comes *before* batch norm and ReLU, which then have only a quarter of the pixels to process. In eval mode the
    order makes no difference where batch norm's scale is positive.

    Args:
        in_channels, out_channels: channels of the input and the output.
        pool: halve height and width with a 2x2 max-pool.
        dropout: probability of zeroing an activation in training.
        conv, norm: what builds the convolution and the normalization; the recipe has ``GhostBatchNorm2d``.

    Shapes:
        (N, in_channels, H, W) -> (N, out_channels, H, W), or (N, out_channels, H/2, W/2) with ``pool``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        pool: bool = False,
        dropout: float = 0.0,
        conv: Callable[..., nn.Module] = nn.Conv2d,
        norm: Callable[..., nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        # No bias: batch norm subtracts the channel's mean, and any bias with it.
        self.conv = conv(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else None
        self.norm = norm(out_channels)
        self.relu = nn.ReLU()  # not in place: torch overwrites bf16 on a CPU at less than half the speed
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.pool is not None:
            x = self.pool(x)
        x = self.norm(x)
        x = self.relu(x)
        return self.dropout(x)


class CustomLayer(nn.Module):
    """One ``ConvLayer``, optionally followed by a residual block: ``x + R(x)``, where R is two ``ConvLayer``s.

    Channels, ``pool``, ``options`` and shapes are as in ``ConvLayer``. ``skip=False`` leaves out the residual connection:
    ``R(x)``, with the same parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        pool: bool = True,
        residual: bool = False,
        skip: bool = True,
        **options,
    ):
        super().__init__()
        self.skip = skip
        self.conv = ConvLayer(in_channels, out_channels, pool, **options)
        self.block = None
        if residual:
            self.block = nn.Sequential(
                ConvLayer(out_channels, out_channels, **options),
                ConvLayer(out_channels, out_channels, **options),
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.block is None:
            return x
        return x + self.block(x) if self.skip else self.block(x)


class CustomResNet(nn.Module):
    """PrepLayer, three layers (the first and third residual), a 4x4 max-pool and a linear classifier.

    Args:
        num_classes: size of the output.
        width: channels of the first layer; the other three have 2, 4 and 8 times as many.
        logit_scale: multiplies the logits. Two residual sums and a max-pool make them large: an untrained network would
            start at a loss of 3 to 6, depending on its first weights. Scaled by 1/8 (Page, 2018) it starts near ln 10 =
            2.30, the loss of giving every class the same probability.
        skip: see ``CustomLayer``.
        options: of every ``ConvLayer``: ``dropout``, ``conv``, ``norm``.

    Shapes:
        (N, 3, 32, 32) float -> (N, num_classes) logits. The softmax is part of the loss, and of ``predict_proba``.
    """

    def __init__(
        self, num_classes: int = 10, *, width: int = 64, logit_scale: float = 0.125, skip: bool = True, **options
    ):
        super().__init__()
        self.logit_scale = logit_scale
        self.prep = CustomLayer(3, width, pool=False, **options)
        self.layer1 = CustomLayer(width, 2 * width, residual=True, skip=skip, **options)
        self.layer2 = CustomLayer(2 * width, 4 * width, **options)
        self.layer3 = CustomLayer(4 * width, 8 * width, residual=True, skip=skip, **options)
        self.pool = nn.MaxPool2d(4)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prep(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.pool(x)
        x = self.flatten(x)
        x = self.fc(x)
        return x * self.logit_scale

    @torch.no_grad()
    def predict_proba(self, x: Tensor) -> Tensor:
        """Class probabilities in eval mode, (N, 3, 32, 32) normalized floats -> (N, num_classes) float32.

        The model's mode is restored afterwards.
        """
        was_training = self.training
        try:
            return self.eval()(x).float().softmax(dim=1)
        finally:
            self.train(was_training)
