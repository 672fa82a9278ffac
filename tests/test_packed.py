"""Packed convolutions: the same numbers as plain ones for every batch, map and dtype, and otherwise the same model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.packed import PackedConv2d
from utils.config import Config
from utils.engine import build_model
from utils.runtime import Precision


def pair(inputs: int, outputs: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A plain and a packed convolution whose weights are -1, 0 and 1."""
    plain, packed = (kind(inputs, outputs, 3, padding=1, bias=False) for kind in (nn.Conv2d, PackedConv2d))
    nn.init.uniform_(plain.weight, -1.5, 1.5).data.round_()
    packed.load_state_dict(plain.state_dict())
    return plain, packed


def integers(*shape: int) -> torch.Tensor:
    """-1, 0 and 1 in channels_last: sums of their products are exact in any order."""
    return torch.randint(-1, 2, shape).float().contiguous(memory_format=torch.channels_last)


@given(st.integers(1, 20), st.tuples(*[st.integers(1, 9)] * 4), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=50)
def test_packing_changes_no_output_and_no_gradient(count, sizes, dtype):
    torch.manual_seed(count)
    inputs, outputs, *map_size = sizes
    x, outer = (integers(count, channels, *map_size).to(dtype) for channels in (inputs, outputs))
    results = []
    for convolution in pair(inputs, outputs):
        y = convolution.to(dtype)(x.requires_grad_())
        results.append((y, *torch.autograd.grad(y, (x, convolution.weight), outer)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_packed_network_is_otherwise_the_same():
    plain, packed = (build_model(Config(width=4, ghost_batch=0, packed=packed), 10) for packed in ("off", "on"))
    assert sum(isinstance(module, PackedConv2d) for module in packed.modules()) == 8
    packed.load_state_dict(plain.state_dict())
    x, labels = torch.randn(11, 3, 32, 32), torch.arange(11) % 10
    for model in (plain, packed):
        nn.functional.cross_entropy(model(x), labels).backward()
    for expected, found in zip(plain.parameters(), packed.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("flag", "name"), [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("amx_bf16", "fp32")])
def test_maps_are_packed_only_in_bf16_with_amx(flag, name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    model = build_model(Config(width=4), 10, Precision(name, torch.device("cpu")))
    assert isinstance(model.prep.conv.conv, PackedConv2d) == ((flag, name) == ("amx_bf16", "bf16"))
