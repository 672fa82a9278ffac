"""One cycle: torch's scheduler against the formula, step by step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.config import full
from utils.runtime import ConfigError
from utils.schedule import BETA1_RANGE, one_cycle, one_cycle_beta1s, one_cycle_lrs, scheduler_for

BETA1 = 0.9


def make_optimizer():
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.5, betas=(BETA1, 0.99))


def run(scheduler, steps):
    """(LR of each step, beta1 of each step) as the scheduler's optimizer sees them."""
    lrs, beta1s = [], []
    for _ in range(steps):
        (group,) = scheduler.optimizer.param_groups
        lrs.append(group["lr"])
        beta1s.append(group["betas"][0])
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(lrs), np.array(beta1s)


def run_cycle(lr_min, lr_max, epochs, peak_epoch, steps_per_epoch, **options):
    scheduler = one_cycle(make_optimizer(), lr_min, lr_max, epochs, peak_epoch, steps_per_epoch, **options)
    return run(scheduler, epochs * steps_per_epoch)


@st.composite
def cycles(draw):
    epochs = draw(st.integers(2, 30))
    peak_epoch = draw(st.integers(1, epochs - 1))
    steps_per_epoch = draw(st.integers(2 if peak_epoch == 1 else 1, 20))
    lr_max = draw(st.floats(1e-5, 10.0))
    lr_min = lr_max * draw(st.floats(1e-4, 0.9))
    return lr_min, lr_max, epochs, peak_epoch, steps_per_epoch


@given(cycles())
def test_the_scheduler_follows_the_formula_at_every_step(cycle):
    lr_min, lr_max, _, peak_epoch, steps_per_epoch = cycle
    lrs, beta1s = run_cycle(*cycle)
    np.testing.assert_allclose(lrs, one_cycle_lrs(*cycle), rtol=1e-9)
    assert (beta1s == BETA1).all()

    peak = peak_epoch * steps_per_epoch - 1
    assert lrs.argmax() == peak
    np.testing.assert_allclose(lrs[[0, peak, -1]], [lr_min, lr_max, lr_min], rtol=1e-9)  # no annihilation
    # Straight ramps: all steps of a ramp are equal.
    for ramp in (lrs[: peak + 1], lrs[peak:]):
        np.testing.assert_allclose(np.diff(ramp), (ramp[-1] - ramp[0]) / (len(ramp) - 1), rtol=1e-6)


@given(cycles())
def test_beta1_cycles_on_request_as_the_mirror_image_of_the_lr(cycle):
    lrs, beta1s = run_cycle(*cycle, cycle_beta1=True)
    np.testing.assert_allclose(beta1s, one_cycle_beta1s(*cycle[2:]), rtol=1e-9)
    np.testing.assert_allclose(lrs, one_cycle_lrs(*cycle), rtol=1e-9)
    low, high = BETA1_RANGE
    np.testing.assert_allclose(beta1s[[0, lrs.argmax(), -1]], [high, low, high], rtol=1e-9)


def test_the_full_recipe_peaks_at_step_489():
    # 50,000 images in batches of 512: 98 steps an epoch; epoch 5 ends at step 5 * 98 - 1 = 489, counted from 0.
    lr_min, lr_max = 5e-4, 1e-2
    lrs = one_cycle_lrs(lr_min, lr_max, epochs=24, peak_epoch=5, steps_per_epoch=98)
    assert lrs.shape == (2352,)
    assert lrs.dtype == np.float64
    assert lrs[0] == lr_min
    assert lrs[489] == lr_max
    assert lrs[2351] == lr_min
    assert lrs.argmax() == 489
    assert lrs[488] < lr_max > lrs[490]
    np.testing.assert_allclose(run_cycle(lr_min, lr_max, 24, 5, 98)[0], lrs, rtol=1e-9)


@pytest.mark.parametrize(
    ("cycle", "message"),
    [
        ((0.1, 0.1, 24, 5, 98), "lr_min is 0.1 and lr_max is 0.1: the cycle needs 0 < lr_min < lr_max"),
        ((0.2, 0.1, 24, 5, 98), "lr_min is 0.2 and lr_max is 0.1"),
        ((0.0, 0.1, 24, 5, 98), "lr_min is 0.0 and lr_max is 0.1"),
        ((float("nan"), 0.1, 24, 5, 98), "lr_min is nan"),
        ((0.01, 0.1, 4, 5, 98), "epochs is 4 and peak_epoch is 5: .* train for at least 6 epochs or lower peak_epoch"),
        ((0.01, 0.1, 5, 5, 98), "epochs is 5 and peak_epoch is 5"),
        ((0.01, 0.1, 5, 0, 98), "epochs is 5 and peak_epoch is 0"),
        ((0.01, 0.1, 24, 5, 0), "steps_per_epoch is 0: an epoch needs at least 1 batch"),
        (
            (0.01, 0.1, 24, 1, 1),
            "the LR would rise within a single step: with 1 batch per epoch, use a smaller --batch-size or a",
        ),
    ],
)
def test_settings_that_make_no_cycle_are_refused_with_the_reason(cycle, message):
    with pytest.raises(ConfigError, match=message):
        one_cycle(make_optimizer(), *cycle)
    with pytest.raises(ConfigError, match=message):
        one_cycle_lrs(*cycle)


@pytest.mark.parametrize(
    ("schedule", "first", "peak", "last"),
    [
        ("one-cycle", 1e-3, 1e-2, 1e-3),
        ("constant", 1e-2, 1e-2, 1e-2),
        ("no-warm-up", 1e-2, 1e-2, 1e-3),
        ("annihilation", 1e-3, 1e-2, 1e-5),
    ],
)
def test_the_schedule_of_an_ablation_does_what_its_name_says(schedule, first, peak, last):
    config = full(epochs=6, peak_epoch=2, schedule=schedule)
    lrs, _ = run(scheduler_for(config, make_optimizer(), 1e-3, 1e-2, 10), 60)
    np.testing.assert_allclose([lrs[0], lrs[19], lrs[-1]], [first, peak, last], rtol=1e-9)
    assert max(lrs) <= 1e-2 * (1 + 1e-9)
