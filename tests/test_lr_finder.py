"""The LR range test: the rules on curves whose answer is known, and a sweep that leaves no trace."""

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

from utils.config import ConfigError, quick
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
from utils.runtime import Precision, seed_everything
from utils.schedule import one_cycle
from utils.transforms import BatchAugment

FP32 = Precision("fp32", torch.device("cpu"))


def curve(start=1e-6, decades=6.0, steps=121, steepest=3.0, minimum=4.5, depth=1.5, level=2.3):
    """A typical range test: flat, a fall around ``start * 10**steepest``, a minimum, a rise.

    Returns:
        (lrs, losses), (S,) each.
    """
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
    # Behind the corner where the rise begins the curve still falls a little; the smoothing window spans both.
    assert math.log10(found.suggestions["minimum"] / start) == pytest.approx(steepest + gap, abs=4 * step + 0.2)
    assert found.suggestions["minimum/10"] == pytest.approx(found.suggestions["minimum"] / 10)
    fall = losses[0] - found.smoothed.min()
    at_onset = np.interp(math.log(found.suggestions["onset"]), np.log(lrs), found.smoothed)
    assert (
        ONSET * fall <= losses[0] - at_onset < (ONSET + 0.1) * fall + 0.05
    )  # one point of the curve at most behind it
    assert found.suggestions["onset"] < found.suggestions["steepest"]
    assert found.suggestions["steepest"] / 30 < found.suggestions["valley"] < found.suggestions["minimum"]


@given(shift=st.floats(-3, 3), rule=st.sampled_from(sorted(RULES)))
def test_a_curve_shifted_in_lr_moves_the_answer_along(shift, rule):
    lrs, losses = curve()
    plain, moved = read_curve(lrs, losses, rule), read_curve(lrs * 10**shift, losses, rule)
    assert moved.lr_min == pytest.approx(plain.lr_min * 10**shift, rel=1e-6)
    assert moved.lr_max == pytest.approx(plain.lr_max * 10**shift, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_takes_its_two_named_suggestions(rule):
    lrs, losses = curve()
    found = read_curve(lrs, losses, rule)
    low, high = RULES[rule]
    assert found.rule == rule
    assert (found.lr_min, found.lr_max) == (found.suggestions[low], found.suggestions[high])
    assert set(found.suggestions) == {"onset", "steepest", "valley", "minimum/10", "minimum"}
    assert 1e-6 < found.lr_min < found.lr_max < 1
    assert set(found.suggestions.values()) - {found.suggestions["minimum/10"]} <= set(lrs)


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_of_mini_batches_moves_the_answer_by_less_than_half_a_decade(seed):
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
    np.testing.assert_allclose(smooth(np.full(5, 3.0)), 3.0)  # at the ends: the mean of what there is


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (np.full(100, 2.3), "the loss never fell: 2.300 at LR 1.0e-06, at best 2.300.* raise range_test_end"),
        (np.linspace(2.3, 9.0, 100), "the loss never fell.* If it rose at once, lower range_test_start"),
        (np.linspace(2.3, 0.5, 100), r"still falling at LR 1.0e\+00, the end of the range test.* raise range_test_end"),
        (np.full(3, 2.3), "stopped being finite after 3 steps.* lower range_test_start .it began at 1.0e-06.*NaN"),
        (np.array([]), "stopped being finite after 0 steps of the range test: lower range_test_start"),
    ],
)
def test_a_curve_without_an_answer_says_what_to_change(losses, message):
    lrs = np.logspace(-6, 0, 100)[: len(losses)]
    with pytest.raises(LRRangeError, match=message):
        read_curve(lrs, losses)


