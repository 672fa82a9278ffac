"""One cycle, against torch's own and step by step, and the ablations' schedules."""

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from utils.config import from_profile
from utils.runtime import ConfigError
from utils.schedule import lrs_for, one_cycle, one_cycle_lrs, scheduler


def make_optimizer(lr=0.5):
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr)


def run(schedule, steps):
    """(steps,): the LRs that the scheduler's optimizer sees."""
    lrs = []
    for _ in range(steps):
        lrs.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return np.array(lrs)


@pytest.mark.parametrize("lengths", [(24, 5, 98), (2, 1, 2), (24, 23, 1), (7, 3, 10)])
@pytest.mark.parametrize(("lr_min", "lr_max"), [(5e-4, 1e-2), (0.9, 1.0)])
def test_the_cycle_is_torchs_linear_one_cycle_without_annihilation(lengths, lr_min, lr_max):
    epochs, peak_epoch, steps_per_epoch = lengths
    steps = epochs * steps_per_epoch
    lrs = run(one_cycle(make_optimizer(), lr_min, lr_max, *lengths), steps)
    ends = dict(div_factor=lr_max / lr_min, final_div_factor=1.0)  # begin and end at lr_max / div_factor
    shape = dict(total_steps=steps, pct_start=peak_epoch / epochs, anneal_strategy="linear", cycle_momentum=False)
    torchs = run(OneCycleLR(make_optimizer(), lr_max, **shape, **ends), steps)
    np.testing.assert_allclose(lrs, torchs, rtol=1e-12)
    np.testing.assert_array_equal(lrs, one_cycle_lrs(lr_min, lr_max, *lengths))


def test_the_full_recipe_peaks_at_step_489_and_ends_where_it_began():
    lrs = one_cycle_lrs(5e-4, 1e-2, epochs=24, peak_epoch=5, steps_per_epoch=98)  # 50,000 images in batches of 512
    assert lrs.shape == (2352,)
    np.testing.assert_allclose(lrs[[0, 489, 2351]], [5e-4, 1e-2, 5e-4], rtol=1e-12)
    assert lrs.argmax() == 489  # the last step of epoch 5, counted from 0
    assert lrs.min() >= 5e-4 * (1 - 1e-12)  # no annihilation


def test_the_optimizers_own_lr_does_not_matter():
    cycle = (1e-3, 1e-2, 4, 1, 5)
    lrs = run(one_cycle(make_optimizer(1e-9), *cycle), 23)
    np.testing.assert_allclose(lrs, [*one_cycle_lrs(*cycle), *[1e-3] * 3], rtol=1e-12)  # it may go on after the end


def test_a_restored_schedule_continues():
    cycle = (1e-3, 1e-2, 4, 2, 5)
    first = one_cycle(make_optimizer(), *cycle)
    begun = run(first, 7)
    second = one_cycle(make_optimizer(), *cycle)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(np.concatenate([begun, run(second, 13)]), one_cycle_lrs(*cycle))


@pytest.mark.parametrize(
    ("schedule", "corners"),
    [
        ("one-cycle", {0: 1e-3, 29: 1e-2, 99: 1e-3}),
        ("constant", {0: 1e-2, 99: 1e-2}),
        ("no-warm-up", {0: 1e-2, 29: 1e-2, 99: 1e-3}),
        ("low-end", {0: 1e-3, 29: 1e-2, 99: 1e-5}),
        ("annihilation", {0: 1e-3, 29: 1e-2, 89.1: 1e-3, 99: 1e-5}),
    ],
)
def test_the_schedule_of_an_ablation_does_what_its_name_says(schedule, corners):
    config = from_profile("full", epochs=10, peak_epoch=3, schedule=schedule)
    lrs = lrs_for(config, 1e-3, 1e-2, 10)
    np.testing.assert_allclose(lrs, np.interp(range(100), list(corners), list(corners.values())), rtol=1e-9)
    np.testing.assert_array_equal(run(scheduler(make_optimizer(), lrs), 100), lrs)


@pytest.mark.parametrize(
    ("cycle", "message"),
    [
        ((0.1, 0.1, 24, 5, 98), "lr_min is 0.1 and lr_max is 0.1"),
        ((0.0, 0.1, 24, 5, 98), "lr_min is 0.0"),
        ((0.01, 0.1, 5, 5, 98), "peak_epoch is 5 of 5 epochs: .*before the last"),
        ((0.01, 0.1, 5, 0, 98), "peak_epoch is 0"),
        ((0.01, 0.1, 24, 1, 1), "within a single step: .*batch_size or .*peak_epoch"),
    ],
)
def test_settings_that_make_no_cycle_are_refused_with_the_reason(cycle, message):
    with pytest.raises(ConfigError, match=message):
        one_cycle(make_optimizer(), *cycle)
