"""The network: the assignment's table, and what each layer and each variant computes."""

import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import CustomLayer, CustomResNet
from models.ghost_norm import GhostBatchNorm2d, all_at_once, group_by_group
from models.patches import init_patches, principal_patches
from utils.runs import report
from utils.runtime import PROJECT_ROOT
from utils.transforms import normalize

REFERENCE_SUMMARY = PROJECT_ROOT.parent / "shared" / "reference" / "model_summary.txt"


def test_the_summary_is_the_assignments_table():
    def lines(text):  # without rules and alignment, and with this project's class name
        lines = [" ".join(line.split()) for line in text.replace("Make_Custom_Layer-", "CustomLayer-").splitlines()]
        return [line for line in lines if set(line) - {"-", "="}]

    printed = lines(report.model_summary())
    assert "Total params: 6,573,130" in printed
    if not REFERENCE_SUMMARY.is_file():
        pytest.skip("needs the reference table model_summary.txt in ../shared/reference beside the repository")
    assert printed == lines(REFERENCE_SUMMARY.read_text())


@pytest.mark.parametrize("skip", [True, False])
def test_parameters_and_the_names_of_the_weights_stay_the_same_without_skips(skip):
    model = CustomResNet(skip=skip)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_573_130
    blocks = [f"layer{number}.block.{half}" for number in (1, 3) for half in (0, 1)]
    layers = ["prep.conv", "layer1.conv", *blocks[:2], "layer2.conv", "layer3.conv", *blocks[2:]]
    of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [f"{layer}.{name}" for layer in layers for name in ("conv.weight", *(f"norm.{part}" for part in of_norm))]
    assert list(model.state_dict()) == [*names, "fc.weight", "fc.bias"]


def test_a_block_is_added_to_its_input_and_without_skip_replaces_it():
    layer, without = CustomLayer(4, 6, residual=True), CustomLayer(4, 6, residual=True, skip=False)
    without.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 8, 8)
    shortcut = layer.eval().conv(x)
    torch.testing.assert_close(layer(x), shortcut + layer.block(shortcut))
    torch.testing.assert_close(without.eval()(x), layer.block(shortcut))


def test_the_gradient_passes_a_block_only_through_the_skip():
    for skip in (True, False):
        layer = CustomLayer(4, 6, residual=True, skip=skip)
        nn.init.zeros_(layer.block[0].norm.weight)  # nothing comes back through R(x)
        layer(torch.randn(2, 4, 8, 8)).square().sum().backward()
        assert layer.conv.conv.weight.grad.any() == skip


def test_an_untrained_network_starts_near_ln_10_because_of_the_logits_scale(toy):
    images, labels = normalize(torch.from_numpy(toy.train_images[:40])), torch.from_numpy(toy.train_labels[:40])
    model, unscaled = CustomResNet(width=16), CustomResNet(width=16, logit_scale=1.0)
    unscaled.load_state_dict(model.state_dict())
    logits = model(images)
    torch.testing.assert_close(logits, unscaled(images) / 8)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(math.log(10), abs=0.3)


