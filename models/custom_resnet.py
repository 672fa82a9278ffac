"""The Session 10 network: a small ResNet for 32x32 images, 6,573,130 parameters with ten classes.

Read bottom-up: ``CustomResNet`` stacks four ``CustomLayer``s, each made of ``ConvLayer``s.

The architecture is the ResNet-9 of D. Page, *How to train your ResNet* (2018). The residual connection is from He et
al., *Deep Residual Learning for Image Recognition* (2015), https://arxiv.org/abs/1512.03385.
"""

import torch
from torch import Tensor, nn

IMAGE_SIZE = 32


class ConvLayer(nn.Module):
    """3x3 convolution -> (max-pool) -> batch norm -> ReLU -> dropout.

    Pooling comes *before* batch norm and ReLU: the maximum commutes with both (up to the sign of batch norm's scale),
    and in this order they have only a quarter of the pixels to process.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        pool: halve height and width with a 2x2 max-pool.
        dropout: probability of zeroing an activation in training; 0: no dropout.

    Shapes:
        (N, in_channels, H, W) -> (N, out_channels, H, W), or (N, out_channels, H/2, W/2) with ``pool``.
    """

    def __init__(self, in_channels: int, out_channels: int, pool: bool = False, dropout: float = 0.0):
        super().__init__()
        # No bias: batch norm subtracts the channel's mean, and any bias with it.
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else None
        self.norm = nn.BatchNorm2d(out_channels)
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

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        pool: halve height and width in the first ``ConvLayer``.
        residual: add the residual block.
        dropout: passed to every ``ConvLayer``.

    Shapes:
        (N, in_channels, H, W) -> (N, out_channels, H, W), or (N, out_channels, H/2, W/2) with ``pool``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, pool: bool = True, residual: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.conv = ConvLayer(in_channels, out_channels, pool=pool, dropout=dropout)
        self.block = None
        if residual:
            self.block = nn.Sequential(
                ConvLayer(out_channels, out_channels, dropout=dropout),
                ConvLayer(out_channels, out_channels, dropout=dropout),
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.block is not None:
            x = x + self.block(x)
        return x


class CustomResNet(nn.Module):
    """PrepLayer, three layers (the first and third residual), a 4x4 max-pool and a linear classifier.

    Args:
        num_classes: size of the output, at least 2.
        dropout: probability used after each ReLU.
        logit_scale: the output of the linear layer is multiplied by this. Two residual sums and a max-pool make the raw
            logits large: an untrained network would start at a loss of 3 to 6, depending on its first weights. Scaled
            by 1/8 (Page, 2018) it starts near ln 10 = 2.30, the loss of giving every class the same probability.
        width: channels of the first layer; the other three have 2, 4 and 8 times as many.

    Shapes:
        (N, 3, 32, 32) float -> (N, num_classes) logits. The softmax is part of the loss, and of ``predict_proba``.

    Raises:
        ValueError: ``num_classes`` is below 2, ``dropout`` outside [0, 1), ``width`` below 1, or the input is not
            (N, 3, 32, 32).
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.0, logit_scale: float = 0.125, width: int = 64):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}: a classifier needs at least 2 classes")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}: choose a probability of at least 0 and below 1")
        if width < 1:
            raise ValueError(f"width is {width}: the first layer needs at least 1 channel; the recipe has 64")
        self.logit_scale = logit_scale
        self.prep = CustomLayer(3, width, pool=False, dropout=dropout)
        self.layer1 = CustomLayer(width, 2 * width, residual=True, dropout=dropout)
        self.layer2 = CustomLayer(2 * width, 4 * width, dropout=dropout)
        self.layer3 = CustomLayer(4 * width, 8 * width, residual=True, dropout=dropout)
        self.pool = nn.MaxPool2d(4)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the input has shape {tuple(x.shape)}: CustomResNet takes (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}); "
                "for one image add a batch dimension with image[None], for NHWC use images.permute(0, 3, 1, 2)"
            )
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
        """Class probabilities of a batch, computed in eval mode; the model's mode is restored afterwards.

        Args:
            x: (N, 3, 32, 32) float, normalized.

        Returns:
            (N, num_classes) float32; each row sums to 1.
        """
        was_training = self.training
        self.eval()
        try:
            return self(x).float().softmax(dim=1)
        finally:
            self.train(was_training)
