"""Departures from the plain network: what is taken away to see what it was good for, and what is tried out.

All change a built ``CustomResNet`` in place and keep its modules' names and parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.custom_resnet import CustomLayer, CustomResNet


class LayerWithoutSkip(CustomLayer):
    """R(x) where ``CustomLayer`` gives x + R(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))


def remove_skips(model: CustomResNet) -> None:
    """Take the residual connections away, and nothing else: same convolutions, same initial weights."""
    for layer in (model.layer1, model.layer3):
        layer.__class__ = LayerWithoutSkip


def pad_by_replication(model: nn.Module) -> None:
    """Convolutions continue the border pixels instead of padding with zeros."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "replicate"


def set_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Batch norm's running statistics move by ``momentum`` a step (torch's default: 0.1)."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


# --- ghost batch norm -------------------------------------------------------------------------------------------------


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that takes its statistics over ``group`` images at a time while training; see ``ghost_batch_norm``."""

    group: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.group:
            return super().forward(x)
        groups = -(
            -len(x) // self.group
        )  # their sizes differ by one image at most, so none is too small for statistics
        normalize = self._group_by_group if x.device.type == "cpu" else self._all_at_once
        out, means, variances = normalize(x, groups)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(means.mean(0), self.momentum)
            self.running_var.lerp_(variances.mean(0), self.momentum)
        return out

    def _group_by_group(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """As fast as plain batch norm on a CPU: no copies, each group is read and written where it lies.

        Returns:
            The (N, C, H, W) output, and each group's (groups, C) means and unbiased variances.
        """
        return _NormalizeGroups.apply(x, self.weight, self.bias, groups, self.eps)

    def _all_at_once(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same in few launches, for a GPU."""
        size, larger = divmod(len(x), groups)
        split = larger * (size + 1)
        parts = [(x[:split], larger), (x[split:], groups - larger)]
        outputs, means, variances = zip(*(self._as_channels(part, count) for part, count in parts if count))
        return torch.cat(outputs), torch.cat(means), torch.cat(variances)

    def _as_channels(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """One call of torch's batch norm, in which each group, all of one size, has channels of its own."""
        mean, variance = x.new_zeros((2, groups * x.shape[1]), dtype=self.running_mean.dtype)
        pixels = x.permute(0, 2, 3, 1).unflatten(0, (groups, -1))  # (groups, N / groups, H, W, C)
        channels = pixels.permute(1, 2, 3, 0, 4).flatten(3)  # (N / groups, H, W, groups * C)
        channels = F.batch_norm(
            channels.permute(0, 3, 1, 2),
            mean,
            variance,
            self.weight.repeat(groups),
            self.bias.repeat(groups),
            training=True,
            momentum=1.0,  # `mean` and `variance` become those of this batch
            eps=self.eps,
        )
        pixels = channels.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).permute(3, 0, 1, 2, 4)
        return pixels.flatten(0, 1).permute(0, 3, 1, 2), mean.view(groups, -1), variance.view(groups, -1)


class _NormalizeGroups(torch.autograd.Function):
    """Batch norm over each of ``groups`` parts of a batch by itself, with torch's own kernels."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        out = torch.empty_like(x)
        of_groups = (groups, x.shape[1])
        mean, variance, saved_mean, saved_invstd = weight.new_zeros((4, *of_groups))
        for part, part_out, *rows in zip(
            x.tensor_split(groups), out.tensor_split(groups), mean, variance, saved_mean, saved_invstd
        ):
            torch.ops.aten.native_batch_norm.out(
                *(part, weight, bias, rows[0], rows[1], True, 1.0, eps),  # momentum 1: `mean` becomes this group's
                **dict(out=part_out, save_mean=rows[2], save_invstd=rows[3]),
            )
        ctx.save_for_backward(x, weight, saved_mean, saved_invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, saved_mean, saved_invstd = ctx.saved_tensors
        groups = len(saved_mean)
        to_x, (to_weight, to_bias) = torch.empty_like(x), weight.new_zeros((2, *saved_mean.shape))
        for part, above, part_out, *rows in zip(
            *(each.tensor_split(groups) for each in (x, gradient, to_x)), saved_mean, saved_invstd, to_weight, to_bias
        ):
            torch.ops.aten.native_batch_norm_backward.out(
                *(above, part, weight, None, None, rows[0], rows[1], True, ctx.eps, [True, True, True]),
                **dict(out0=part_out, out1=rows[2], out2=rows[3]),
            )
        return to_x, to_weight.sum(0), to_bias.sum(0), None, None


def ghost_batch_norm(model: nn.Module, group: int) -> None:
    """Batch statistics over groups of at most ``group`` images (Hoffer et al. 2017, https://arxiv.org/abs/1705.08741).

    Smaller groups make the statistics noisier, which regularizes; the optimizer's batch stays what it is. The running
    statistics move once a step, towards the mean of the groups' statistics, by the momentum that plain batch norm has:
    they then remember as many steps as there. (Updated once a *group* instead, they would need a momentum of
    1 - (1 - m)^(1 / groups) for that.) In eval mode nothing changes.

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
    """Start the first layer from the images' own patterns, and the others near the identity; all stay trainable.

    The first layer's filters become the principal components of the images' 3x3 patches, the strongest first, each with
    its negative, since the ReLU behind drops one sign; with the spread of the default initialization. Batch norm then
    evens out the components' variances: together that is Page's whitening layer, not frozen. In every other convolution
    the first filters, one an input channel, pass that channel on ("partial identity": Jordan 2024,
    https://arxiv.org/abs/2404.00498). Filters beyond those keep their default values.

    Args:
        model: on the CPU, freshly made.
        images: (N, 3, 32, 32) float32, normalized train images; a few thousand are plenty.
    """
    first, *others = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    components = principal_patches(images)[: first.out_channels // 2]
    components = components / 3**0.5  # the default's variance is 1 / (3 * inputs): filters of length 1 / sqrt(3)
    first.weight[: 2 * len(components)] = torch.stack((components, -components), dim=1).flatten(0, 1)
    for convolution in others:
        nn.init.dirac_(convolution.weight[: convolution.in_channels])


def principal_patches(images: Tensor) -> Tensor:
    """The principal components of all 3x3 patches of (N, C, H, W) images: (9 C, C, 3, 3), of unit length, strongest first.

    A component's sign is arbitrary.
    """
    channels = images.shape[1]
    patches = F.unfold(images, kernel_size=3).transpose(1, 2).flatten(0, 1)  # (N * patches, 9 C)
    _, vectors = torch.linalg.eigh(patches.T.cov())
    return vectors.T.flip(0).unflatten(1, (channels, 3, 3)).contiguous()
