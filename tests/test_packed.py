"""Packed convolutions: the same numbers as plain ones for every batch, map and dtype, and otherwise the same model."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import models.packed
from models import CustomResNet
from models.packed import PackedConv2d, pack_small_maps
from utils.runs.machine import packing_pays
from utils.runtime import Precision


def pair(inputs: int, outputs: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A plain and a packed convolution whose weights are -1, 0 and 1."""
    plain = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    nn.init.uniform_(plain.weight, -1.5, 1.5).data.round_()
    packed = pack_small_maps(copy.deepcopy(plain))
    assert type(packed) is PackedConv2d
    return plain, packed


def integers(*shape: int) -> torch.Tensor:
    """-1, 0 and 1 in channels_last: sums of their products are exact in any order."""
    return torch.randint(-1, 2, shape).float().contiguous(memory_format=torch.channels_last)


def gradients(convolution: nn.Conv2d, x: torch.Tensor, outer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, and the gradients of input and weight."""
    x = x.clone().requires_grad_()
    y = convolution(x)
    return y, *torch.autograd.grad(y, (x, convolution.weight), outer)


@given(
    count=st.integers(1, 20),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packing_changes_no_number(count, inputs, outputs, height, width, dtype):
    torch.manual_seed(count)
    plain, packed = (convolution.to(dtype) for convolution in pair(inputs, outputs))
    x, outer = integers(count, inputs, height, width).to(dtype), integers(count, outputs, height, width).to(dtype)
    for expected, found in zip(gradients(plain, x, outer), gradients(packed, x, outer), strict=True):
        assert torch.equal(found, expected)


def test_neighbours_do_not_leak_into_each_other():
    _, packed = pair(4, 4)
    x = integers(16, 4, 4, 4)
    alone = packed(x)
    x[3] += 100
    touched = (packed(x) != alone).flatten(1).any(1)
    assert touched.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("side", [4, 8])
def test_the_layout_is_packed_and_stays_channels_last(side, monkeypatch):
    seen = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: seen.append(x) or forward(self, x))
    _, packed = pair(4, 6)
    y = packed(integers(16, 4, side, side))
    assert seen[0].shape == (2, 4, side, 8 * (side + 1))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_large_maps_and_few_images_are_not_packed(monkeypatch):
    monkeypatch.setattr(models.packed, "side_by_side", lambda x: pytest.fail("packed"))
    _, packed = pair(2, 2)
    packed(integers(8, 2, 9, 9))
    packed(integers(7, 2, 4, 4))


def test_the_rest_of_the_model_stays_the_same():
    torch.manual_seed(0)
    plain = CustomResNet(width=4).to(memory_format=torch.channels_last)
    packed = pack_small_maps(copy.deepcopy(plain))
    assert sum(type(module) is PackedConv2d for module in packed.modules()) == 8
    assert list(packed.state_dict()) == list(plain.state_dict())
    x, labels = torch.randn(11, 3, 32, 32), torch.arange(11) % 10
    for model in (plain, packed):
        nn.functional.cross_entropy(model(x), labels).backward()
    for expected, found in zip(plain.parameters(), packed.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-6)
    # A copy packs too, loads a plain model's weights, and gives the same results.
    again = copy.deepcopy(packed)
    again.load_state_dict(plain.state_dict())
    assert type(again.layer3.block[0].conv) is PackedConv2d
    torch.testing.assert_close(again.eval()(x), plain.eval()(x))


def test_other_convolutions_are_not_packed():
    others = nn.Sequential(
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(2, 2, 3, padding=1, stride=2),
        nn.Conv2d(2, 2, 1),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
    )
    assert not any(isinstance(module, PackedConv2d) for module in pack_small_maps(others).modules())


@pytest.mark.parametrize(
    ("flag", "name", "device", "pays"),
    [
        ("amx_bf16", "bf16", "cpu", True),
        ("avx512_bf16", "bf16", "cpu", False),
        ("amx_bf16", "fp32", "cpu", False),
        ("amx_bf16", "bf16", "cuda", False),
    ],
)
def test_packing_pays_only_in_bf16_with_amx(flag, name, device, pays, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    assert packing_pays(Precision(name, torch.device(device))) is pays
