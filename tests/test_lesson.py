"""The notebook's small experiments, and the two scripts around the trained weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from utils.checkpoint import save_weights

import predict
from models import CustomResNet
from utils import lesson
from utils.transforms import normalize


@pytest.fixture(scope="module")
def model() -> CustomResNet:
    torch.manual_seed(0)
    return CustomResNet()


@pytest.fixture
def weights(model, tmp_path):
    save_weights(model, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_skips_keep_the_gradient_and_plain_networks_lose_it():
    """What the notebook's first figure claims."""
    plain, skip = (lesson.gradient_norms(20, skip=s, batch_norm=False) for s in (False, True))
    assert len(plain) == 21
    assert plain[0] < 1e-10 * plain[-1]
    assert 0.1 < skip[0] / skip[-1] < 10


def test_batch_norm_alone_makes_the_plain_gradient_explode():
    plain, skip = (lesson.gradient_norms(20, skip=s, batch_norm=True) for s in (False, True))
    assert plain[0] > 100 * plain[-1]
    assert skip[0] < 20 * skip[-1]


def test_gradient_norms_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    lesson.gradient_norms(2, skip=True, batch_norm=True)
    assert torch.equal(before, torch.get_rng_state())


def test_the_diagram_is_read_off_the_model(model):
    stages = lesson.diagram_stages(model.train())
    assert [name for name, *_ in stages] == ["input", "prep", "layer1", "layer2", "layer3", "pool", "fc"]
    assert [shape for _, _, shape, _ in stages] == [
        "3×32×32", "64×32×32", "128×16×16", "256×8×8", "512×4×4", "512×1×1", "10",
    ]  # fmt: skip
    assert [name for name, *_, residual in stages if residual] == ["layer1", "layer3"]
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_activation_maps_are_images_between_0_and_1_and_leave_no_gradient(model, toy):
    images = normalize(torch.from_numpy(toy.test_images[:3]))
    maps = lesson.class_activation_maps(model.train(), images, [0, 1, 2])
    assert maps.shape == (3, 32, 32)
    assert 0 <= maps.min() <= maps.max() <= 1
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_predict_names_the_picture_and_three_classes(weights, tmp_path, toy, capsys):
    picture = tmp_path / "picture.png"
    Image.fromarray(toy.test_images[0]).save(picture)
    assert predict.main([str(picture), "--weights", str(weights)]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{picture}: ")
    assert line.count("%") == 3


def test_predict_says_what_is_wrong_with_a_file(weights, tmp_path, capsys):
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    for arguments, words in (
        ([str(text)], "is not an image"),
        ([str(tmp_path / "missing.png")], "check the path"),
    ):
        assert predict.main([*arguments, "--weights", str(weights)]) == 1
        message = capsys.readouterr().err
        assert words in message
        assert "Traceback" not in message


def test_predict_refuses_missing_weights_and_contradictory_options(tmp_path, capsys):
    assert predict.main(["x.png", "--weights", str(tmp_path / "none.safetensors")]) == 1
    assert "no weights at" in capsys.readouterr().err
    for arguments in ([], ["x.png", "--test"], ["x.png", "--top", "0"]):
        with pytest.raises(SystemExit) as stop:
            predict.main(arguments)
        assert stop.value.code == 2


def test_predict_tests_the_weights_on_a_folder(weights, image_folder, capsys):
    arguments = ["--test", "--weights", str(weights), "--data-dir", str(image_folder), "--device", "cpu"]
    assert predict.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "30 test images of CIFAR-10 as an image folder" in printed
    assert "with flip TTA" in printed

    for split in ("train", "test"):  # other classes than the weights know
        (image_folder / split / "plane").rename(image_folder / split / "kite")
    assert predict.main(arguments) == 1
    assert "--test needs CIFAR-10, found own images in 10 classes" in capsys.readouterr().err


def test_maps_need_no_particular_batch(model, toy):
    one = lesson.class_activation_maps(model, normalize(torch.from_numpy(toy.test_images[:1])), np.array([4]))
    assert one.shape == (1, 32, 32)
