"""The notebook's small experiments: they show what its text claims, and leave the main job unchanged."""

import dataclasses
import json
import sys

import ipywidgets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

from experiments import degradation
from models import CustomLayer, CustomResNet
from models.variants import remove_skips
from utils import engine, lesson
from utils.runtime import ConfigError
from utils.transforms import normalize


@pytest.fixture(scope="module")
def model() -> CustomResNet:
    torch.manual_seed(0)
    return CustomResNet()


# --- showing code -----------------------------------------------------------------------------------------------------


def test_shown_code_is_the_modules_code_without_docstrings():
    shown = lesson.show(CustomLayer, engine.RunningMetrics.update).data
    assert shown.startswith("```python\nclass CustomLayer(nn.Module):\n    def __init__(")
    assert "            x = x + self.block(x)\n" in shown
    assert "\ndef update(self, logits: Tensor, labels: Tensor) -> None:\n    self.logits" in shown  # not indented
    assert '"""' not in shown
    compile(shown.removeprefix("```python\n").removesuffix("```"), "shown", "exec")


# --- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "batch_norm", "plain", "skip"),
    [
        ("default", False, (-18, -15), (-1, 1)),  # vanishes; level
        ("he", False, (-1, 1), (3, 5)),  # level; explodes
        ("default", True, (2, 3), (0.5, 1)),  # explodes; much less
        ("he", True, (2, 3), (0.5, 1)),
    ],
)
def test_gradients_vanish_or_explode_as_the_notebook_says(init, batch_norm, plain, skip):
    """``plain`` and ``skip``: bounds for the orders of magnitude from the last of 20 blocks to the input."""
    for skips, (low, high) in ((False, plain), (True, skip)):
        norms = lesson.gradient_norms(20, skip=skips, batch_norm=batch_norm, init=init)
        assert len(norms) == 21
        assert low < np.log10(norms[0] / norms[-1]) < high


def test_an_unknown_initialization_is_refused_by_name():
    with pytest.raises(ValueError, match="'xavier': choose one of default, he"):
        lesson.gradient_norms(2, skip=True, batch_norm=True, init="xavier")


@pytest.mark.parametrize("depth", [8, 32])
def test_plain_and_residual_networks_differ_in_the_skip_alone(depth):
    torch.manual_seed(0)
    plain = lesson.DepthNet(depth, skip=False)
    torch.manual_seed(0)
    residual = lesson.DepthNet(depth, skip=True)
    layers = [module for module in plain.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth
    for one, other in zip(plain.parameters(), residual.parameters(), strict=True):
        assert torch.equal(one, other)
    x = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(plain(x), residual(x))


@pytest.mark.parametrize("depth", [2, 7])
def test_a_depth_that_no_blocks_make_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}: choose 4, 6, 8"):
        lesson.DepthNet(depth, skip=True)


def test_training_error_falls_and_one_seed_gives_one_curve(toy):
    curve, again = (lesson.training_error(toy, 8, skip=True, epochs=5, batch_size=20) for _ in range(2))
    assert curve.shape == (5, 2)
    assert curve[-1, 0] < 0.7 * curve[0, 0]
    assert curve[-1, 1] < curve[0, 1]
    assert np.array_equal(curve, again)


