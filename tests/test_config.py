"""Every setting is checked where it is made: a wrong one names its value, the reason and the fix."""

import dataclasses
import json

import pytest

from utils.config import PROFILES, Config, ConfigError, from_profile, full, quick


def test_full_is_the_recipe():
    config = full()
    assert (config.epochs, config.peak_epoch, config.batch_size) == (24, 5, 512)
    assert (config.pad, config.cutout, config.flip) == (4, 8, True)
    assert config.train_images is None
    assert config.test_images is None
    assert config.lr_min is None  # found by the range test
    assert config.lr_max is None
    assert not config.cycle_beta1


def test_quick_is_the_same_recipe_on_fewer_images_and_epochs():
    shrunk = {"profile", "train_images", "test_images", "batch_size", "epochs", "peak_epoch"}
    tuned_to_fewer_steps = {"range_test_steps", "ema_decay"}
    whole, small = full().to_dict(), quick().to_dict()
    assert {name for name in whole if whole[name] != small[name]} <= shrunk | tuned_to_fewer_steps
    assert small["epochs"] < whole["epochs"]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_by_name_takes_changes(name):
    config = from_profile(name, seed=7)
    assert config.profile == name
    assert config.seed == 7


def test_an_unknown_profile_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="profile is 'fast': choose one of full, quick"):
        from_profile("fast")
    with pytest.raises(ConfigError, match="profile is 'fast': choose one of full, quick"):
        Config(profile="fast")


def test_a_config_is_frozen_and_plain_json():
    config = quick()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=0), "batch_size is 0: it must be at least 1"),
        (dict(batch_size=101, train_images=100), "batch_size is 101: it is larger than the train set of 100 images"),
        (dict(eval_batch_size=0), "eval_batch_size is 0"),
        (dict(train_images=0), "train_images is 0: ask for at least 1 image"),
        (dict(test_images=-1), "test_images is -1: ask for at least 1 image"),
        (dict(pipeline="fast"), "pipeline is 'fast': choose 'batched' or 'albumentations'"),
        (dict(num_workers=-1), "num_workers is -1: it must be 0"),
        (dict(pad=-1), "pad is -1"),
        (dict(pad=32), "pad is 32: it must be between 0 and 31"),
        (dict(pad_mode="zeros"), "pad_mode is 'zeros': choose 'reflect' or 'constant'"),
        (dict(cutout=33), "cutout is 33: it must be between 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(beta1=1.0), "beta1 is 1.0"),
        (dict(beta2=-0.1), "beta2 is -0.1"),
        (dict(eps=0.0), "eps is 0.0: it must be positive"),
        (dict(decay_at_peak=-1.0), "decay_at_peak is -1.0: it must not be negative"),
        (dict(label_smoothing=1.0), "label_smoothing is 1.0"),
        (dict(ema_decay=1.0), "ema_decay is 1.0"),
        (dict(ema_every=0), "ema_every is 0"),
        (dict(compile="fast"), "compile is 'fast': choose one of 'off', 'default', 'reduce-overhead'"),
        (dict(peak_epoch=0), "peak_epoch is 0: it must be at least 1"),
        (dict(epochs=3), "epochs is 3: the LR peaks at epoch 5 .* train for at least 6 epochs or lower peak_epoch"),
        (dict(epochs=5), "epochs is 5: the LR peaks at epoch 5"),
        (dict(lr_max=0.1), "lr_min is None: lr_max is 0.1; give both to skip the range test, or neither"),
        (dict(lr_min=0.1, lr_max=0.1), "lr_min is 0.1: it must be positive and below lr_max, which is 0.1"),
        (dict(lr_min=0.2, lr_max=0.1), "lr_min is 0.2: it must be positive and below lr_max, which is 0.1"),
        (dict(lr_min=0.0, lr_max=0.1), "lr_min is 0.0: it must be positive"),
        (dict(lr_min=float("nan"), lr_max=0.1), "lr_min is nan: it must be a finite number"),
        (dict(lr_min=0.1, lr_max=float("inf")), "lr_max is inf: it must be a finite number"),
        (dict(dropout="0.1"), "dropout is '0.1': it must be a finite number"),
        (dict(batch_size=64.0), "batch_size is 64.0: it must be a whole number"),
        (dict(epochs=None), "epochs is None: it must be a whole number"),
        (dict(train_images=1e4), "train_images is 10000.0: it must be a whole number"),
        (dict(range_test_start=2.0), "range_test_start is 2.0: it must be positive and below range_test_end"),
        (dict(range_test_steps=19), "range_test_steps is 19: a readable curve needs at least 20 steps"),
        (dict(precision="fp64"), "precision is 'fp64': choose 'auto', 'fp32', 'bf16' or 'fp16'"),
        (dict(seed=-1), "seed is -1: it must be 0 or more"),
        (dict(seed=2**64), "seed is 18446744073709551616: it must be 0 or more, and below"),
    ],
)
def test_a_wrong_setting_names_its_value_and_the_fix(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(epochs=6),  # one epoch to come down in
        dict(batch_size=100, train_images=100),  # one batch
        dict(lr_min=1e-3, lr_max=1e-2),
        dict(pad=0, cutout=0, flip=False),
        dict(ema_decay=0.0, label_smoothing=0.0, dropout=0.0, decay_at_peak=0.0),
    ],
)
def test_the_edges_of_what_works_are_accepted(changes):
    assert dataclasses.replace(Config(), **changes) == Config(**changes)
