"""Use trained weights: classify your own pictures, or test the weights on the data of their run.

python predict.py picture.jpg                   the three most probable classes, with the weights in Results/
python predict.py --weights RUN/custom_resnet.safetensors picture.jpg     with the weights of your own run
python predict.py --test                        accuracy on the test images, beside metrics.json's
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from models import CustomResNet
from utils import runtime
from utils.analysis import classify
from utils.dataset import CIFAR10_CLASSES, DatasetError, ImageDataset, load_dataset
from utils.runs import report
from utils.runs.cli import print_error, run_command
from utils.runs.weights import WEIGHTS_NAME, load_model
from utils.runtime import Session10Error, say
from utils.sources.pictures import read_image


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="*", type=Path, help="image files; the central square is scaled to 32x32")
    parser.add_argument("--test", action="store_true", help="test the weights on their run's data (minutes on a CPU)")
    weights = report.RESULTS / WEIGHTS_NAME
    parser.add_argument("--weights", type=Path, default=weights, help="a file that a run wrote (default: Results/'s)")
    parser.add_argument("--top", type=int, default=3, help="how many classes to name (default: 3)")
    parser.add_argument("--data-dir", help="for --test: the run's data (default: $CIFAR10_DIR, else data/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    args = parser.parse_args(argv)
    if args.test == bool(args.picture) or args.top < 1:
        parser.error("name one or more pictures and at least one class, or --test")
    return args


def test(args: argparse.Namespace, model: CustomResNet, classes: list[str]) -> None:
    """Test the weights as the last step of a run does, and show the metrics stored beside them."""
    folder = args.weights.parent
    stored = report.read_metrics(folder) if (folder / report.METRICS_NAME).exists() else None
    dataset = data_of_run(args.data_dir, classes, stored or {"split": "test", "source": "", "config": {}})
    measured = report.test_figures(report.final_test(model, dataset), dataset.fingerprint)
    say(f"{measured['test_images']:,} test images of {dataset.description}")
    for name, metrics in {"measured now": measured, report.METRICS_NAME: stored or {}}.items():
        if metrics:
            say(f"{name}: {report.accuracies(metrics)}; loss {metrics['test_loss']:.4f}")
        if "exact_test_images" in metrics:
            exact = report.accuracies(metrics, "test_accuracy_exact")
            say(f"    on the {metrics['exact_test_images']:,} bit-exact images: {exact}")


def data_of_run(data_dir: str | None, classes: list[str], stored: dict) -> ImageDataset:
    """The data that a run with these metrics was tested on; of a quick run, the same subset."""
    if stored["split"] == "validation":
        raise DatasetError(
            f"this run helped to choose settings, on {stored['data']}: the test set is for final results"
        )
    source = "digits" if stored["source"] == "digits" and data_dir is None else "auto"
    named = data_dir or os.environ.get("CIFAR10_DIR") or source == "digits" or classes == list(CIFAR10_CLASSES)
    dataset = load_dataset(data_dir, source) if named else None
    if dataset is None or list(dataset.classes) != classes:
        loaded = f", but {dataset.description} has {', '.join(dataset.classes)}" if dataset else ""
        raise DatasetError(f"the weights know {', '.join(classes)}{loaded}: name the run's pictures with --data-dir")
    return dataset.subset(stored["config"].get("train_images"), stored["config"].get("test_images"))


def classify_files(args: argparse.Namespace, model: CustomResNet, classes: list[str]) -> None:
    """Print a line for every picture; those that cannot be read are named, and Session10Error tells how many."""
    failed = 0
    for picture in args.picture:
        try:
            answers = classify(model, read_image(picture), classes, args.top)
        except (DatasetError, OSError) as error:
            print_error(f"predict.py: {error}")
            failed += 1
        else:
            say(f"{picture}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in answers))
    if failed:
        raise Session10Error(f"{failed} of {len(args.picture)} pictures could not be classified")
    say(f"The weights know {', '.join(classes)} and name one of them whatever a picture shows.")


def main(argv: list[str] | None = None) -> int:
    """Run with the given command line; returns the exit code."""
    args = parse_args(argv)

    def predict() -> None:
        model, metadata = load_model(args.weights)
        work = test if args.test else classify_files
        work(args, model.to(runtime.pick_device(args.device)), metadata["classes"])

    return run_command("predict.py", predict)


if __name__ == "__main__":
    sys.exit(main())
