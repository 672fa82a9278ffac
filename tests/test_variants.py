"""Variants of the network: what each changes, and what it must not change."""

import copy
import shutil

import pytest
import torch
from torch import nn

from models import CustomResNet
from models.variants import (
    GhostBatchNorm2d,
    ghost_batch_norm,
    init_patches,
    pad_by_replication,
    principal_patches,
    remove_skips,
    set_norm_momentum,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CustomResNet(width=4)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_removing_skips_keeps_names_and_weights(model):
    x = torch.randn(2, 4, 32, 32)
    before = copy.deepcopy(model.eval())
    remove_skips(model)
    torch.testing.assert_close(model.layer1(x), before.layer1.block(before.layer1.conv(x)))
    assert not torch.allclose(model.layer1(x), before.layer1(x))
    images = torch.randn(2, 3, 32, 32)
    with_first_only = copy.deepcopy(model)
    with_first_only.layer3.__class__ = type(before.layer3)
    assert not torch.allclose(model(images), with_first_only(images))  # layer 3 has no skip either
    model.load_state_dict(before.state_dict())


def test_replicate_padding_changes_only_the_border(model):
    x = torch.randn(1, 3, 32, 32) + 3
    zeros = model.prep.conv.conv(x)
    pad_by_replication(model)
    replicated = model.prep.conv.conv(x)
    torch.testing.assert_close(zeros[..., 1:-1, 1:-1], replicated[..., 1:-1, 1:-1])
    assert not torch.allclose(zeros[..., 0, :], replicated[..., 0, :])


def test_norm_momentum_reaches_every_batch_norm(model):
    set_norm_momentum(model, 0.4)
    assert [norm.momentum for norm in norms(model)] == [0.4] * 8


# --- ghost batch norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "group", "sizes"),
    [(12, 4, [4, 4, 4]), (11, 4, [4, 4, 3]), (9, 4, [3, 3, 3]), (3, 4, [3]), (13, 8, [7, 6])],
)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("way", ["_group_by_group", "_all_at_once"])
def test_groups_are_normalized_separately_and_share_running_statistics(
    monkeypatch, count, group, sizes, memory_format, way
):
    monkeypatch.setattr(GhostBatchNorm2d, "_group_by_group", getattr(GhostBatchNorm2d, way))  # without a GPU too
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5, momentum=0.3)
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    nn.init.uniform_(plain.running_mean)
    ghost = copy.deepcopy(plain)
    ghost_batch_norm(ghost, group)

    x = (torch.randn(count, 5, 3, 2) * 2 + 1).contiguous(memory_format=memory_format).requires_grad_()
    alone = [copy.deepcopy(plain) for _ in sizes]
    expected = torch.cat([norm(part) for norm, part in zip(alone, x.split(sizes))])
    found = ghost(x)
    torch.testing.assert_close(found, expected)
    outer = torch.randn_like(found)
    ours = torch.autograd.grad(found, (x, ghost.weight, ghost.bias), outer)
    of_x = torch.autograd.grad(expected, x, outer, retain_graph=True)
    of_weights = torch.autograd.grad(expected, [norm.weight for norm in alone], outer, retain_graph=True)
    of_biases = torch.autograd.grad(expected, [norm.bias for norm in alone], outer)
    torch.testing.assert_close(ours, (*of_x, sum(of_weights), sum(of_biases)))
    assert ours[0].is_contiguous(memory_format=torch.channels_last) or memory_format is torch.contiguous_format

    # One update: the mean of the statistics that each group alone would give.
    torch.testing.assert_close(ghost.running_mean, torch.stack([norm.running_mean for norm in alone]).mean(0))
    torch.testing.assert_close(ghost.running_var, torch.stack([norm.running_var for norm in alone]).mean(0))
    assert ghost.num_batches_tracked == 1
    in_eval_mode = nn.functional.batch_norm(x, ghost.running_mean, ghost.running_var, ghost.weight, ghost.bias)
    torch.testing.assert_close(ghost.eval()(x), in_eval_mode)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_network_has_the_same_ghost_batches():
    class Network(nn.Module):  # of its own: torch.compile may skip what is all torch's own
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())

        def forward(self, x):
            return self.layers(x)

    torch.manual_seed(0)
    eager = Network()
    ghost_batch_norm(eager, 4)
    compiled = copy.deepcopy(eager)
    torch.compiler.reset()
    compiled.compile(dynamic=False)
    images, outer = torch.randn(12, 3, 8, 8), torch.randn(12, 16 * 36)
    for network in (eager, compiled):
        network(images).backward(outer)
    torch.compiler.reset()
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, ours), theirs in zip(compiled.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_ghost_batch_norm_reaches_the_whole_model_and_learns(model):
    names = list(model.state_dict())
    plain = copy.deepcopy(model)
    ghost_batch_norm(model, 4)
    assert list(model.state_dict()) == names
    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert not torch.allclose(model(images), plain(images))
    model(images).square().sum().backward()
    assert all(norm.weight.grad.abs().sum() > 0 for norm in norms(model))
    with pytest.raises(ValueError, match="group is 1"):
        ghost_batch_norm(model, 1)


# --- initialization ---------------------------------------------------------------------------------------------------


def smooth_images(count: int) -> torch.Tensor:
    """Random pictures with similar neighbouring pixels, like photographs."""
    return nn.functional.avg_pool2d(torch.randn(count, 3, 36, 36), 5, stride=1) * 5


def test_principal_patches_are_uncorrelated_and_ordered():
    torch.manual_seed(0)
    images = smooth_images(20)
    components = principal_patches(images)
    answers = nn.functional.conv2d(images, components).transpose(0, 1).flatten(1)
    covariance = answers.cov()
    variances = covariance.diagonal()
    assert (variances[:-1] >= variances[1:] - 1e-4).all()
    assert variances[0] > 10 * variances[-1]
    torch.testing.assert_close(covariance, torch.diag(variances), atol=1e-3 * variances[0].item(), rtol=0)
    torch.testing.assert_close(components.flatten(1).norm(dim=1), torch.ones(27))


@pytest.mark.parametrize("width", [8, 64])
def test_filters_start_as_pairs_of_patches_and_as_identities(width):
    torch.manual_seed(0)
    images = smooth_images(4)
    plain = CustomResNet(width=width)
    model = copy.deepcopy(plain)
    init_patches(model, images)
    first, before = model.prep.conv.conv.weight, plain.prep.conv.conv.weight
    pairs = min(width // 2, 27)
    torch.testing.assert_close(first[0 : 2 * pairs : 2], -first[1 : 2 * pairs : 2])
    assert torch.equal(first[2 * pairs :], before[2 * pairs :])
    assert first.std().item() == pytest.approx((3 * 27) ** -0.5, rel=0.1)

    x = torch.randn(1, 2 * width, 4, 4)
    torch.testing.assert_close(model.layer1.block[0].conv(x), x)
    wider = model.layer2.conv.conv
    torch.testing.assert_close(wider(x)[:, : 2 * width], x)
    assert torch.equal(wider.weight[2 * width :], plain.layer2.conv.conv.weight[2 * width :])
    assert all(parameter.requires_grad for parameter in model.parameters())
