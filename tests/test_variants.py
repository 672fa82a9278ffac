"""What the recipe adds to the network: ghost batch norm, and first filters from patches."""

import copy
import shutil

import pytest
import torch
from torch import nn

from models import CustomResNet
from models.ghost_norm import GhostBatchNorm2d, all_at_once, group_by_group
from models.patches import init_patches, principal_patches

# --- ghost batch norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "group", "sizes"),
    [(12, 4, [4, 4, 4]), (11, 4, [4, 4, 3]), (9, 4, [3, 3, 3]), (3, 4, [3]), (13, 8, [7, 6])],
)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_groups_are_normalized_separately_and_share_running_statistics(count, group, sizes, memory_format):
    torch.manual_seed(0)
    plain, ghost = nn.BatchNorm2d(5, momentum=0.3), GhostBatchNorm2d(5, group, momentum=0.3)
    for tensor in (plain.weight, plain.bias, plain.running_mean):
        nn.init.uniform_(tensor)
    ghost.load_state_dict(plain.state_dict())
    x = (torch.randn(count, 5, 3, 2) * 2 + 1).contiguous(memory_format=memory_format).requires_grad_()
    alone = [copy.deepcopy(plain) for _ in sizes]
    expected = torch.cat([norm(part) for norm, part in zip(alone, x.split(sizes))])
    found = ghost(x)
    torch.testing.assert_close(found, expected)
    outer = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (x, ghost.weight, ghost.bias), outer)
    of_x = torch.autograd.grad(expected, x, outer, retain_graph=True)
    of_weights = torch.autograd.grad(expected, [norm.weight for norm in alone], outer, retain_graph=True)
    of_biases = torch.autograd.grad(expected, [norm.bias for norm in alone], outer)
    torch.testing.assert_close(gradients, (*of_x, sum(of_weights), sum(of_biases)))

    # One update, to the mean of the statistics that each group alone would give.
    torch.testing.assert_close(ghost.running_mean, torch.stack([norm.running_mean for norm in alone]).mean(0))
    torch.testing.assert_close(ghost.running_var, torch.stack([norm.running_var for norm in alone]).mean(0))
    assert ghost.num_batches_tracked == 1
    in_eval_mode = nn.functional.batch_norm(x, ghost.running_mean, ghost.running_var, ghost.weight, ghost.bias)
    torch.testing.assert_close(ghost.eval()(x), in_eval_mode)


def test_the_form_for_gpus_computes_the_same():
    x = torch.randn(11, 5, 3, 2, requires_grad=True)
    weight, bias, outer = torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True), torch.randn(11, 5, 3, 2)
    results = []
    for form in (group_by_group, all_at_once):
        out, statistics = form(x, weight, bias, 3, 1e-5)
        results.append((out, statistics, *torch.autograd.grad(out, (x, weight, bias), outer)))
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_ghost_batches_are_the_same():
    torch.manual_seed(0)
    eager = GhostBatchNorm2d(16, group=4)
    compiled = copy.deepcopy(eager)
    torch.compiler.reset()
    compiled.compile(dynamic=False)
    images, outer = torch.randn(12, 16, 6, 6), torch.randn(12, 16, 6, 6)
    for norm in (eager, compiled):
        norm(images).backward(outer)
    torch.compiler.reset()
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))
    for found, expected in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4)


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
