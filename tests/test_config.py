"""Settings are checked when a config is made: the error names the value, the reason and the fix."""

import argparse
import json

import pytest

from utils.config import Config, changed_settings, from_profile
from utils.runs.cli import add_arguments, from_arguments
from utils.runtime import ConfigError


def on_the_command_line(*words: str) -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(profile="full")
    return from_arguments(parser.parse_args(words))


def test_full_is_the_assignments_recipe():
    config = from_profile("full")
    assert config == Config()
    assert (config.epochs, config.peak_epoch, config.batch_size) == (24, 5, 512)
    assert (config.pad, config.cutout, config.flip) == (4, 8, True)
    assert config.train_images is config.test_images is None
    assert config.lr_min is config.lr_max is None  # found by the range test


def test_quick_is_the_same_recipe_made_small():
    whole, small = from_profile("full").to_dict(), from_profile("quick", seed=7).to_dict()
    shrunk = {"profile", "seed", "train_images", "test_images", "batch_size", "epochs", "peak_epoch", "width"}
    tuned_to_fewer_steps = {"range_test_steps", "ema_decay"}
    assert {name for name in whole if whole[name] != small[name]} == shrunk | tuned_to_fewer_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size="many"), "batch_size is 'many': .*valid integer"),
        (dict(init="zeros"), "init is 'zeros': .*'default' or 'patches'"),
        (dict(flip="sometimes"), "flip is 'sometimes': .*valid boolean"),
        (dict(dropout=1.0), "dropout is 1.0: .*less than 1"),
        (dict(ghost_batch=1), "ghost_batch is 1: statistics need 2 images"),
        (dict(schedule="cosine"), "schedule is 'cosine': .*'one-cycle', "),
        (dict(epochs=5, peak_epoch=5), "epochs is 5: the LR peaks at epoch 5 .*raise epochs or lower peak_epoch"),
        (dict(lr_max=0.1), "lr_min is None and lr_max is 0.1: give both, or neither"),
        (dict(lr_min=0.1, lr_max=0.1), "lr_min is 0.1: it must be below lr_max, which is 0.1"),
        (dict(lr_min=float("nan"), lr_max=0.1), "lr_min is nan: .*finite number"),
        (dict(range_test_start=2.0), "range_test_start is 2.0: it must be below range_test_end"),
        (dict(range_test_steps=19), "range_test_steps is 19: .*greater than or equal to 20"),
        (dict(epoch=3), "epoch is 3: Unexpected keyword"),
        (dict(name="fast"), "profile is 'fast': choose one of full, quick"),
    ],
)
def test_a_wrong_setting_names_its_value_and_the_reason(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_profile(**{"name": "full", **changes})


def test_changed_settings_names_both_values_fills_in_new_ones_and_ignores_those_that_went():
    config = from_profile("full", seed=1, dropout=0.1)
    saved = {**config.to_dict(), "seed": 2, "pad_mode": "reflect"}
    del saved["epochs"], saved["dropout"]
    assert changed_settings(saved, config) == ["dropout 0.0 there, 0.1 here", "seed 2 there, 1 here"]
    assert changed_settings(json.loads(json.dumps(config.to_dict())), config) == []


# --- command line -----------------------------------------------------------------------------------------------------

# Every setting, with another value than the recipe's.
OTHERS = """
--profile quick --train-images 300 --test-images 20 --batch-size 30 --pad 3
--no-flip --no-alternate-flip --cutout 6 --width 8 --dropout 0.1 --no-residual --ghost-batch 16 --init default
--beta1 0.8 --beta2 0.95 --decay-at-peak 0.001 --coupled-decay 0.0001 --label-smoothing 0.1 --ema-decay 0.5 --epochs 7
--peak-epoch 3 --schedule constant --lr-min 0.0001 --lr-max 0.01 --lr-rule steepest-minimum --lr-scale 0.4
--range-test-start 0.1 --range-test-end 10.0 --range-test-steps 50 --seed 3 --eval-every 2 --precision bf16
--deterministic --packed off --recorded off --compile default
"""


def test_every_setting_has_a_flag_that_sets_it():
    words = []
    for name, value in on_the_command_line(*OTHERS.split()).to_dict().items():
        assert value != Config().to_dict()[name]
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    assert words == OTHERS.split()


def test_flags_that_are_not_given_leave_the_profile_as_it_is():
    assert on_the_command_line() == Config()
    assert on_the_command_line("--profile", "quick") == from_profile("quick")
    quick = on_the_command_line("--profile", "quick", "--epochs", "9", "--no-flip")
    assert quick == from_profile("quick", epochs=9, flip=False)


def test_help_explains_every_setting_with_its_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit):
        on_the_command_line("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--batch-size N images per step (default: 512; quick: 64)" in text
    assert "--lr-max X with lr_min: the LR at the peak (default: not set)" in text
    assert text.count("(default: ") == len(Config().to_dict())
