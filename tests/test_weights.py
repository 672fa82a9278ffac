"""The weights file gives back the trained network bit for bit; anything else is refused."""

import functools
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CustomResNet
from tests.small_runs import Payload, TinyNet
from utils import engine
from utils.config import Config
from utils.runs.weights import HEADER_KEY, WeightsError, load_model, save_weights

ABOUT = {"classes": ["a", "b", "c"], "width": 4}


@pytest.fixture
def path(tmp_path):
    """A file with the weights of a narrow network."""
    torch.manual_seed(0)
    save_weights(CustomResNet(3, width=4), tmp_path / "narrow.safetensors", ABOUT)
    return tmp_path / "narrow.safetensors"


@pytest.mark.parametrize("changes", [{}, {"residual": False}, {"conv_padding": "replicate"}, {"logit_scale": 0.5}])
def test_a_file_gives_back_the_network_that_was_trained(tmp_path, changes):
    path, config = tmp_path / "weights.safetensors", Config(width=4, **changes)
    model = engine.build_model(config, 3).half().float().eval()  # as float16 rounds it
    save_weights(model, path, {**ABOUT, **changes})
    state = torch.random.get_rng_state()
    loaded, metadata = load_model(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert metadata["classes"] == ABOUT["classes"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert all(value.dtype in (torch.float16, torch.int64) for value in load_file(path).values())


def test_weights_load_however_the_recipe_initializes_new_networks(path, monkeypatch):
    monkeypatch.setattr("utils.runs.weights.Config", functools.partial(Config, init="patches"))
    assert load_model(path)[0].fc.out_features == 3


def test_the_full_network_fits_16_megabytes(tmp_path):
    save_weights(CustomResNet(), tmp_path / "full.safetensors", {"classes": ["a"] * 10})
    assert (tmp_path / "full.safetensors").stat().st_size < 16_000_000


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
        assert metadata["classes"] == ABOUT["classes"], f"another header, damaged at byte {place}"
        assert all(torch.equal(value, original[name]) for name, value in loaded.state_dict().items()), place


def rewritten(path, name: str, change=None, **about) -> None:
    """The file as another program might write it, with one tensor changed."""
    weights = load_file(path)
    weights[name] = change(weights[name]) if change else weights[name]
    save_file(weights, path, {HEADER_KEY: json.dumps({**ABOUT, "sha256": "", **about})})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.bfloat16(), r"fc.bias as torch.bfloat16, but it must be torch.float16"),
        (lambda value: value.to(torch.float8_e4m3fn), r"fc.bias as torch.float8_e4m3fn"),
        (lambda value: value > 0, r"fc.bias as torch.bool"),
        (lambda value: value.to(torch.int8), r"fc.bias as torch.int8"),
        (lambda value: value[:2], r"another model \(fc.bias is \(2,\) there, \(3,\) here\)"),
        (lambda value: value + 1, r"is damaged: its content does not match its checksum"),
    ],
)
def test_tensors_of_another_type_or_shape_are_refused(path, change, words):
    rewritten(path, "fc.bias", change)
    with pytest.raises(WeightsError, match=words):
        load_model(path)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"classes": "abc"}, "does not name its classes"),
        ({"classes": []}, "does not name its classes"),
        ({"width": 10**7}, "is of another model"),
        ({"width": "4"}, "describes a network that cannot be built .width is '4'"),
        ({"logit_scale": float("nan")}, "describes a network that cannot be built .logit_scale is nan"),
        ({"residual": None}, "describes a network that cannot be built .residual is None"),
        ({"logit_scale": 0.5}, "is damaged: its content does not match its checksum"),
    ],
)
def test_a_header_that_describes_another_network_or_none_is_refused(path, about, words):
    digest = load_model(path)[1]["sha256"]
    rewritten(path, "fc.bias", sha256=digest, **about)
    with pytest.raises(WeightsError, match=words):
        load_model(path)


@pytest.mark.parametrize("metadata", [None, {HEADER_KEY: "[]"}, {HEADER_KEY: "["}, {HEADER_KEY: "[" * 100_000}])
def test_a_file_of_another_program_is_refused(tmp_path, metadata):
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(WeightsError, match=r"does not name its classes|not a complete safetensors file"):
        load_model(tmp_path / "other.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_float16_cannot_hold_are_refused_and_the_file_there_stays(path, value):
    before, model = path.read_bytes(), TinyNet()
    with torch.no_grad():
        model.fc.weight[0, 0] = value
    with pytest.raises(WeightsError, match=r"fc\.weight holds values that are not finite in float16.*diverged"):
        save_weights(model, path, ABOUT)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(pickle.dumps(Payload("executed"))), "refused, since they can run code"),
        (lambda path: torch.save({"fc.weight": Payload("executed")}, path), "refused, since they can run code"),
        (lambda path: path.write_bytes(b""), "not a complete safetensors file"),
        (lambda path: path.mkdir(), "is not a file: name the weights file itself"),
        (os.mkfifo, "is not a file"),
        (lambda path: None, "no weights at .*train first"),
    ],
)
def test_other_files_are_refused_with_the_reason_and_run_nothing(tmp_path, monkeypatch, make, words):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=words):
        load_model(tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()
