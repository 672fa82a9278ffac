"""The notebooks' small experiments and checks: they show what the text claims."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from models import CustomLayer, CustomResNet
from models.custom_resnet import ConvLayer
from utils import analysis, engine, lesson
from utils.schedule import one_cycle_lrs


def test_shown_code_is_the_modules_code():
    shown = lesson.show(CustomLayer, engine.RunningMetrics.update).data
    assert shown.startswith("```python\nclass CustomLayer(nn.Module):\n")
    assert "\ndef update(self, logits: Tensor, labels: Tensor) -> None:\n    " in shown  # not indented
    compile(shown.removeprefix("```python\n").removesuffix("```"), "shown", "exec")


def test_small_runs_learn_repeat_and_leave_the_global_generator_unchanged(toy):
    before = torch.get_rng_state()
    settings = {"epochs": 3, "peak_epoch": 1, "batch_size": 10, "width": 4}
    cycle, again, constant = (
        lesson.small_run(toy, schedule=schedule, **settings) for schedule in ("one-cycle", "one-cycle", "constant")
    )
    assert torch.equal(before, torch.get_rng_state())
    assert cycle.train_loss == again.train_loss
    assert cycle.train_loss[-1] < 0.9 * cycle.train_loss[0]
    assert cycle.lr[-1] == pytest.approx(1e-4)
    assert constant.lr == pytest.approx([1e-2] * 3)


def test_activation_maps_point_at_what_speaks_for_the_class():
    """A head that reads one channel of the last map: the evidence is where that channel is bright."""
    reader = CustomResNet(width=8)
    with torch.no_grad():
        reader.fc.weight.zero_()
        reader.fc.weight[3, 7] = 1.0
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (evidence,) = analysis.class_activation_maps(reader, image, [3])
    assert reader.training
    features = reader.eval().layer3(reader.layer2(reader.layer1(reader.prep(image))))
    row, column = divmod(int(features[0, 7].argmax()), 4)
    peak = np.unravel_index(evidence.argmax(), evidence.shape)
    assert (peak[0] // 8, peak[1] // 8) == (row, column)
    assert 0 <= evidence.min() <= 0.5 < evidence.max() <= 1
    assert not analysis.class_activation_maps(reader, image, [2]).any()  # nothing speaks for a class that nothing reads


class Block(nn.Module):
    def __init__(self, channels: int, layers: int = 2):
        super().__init__()
        self.block = nn.Sequential(*(ConvLayer(channels, channels) for _ in range(layers)))

    def forward(self, x):
        return x + self.block(x)


def variant(forward) -> type[Block]:
    return type("Variant", (Block,), {"forward": forward})


def cycle_lr(step: int, *cycle) -> float:
    return one_cycle_lrs(*cycle)[step]


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: lesson.check_block(Block), "right"),
        (lambda: lesson.check_block(variant(lambda self, x: self.block(x))), "not yet: .* x must come out"),
        (
            lambda: lesson.check_block(variant(lambda self, x: (x + self.block(x)).relu())),
            "not yet: .* x must come out",
        ),
        (
            lambda: lesson.check_block(variant(lambda self, x: x + self.block[0](x) + self.block[1](x))),
            "not yet: .* x must come out",
        ),
        (lambda: lesson.check_block(variant(lambda self, x: None)), "not yet: forward returns nothing"),
        (lambda: lesson.check_block(variant(lambda self, x: x)), "not yet: one of the two layers does nothing"),
        (lambda: lesson.check_block(variant(lambda self, x: x + self.block[0](x))), "not yet: one of the two layers"),
        (lambda: lesson.check_block(lambda channels: Block(channels, 1)), "not yet: .* 304 .*, your block has 152"),
        (lambda: lesson.check_block(None), "not yet: TypeError"),
        (lambda: lesson.check_lr(cycle_lr), "right"),
        (lambda: lesson.check_lr(lambda step, low, *_: low), r"not yet: at step 1 .* is 3.243e-05, yours is 1.2e-05"),
        (lambda: lesson.check_value(3, 3, "count again"), "right"),
        (lambda: lesson.check_value(2, 3, "count again"), "not yet: count again"),
        (lambda: lesson.check_value(None, 3, "count again"), "not yet: no answer so far"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_check_says_right_or_what_is_missing(check, said, capsys):
    check()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert re.fullmatch(f"{said}.*\n", out)
