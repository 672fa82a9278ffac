"""The LR range test: the rules on curves with known answers, and a sweep that changes nothing."""

import contextlib
import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utils import lr_finder
from utils.config import choices, quick
from utils.loaders import BatchedLoader
from utils.lr_finder import (
    ONSET,
    RULES,
    SMOOTHING_WINDOW,
    LRRange,
    LRRangeError,
    find_lr,
    find_range,
    read_curve,
    smooth,
)
from utils.runtime import ConfigError, Precision, seed_everything
from utils.schedule import one_cycle
from utils.transforms import BatchAugment

FP32 = Precision("fp32", torch.device("cpu"))


def curve(start=1e-6, decades=6.0, steps=121, steepest=3.0, minimum=4.5, depth=1.5, level=2.3):
    """(lrs, losses) of a typical range test: flat, a fall around ``start * 10**steepest``, a minimum, a rise."""
    decade = np.linspace(0, decades, steps)
    fall = depth / (1 + np.exp(-4 * (decade - steepest)))
    rise = 4 * np.maximum(decade - minimum, 0) ** 2
    return start * 10**decade, level - fall + rise


# --- reading a curve ------------------------------------------------------------------------------------------------


@given(
    start=st.floats(1e-8, 1e-4),
    steepest=st.floats(1.5, 3.0),
    gap=st.floats(1.2, 2.0),
    depth=st.floats(0.5, 2.2),
    steps=st.integers(80, 300),
)
def test_the_rules_find_the_steepest_fall_and_the_minimum_wherever_they_lie(start, steepest, gap, depth, steps):
    lrs, losses = curve(start, steps=steps, steepest=steepest, minimum=steepest + gap, depth=depth)
    found = read_curve(lrs, losses)
    step = 6.0 / (steps - 1)  # decades between two points of the curve
    assert math.log10(found.suggestions["steepest"] / start) == pytest.approx(steepest, abs=2 * step)
    # The curve still falls a little after the rise begins, and the smoothing window spans both.
    assert math.log10(found.suggestions["minimum"] / start) == pytest.approx(steepest + gap, abs=4 * step + 0.2)
    assert found.suggestions["minimum/10"] == pytest.approx(found.suggestions["minimum"] / 10)
    fall = losses[0] - found.smoothed.min()
    at_onset = np.interp(math.log(found.suggestions["onset"]), np.log(lrs), found.smoothed)
    assert ONSET * fall <= losses[0] - at_onset < (ONSET + 0.1) * fall + 0.05  # at most one point too late
    assert found.suggestions["onset"] < found.suggestions["steepest"]
    assert found.suggestions["steepest"] / 30 < found.suggestions["valley"] < found.suggestions["minimum"]


