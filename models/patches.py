"""The recipe's start: first filters from patterns in the images, the other convolutions near the identity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def init_patches(model: nn.Module, images: Tensor) -> None:
    """Set the first filters of every convolution, in place; all stay trainable, and the rest keep their values.

    The first convolution's filters become the principal components of the images' 3x3 patches, the strongest first.
    Each is followed by its negative, since the ReLU drops one sign; their spread is that of the default initialization.
    Batch norm then equalizes the components' variances: together this is Page's whitening layer, but trainable. In the
    other convolutions, the first filters pass on one input channel each ("partial identity": Jordan 2024,
    https://arxiv.org/abs/2404.00498).

    Args:
        model: on the CPU, newly built.
        images: (N, 3, 32, 32) float32, normalized train images; a few thousand are enough.
    """
    first, *others = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    components = principal_patches(images)[: first.out_channels // 2]
    components = components / 3**0.5  # the default's variance is 1 / (3 * inputs): filters of length 1 / sqrt(3)
    first.weight[: 2 * len(components)] = torch.stack((components, -components), dim=1).flatten(0, 1)
    for convolution in others:
        nn.init.dirac_(convolution.weight[: convolution.in_channels])


def principal_patches(images: Tensor) -> Tensor:
    """The principal components of all 3x3 patches of (N, C, H, W) images: (9 C, C, 3, 3), unit length, strongest first.

    Their signs are arbitrary.
    """
    channels = images.shape[1]
    patches = F.unfold(images, kernel_size=3).transpose(1, 2).flatten(0, 1)  # (N * patches, 9 C)
    _, vectors = torch.linalg.eigh(patches.T.cov())
    return vectors.T.flip(0).unflatten(1, (channels, 3, 3)).contiguous()