def test_an_interrupted_longer_run_is_resumed_and_a_finished_one_is_kept(toy, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results" / "curves.json"
    settings = {"train_images": 40, "epochs": 1, "depths": [4], "lrs": [1e-3], "seeds": [0, 1]}
    whole = degradation.run_all(toy, out, settings)
    assert len(whole["runs"]) == 4
    out.write_text(json.dumps({**whole, "runs": whole["runs"][:3]}), encoding="utf-8")
    capsys.readouterr()
    assert degradation.run_all(toy, out, settings)["runs"] == whole["runs"]
    assert capsys.readouterr().out.count("\n") == 1  # one run was made
    before = out.read_bytes()
    with pytest.raises(
        ConfigError, match=r"curves.json holds runs of other settings or data \(epochs 1\): move it away"
    ):
        degradation.run_all(toy, out, {**settings, "epochs": 2})
    monkeypatch.setattr(lesson, "STORED_DEGRADATION", out)
    monkeypatch.setattr(degradation, "SETTINGS", settings)
    for source, words in (("official", "(data toy images)"), ("digits", "these are other images")):
        other = dataclasses.replace(toy, source=source, description="other images")
        monkeypatch.setattr(degradation, "load_dataset", lambda other=other: other)
        assert degradation.main() == 2
        assert words in capsys.readouterr().err
    assert out.read_bytes() == before


def test_the_stored_curves_show_degradation_in_every_seed():
    """The deepest plain network ends with a higher train error than the shallowest, the deepest residual one does not."""
    panels, words = lesson.stored_degradation()
    plain, residual = (list(panel.values()) for panel in panels.values())
    assert plain[0].shape[0] >= 3
    assert plain[-1][:, -1].min() > plain[0][:, -1].max() + 5
    assert residual[-1][:, -1].max() < residual[0][:, -1].min()
    assert "JPEG" in words or "official" in words


def test_every_stored_network_is_shown_with_its_better_learning_rate(tmp_path):
    runs = [
        {"skip": skip, "depth": 8, "lr": lr, "seed": seed, "error": [80.0, last + seed]}
        for skip, lr, last in ((False, 0.1, 70), (False, 0.2, 60), (True, 0.1, 40), (True, 0.2, 50))
        for seed in (0, 1)
    ]
    stored = {"depths": [8], "lrs": [0.1, 0.2], "seeds": [0, 1], "train_images": 10, "epochs": 2, "runs": runs}
    stored |= {"data": "toys", "device": "abacus", "versions": {"torch": "2"}}
    (tmp_path / "stored.json").write_text(json.dumps(stored), encoding="utf-8")
    panels, words = lesson.stored_degradation(tmp_path / "stored.json")
    assert panels["plain"]["8 layers"].tolist() == [[80, 60], [80, 61]]
    assert panels["with skip connections"]["8 layers"].tolist() == [[80, 40], [80, 41]]
    assert words.startswith("10 train images of toys, 2 epochs, 2 seeds, each network with the better of")


# --- small ideas ------------------------------------------------------------------------------------------------------


def test_an_untrained_network_starts_above_ln_10_with_and_without_smoothing(toy):
    plain, smoothed = (lesson.untrained_loss(toy.test_images, toy.test_labels, 3, share) for share in (0.0, 0.1))
    assert (plain > np.log(10)).all()
    assert plain.max() < 2.5
    assert abs(plain - smoothed).max() < 0.02


def test_smoothed_loss_is_lowest_short_of_certainty_and_never_zero():
    confidences = [0.1, 0.5, 0.91, 0.99, 0.999]
    smoothed = lesson.smoothed_losses(confidences, 0.1)
    assert smoothed.argmin() == 2
    target = np.array([0.91] + [0.01] * 9)
    assert smoothed.min() == pytest.approx(-(target * np.log(target)).sum())  # the target's entropy, 0.50


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_losses_are_the_training_loss(smoothing):
    confidences = torch.tensor([0.1, 0.5, 0.999], dtype=torch.float64)
    others = (1 - confidences) / 9
    logits = torch.stack([confidences, *[others] * 9], dim=1).log()
    expected = F.cross_entropy(logits, torch.zeros(3, dtype=torch.int64), label_smoothing=smoothing, reduction="none")
    assert np.allclose(lesson.smoothed_losses(confidences.tolist(), smoothing), expected)


def test_decoupled_decay_is_the_same_for_all_weights_and_coupled_is_not():
    decoupled, coupled = (
        [lesson.weight_after_decay(gradient, decoupled=kind) for gradient in (0.01, 0.1, 1.0, 10.0)]
        for kind in (True, False)
    )
    assert decoupled == pytest.approx([np.exp(-0.1)] * 4, abs=0.003)
    assert coupled == sorted(coupled)
    assert coupled[0] < 0.3
    assert coupled[-1] > 0.98


def test_an_average_without_memory_is_the_latest_weights(toy):
    latest, average = lesson.average_and_latest(toy, epochs=2, decay=0.0).values()
    assert len(latest) == 2
    assert np.array_equal(latest, average)
    _, average = lesson.average_and_latest(toy, epochs=2, decay=0.98).values()
    assert not np.array_equal(latest, average)


@pytest.mark.parametrize(
    ("counts", "level"), [([100] * 10, 12.85), ([10, 10, 10], 59.15), ([90, 10], 99.0), ([5], 100.0)]
)
def test_chance_is_the_most_frequent_class_and_a_margin(counts, level):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert lesson.chance_level(labels) == pytest.approx(level, abs=0.01)


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.filterwarnings("error")
def test_experiments_leave_the_global_generators_unchanged(toy, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' generators are seeded"))
    before = torch.get_rng_state()
    lesson.gradient_norms(2, skip=True, batch_norm=True)
    lesson.training_error(toy, 4, skip=False, epochs=1)
    lesson.untrained_loss(toy.test_images, toy.test_labels, 1)
    lesson.average_and_latest(toy, epochs=1)
    assert torch.equal(before, torch.get_rng_state())


# --- playing with the cycle -------------------------------------------------------------------------------------------


def test_a_moved_slider_redraws_the_cycle_and_crossed_ends_do_no_harm():
    low, high, peak, picture = lesson.cycle_explorer(5e-4, 1e-2, 24, 5, 98).children
    seen = [bytes(picture.value)]
    for control, value in ((peak, 12), (high, 1e-3), (low, 5e-3)):  # in the end LRMIN is above LRMAX
        control.value = value
        seen.append(bytes(picture.value))
    assert len(set(seen)) == 4
    assert seen[0].startswith(b"\x89PNG")


@pytest.mark.skipif(Version(ipywidgets.__version__) < Version("8"), reason="ipywidgets 7 shows the sliders alone")
def test_the_explorer_shows_a_still_picture_where_there_are_no_widgets(monkeypatch):
    explorer = lesson.cycle_explorer(5e-4, 1e-2, 6, 2, 10)
    view = "application/vnd.jupyter.widget-view+json"
    assert {view, "image/png"} < set(explorer._repr_mimebundle_())
    monkeypatch.setitem(sys.modules, "google.colab", object())
    assert "image/png" not in explorer._repr_mimebundle_()
    assert view in explorer._repr_mimebundle_()


# --- looking into the network -----------------------------------------------------------------------------------------


def test_the_diagram_is_read_off_the_model(model):
    stages = lesson.diagram_stages(model.train())
    assert [name for name, *_ in stages] == ["input", "prep", "layer1", "layer2", "layer3", "pool", "fc"]
    assert [shape for *_, shape, _ in stages] == [
        "3×32×32", "64×32×32", "128×16×16", "256×8×8", "512×4×4", "512×1×1", "10",
    ]  # fmt: skip
    assert [name for name, *_, residual in stages if residual] == ["layer1", "layer3"]
    assert [name for name, _, block, *_ in stages if block] == ["layer1", "layer3"]
    assert model.training
    assert model.prep.conv.norm.num_batches_tracked == 0
    remove_skips(model)
    assert not any(residual for *_, residual in lesson.diagram_stages(model))


def test_activation_maps_are_images_between_0_and_1_and_leave_the_model_unchanged(model, toy):
    images = normalize(torch.from_numpy(toy.test_images[:3]))
    maps = lesson.class_activation_maps(model.train(), images, np.array([0, 1, 2]))
    assert maps.shape == (3, 32, 32)
    assert maps.min() >= 0
    assert 0.5 < maps.max() <= 1
    assert model.training
    assert not model.layer3._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    one = lesson.class_activation_maps(model, images[1:2], [1])  # whatever the batch
    assert np.allclose(one[0], maps[1], atol=1e-4)


def test_activation_maps_point_at_what_speaks_for_the_class():
    """A head that reads one channel of the last map: the evidence is where that channel is bright."""
    reader = CustomResNet().eval()
    with torch.no_grad():
        reader.fc.weight.zero_()
        reader.fc.weight[3, 7] = 1.0
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (evidence,) = lesson.class_activation_maps(reader, image, [3])
    features = reader.layer3(reader.layer2(reader.layer1(reader.prep(image))))
    row, column = divmod(int(features[0, 7].argmax()), 4)
    peak = np.unravel_index(evidence.argmax(), evidence.shape)
    assert (peak[0] // 8, peak[1] // 8) == (row, column)
    assert not lesson.class_activation_maps(reader, image, [2]).any()  # nothing speaks for a class that nothing reads
