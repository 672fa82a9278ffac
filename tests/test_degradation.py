"""How fast depth trains: the networks, the stored runs, and the command that makes them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from experiments import degradation
from experiments.degradation import DepthNet, run_all, stored_curves, training_error
from utils.runtime import ConfigError

SETTINGS = {"train_images": 60, "epochs": 1}
GRID = {"seed": [0, 1], "lr": [1e-3], "depth": [4], "skip": [False, True]}


@pytest.mark.parametrize("depth", [8, 32])
def test_plain_and_residual_networks_differ_in_the_skip_alone(depth):
    torch.manual_seed(0)
    plain = DepthNet(depth, skip=False)
    torch.manual_seed(0)
    residual = DepthNet(depth, skip=True)
    layers = [module for module in plain.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth
    for one, other in zip(plain.parameters(), residual.parameters(), strict=True):
        assert torch.equal(one, other)
    images = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(plain(images), residual(images))


def test_training_error_falls_and_one_seed_gives_one_curve(toy):
    before = torch.get_rng_state()
    curve, again = (training_error(toy, 8, skip=True, epochs=8) for _ in range(2))
    assert curve.shape == (8, 2)
    assert curve[-1, 0] < 0.7 * curve[0, 0]
    assert curve[-1, 1] < curve[0, 1]
    assert np.array_equal(curve, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_missing_runs_are_made_and_the_others_stay_as_they_are(toy, tmp_path, capsys):
    out = tmp_path / "curves.json"
    whole = run_all(toy, out, SETTINGS, GRID)
    assert len(whole["runs"]) == 4
    assert {"seed": 1, "lr": 1e-3, "depth": 4, "skip": True}.items() <= whole["runs"][-1].items()
    old = [{**whole["runs"][0], "error": [12.5]}, *whole["runs"][1:3]]
    out.write_text(json.dumps({**whole, "runs": old}), encoding="utf-8")
    capsys.readouterr()
    assert run_all(toy, out, SETTINGS, GRID)["runs"] == [*old, whole["runs"][3]]
    assert len(run_all(toy, out, SETTINGS, {**GRID, "lr": [1e-3, 1e-2]})["runs"]) == 8
    assert capsys.readouterr().out.count("train error") == 5


@pytest.mark.parametrize("change", [{"description": "other images"}, {"source": "digits"}, {}], ids=str)
def test_other_images_or_settings_are_refused(toy, tmp_path, change):
    out = tmp_path / "curves.json"
    run_all(toy, out, SETTINGS, {**GRID, "seed": [0]})
    before, epochs = out.read_bytes(), 1 if change else 2
    with pytest.raises(ConfigError, match=r"curves\.json"):
        run_all(dataclasses.replace(toy, **change), out, {**SETTINGS, "epochs": epochs}, GRID)
    assert out.read_bytes() == before


def test_each_network_is_shown_at_its_best_learning_rate(tmp_path):
    runs = [
        {"skip": skip, "depth": 8, "lr": lr, "seed": seed, "error": [80.0, last + seed]}
        for skip, lr, last in ((False, 0.1, 70), (False, 0.2, 60), (True, 0.1, 40), (True, 0.2, 50))
        for seed in (0, 1)
    ]
    stored = {"train_images": 10, "epochs": 2, "data": "toys", "device": "abacus", "runs": runs}
    (tmp_path / "stored.json").write_text(json.dumps(stored), encoding="utf-8")
    panels, description = stored_curves(tmp_path / "stored.json")
    assert panels["plain"]["8 layers, LR 0.2"].tolist() == [[80, 60], [80, 61]]
    assert panels["with skip connections"]["8 layers, LR 0.1"].tolist() == [[80, 40], [80, 41]]
    assert description.startswith("10 train images of toys, 2 epochs, 2 seeds, each network with the best of the")


def test_the_stored_runs_are_all_there_and_show_that_depth_trains_only_with_skips():
    stored = json.loads(degradation.STORED.read_text(encoding="utf-8"))
    assert len(stored["runs"]) == np.prod([len(values) for values in degradation.GRID.values()])
    assert all(stored[name] == value for name, value in degradation.SETTINGS.items())
    panels, _ = stored_curves()
    plain, residual = (list(panel.values()) for panel in panels.values())
    assert [errors.shape for errors in plain + residual] == [(3, 10)] * 6
    assert plain[-1][:, -1].min() > plain[0][:, -1].max() + 5  # in every seed
    assert residual[-1][:, -1].max() < residual[0][:, -1].min()
