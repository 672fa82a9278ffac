"""Every figure of ``Results/``, drawn from the objects of a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from models import CustomResNet
from utils import analysis, lesson, plotting
from utils.analysis import Predictions
from utils.config import Config
from utils.dataset import ImageDataset
from utils.loaders import BatchedLoader
from utils.lr_finder import LRRange
from utils.metrics import History
from utils.schedule import one_cycle_beta1s, one_cycle_lrs
from utils.transforms import BatchAugment, denormalize, normalize


@dataclass(frozen=True)
class FigureInputs:
    """What a finished run's figures are drawn from.

    Attributes:
        config, dataset, history: of the run.
        model: the tested network.
        lr_range: the range in use, found or given.
        predictions: the tested network's, on all test images in order.
    """

    config: Config
    dataset: ImageDataset
    model: CustomResNet
    lr_range: LRRange
    history: History
    predictions: Predictions


def draw_all(run: FigureInputs) -> dict[str, Figure]:
    """Every figure of ``Results/``, by file name.

    ``lr_finder.png`` needs a range test, and ``one_cycle.png`` the one-cycle schedule. A figure that fails is left out
    with a warning that gives the reason: a run's weights and numbers must not be lost with it.
    """
    config, dataset, predictions = run.config, run.dataset, run.predictions
    steps = -(-len(dataset.train_labels) // config.batch_size)
    drawings = {
        "train.png": lambda: train_samples(dataset, config),
        "test.png": lambda: test_samples(dataset),
        "network.png": lambda: network(run.model),
        "lr_finder.png": lambda: lr_range_test(run.lr_range),
        "one_cycle.png": lambda: one_cycle(config, run.lr_range, steps),
        "model_viz.png": lambda: training_curves(run.history, config.peak_epoch),
        "mis.png": lambda: mistakes(dataset, predictions),
        "confusion_matrix.png": lambda: confusion(predictions, dataset.classes),
        "class_accuracy.png": lambda: class_accuracy(predictions, dataset.classes),
        "grad_cam.png": lambda: grad_cam(run.model, dataset, predictions),
    }
    if not len(run.lr_range.losses):  # the LRs were given
        del drawings["lr_finder.png"]
    if config.schedule != "one-cycle":
        del drawings["one_cycle.png"]
    figures = {}
    for name, draw in drawings.items():
        try:
            figure = draw()
            figure.draw_without_rendering()  # some errors are raised only when the text is laid out
            figures[name] = figure
        except Exception as error:
            warnings.warn(f"{name} is left out: {type(error).__name__}: {error}", stacklevel=2)
    return figures


def train_samples(dataset: ImageDataset, config: Config, count: int = 10, versions: int = 3) -> Figure:
    """The first ``count`` train images, above what the network sees of them in ``versions`` epochs."""
    images, labels = dataset.train_images[:count], dataset.train_labels[:count]
    loader = BatchedLoader(
        images,
        labels,
        len(images),
        augment=BatchAugment(config.pad, config.pad_mode, config.flip, config.cutout),
        alternate_flip=config.alternate_flip,
        seed=config.seed,
    )
    augmented = np.stack([denormalize(batch) for _ in range(versions) for batch, _ in loader])
    title = f"Train images, and what the network sees of them in {versions} epochs"
    return plotting.augmentation_grid(images, augmented, _names(dataset, labels), title)


def test_samples(dataset: ImageDataset) -> Figure:
    """The first 20 test images after normalization and back, as the network sees them."""
    shown = denormalize(normalize(torch.from_numpy(dataset.test_images[:20])))
    return plotting.image_grid(shown, _names(dataset, dataset.test_labels[:20]), "Test images: never augmented")


def network(model: CustomResNet) -> Figure:
    """The network's stages and residual blocks."""
    return plotting.block_diagram(lesson.diagram_stages(model))


def first_filters(model: CustomResNet) -> Figure:
    """The filters of the first convolution as they are now."""
    weights = model.prep.conv.conv.weight.detach().float().cpu().numpy()
    return plotting.filter_grid(weights, "The filters of the first convolution, before training")


def lr_range_test(lr_range: LRRange) -> Figure:
    """The range test's curve and what each rule suggests; ``lr_range`` must come from a range test."""
    return plotting.lr_range_test(
        lr_range.lrs, lr_range.losses, lr_range.smoothed, lr_range.suggestions, lr_range.lr_min, lr_range.lr_max
    )


def one_cycle(config: Config, lr_range: LRRange, steps_per_epoch: int) -> Figure:
    """The LR and Adam's beta1 at every step, compared with a cycle that ends in annihilation."""
    cycle = (config.epochs, config.peak_epoch, steps_per_epoch)
    lrs = one_cycle_lrs(lr_range.lr_min, lr_range.lr_max, *cycle)
    beta1s = one_cycle_beta1s(*cycle) if config.cycle_beta1 else np.full(len(lrs), config.beta1)
    last = len(lrs) - 1
    # Down to LRMIN after nine tenths of the steps, or halfway from a later peak, then to a hundredth of LRMIN.
    corners = [0, lrs.argmax(), max(0.9 * last, (lrs.argmax() + last) / 2), last]
    levels = [lr_range.lr_min, lr_range.lr_max, lr_range.lr_min, lr_range.lr_min / 100]
    annihilated = np.interp(np.arange(len(lrs)), corners, levels)
    return plotting.one_cycle(lrs, config.epochs, config.peak_epoch, beta1s, annihilated)


def training_curves(history: History, peak_epoch: int) -> Figure:
    """Loss and accuracy of every epoch, train and test."""
    return plotting.training_curves(
        history.train_loss, history.test_loss, history.train_accuracy, history.test_accuracy, peak_epoch
    )


def mistakes(dataset: ImageDataset, predictions: Predictions) -> Figure:
    """The 20 wrong answers that the network was surest of."""
    worst = analysis.confident_mistakes(predictions, 20)
    return plotting.misclassified(
        dataset.test_images[worst.index],
        _names(dataset, worst.predicted),
        _names(dataset, worst.true),
        worst.predicted_probability,
        worst.true_probability,
    )


def confusion(predictions: Predictions, classes: Sequence[str]) -> Figure:
    """Which classes are confused."""
    return plotting.confusion_heatmap(analysis.confusion_matrix(predictions), classes)


def class_accuracy(predictions: Predictions, classes: Sequence[str]) -> Figure:
    """The accuracy of every class, and overall."""
    return plotting.class_accuracy(analysis.per_class_accuracy(predictions), classes, predictions.accuracy)


def grad_cam(model: CustomResNet, dataset: ImageDataset, predictions: Predictions) -> Figure:
    """Where the network looks: in the first four right answers, then in the four surest wrong ones."""
    right = np.flatnonzero(predictions.predicted == predictions.labels)[:4]
    wrong = analysis.confident_mistakes(predictions, 4).index
    shown = np.concatenate([right, wrong])
    pictures, answers = dataset.test_images[shown], predictions.predicted[shown]
    images = torch.from_numpy(pictures).to(next(model.parameters()).device)
    maps = lesson.class_activation_maps(model, normalize(images), answers)
    return plotting.activation_maps(
        pictures,
        maps,
        _names(dataset, answers),
        _names(dataset, predictions.labels[shown]),
        "The answer and the truth; below, the evidence for the answer (wrong answers in red)",
    )


def _names(dataset: ImageDataset, labels: np.ndarray) -> list[str]:
    return [dataset.classes[label] for label in labels]
