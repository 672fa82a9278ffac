"""Settings are checked when a config is made: the error names the value, the reason and the fix."""

import dataclasses
import json

import pytest

from utils.config import PROFILES, Config, from_profile, full, quick
from utils.runtime import ConfigError


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
    with pytest.raises(ConfigError, match="profile is 'fast': it should be 'full' or 'quick'"):
        Config(profile="fast")


def test_a_setting_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="'nope' has no name: name every setting, as in seed=3"):
        Config("nope")


def test_a_config_is_frozen_and_plain_json():
    config = quick()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=0), "batch_size is 0: it should be greater than or equal to 1"),
        (dict(batch_size=64.0), "batch_size is 64.0: it should be a valid integer"),
        (dict(batch_size=101, train_images=100), "batch_size is 101: it is larger than the train set of 100 images"),
        (dict(train_images=0), "train_images is 0"),
        (dict(train_images=1e4), "train_images is 10000.0"),
        (dict(pipeline="fast"), "pipeline is 'fast': it should be 'batched' or 'albumentations'"),
        (dict(num_workers=-1), "num_workers is -1"),
        (dict(pad=32), "pad is 32: it should be less than or equal to 31"),
        (dict(pad_mode="zeros"), "pad_mode is 'zeros': it should be 'reflect' or 'constant'"),
        (dict(cutout=33), "cutout is 33"),
        (dict(flip="no"), "flip is 'no': it should be a valid boolean"),
        (dict(alternate_flip=3), "alternate_flip is 3: it should be a valid boolean"),
        (dict(deterministic="x"), "deterministic is 'x'"),
        (dict(logit_scale=-1), "logit_scale is -1: it should be greater than 0"),
        (dict(dropout=1.0), "dropout is 1.0: it should be less than 1"),
        (dict(dropout="0.1"), "dropout is '0.1': it should be a valid number"),
        (dict(beta2=-0.1), "beta2 is -0.1"),
        (dict(eps=0.0), "eps is 0.0"),
        (dict(decay_at_peak=-1.0), "decay_at_peak is -1.0"),
        (dict(ema_decay=1.0), "ema_decay is 1.0"),
        (dict(ema_also=(0.5, 1.0)), "ema_also is"),
        (dict(compile="fast"), "compile is 'fast': it should be 'off', 'default', 'reduce-overhead'"),
        (
            dict(ghost_batch=1),
            "ghost_batch is 1: the statistics of a group need at least 2 images; the usual groups are 32",
        ),
        (dict(lr_rule="guess"), "lr_rule is 'guess': it should be 'steepest-minimum', "),
        (dict(peak_epoch=0), "peak_epoch is 0"),
        (dict(epochs=None), "epochs is None: it should be a valid integer"),
        (dict(epochs=5), "epochs is 5: the LR peaks at epoch 5 .* train for at least 6 epochs or lower peak_epoch"),
        (dict(lr_max=0.1), "lr_min is None and lr_max is 0.1: give both to skip the range test, or neither"),
        (dict(lr_min=0.1, lr_max=0.1), "lr_min is 0.1: it must be below lr_max, which is 0.1"),
        (dict(lr_min=0.0, lr_max=0.1), "lr_min is 0.0: it should be greater than 0"),
        (dict(lr_min=float("nan"), lr_max=0.1), "lr_min is nan: it should be a finite number"),
        (dict(lr_min=0.1, lr_max=float("inf")), "lr_max is inf: it should be a finite number"),
        (dict(range_test_start=2.0), "range_test_start is 2.0: it must be below range_test_end"),
        (dict(range_test_steps=19), "range_test_steps is 19: it should be greater than or equal to 20"),
        (dict(precision="fp64"), "precision is 'fp64': it should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=2**64), "seed is 18446744073709551616: it should be less than"),
        (dict(epoch=3), "epoch is not a setting"),
    ],
)
def test_a_wrong_setting_names_its_value_and_the_fix(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(epochs=6),  # one epoch after the peak
        dict(batch_size=100, train_images=100),  # one batch
        dict(lr_min=1e-3, lr_max=1e-2),
        dict(pad=0, cutout=0, flip=False),
        dict(logit_scale=1, lr_min_factor=2),  # integers count as numbers
        dict(ema_decay=0.0, label_smoothing=0.0, dropout=0.0, decay_at_peak=0.0),
    ],
)
def test_settings_at_the_edge_of_their_range_are_accepted(changes):
    assert dataclasses.replace(Config(), **changes) == Config(**changes)