def test_a_rule_whose_ends_are_the_wrong_way_round_points_to_the_others():
    # The minimum comes early, and the longest decrease, whose middle is the valley, only after it.
    losses = np.concatenate([np.full(10, 2.3), np.linspace(2.3, 0.5, 10), np.full(10, 0.5), np.linspace(2.2, 1.5, 70)])
    lrs = np.logspace(-6, 0, 100)
    with pytest.raises(LRRangeError, match=r"rule 'valley-minimum' puts LRMIN at .*or choose another of steepest-min"):
        read_curve(lrs, losses, "valley-minimum")
    assert lrs[19] <= read_curve(lrs, losses, "steepest-minimum").lr_max <= lrs[30]


def test_a_range_survives_json():
    found = read_curve(*curve())
    back = LRRange.from_dict(json.loads(json.dumps(found.to_dict())))
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(back, name), value)
    assert isinstance(back.losses, np.ndarray)


# --- the sweep ------------------------------------------------------------------------------------------------------


STEPPED_WITH: list[float] = []  # the LR of every step that a RecordingAdam or a copy of one has taken


class RecordingAdam(torch.optim.Adam):
    def step(self, closure=None):
        STEPPED_WITH.append(self.param_groups[0]["lr"])
        return super().step(closure)


def make(toy):
    """A small network with batch norm and dropout, a loader with augmentation, Adam that has already stepped."""
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


def sweep(model, loader, optimizer, criterion=None, **options):
    settings = dict(precision=FP32, start=1e-5, end=100.0, steps=70)
    return find_lr(model, loader, optimizer, criterion or nn.CrossEntropyLoss(), **{**settings, **options})


def test_a_sweep_of_a_real_network_finds_a_range_that_trains_it(toy):
    model, loader, optimizer = make(toy)
    found = sweep(model, loader, optimizer)
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
def test_a_sweep_leaves_everything_as_it_was(toy, training):
    model, loader, optimizer = make(toy)
    model.train(training)
    loader.epoch = 7
    model_before, optimizer_before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients_before = [parameter.grad.clone() for parameter in model.parameters()]
    rng_before = random.getstate(), np.random.get_state(), torch.get_rng_state()

    sweep(model, loader, optimizer)

    assert model.training is training
    assert model[1].training is training
    for name, value in model.state_dict().items():
        assert torch.equal(value, model_before[name]), name
    for parameter, gradient in zip(model.parameters(), gradients_before):
        assert torch.equal(parameter.grad, gradient)
    after = optimizer.state_dict()
    assert after["param_groups"] == optimizer_before["param_groups"]
    for index, state in after["state"].items():
        for name, value in state.items():
            assert torch.equal(value, optimizer_before["state"][index][name]), name
    assert loader.epoch == 7
    assert random.getstate() == rng_before[0]
    np.testing.assert_equal(np.random.get_state(), rng_before[1])
    assert torch.equal(torch.get_rng_state(), rng_before[2])