def test_predict_proba_gives_probabilities_in_eval_mode_and_restores_the_mode():
    model, images = CustomResNet(width=4, dropout=0.3), torch.randn(3, 3, 32, 32)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3] * 8
    probabilities = model.predict_proba(images)
    with pytest.raises(RuntimeError):
        model.predict_proba(torch.zeros(1, 4, 32, 32))
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(probabilities, model.eval()(images).softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "group", "sizes"),
    [(12, 4, [4, 4, 4]), (11, 4, [4, 4, 3]), (9, 4, [3, 3, 3]), (3, 4, [3]), (13, 8, [7, 6])],
)
def test_groups_are_normalized_separately_and_share_running_statistics(count, group, sizes, dtype):
    plain, ghost = nn.BatchNorm2d(5, momentum=0.3), GhostBatchNorm2d(5, group, momentum=0.3)
    for tensor in (plain.weight, plain.bias, plain.running_mean):
        nn.init.uniform_(tensor)
    ghost.load_state_dict(plain.state_dict())
    x = (torch.randn(count, 5, 3, 2) * 2 + 1).to(dtype, memory_format=torch.channels_last).requires_grad_()
    alone = [copy.deepcopy(plain) for _ in sizes]
    expected, found = torch.cat([norm(part) for norm, part in zip(alone, x.split(sizes))]), ghost(x)
    torch.testing.assert_close(found, expected)
    outer, weights = torch.randn_like(found), [parameter for norm in alone for parameter in norm.parameters()]
    gradients = torch.autograd.grad(found, (x, ghost.weight, ghost.bias), outer)
    of_x, *of_weights = torch.autograd.grad(expected, (x, *weights), outer)
    torch.testing.assert_close(gradients, (of_x, sum(of_weights[::2]), sum(of_weights[1::2])))

    # One update: the mean of the statistics that each group alone would give.
    torch.testing.assert_close(ghost.running_mean, torch.stack([norm.running_mean for norm in alone]).mean(0))
    torch.testing.assert_close(ghost.running_var, torch.stack([norm.running_var for norm in alone]).mean(0))
    assert ghost.num_batches_tracked == 1
    plain.load_state_dict(ghost.state_dict())
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("count", [12, 11])
def test_both_forms_of_ghost_batch_norm_give_the_same_bits(count):
    x, outer = torch.randn(2, count, 4, 4, 16).movedim(4, 2)  # channels_last; 16 fill every processor's vectors
    x.requires_grad_()
    weight, bias = torch.rand(16, requires_grad=True), torch.rand(16, requires_grad=True)
    results = []
    for form in (group_by_group, all_at_once):
        out, statistics = form(x, weight, bias, 3, 1e-5)
        results.append((out, statistics, *torch.autograd.grad(out, (x, weight, bias), outer)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_ghost_batches_are_the_same():
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


def test_principal_patches_are_uncorrelated_and_ordered():
    images = F.avg_pool2d(torch.randn(20, 3, 36, 36), 5, stride=1) * 5  # neighbouring pixels are alike, as in photos
    components = principal_patches(images)
    covariance = F.conv2d(images, components).transpose(0, 1).flatten(1).cov()
    variances = covariance.diagonal()
    assert (variances[:-1] >= variances[1:] - 1e-4).all()
    assert variances[0] > 10 * variances[-1]
    torch.testing.assert_close(covariance, torch.diag(variances), atol=1e-3 * variances[0].item(), rtol=0)
    torch.testing.assert_close(components.flatten(1).norm(dim=1), torch.ones(27))


@pytest.mark.parametrize("width", [8, 64])
def test_filters_start_as_pairs_of_patches_and_as_identities(width):
    images, plain = torch.randn(4, 3, 32, 32), CustomResNet(width=width)
    model = copy.deepcopy(plain)
    init_patches(model, images)
    first, before = model.prep.conv.conv.weight, plain.prep.conv.conv.weight
    pairs = min(width // 2, 27)
    torch.testing.assert_close(first[0 : 2 * pairs : 2], principal_patches(images)[:pairs] / 3**0.5)
    assert torch.equal(first[1 : 2 * pairs : 2], -first[0 : 2 * pairs : 2])
    assert torch.equal(first[2 * pairs :], before[2 * pairs :])
    assert first.std().item() == pytest.approx((3 * 27) ** -0.5, rel=0.1)  # as torch's default

    x, wider = torch.randn(1, 2 * width, 4, 4), model.layer2.conv.conv
    torch.testing.assert_close(model.layer1.block[0].conv(x), x)
    torch.testing.assert_close(wider(x)[:, : 2 * width], x)
    assert torch.equal(wider.weight[2 * width :], plain.layer2.conv.conv.weight[2 * width :])
    assert all(parameter.requires_grad for parameter in model.parameters())
