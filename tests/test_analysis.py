"""Predictions, confusions, class accuracy, the most confident mistakes."""

import numpy as np
import pytest
import torch

from models import CustomResNet
from utils import analysis
from utils.analysis import Predictions
from utils.loaders import BatchedLoader
from utils.runtime import Precision
from utils.transforms import normalize


def predictions(*rows: tuple[int, tuple[float, ...]]) -> Predictions:
    """Rows of (true class, probabilities)."""
    return Predictions(np.array([p for _, p in rows], dtype=np.float32), np.array([label for label, _ in rows]))


SMALL = predictions((0, (0.9, 0.05, 0.05)), (0, (0.1, 0.7, 0.2)), (1, (0.0, 0.99, 0.01)), (1, (0.03, 0.02, 0.95)))


def test_accuracy_and_loss_are_over_images():
    assert SMALL.accuracy == 50.0
    assert SMALL.loss == pytest.approx(-np.log([0.9, 0.1, 0.99, 0.02]).mean(), rel=1e-5)
    assert 50 < predictions((1, (1.0, 0.0))).loss < 100  # a certain mistake is large but finite


def test_confusions_have_true_classes_down_and_answers_across():
    assert analysis.confusion_matrix(SMALL).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_class_accuracy_is_printed_as_in_the_assignment_and_unknown_without_images():
    lines = analysis.class_accuracy_lines(SMALL, ("plane", "car", "bird"))
    assert lines[0] == "Accuracy for class: plane is 50.0 %"
    assert lines[2] == "Accuracy for class: bird is unknown (no images)"


def test_mistakes_come_most_confident_first():
    assert analysis.confident_mistakes(SMALL).tolist() == [3, 1]
    assert [analysis.confident_mistakes(SMALL, count).tolist() for count in (0, 1, 99)] == [[], [3], [3, 1]]


def test_predictions_keep_the_loaders_order(toy):
    model, precision = CustomResNet(width=4), Precision("fp32", torch.device("cpu"))
    loader = BatchedLoader(toy.test_images, toy.test_labels, 7)
    plain, mirrored = analysis.predict(model, loader, precision=precision, kinds=("none", "flip")).values()
    assert plain.labels.tolist() == toy.test_labels.tolist()
    expected = model.predict_proba(normalize(torch.from_numpy(toy.test_images)))
    assert plain.probabilities == pytest.approx(expected.numpy(), abs=1e-5)
    assert not np.allclose(plain.probabilities, mirrored.probabilities)


def test_a_picture_gets_the_most_probable_of_the_models_own_classes(toy):
    model, classes = CustomResNet(num_classes=3, width=4), ("crow", "owl", "jay")
    answers = analysis.classify(model, toy.test_images[0], classes, top=2)
    everything = analysis.classify(model, toy.test_images[0], classes, top=99)
    assert {name for name, _ in everything} == set(classes)
    assert sum(probability for _, probability in everything) == pytest.approx(1)
    assert everything[:2] == answers
    assert answers[0][1] >= answers[1][1] > 0
