"""The network: the assignment's table, and the behaviour of each part."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import ConvLayer, CustomLayer, CustomResNet
from utils.runs import report
from utils.runtime import PROJECT_ROOT, seed_everything
from utils.transforms import normalize

PARAMETERS = 6_573_130
REFERENCE_SUMMARY = PROJECT_ROOT.parent / "shared" / "reference" / "model_summary.txt"


def summary_lines(text):
    """The lines of the table without rules and alignment, with the current class name."""
    lines = [" ".join(line.split()) for line in text.replace("Make_Custom_Layer-", "CustomLayer-").splitlines()]
    return [line for line in lines if line and set(line) not in ({"-"}, {"="})]


@pytest.fixture(scope="module")
def printed_summary():
    return summary_lines(report.model_summary())


@pytest.fixture(scope="module")
def model():
    seed_everything(0)
    return CustomResNet()


@pytest.fixture(scope="module")
def images(toy):
    return normalize(torch.from_numpy(toy.train_images[:8]))


def test_the_summary_is_the_reference_table(printed_summary):
    if not REFERENCE_SUMMARY.is_file():
        pytest.skip("needs the reference table model_summary.txt in ../shared/reference beside the repository")
    assert printed_summary == summary_lines(REFERENCE_SUMMARY.read_text())


def test_the_summary_has_50_rows_and_the_assignments_parameter_count(printed_summary, model):
    assert sum(bool(re.match(r"\w+-\d+ \[", line)) for line in printed_summary) == 50
    assert f"Total params: {PARAMETERS:,}" in printed_summary
    assert f"Trainable params: {PARAMETERS:,}" in printed_summary
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS


def test_the_width_scales_every_layer(images):
    model = CustomResNet(width=8).eval()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [convolution.out_channels for convolution in convolutions] == [8, 16, 16, 16, 32, 64, 64, 64]
    assert model(images[:2]).shape == (2, 10)


def test_convolutions_have_no_bias(model):
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 8
    assert all(convolution.bias is None for convolution in convolutions)


@pytest.mark.parametrize("num_classes", [2, 37])
def test_the_output_is_one_row_of_logits_per_image(num_classes, images):
    logits = CustomResNet(num_classes).eval()(images[:2])
    assert logits.shape == (2, num_classes)


def test_logits_are_not_softmaxed(model, images):
    with torch.no_grad():
        model.fc.bias += 100  # moves every logit, but no probability
        logits = model.eval()(images[:2])
        model.fc.bias -= 100
    assert (logits > 1).all()


@pytest.mark.parametrize("training", [True, False])
def test_predict_proba_gives_probabilities_and_restores_the_mode(model, images, training):
    model.train(training)
    statistics = model.prep.conv.norm.running_mean.clone()
    probabilities = model.predict_proba(images)
    assert all(module.training is training for module in model.modules())
    assert torch.equal(model.prep.conv.norm.running_mean, statistics)  # computed in eval mode either way
    assert not probabilities.requires_grad
    torch.testing.assert_close(probabilities, model.eval()(images).softmax(1))


def test_predict_proba_restores_the_mode_after_an_error(model):
    model.train()
    with pytest.raises(ValueError, match="shape"):
        model.predict_proba(torch.zeros(1, 3, 28, 28))
    assert model.training


@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_network_starts_near_ln_10(seed, toy):
    seed_everything(seed)
    labels = torch.from_numpy(toy.train_labels[:40])
    with torch.no_grad():
        loss = F.cross_entropy(CustomResNet().train()(normalize(torch.from_numpy(toy.train_images[:40]))), labels)
    assert loss.item() == pytest.approx(math.log(10), abs=0.3)


def test_logit_scale_multiplies_the_logits(images):
    seed_everything(0)
    plain = CustomResNet(logit_scale=1.0).eval()
    scaled = CustomResNet(logit_scale=0.125).eval()
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(scaled(images[:2]), plain(images[:2]) / 8)


def test_the_residual_block_is_added_to_its_input():
    seed_everything(0)
    layer = CustomLayer(4, 6, residual=True).eval()
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        shortcut = layer.conv(x)
        torch.testing.assert_close(layer(x), shortcut + layer.block(shortcut))
        assert not torch.allclose(layer(x), shortcut)
        # A block that outputs 0 changes nothing.
        layer.block[1].norm.weight.zero_()
        layer.block[1].norm.bias.zero_()
        torch.testing.assert_close(layer(x), shortcut)


def test_layers_one_and_three_are_residual(model):
    residual = [layer.block is not None for layer in (model.prep, model.layer1, model.layer2, model.layer3)]
    assert residual == [False, True, False, True]


@pytest.mark.parametrize("pool", [False, True])
def test_a_conv_layer_pools_before_it_normalizes(pool):
    layer = ConvLayer(3, 5, pool=pool).train()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = F.conv2d(x, layer.conv.weight, padding=1)
        if pool:
            expected = F.max_pool2d(expected, 2)
        expected = F.relu(F.batch_norm(expected, None, None, training=True))
        torch.testing.assert_close(layer(x), expected)


def test_dropout_zeroes_its_share_in_training_only():
    seed_everything(0)
    layer = ConvLayer(3, 16, dropout=0.3)
    with torch.no_grad():
        layer.norm.bias.fill_(20.0)  # so that the ReLU zeroes nothing
        x = torch.randn(16, 3, 16, 16)
        trained = layer.train()(x)
        tested = layer.eval()(x)
    zeroed = (trained == 0).float().mean().item()
    assert zeroed == pytest.approx(0.3, abs=0.01)  # 65,536 draws: a standard deviation of 0.002
    assert (tested > 0).all()


def test_dropout_reaches_every_relu():
    dropouts = [module for module in CustomResNet(dropout=0.2).modules() if isinstance(module, nn.Dropout)]
    assert [dropout.p for dropout in dropouts] == [0.2] * 8
    assert all(module.p == 0.0 for module in CustomResNet().modules() if isinstance(module, nn.Dropout))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (2, 3, 28, 28), (2, 32, 32, 3), (2, 3, 32, 32, 1)])
def test_the_error_for_a_wrong_input_shape_names_the_right_one(model, shape):
    message = re.escape(f"shape {shape}: CustomResNet takes (N, 3, 32, 32)")
    with pytest.raises(ValueError, match=rf"{message}.*image\[None\].*permute"):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_classes=1), "num_classes is 1: a classifier needs at least 2 classes"),
        (dict(num_classes=0), "num_classes is 0"),
        (dict(dropout=1.0), r"dropout is 1.0: choose a probability of at least 0 and below 1"),
        (dict(dropout=-0.1), "dropout is -0.1"),
        (dict(width=0), "width is 0: the first layer needs at least 1 channel"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CustomResNet(**arguments)


def test_a_few_steps_on_one_batch_lower_its_loss(toy):
    seed_everything(0)
    model = CustomResNet(width=16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, labels = normalize(torch.from_numpy(toy.train_images[:10])), torch.from_numpy(toy.train_labels[:10])
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