@given(shift=st.floats(-3, 3), rule=st.sampled_from(sorted(RULES)))
def test_a_curve_shifted_in_lr_shifts_the_answer(shift, rule):
    lrs, losses = curve()
    plain, moved = read_curve(lrs, losses, rule), read_curve(lrs * 10**shift, losses, rule)
    assert moved.lr_min == pytest.approx(plain.lr_min * 10**shift, rel=1e-6)
    assert moved.lr_max == pytest.approx(plain.lr_max * 10**shift, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_uses_its_two_suggestions(rule):
    lrs, losses = curve()
    found = read_curve(lrs, losses, rule)
    low, high = RULES[rule]
    assert found.rule == rule
    assert (found.lr_min, found.lr_max) == (found.suggestions[low], found.suggestions[high])
    assert set(found.suggestions) == {"onset", "steepest", "valley", "minimum/10", "minimum"}
    assert 1e-6 < found.lr_min < found.lr_max < 1
    assert set(found.suggestions.values()) - {found.suggestions["minimum/10"]} <= set(lrs)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_answer_by_less_than_half_a_decade(seed):
    lrs, losses = curve()
    noisy = read_curve(lrs, losses + np.random.default_rng(seed).normal(0, 0.05, len(losses)))
    clean = read_curve(lrs, losses)
    assert abs(math.log10(noisy.lr_min / clean.lr_min)) < 0.5
    assert abs(math.log10(noisy.lr_max / clean.lr_max)) < 0.5


def test_smoothing_averages_a_window_and_shifts_nothing():
    ramp = np.arange(20.0)
    np.testing.assert_allclose(smooth(ramp)[3:-3], ramp[3:-3])
    spike = np.zeros(21)
    spike[10] = SMOOTHING_WINDOW
    np.testing.assert_allclose(smooth(spike), (np.abs(np.arange(21) - 10) <= SMOOTHING_WINDOW // 2).astype(float))
    np.testing.assert_allclose(smooth(np.full(5, 3.0)), 3.0)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (np.full(100, 2.3), "the loss never fell: 2.300 at LR 1.0e-06, at best 2.300.* raise range_test_end"),
        (np.linspace(2.3, 9.0, 100), "the loss never fell.* If it rose at once, lower range_test_start"),
        (np.linspace(2.3, 0.5, 100), r"still falling at LR 1.0e\+00, the end of the range test.* raise range_test_end"),
        (np.full(3, 2.3), "after 3 steps, because the loss .*: lower range_test_start .it began at 1.0e-06.*NaN"),
        (np.array([]), "ended after 0 steps, because the loss stopped being finite .*: lower range_test_start"),
    ],
)
def test_an_unreadable_curve_names_the_setting_to_change(losses, message):
    lrs = np.logspace(-6, 0, 100)[: len(losses)]
    with pytest.raises(LRRangeError, match=message):
        read_curve(lrs, losses)


def test_a_rule_with_swapped_ends_points_to_the_others():
    # The minimum comes early, before the longest decrease with the valley in its middle.
    losses = np.concatenate([np.full(10, 2.3), np.linspace(2.3, 0.5, 10), np.full(10, 0.5), np.linspace(2.2, 1.5, 70)])
    lrs = np.logspace(-6, 0, 100)
    with pytest.raises(LRRangeError, match=r"rule 'valley-minimum' puts LRMIN at .*or choose another of steepest-min"):
        read_curve(lrs, losses, "valley-minimum")
    assert lrs[19] <= read_curve(lrs, losses, "steepest-minimum").lr_max <= lrs[30]


def test_a_range_survives_json():
    found = read_curve(*curve())
    back = LRRange.from_dict(json.loads(json.dumps(found.to_dict())))
    assert isinstance(back.losses, np.ndarray)
    np.testing.assert_equal(vars(back), vars(found))


# --- the sweep ------------------------------------------------------------------------------------------------------


STEPPED_WITH: list[float] = []  # the LR of every step that a RecordingAdam or its copies have taken


class RecordingAdam(torch.optim.Adam):
    def step(self, closure=None):
        STEPPED_WITH.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.fixture
def parts(toy):
    """A small network with batch norm and dropout, an augmenting loader, and Adam after its first step."""
    seed_everything(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(392, 10)
    )
    loader = BatchedLoader(toy.train_images, toy.train_labels, 20, augment=BatchAugment(), shuffle=True)
    optimizer = RecordingAdam(model.parameters(), lr=3e-4)
    images, labels = next(iter(loader))
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    STEPPED_WITH.clear()
    return model, loader, optimizer


def sweep(model, loader, optimizer, criterion=nn.functional.cross_entropy, **options):
    settings = dict(precision=FP32, start=1e-5, end=100.0, steps=70, rule="onset-minimum")
    return find_lr(model, loader, optimizer, criterion, **{**settings, **options})


def loss_by_step(function):
    """A criterion whose value depends only on the number of steps taken so far."""
    return lambda logits, labels: logits.sum() * 0 + function(len(STEPPED_WITH))


def test_a_sweep_of_a_real_network_finds_a_range_that_trains_it(parts):
    model, loader, _ = parts
    found = sweep(*parts)
    assert 1e-5 < found.lr_min < found.lr_max < 10
    assert np.isfinite(found.losses).all()
    assert found.lrs.shape == found.losses.shape == found.smoothed.shape

    def loss_after_training_at(lr):
        trained = copy.deepcopy(model)
        adam = torch.optim.Adam(trained.parameters(), lr=lr)
        for _ in range(4):
            for images, labels in loader:
                adam.zero_grad()
                loss = nn.functional.cross_entropy(trained(images), labels)
                loss.backward()
                adam.step()
        return loss.item()

    assert loss_after_training_at(found.lr_max) < loss_after_training_at(1e-6) / 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_a_sweep_leaves_everything_as_it_was(parts, training, fails):
    model, loader, optimizer = parts
    model.train(training)
    loader.epoch = 7

    def snapshot():
        states = (value for state in optimizer.state.values() for value in state.values())
        gradients = (parameter.grad for parameter in model.parameters())
        tensors = [*model.state_dict().values(), *gradients, *states, torch.get_rng_state()]
        modes = [module.training for module in model.modules()]
        plain = (modes, loader.epoch, optimizer.state_dict()["param_groups"], random.getstate(), np.random.get_state())
        return copy.deepcopy((tensors, plain))

    def failing(logits, labels):
        if len(STEPPED_WITH) == 5:
            raise RuntimeError("out of memory")
        return nn.functional.cross_entropy(logits, labels)

    tensors, plain = snapshot()
    with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
        sweep(*parts, failing if fails else nn.functional.cross_entropy)
    tensors_after, plain_after = snapshot()
    torch.testing.assert_close(tensors_after, tensors, rtol=0, atol=0)
    np.testing.assert_equal(plain_after, plain)


def test_a_sweep_is_repeatable_and_quiet(parts, capfd):
    first, second = (sweep(*parts) for _ in range(2))
    np.testing.assert_array_equal(first.losses, second.losses)
    np.testing.assert_array_equal(first.lrs, second.lrs)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_lr_runs_from_start_to_end_in_equal_ratios(parts, scheduled):
    *_, optimizer = parts
    if scheduled:  # an optimizer may already have a scheduler
        one_cycle(optimizer, 1e-3, 1e-2, epochs=4, peak_epoch=2, steps_per_epoch=5)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    found = sweep(*parts, loss_by_step(lambda step: abs(step - 30) / 10 + 4), start=1e-4, end=0.5, steps=41)
    np.testing.assert_allclose(found.lrs, np.geomspace(1e-4, 0.5, 41), rtol=1e-9)
    np.testing.assert_array_equal(found.lrs, STEPPED_WITH)  # the optimizer really used them
    np.testing.assert_allclose(found.losses, [abs(step - 30) / 10 + 4 for step in range(41)], rtol=1e-6)
    assert optimizer.state_dict()["param_groups"] == before


def test_a_nan_ends_the_sweep_and_the_curve_so_far_is_read(parts):
    found = sweep(*parts, loss_by_step(lambda step: 4 + abs(step - 30) / 10 if step < 40 else math.nan))
    assert len(found.losses) == 40
    assert np.isfinite(found.losses).all()
    assert len(STEPPED_WITH) == 41  # no batch was spent after the NaN


def test_single_bad_batches_of_a_set_learned_by_heart_do_not_end_the_sweep(parts):
    def falls_far_with_spikes(step):
        if step >= 50:
            return 20.0
        return 2.3 if step < 20 else 0.2 if step % 5 == 0 else 0.01  # spikes of 20 times the best loss

    found = sweep(*parts, loss_by_step(falls_far_with_spikes))
    assert len(found.losses) == 51  # it ended with the divergence
    assert found.lr_max > found.lrs[20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(criterion=loss_by_step(lambda step: math.nan)), "after 0 steps, .* finite .* look at the data for NaN"),
        (
            dict(criterion=loss_by_step(lambda step: 1 + step)),
            "after 4 steps, .* exceeded 3 times the first: lower range_",
        ),
        (dict(start=1e-9, end=1e-7), "range_test_end"),
    ],
)
def test_a_sweep_without_an_answer_names_the_setting_to_change(parts, options, message):
    with pytest.raises(LRRangeError, match=message):
        sweep(*parts, **options)


