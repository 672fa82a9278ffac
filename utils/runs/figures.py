"""Every figure of ``Results/``, drawn from the objects of a run."""

from __future__ import annotations

import math
import warnings

from matplotlib.figure import Figure

from models import CustomResNet
from utils import plotting
from utils.analysis import Predictions
from utils.config import Config
from utils.dataset import ImageDataset
from utils.lr_finder import LRRange
from utils.metrics import History


def draw_all(
    config: Config,
    dataset: ImageDataset,
    model: CustomResNet,
    lr_range: LRRange,
    history: History,
    predictions: Predictions,
) -> dict[str, Figure]:
    """Every figure of ``Results/``, by file name; one that fails is left out with a warning, for the others' sake."""
    steps = math.ceil(len(dataset.train_labels) / config.batch_size)
    tested = f"Seed {config.seed}; tested: the {'averaged' if config.ema_decay else 'latest'} weights"
    drawings = {
        "train.png": lambda: plotting.augmented_images(dataset, config),
        "test.png": lambda: plotting.sample_images(dataset),
        "lr_finder.png": lambda: plotting.lr_range_test(lr_range, config.label_smoothing),
        "one_cycle.png": lambda: plotting.one_cycle(config, lr_range, steps),
        "model_viz.png": lambda: plotting.training_curves(history, config.peak_epoch, tested),
        "mis.png": lambda: plotting.mistakes(dataset, predictions),
        "confusion_matrix.png": lambda: plotting.confusion_matrix(predictions, dataset.classes),
        "class_accuracy.png": lambda: plotting.class_accuracy(predictions, dataset.classes),
        "grad_cam.png": lambda: plotting.grad_cam(model, dataset, predictions),
    }
    if not len(lr_range.losses):  # the LRs were given
        del drawings["lr_finder.png"]
    figures = {}
    for name, draw in drawings.items():
        try:
            figure = draw()
            figure.draw_without_rendering()  # some errors are raised only when the text is laid out
            figures[name] = figure
        except Exception as error:
            warnings.warn(f"{name} is left out: {type(error).__name__}: {error}", stacklevel=2)
    return figures
