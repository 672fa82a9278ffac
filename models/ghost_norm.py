"""Ghost batch norm (Hoffer et al. 2017, https://arxiv.org/abs/1705.08741): statistics of small groups of a batch.

Smaller groups make the statistics noisier, which regularizes, without a smaller batch for the optimizer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, in training, normalizes groups of at most ``group`` images, whose sizes differ by at most one.

    The running statistics move once per step, towards the mean of the groups' statistics, so ``momentum`` means the
    same as in plain batch norm. In eval mode nothing changes.

    Args:
        num_features: channels.
        group: images per group, at least 2; the usual groups are 32 to 64.
        options: of ``nn.BatchNorm2d``.
    """

    def __init__(self, num_features: int, group: int = 64, **options):
        super().__init__(num_features, **options)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.group:
            return super().forward(x)
        groups = math.ceil(len(x) / self.group)
        normalize = group_by_group if prefers_small_calls(x.device) else all_at_once
        out, statistics = normalize(x, self.weight, self.bias, groups, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            running = [self.running_mean, self.running_var]
            torch._foreach_lerp_(running, list(statistics.mean(1)), self.momentum)
        return out


def prefers_small_calls(device: torch.device) -> bool:
    """True where one call per group is faster: on a CPU, which needs no copies then, and on GPUs before Ampere.

    Compiled code fuses the copies away, and the compiler takes no ``out=`` views.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0))


def group_by_group(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Normalize (N, C, H, W) with one call per group, without copies.

    Returns the output, and (2, groups, C) statistics: the means, and the unbiased variances.
    """
    return _GroupByGroup.apply(x, weight, bias, groups, eps)


def all_at_once(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The same as ``group_by_group`` in a few large calls."""
    size, larger = divmod(len(x), groups)
    if not larger:
        return _AllAtOnce.apply(x, weight, bias, groups, eps)
    split = larger * (size + 1)  # the first `larger` groups have one image more
    first = _AllAtOnce.apply(x[:split], weight, bias, larger, eps)
    second = _AllAtOnce.apply(x[split:], weight, bias, groups - larger, eps)
    return torch.cat((first[0], second[0])), torch.cat((first[1], second[1]), dim=1)


class _GroupByGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        out = torch.empty_like(x)
        statistics, saved = weight.new_zeros((2, 2, groups, x.shape[1]))
        for part, to, (mean, variance), (saved_mean, saved_invstd) in zip(
            x.tensor_split(groups), out.tensor_split(groups), statistics.unbind(1), saved.unbind(1)
        ):
            # With a momentum of 1, `mean` and `variance` become this group's.
            normalize, into = torch.ops.aten.native_batch_norm.out, dict(out=to, save_mean=saved_mean)
            normalize(part, weight, bias, mean, variance, True, 1.0, eps, **into, save_invstd=saved_invstd)
        ctx.save_for_backward(x, weight, saved)
        ctx.eps = eps
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # no zeros for the gradient of `statistics`
        return out, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        x, weight, saved = ctx.saved_tensors
        groups = saved.shape[1]
        to_x, to_both = torch.empty_like(x), torch.empty_like(saved)
        backward = torch.ops.aten.native_batch_norm_backward.out
        for part, part_gradient, to_part, (mean, invstd), (to_weight, to_bias) in zip(
            *(each.tensor_split(groups) for each in (x, gradient, to_x)), saved.unbind(1), to_both.unbind(1)
        ):
            into = dict(out0=to_part, out1=to_weight, out2=to_bias)
            backward(part_gradient, part, weight, None, None, mean, invstd, True, ctx.eps, [True] * 3, **into)
        return to_x, *to_both.sum(1), None, None


class _AllAtOnce(torch.autograd.Function):
    """Groups of equal size: each gets channels of its own, which takes copies, but few launches."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        channels = _to_channels(x, groups)
        weights, biases = (each.expand(groups, -1).reshape(-1) for each in (weight, bias))
        mean, variance = statistics = weight.new_zeros((2, groups * x.shape[1]))
        out, *saved = torch.native_batch_norm(channels, weights, biases, mean, variance, True, 1.0, eps)
        ctx.save_for_backward(channels, weights, *saved)
        ctx.groups, ctx.eps = groups, eps
        statistics = statistics.view(2, groups, -1)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return _from_channels(out, groups), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        channels, weights, *saved = ctx.saved_tensors
        to_channels, *to_both = torch.ops.aten.native_batch_norm_backward(
            _to_channels(gradient, ctx.groups), channels, weights, None, None, *saved, True, ctx.eps, [True] * 3
        )
        to_weight, to_bias = (each.view(ctx.groups, -1).sum(0) for each in to_both)
        return _from_channels(to_channels, ctx.groups), to_weight, to_bias, None, None


def _to_channels(x: Tensor, groups: int) -> Tensor:
    """(N, C, H, W) -> (N / groups, groups * C, H, W), channels_last."""
    pixels = x.permute(0, 2, 3, 1).unflatten(0, (groups, -1))  # (groups, N / groups, H, W, C)
    return pixels.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def _from_channels(channels: Tensor, groups: int) -> Tensor:
    """The inverse of ``_to_channels``."""
    pixels = channels.permute(0, 2, 3, 1).unflatten(3, (groups, -1))  # (N / groups, H, W, groups, C)
    return pixels.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)