def test_an_unknown_rule_is_answered_with_the_known_ones(parts):
    with pytest.raises(ConfigError, match="rule is 'guess': choose one of steepest-minimum, valley-minimum, tenth-min"):
        sweep(*parts, rule="guess")


def test_a_loader_that_counts_no_epochs_can_be_swept(parts):
    model, loader, optimizer = parts
    assert sweep(model, list(loader), optimizer).lr_max > 0


def test_every_rule_can_be_chosen_in_the_settings():
    assert set(lr_finder.RULES) == set(choices("lr_rule"))


@pytest.mark.parametrize("factors", [(0.5, 1.6), (1.0, 1.0)])
def test_the_ends_of_the_cycle_may_be_multiples_of_what_the_rule_finds(parts, factors):
    low, high = factors
    model, loader, _ = parts
    settings = dict(batch_size=20, range_test_start=1e-5, range_test_end=100.0, range_test_steps=70)
    found = find_range(model, loader, quick(**settings, lr_min_factor=low, lr_max_factor=high), FP32)
    assert found.lr_min == low * found.suggestions["onset"]
    assert found.lr_max == high * found.suggestions["minimum"]
    with pytest.raises(LRRangeError, match=r"lr_min_factor 1000000.0 .* choose factors that leave LRMIN below LRMAX"):
        find_range(model, loader, quick(**settings, lr_min_factor=1e6), FP32)
