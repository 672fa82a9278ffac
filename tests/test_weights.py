"""The weights file gives back the trained network bit for bit; anything else is refused."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CustomResNet
from utils.runs.report import RESULTS
from utils.runs.weights import HEADER_KEY, WEIGHTS_NAME, WeightsError, load_model, save_weights

CLASSES = ["a", "b", "c"]


@pytest.fixture
def path(tmp_path):
    """A file with the weights of a narrow network."""
    save_weights(CustomResNet(3, width=4), tmp_path / "narrow.safetensors", {"classes": CLASSES})
    return tmp_path / "narrow.safetensors"


@pytest.mark.parametrize("options", [{"width": 4}, {"width": 8, "skip": False}, {"width": 4, "logit_scale": 0.5}])
def test_a_file_gives_back_the_network_that_was_trained(tmp_path, options):
    model = CustomResNet(3, **options).half().float().eval()  # as float16 rounds it
    save_weights(model, tmp_path / "weights.safetensors", {"classes": CLASSES, "data": "drawn"})
    state = torch.random.get_rng_state()
    loaded, metadata = load_model(tmp_path / "weights.safetensors")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (metadata["classes"], metadata["data"]) == (CLASSES, "drawn")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


def test_the_published_file_loads_in_both_ways():
    path = RESULTS / WEIGHTS_NAME
    loaded, metadata = load_model(path)
    assert metadata["classes"][:3] == ["plane", "car", "bird"]
    plain = CustomResNet()
    plain.load_state_dict(load_file(path))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), plain.eval()(images))
    assert path.stat().st_size < 16_000_000


def test_one_changed_bit_anywhere_is_noticed(path):
    content = path.read_bytes()
    original = load_model(path)[0].state_dict()
    header = content.index(b"fc.bias")
    for place in {*range(0, header, 5), *range(header, len(content), len(content) // 40), len(content) - 1}:
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        try:
            loaded, metadata = load_model(path)
        except WeightsError:
            continue
        assert metadata["classes"] == CLASSES, f"other metadata, damaged at byte {place}"
        assert all(torch.equal(value, original[name]) for name, value in loaded.state_dict().items()), place


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "no weights file .*: train first"),
        (lambda path: path.write_bytes(b""), "is not an undamaged weights file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is not an undamaged weights file"),
        (lambda path: save_file(load_file(path), path), f"KeyError: '{HEADER_KEY}'"),
        (lambda path: save_file(load_file(path), path, {HEADER_KEY: "[]"}), "TypeError"),
        (
            lambda path: save_weights(CustomResNet(4, width=4), path, {"classes": CLASSES}),
            "size mismatch for fc.weight",
        ),
        (lambda path: save_weights(CustomResNet(3, width=4), path, {}), "KeyError: 'classes'"),
    ],
)
def test_missing_damaged_and_other_files_are_refused(path, damage, words):
    damage(path)
    with pytest.raises(WeightsError, match=words):
        load_model(path)


class Payload:
    """Pickles into a call that makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickled_weights_are_refused_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
    torch.save({"fc.weight": Payload()}, tmp_path / "torch.pt")
    for name in ("plain.pt", "torch.pt"):
        with pytest.raises(WeightsError, match="pickled weights are never loaded"):
            load_model(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_float16_cannot_hold_are_not_written(path, value):
    before, model = path.read_bytes(), CustomResNet(3, width=4)
    with torch.no_grad():
        model.fc.weight[0, 0] = value
    with pytest.raises(WeightsError, match=r"fc\.weight is not finite in float16"):
        save_weights(model, path, {"classes": CLASSES})
    assert path.read_bytes() == before
