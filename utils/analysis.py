"""What the trained network gets right and wrong, as NumPy arrays and numbers; ``plotting`` draws them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models import CustomResNet
from utils.engine import predict_batches
from utils.runtime import Precision
from utils.sources.image_folder import read_image
from utils.transforms import normalize


@dataclass(frozen=True)
class Predictions:
    """The network's answers on N images, in the images' order.

    Attributes:
        probabilities: (N, C) float32, each row sums to 1.
        labels: (N,) int64, the true classes.
    """

    probabilities: np.ndarray
    labels: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """(N,) int64, the most probable class of each image."""
        return self.probabilities.argmax(axis=1)

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100.0 * int((self.predicted == self.labels).sum()) / len(self.labels)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        true = self.probabilities[np.arange(len(self.labels)), self.labels].astype(np.float64)
        return float(-np.log(np.maximum(true, np.finfo(np.float32).tiny)).mean())


def predict(model: nn.Module, loader: Iterable, *, precision: Precision, tta: bool = False) -> Predictions:
    """Class probabilities for every image of an unshuffled ``loader``, in eval mode.

    Args:
        model: the network.
        loader: (B, 3, 32, 32) float images and (B,) int64 labels.
        precision: of the forward pass.
        tta: average the logits of each image and its mirror image first.
    """
    probabilities, labels = [], []
    for logits, batch_labels in predict_batches(model, loader, precision=precision, tta=tta):
        probabilities.append(logits.softmax(dim=1).cpu())
        labels.append(batch_labels.cpu())
    return Predictions(torch.cat(probabilities).numpy(), torch.cat(labels).numpy())


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """(C, C) int64: entry [i, j] counts the images of class i that the network called class j."""
    classes = predictions.probabilities.shape[1]
    pairs = predictions.labels * classes + predictions.predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def per_class_accuracy(predictions: Predictions) -> np.ndarray:
    """(C,) float64, percent; NaN for a class without images."""
    matrix = confusion_matrix(predictions)
    totals = matrix.sum(axis=1)
    return np.divide(100.0 * matrix.diagonal(), totals, out=np.full(len(matrix), np.nan), where=totals > 0)


def class_accuracy_lines(predictions: Predictions, classes: Sequence[str]) -> list[str]:
    """One line per class, such as ``Accuracy for class: plane is 94.3 %``."""
    return [
        f"Accuracy for class: {name} is " + ("unknown (no images)" if np.isnan(accuracy) else f"{accuracy:.1f} %")
        for name, accuracy in zip(classes, per_class_accuracy(predictions))
    ]


@dataclass(frozen=True)
class Mistakes:
    """Wrong answers, the most confident first; every array has one entry per mistake.

    Attributes:
        index: position of the image in the loader.
        predicted, true: class numbers.
        predicted_probability, true_probability: the network's probabilities of these two classes.
    """

    index: np.ndarray
    predicted: np.ndarray
    true: np.ndarray
    predicted_probability: np.ndarray
    true_probability: np.ndarray


def confident_mistakes(predictions: Predictions, count: int | None = None) -> Mistakes:
    """The ``count`` wrong answers that the network was surest of; all of them for None or a larger ``count``.

    Raises:
        ValueError: a negative ``count``.
    """
    if count is not None and count < 0:
        raise ValueError(f"count is {count}: ask for 0 mistakes or more")
    predicted = predictions.predicted
    wrong = np.flatnonzero(predicted != predictions.labels)
    confidence = predictions.probabilities[wrong, predicted[wrong]]
    index = wrong[np.argsort(-confidence, kind="stable")][:count]
    return Mistakes(
        index=index,
        predicted=predicted[index],
        true=predictions.labels[index],
        predicted_probability=predictions.probabilities[index, predicted[index]],
        true_probability=predictions.probabilities[index, predictions.labels[index]],
    )


def frequent_confusions(predictions: Predictions, count: int = 5) -> list[tuple[int, int, int]]:
    """Up to ``count`` pairs of classes that were confused, as ``(true, predicted, how often)``, most frequent first."""
    matrix = confusion_matrix(predictions)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:count]
    pairs = np.column_stack(np.unravel_index(order, matrix.shape)).tolist()
    return [(true, answer, int(matrix[true, answer])) for true, answer in pairs if matrix[true, answer]]


def classify_file(
    model: CustomResNet, path: str | Path, classes: Sequence[str], top: int = 3
) -> list[tuple[str, float]]:
    """The ``top`` most probable classes of a picture file, as (name, probability in [0, 1]).

    Args:
        model: the network, on any device.
        path: a picture of any size.
        classes: the names of the model's classes, in the order of its outputs.
        top: how many to name; all classes if there are fewer.

    Raises:
        ValueError: the number of names is not the model's number of outputs.
        DatasetError: the file is missing or not an image.
    """
    pixels = torch.from_numpy(read_image(path).copy())[None]
    device = next(model.parameters()).device
    probabilities = model.predict_proba(normalize(pixels.to(device)))[0]
    if len(classes) != len(probabilities):
        raise ValueError(
            f"{len(classes)} class names for a network with {len(probabilities)} outputs: "
            "give the names it was trained with"
        )
    values, numbers = probabilities.topk(min(top, len(classes)))
    return [(classes[number], value) for number, value in zip(numbers.tolist(), values.tolist())]
