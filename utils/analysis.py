"""What the trained network gets right and wrong, as NumPy arrays and numbers; ``plotting`` draws them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CustomResNet
from utils.engine import TTA, mean_logits, predict_views
from utils.runtime import Precision
from utils.transforms import normalize


@dataclass(frozen=True)
class Predictions:
    """The network's answers on N images, in the images' order."""

    probabilities: np.ndarray  # (N, C) float32, each row sums to 1
    labels: np.ndarray  # (N,) int64, the true classes

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


def predict(
    model: nn.Module, loader: Iterable, *, precision: Precision, kinds: Iterable[str] = tuple(TTA)
) -> dict[str, Predictions]:
    """Class probabilities for every image of an unshuffled ``loader``, by kind of test-time augmentation.

    The ``kinds``, keys of ``engine.TTA``, share their views of an image.
    """
    probabilities, labels = {kind: [] for kind in kinds}, []
    count = max(len(TTA[kind]) for kind in probabilities)
    for logits, batch_labels in predict_views(model, loader, precision, count):
        labels.append(batch_labels.cpu())
        for kind, batches in probabilities.items():
            batches.append(mean_logits(logits, kind).softmax(dim=1).cpu())
    truth = torch.cat(labels).numpy()
    return {kind: Predictions(torch.cat(batches).numpy(), truth) for kind, batches in probabilities.items()}


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


def confident_mistakes(predictions: Predictions, count: int | None = None) -> np.ndarray:
    """The numbers of the images with a wrong answer, (M,) int64, from the surest on: ``count`` of them, or all."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    confidence = predictions.probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")][:count]


def classify(model: CustomResNet, pixels: np.ndarray, classes: Sequence[str], top: int = 3) -> list[tuple[str, float]]:
    """The ``top`` most probable classes of one picture, as (name, probability in [0, 1]).

    Args:
        model: the network, on any device.
        pixels: (32, 32, 3) uint8, as from ``sources.pictures.read_image``.
        classes: the names of the model's classes, in the order of its outputs.
        top: how many to name; all classes if there are fewer.
    """
    images = normalize(torch.tensor(pixels[None], device=next(model.parameters()).device))
    values, numbers = model.predict_proba(images)[0].topk(min(top, len(classes)))
    return [(classes[number], value) for number, value in zip(numbers.tolist(), values.tolist())]


def class_activation_maps(model: CustomResNet, images: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391): the evidence for ``classes``, one per image.

    The maps of the layer before the last pooling are summed, each weighted with the mean of its gradient; evidence
    against the class is cut off. ``images`` are (N, 3, 32, 32) float32, normalized, on the model's device.

    Returns:
        (N, 32, 32) float32 in [0, 1], all zero where nothing speaks for the class.
    """
    model, maps = copy.deepcopy(model).eval(), []
    model.layer3.register_forward_hook(lambda module, inputs, output: maps.append(output))
    logits = model(images)
    wanted = logits[torch.arange(len(images)), torch.as_tensor(classes)]
    (gradients,) = torch.autograd.grad(wanted.sum(), maps[0])
    evidence = F.relu((gradients.mean(dim=(2, 3), keepdim=True) * maps[0]).sum(dim=1, keepdim=True))
    evidence = evidence / evidence.amax(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(evidence.dtype).tiny)
    return F.interpolate(evidence, size=images.shape[2:], mode="bilinear")[:, 0].detach().cpu().numpy()