def test_a_loader_that_fails_in_mid_sweep_leaves_everything_as_it_was_too(toy):
    model, loader, optimizer = make(toy)
    calls = []

    def fails_late(logits, labels):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return nn.functional.cross_entropy(logits, labels)

    loader.epoch = 7
    before, rng_before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        sweep(model, loader, optimizer, fails_late)
    assert loader.epoch == 7
    assert torch.equal(torch.get_rng_state(), rng_before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_sweep_is_repeatable_and_quiet(toy, capfd):
    model, loader, optimizer = make(toy)
    first, second = (sweep(model, loader, optimizer) for _ in range(2))
    np.testing.assert_array_equal(first.losses, second.losses)
    np.testing.assert_array_equal(first.lrs, second.lrs)
    assert capfd.readouterr().out == ""


def dipping(logits, labels):
    """A loss whose value falls and rises with the number of steps taken, whatever the network does."""
    step = len(STEPPED_WITH)
    return logits.sum() * 0 + abs(step - 30) / 10 + 4


def test_the_lr_runs_from_start_to_end_in_equal_ratios(toy):
    found = sweep(*make(toy), dipping, start=1e-4, end=0.5, steps=41)
    expected = np.geomspace(1e-4, 0.5, 41)
    np.testing.assert_allclose(found.lrs, expected, rtol=1e-9)
    np.testing.assert_array_equal(found.lrs, STEPPED_WITH)  # what is reported is what the optimizer stepped with
    np.testing.assert_allclose(found.losses, [abs(step - 30) / 10 + 4 for step in range(41)], rtol=1e-6)


def test_an_optimizer_that_already_has_a_scheduler_is_swept_all_the_same(toy):
    model, loader, optimizer = make(toy)
    scheduler = one_cycle(optimizer, 1e-3, 1e-2, epochs=4, peak_epoch=2, steps_per_epoch=5)
    before = copy.deepcopy((optimizer.state_dict()["param_groups"], scheduler.state_dict()))
    found = sweep(model, loader, optimizer, dipping, start=1e-4, end=0.5, steps=41)
    np.testing.assert_allclose(found.lrs, np.geomspace(1e-4, 0.5, 41), rtol=1e-9)
    assert (optimizer.state_dict()["param_groups"], scheduler.state_dict()) == before


def test_a_nan_in_mid_sweep_ends_it_and_the_curve_so_far_is_read(toy):
    calls = []

    def falls_then_nan(logits, labels):
        calls.append(1)
        step = len(STEPPED_WITH)
        value = 4 + abs(step - 30) / 10 if step < 40 else math.nan
        return logits.sum() * 0 + value

    model, loader, optimizer = make(toy)
    found = sweep(model, loader, optimizer, falls_then_nan)
    assert len(found.losses) == 40
    assert np.isfinite(found.losses).all()
    assert len(calls) == 41  # no batch was spent after the NaN


def test_single_bad_batches_of_a_set_learned_by_heart_do_not_end_the_sweep(toy):
    def falls_far_with_spikes(logits, labels):
        step = len(STEPPED_WITH)
        value = 2.3 if step < 20 else 0.2 if step % 5 == 0 else 0.01  # spikes of 20 times the best loss
        return logits.sum() * 0 + (value if step < 50 else 20.0)

    found = sweep(*make(toy), falls_far_with_spikes)
    assert len(found.losses) == 51  # it ended with the divergence
    assert found.lr_max > found.lrs[20]


def test_a_nan_from_the_first_step_says_where_to_look(toy):
    def nan(logits, labels):
        return logits.sum() * math.nan

    with pytest.raises(LRRangeError, match=r"finite after 0 steps of the range test.* look at the data for NaN"):
        sweep(*make(toy), nan)


def test_a_range_that_ends_before_the_minimum_is_an_error_with_the_setting(toy):
    with pytest.raises(LRRangeError, match="range_test_end"):
        sweep(*make(toy), start=1e-9, end=1e-7)


def test_an_unknown_rule_is_answered_with_the_known_ones(toy):
    with pytest.raises(
        ConfigError, match="rule is 'guess': choose one of steepest-minimum, valley-minimum, tenth-minimum"
    ):
        sweep(*make(toy), rule="guess")


@pytest.mark.parametrize("factors", [(0.5, 1.6), (1.0, 1.0)])
def test_the_cycles_ends_may_be_multiples_of_what_the_rule_reads(toy, factors):
    low, high = factors
    model, loader, _ = make(toy)
    settings = dict(batch_size=20, range_test_start=1e-5, range_test_end=100.0, range_test_steps=70)
    found = find_range(model, loader, quick(**settings, lr_min_factor=low, lr_max_factor=high), FP32)
    assert found.lr_min == low * found.suggestions["steepest"]
    assert found.lr_max == high * found.suggestions["minimum"]
    with pytest.raises(LRRangeError, match=r"lr_min_factor 1000000.0 .* choose factors that leave LRMIN below LRMAX"):
        find_range(model, loader, quick(**settings, lr_min_factor=1e6), FP32)
