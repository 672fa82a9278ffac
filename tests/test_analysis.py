"""Predictions, confusions, class accuracy, the most confident mistakes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import nn

from models import CustomResNet
from utils import analysis
from utils.analysis import Predictions
from utils.loaders import BatchedLoader
from utils.runtime import Precision

FP32 = Precision("fp32", torch.device("cpu"))


def predictions(*rows: tuple[int, tuple[float, ...]]) -> Predictions:
    """Rows of (true class, probabilities)."""
    return Predictions(np.array([p for _, p in rows], dtype=np.float32), np.array([label for label, _ in rows]))


SMALL = predictions((0, (0.9, 0.05, 0.05)), (0, (0.1, 0.7, 0.2)), (1, (0.0, 0.99, 0.01)), (1, (0.95, 0.03, 0.02)))


def test_accuracy_and_loss_are_over_images():
    assert SMALL.accuracy == 50.0
    assert SMALL.loss == pytest.approx(-np.log([0.9, 0.1, 0.99, 0.03]).mean(), rel=1e-5)


def test_a_certain_mistake_has_a_large_but_finite_loss():
    assert 50 < predictions((1, (1.0, 0.0))).loss < 100


def test_confusion_matrix_has_true_classes_down_and_answers_across():
    assert analysis.confusion_matrix(SMALL).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_class_accuracy_is_printed_as_in_the_assignment_and_unknown_without_images():
    lines = analysis.class_accuracy_lines(SMALL, ("plane", "car", "bird"))
    assert lines[0] == "Accuracy for class: plane is 50.0 %"
    assert lines[2] == "Accuracy for class: bird is unknown (no images)"
    assert np.isnan(analysis.per_class_accuracy(SMALL)[2])


def test_mistakes_come_most_confident_first_with_both_probabilities():
    found = analysis.confident_mistakes(SMALL)
    assert found.index.tolist() == [3, 1]
    assert (found.predicted.tolist(), found.true.tolist()) == ([0, 1], [1, 0])
    assert found.predicted_probability == pytest.approx([0.95, 0.7])
    assert found.true_probability == pytest.approx([0.03, 0.1])


@pytest.mark.parametrize("count", [0, 1, 2, 99])
def test_any_number_of_mistakes_can_be_asked_for(count):
    assert len(analysis.confident_mistakes(SMALL, count).index) == min(count, 2)


def test_a_negative_number_of_mistakes_is_refused():
    with pytest.raises(ValueError, match=r"count is -1: ask for 0 mistakes or more"):
        analysis.confident_mistakes(SMALL, -1)


@given(
    st.integers(2, 6).flatmap(
        lambda classes: st.integers(1, 40).flatmap(
            lambda count: st.tuples(
                hnp.arrays(np.float32, (count, classes), elements=st.floats(0, 1, width=32)),
                hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1)),
            )
        )
    )
)
def test_every_image_is_counted_once(data):
    p = Predictions(*data)
    matrix = analysis.confusion_matrix(p)
    assert matrix.sum() == len(p.labels)
    assert 100 * np.trace(matrix) / matrix.sum() == pytest.approx(p.accuracy)
    assert len(analysis.confident_mistakes(p).index) == len(p.labels) - np.trace(matrix)


def test_frequent_confusions_leave_out_what_never_happened():
    assert analysis.frequent_confusions(SMALL) == [(0, 1, 1), (1, 0, 1)]


class Brightness(nn.Module):
    """Two logits, the first from the left column alone, so that mirrored images give other answers."""

    def forward(self, x):
        left = x[:, 0, :, 0].mean(1)
        return torch.stack([left, torch.zeros_like(left)], dim=1)


def test_predictions_keep_the_loaders_order_and_tta_averages_the_mirror_image(toy):
    loader = BatchedLoader(toy.test_images, toy.test_labels, 7)
    model = Brightness().train()
    plain = analysis.predict(model, loader, precision=FP32)
    mirrored = analysis.predict(model, loader, precision=FP32, tta=True)
    assert plain.labels.tolist() == toy.test_labels.tolist()
    images = torch.cat([images for images, _ in loader])
    logits = (model(images) + model(images.flip(3))) / 2
    assert mirrored.probabilities == pytest.approx(logits.softmax(1).numpy(), abs=1e-6)
    assert not np.allclose(plain.probabilities, mirrored.probabilities)
    assert model.training


def test_a_picture_file_of_any_size_gets_the_most_probable_of_the_models_own_classes(tmp_path, toy):
    torch.manual_seed(0)
    model, classes = CustomResNet(num_classes=3), ("crow", "owl", "jay")
    picture = tmp_path / "wide.jpg"
    Image.fromarray(toy.test_images[0]).resize((300, 200)).save(picture)
    answers = analysis.classify_file(model, picture, classes, top=2)
    assert len(answers) == 2
    assert answers[0][1] >= answers[1][1] > 0
    everything = analysis.classify_file(model, picture, classes, top=99)
    assert {name for name, _ in everything} == set(classes)
    assert sum(probability for _, probability in everything) == pytest.approx(1)
    assert everything[:2] == answers
    with pytest.raises(ValueError, match="10 class names for a network with 3 outputs"):
        analysis.classify_file(model, picture, toy.classes)
