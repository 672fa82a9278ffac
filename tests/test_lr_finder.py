"""The LR range test: the rules on curves with known answers, and a sweep that changes nothing."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from utils.config import from_profile
from utils.engine import build_model
from utils.loaders import make_loaders
from utils.lr_finder import LRRange, LRRangeError, find_lr, read_curve, sweep
from utils.runtime import Precision, seed_everything

FP32 = Precision("fp32", torch.device("cpu"))
SETTINGS = dict(train_images=None, batch_size=20, width=4, init="default")
SETTINGS |= dict(range_test_start=1e-5, range_test_end=10.0, range_test_steps=50)


def curve(start=1e-6, steps=121, steepest=3.0, depth=1.5):
    """(lrs, losses) of a typical range test: flat, a fall around ``start * 10**steepest``, a minimum, a rise."""
    decade = np.linspace(0, 6, steps)
    fall = depth / (1 + np.exp(-4 * (decade - steepest)))
    return start * 10**decade, 2.3 - fall + 4 * np.maximum(decade - 4.5, 0) ** 2


@pytest.mark.parametrize(("start", "steepest", "depth", "steps"), [(1e-6, 3.0, 1.5, 121), (1e-8, 2.5, 0.6, 300)])
def test_the_suggestions_lie_where_the_curve_puts_them(start, steepest, depth, steps):
    found = read_curve(*curve(start, steps, steepest, depth))
    decades = {name: math.log10(lr / start) for name, lr in found.suggestions.items()}
    assert decades["steepest"] == pytest.approx(steepest, abs=0.1)
    assert decades["minimum"] == pytest.approx(4.5, abs=0.3)  # it still falls a little after the rise begins
    # A logistic fall of steepness 4 has covered 5% of its height ln(19) / 4 decades before its middle.
    assert decades["onset"] == pytest.approx(steepest - math.log(19) / 4, abs=0.15)


@pytest.mark.parametrize("rule", ["onset-minimum", "steepest-minimum"])
def test_each_rule_uses_its_two_suggestions_despite_noise(rule):
    lrs, losses = curve()
    found = read_curve(lrs, losses, rule)
    low, high = rule.split("-")
    assert found.rule == rule
    assert (found.lr_min, found.lr_max) == (found.suggestions[low], found.suggestions[high])
    noisy = read_curve(lrs, losses + np.random.default_rng(0).normal(0, 0.05, len(losses)), rule)
    np.testing.assert_allclose(*(np.log10([each.lr_min, each.lr_max]) for each in (noisy, found)), rtol=0, atol=0.5)


# A spike hides the fall until the minimum.
SPIKE = np.concatenate([np.full(10, 2.3), np.linspace(2.3, 0.5, 20), [20.0], np.full(20, 0.5), np.linspace(0.5, 3, 49)])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (np.full(100, 2.3), "the loss never fell: 2.300 .* range_test_end "),
        (np.linspace(2.3, 9.0, 100), "the loss never fell.* lower range_test_start"),
        (np.linspace(2.3, 0.5, 100), "still falling at .* raise range_test_end"),
        (np.full(3, 2.3), "after 3 steps, .*: lower range_test_start"),
        (np.array([]), "after 0 steps"),
        (SPIKE, "rule 'onset-minimum' puts LRMIN at .* and LRMAX at .* raise range_test_steps"),
    ],
)
def test_an_unreadable_curve_names_the_settings_to_change(losses, message):
    with pytest.raises(LRRangeError, match=f"{message}.*or set lr_min and lr_max"):
        read_curve(np.logspace(-6, 0, 100)[: len(losses)], losses)


@pytest.fixture
def parts(toy):
    """A small network and its augmenting loader."""
    config = from_profile("quick", **SETTINGS)
    seed_everything(0)
    return build_model(config, 10), make_loaders(toy, config, FP32)[0]


def test_a_sweep_finds_the_range_that_was_recorded_and_shows_only_a_named_bar(parts, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    found = find_lr(*parts, from_profile("quick", **SETTINGS), FP32)
    assert found.losses[:20].mean() == pytest.approx(2.2908, rel=1e-3)
    assert len(found.lrs) >= 45  # it may diverge in the last steps
    np.testing.assert_allclose(found.lrs, np.geomspace(1e-5, 10, 50)[: len(found.lrs)], rtol=1e-9)
    # Processors round differently, which high LRs amplify: it may move both ends by some of the 50 steps.
    steps = 10 ** (5.1 * 6 / 49)
    assert 2.223e-4 / steps <= found.lr_min <= 2.223e-4 * steps
    assert 6.251e-2 / steps <= found.lr_max <= 6.251e-2 * steps
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "LR range test: " in shown.err
    np.testing.assert_equal(vars(LRRange.from_dict(json.loads(json.dumps(found.to_dict())))), vars(found))


@pytest.mark.parametrize("training", [True, False])
def test_a_sweep_leaves_everything_as_it_was_and_repeats(parts, training):
    config = from_profile("quick", **{**SETTINGS, "dropout": 0.1, "range_test_steps": 20})
    model, loader = build_model(config, 10).train(training), parts[1]
    loader.epoch = 7
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    np.testing.assert_array_equal(*(sweep(model, loader, config, FP32) for _ in range(2)))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert loader.epoch == 7


def test_the_curve_ends_before_a_loss_that_is_not_finite(parts):
    model, loader = parts
    batches = [
        (images * (math.nan if step == 12 else 1), labels) for step, (images, labels) in enumerate([*loader] * 5)
    ]
    lrs, losses = sweep(model, batches, from_profile("quick", **SETTINGS), FP32)
    assert len(lrs) == len(losses) == 12


def test_the_curve_ends_once_the_loss_exceeds_three_times_the_first(parts):
    lrs, losses = sweep(*parts, from_profile("quick", **{**SETTINGS, "range_test_end": 1e4}), FP32)
    assert 20 < len(lrs) == len(losses) < 50
    assert max(losses[:-1]) <= 3 * losses[0] < losses[-1]


def test_lr_scale_multiplies_both_ends_and_given_ends_skip_the_test(parts):
    found = find_lr(*parts, from_profile("quick", **SETTINGS, lr_rule="steepest-minimum", lr_scale=0.4), FP32)
    assert found.lr_min == pytest.approx(0.4 * found.suggestions["steepest"])
    assert found.lr_max == pytest.approx(0.4 * found.suggestions["minimum"])
    given = find_lr(*parts, from_profile("quick", lr_min=1e-3, lr_max=1e-2), FP32)
    assert (given.lr_min, given.lr_max, given.rule) == (1e-3, 1e-2, "given")
