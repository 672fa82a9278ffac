"""Variants of the network: parts removed to show what they contribute, and ideas tried out.

Each changes a built ``CustomResNet`` in place, and keeps the names of its modules and parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.custom_resnet import CustomLayer, CustomResNet


class LayerWithoutSkip(CustomLayer):
    """R(x) instead of x + R(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))


def remove_skips(model: CustomResNet) -> None:
    """Remove the residual connections; convolutions and weights stay the same."""
    for layer in (model.layer1, model.layer3):
        layer.__class__ = LayerWithoutSkip


def pad_by_replication(model: nn.Module) -> None:
    """Pad every convolution's input with its border pixels instead of zeros."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "replicate"


def set_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Move batch norm's running statistics by a share of ``momentum`` per step (torch's default: 0.1)."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


# --- ghost batch norm -------------------------------------------------------------------------------------------------


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over groups of at most ``group`` images in training; see ``ghost_batch_norm``."""

    group: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.group:
            return super().forward(x)
        groups = math.ceil(len(x) / self.group)  # their sizes differ by at most one image
        in_place = x.device.type == "cpu" and not torch.compiler.is_compiling()  # the compiler takes no `out=` views
        normalize = self._group_by_group if in_place else self._all_at_once
        out, means, variances = normalize(x, groups)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(means.mean(0), self.momentum)
            self.running_var.lerp_(variances.mean(0), self.momentum)
        return out

    def _group_by_group(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """For a CPU: without copies, and as fast as plain batch norm.

        Returns:
            The (N, C, H, W) output, and the means and unbiased variances of the groups, (groups, C) each.
        """
        return _NormalizeGroups.apply(x, self.weight, self.bias, groups, self.eps)

    def _all_at_once(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """For a GPU: the same in a few kernel launches."""
        size, larger = divmod(len(x), groups)
        split = larger * (size + 1)
        # No slice of the whole: its gradient would be a copy into zeros, and no longer channels_last.
        parts = [(x, groups)] if not larger else zip(x.split([split, len(x) - split]), (larger, groups - larger))
        results = [_NormalizeAsChannels.apply(part, self.weight, self.bias, count, self.eps) for part, count in parts]
        if len(results) == 1:
            return results[0]
        return tuple(torch.cat(each) for each in zip(*results))


class _NormalizeGroups(torch.autograd.Function):
    """Batch norm over each of ``groups`` parts of a batch, with torch's kernels."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        out = torch.empty_like(x)
        mean, variance, saved_mean, saved_invstd = weight.new_zeros((4, groups, x.shape[1]))
        inputs, outputs = x.tensor_split(groups), out.tensor_split(groups)
        for group in range(groups):
            torch.ops.aten.native_batch_norm.out(
                inputs[group],
                weight,
                bias,
                mean[group],
                variance[group],
                training=True,
                momentum=1.0,  # so that `mean` and `variance` become this batch's
                eps=eps,
                out=outputs[group],
                save_mean=saved_mean[group],
                save_invstd=saved_invstd[group],
            )
        ctx.save_for_backward(x, weight, saved_mean, saved_invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        x, weight, saved_mean, saved_invstd = ctx.saved_tensors
        groups = len(saved_mean)
        to_x, (to_weight, to_bias) = torch.empty_like(x), weight.new_zeros((2, *saved_mean.shape))
        inputs, gradients, outputs = (each.tensor_split(groups) for each in (x, gradient, to_x))
        for group in range(groups):
            torch.ops.aten.native_batch_norm_backward.out(
                gradients[group],
                inputs[group],
                weight,
                running_mean=None,
                running_var=None,
                save_mean=saved_mean[group],
                save_invstd=saved_invstd[group],
                train=True,
                eps=ctx.eps,
                output_mask=[True, True, True],
                out0=outputs[group],
                out1=to_weight[group],
                out2=to_bias[group],
            )
        return to_x, to_weight.sum(0), to_bias.sum(0), None, None


class _NormalizeAsChannels(torch.autograd.Function):
    """Batch norm over each of ``groups`` parts of equal size, in one call: each part gets channels of its own.

    The copies that this takes cost less than many small launches; autograd's own bookkeeping of them would cost more.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        mean, variance = weight.new_zeros((2, groups * x.shape[1]))
        channels, weights = _to_channels(x, groups), weight.repeat(groups)
        out, saved_mean, saved_invstd = torch.native_batch_norm(
            channels,
            weights,
            bias.repeat(groups),
            mean,
            variance,
            training=True,
            momentum=1.0,  # as above
            eps=eps,
        )
        ctx.save_for_backward(channels, weights, saved_mean, saved_invstd)
        ctx.groups, ctx.eps = groups, eps
        mean, variance = mean.view(groups, -1), variance.view(groups, -1)
        ctx.mark_non_differentiable(mean, variance)
        return _from_channels(out, groups), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, *_):
        channels, weights, saved_mean, saved_invstd = ctx.saved_tensors
        to_channels, to_weights, to_biases = torch.ops.aten.native_batch_norm_backward(
            _to_channels(gradient, ctx.groups),
            channels,
            weights,
            None,
            None,
            saved_mean,
            saved_invstd,
            True,
            ctx.eps,
            [True, True, True],
        )
        to_weight, to_bias = (each.view(ctx.groups, -1).sum(0) for each in (to_weights, to_biases))
        return _from_channels(to_channels, ctx.groups), to_weight, to_bias, None, None


def _to_channels(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) -> (N / groups, groups * C, H, W), channels_last."""
    pixels = x.permute(0, 2, 3, 1).unflatten(0, (groups, -1))  # (groups, N / groups, H, W, C)
    return pixels.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def _from_channels(channels: Tensor, groups: int) -> Tensor:
    """The inverse of ``_to_channels``."""
    pixels = channels.permute(0, 2, 3, 1).unflatten(3, (groups, -1))  # (N / groups, H, W, groups, C)
    return pixels.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


def ghost_batch_norm(model: nn.Module, group: int) -> None:
    """Normalize over groups of at most ``group`` images (Hoffer et al. 2017, https://arxiv.org/abs/1705.08741).

    Smaller groups make the statistics noisier, which regularizes, without a smaller batch for the optimizer. The
    running statistics move once per step, towards the mean of the groups' statistics, so their momentum means the same
    as in plain batch norm. In eval mode nothing changes.

    Raises:
        ValueError: a group of fewer than two images.
    """
    if group < 2:
        raise ValueError(f"group is {group}: statistics need at least 2 images; the usual groups are 32 to 64")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__, module.group = GhostBatchNorm2d, group


# --- initialization ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_patches(model: CustomResNet, images: Tensor) -> None:
    """Start the first layer from patterns in the images, and the others near the identity; all stay trainable.

    The first layer's filters become the principal components of the images' 3x3 patches, the strongest first. Each is
    followed by its negative, since the ReLU drops one sign; their spread is that of the default initialization. Batch
    norm then equalizes the components' variances: together this is Page's whitening layer, but trainable. In the other
    convolutions, the first filters pass on one input channel each ("partial identity": Jordan 2024,
    https://arxiv.org/abs/2404.00498). All other filters keep their default values.

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
