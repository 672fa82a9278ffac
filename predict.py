"""Use trained weights: classify your own pictures, or test the weights on the data of their run.

python predict.py picture.jpg                   the three most probable classes, with the weights in Results/
python predict.py --weights RUN/custom_resnet.safetensors picture.jpg     with the weights of your own run
python predict.py --test                        accuracy on the test images, beside metrics.json's
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from models import CustomResNet
from utils import runtime
from utils.analysis import classify_file
from utils.dataset import HELD_OUT, DatasetError, ImageDataset, load_dataset
from utils.runs import report
from utils.runs.door import complain, run_door
from utils.runs.machine import explain_failures
from utils.runs.weights import WEIGHTS_NAME, WeightsError, load_model
from utils.runtime import Session10Error, say

CLASSES_LISTED = 10  # longer lists are only counted


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="*", type=Path, help="image files; the central square is scaled to 32x32")
    parser.add_argument(
        "--test", action="store_true", help="instead, test the weights on their run's data (1.5 minutes on a CPU)"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=report.RESULTS / WEIGHTS_NAME,
        help=f"a safetensors file that a run wrote, such as runs/quick-seed0/{WEIGHTS_NAME} (default: Results/'s)",
    )
    parser.add_argument("--top", type=int, default=3, help="how many classes to name (default: 3)")
    parser.add_argument(
        "--data-dir", help="for --test: the folder of the run's data (default: $CIFAR10_DIR, else data/)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    args = parser.parse_args(argv)
    if args.test == bool(args.picture):
        parser.error("name one or more pictures, or --test")
    if args.top < 1:
        parser.error(f"--top is {args.top}: ask for at least 1 class")
    return args


def test(args: argparse.Namespace, model: CustomResNet, classes: list[str]) -> None:
    """Test the weights as the last step of a run does, and compare with the metrics stored beside them.

    Raises:
        DatasetError: the data have other classes than the weights.
    """
    folder = args.weights.parent
    stored = report.read_metrics(folder) if (folder / report.METRICS_NAME).exists() else None
    dataset = data_of_run(args.data_dir, stored)
    if list(dataset.classes) != classes:
        raise DatasetError(
            f"{args.weights} knows {in_words(classes)}, but {dataset.description} has {in_words(dataset.classes)}: name "
            "the folder of the run's data with --data-dir"
        )
    plain, tta = report.final_test(model, dataset)
    say(f"{len(plain.labels):,} test images of {dataset.description}")
    say(f"test accuracy {plain.accuracy:.2f}%, with flip TTA {tta.accuracy:.2f}%, loss {plain.loss:.4f}")
    if stored is not None:
        say(
            f"metrics.json  {stored['test_accuracy']:.2f}%, with flip TTA {stored['test_accuracy_tta']:.2f}%, "
            f"loss {stored['test_loss']:.4f} ({stored['test_images']:,} test images of {stored['data']})"
        )


def data_of_run(data_dir: str | None, stored: dict | None) -> ImageDataset:
    """The data that a run was tested on; for a quick run, the same subset.

    Args:
        data_dir: a folder; None: the usual places, or the stand-in if the run used it.
        stored: the run's metrics, if there are any.

    Raises:
        DatasetError: it was tested on train images, because settings were chosen by it.
    """
    if stored is None:
        return load_dataset(data_dir)
    if HELD_OUT in stored["data"]:
        raise DatasetError(
            f"this run helped to choose settings and was tested on {stored['data']}: the test set is for final results; "
            "to test it all the same, copy its weights to another folder"
        )
    is_stand_in = stored["source"] == "digits" and data_dir is None
    dataset = load_dataset(data_dir, source="digits" if is_stand_in else "auto")
    return dataset.subset(stored["config"].get("train_images"), stored["config"].get("test_images"))


def classify(args: argparse.Namespace, model: CustomResNet, classes: list[str]) -> int:
    """Print a line for every picture; returns how many of several could not be classified.

    Raises:
        DatasetError, OSError: a single picture could not.
        WeightsError: the network's answers are not probabilities.
    """
    failed = 0
    for picture in args.picture:
        try:
            if picture.is_dir():
                raise DatasetError(f"{picture} is a folder: name the pictures in it, such as {picture / 'picture.jpg'}")
            answers = classify_file(model, picture, classes, args.top)
        except (DatasetError, OSError) as error:
            if len(args.picture) == 1:
                raise
            complain(f"predict.py: {error}")
            failed += 1
            continue
        if not all(math.isfinite(probability) for _, probability in answers):
            raise WeightsError(
                f"{args.weights} gives NaN instead of probabilities: the run has diverged; use another run's weights"
            )
        say(f"{picture}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in answers))
    if failed < len(args.picture):
        say(
            f"It knows {in_words(classes)} and names one of them whatever a picture shows: a high probability proves "
            "nothing."
        )
    return failed


def in_words(classes: list[str] | tuple[str, ...]) -> str:
    """``"3 classes (cat, dog, frog)"``; if there are many, only their number."""
    return f"{len(classes)} classes" + (f" ({', '.join(classes)})" if len(classes) <= CLASSES_LISTED else "")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def predict() -> None:
        device = runtime.pick_device(args.device)
        with explain_failures():
            model, metadata = load_model(args.weights)
            model = model.to(device)
            if args.test:
                test(args, model, metadata["classes"])
            elif failed := classify(args, model, metadata["classes"]):
                raise Session10Error(f"{failed} of {len(args.picture)} pictures could not be classified")

    return run_door("predict.py", predict)


if __name__ == "__main__":
    sys.exit(main())
