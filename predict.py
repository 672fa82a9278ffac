"""Use the trained weights: classify your own picture, or test them on CIFAR-10.

python predict.py picture.jpg        the three most probable classes
python predict.py --test             accuracy on CIFAR-10's test images, beside what metrics.json says
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from models import CustomResNet
from utils import report, runtime
from utils.analysis import classify_file
from utils.checkpoint import CheckpointError, load_weights
from utils.dataset import CIFAR10_CLASSES, DatasetError, load_dataset


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classify a picture with Session 10's trained network.")
    parser.add_argument("picture", nargs="*", type=Path, help="image files; the central square is scaled to 32x32")
    parser.add_argument(
        "--test", action="store_true", help="test the weights on CIFAR-10 instead (1.5 minutes on a CPU)"
    )
    parser.add_argument("--weights", type=Path, default=report.RESULTS / report.WEIGHTS_NAME, help="a safetensors file")
    parser.add_argument("--top", type=int, default=3, help="how many classes to name (default: 3)")
    parser.add_argument("--data-dir", help="for --test: a folder with CIFAR-10 (default: $CIFAR10_DIR, else data/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    if args.test == bool(args.picture):
        parser.error("name one or more pictures, or --test")
    if args.top < 1:
        parser.error(f"--top is {args.top}: ask for at least 1 class")
    return args


def test(args: argparse.Namespace) -> None:
    """Test the weights as the last step of a run does, and compare with the metrics stored beside them."""
    dataset = load_dataset(args.data_dir)
    if dataset.classes != CIFAR10_CLASSES:
        raise DatasetError(f"--test needs CIFAR-10, found {dataset.description}: name its folder with --data-dir")
    device = runtime.pick_device(args.device)
    model = load_weights(CustomResNet(), args.weights).to(device)
    plain, mirrored = report.final_test(model, dataset, device)
    print(f"{len(plain.labels):,} test images of {dataset.description}")
    print(f"test accuracy {plain.accuracy:.2f}%, with flip TTA {mirrored.accuracy:.2f}%, loss {plain.loss:.4f}")
    if (args.weights.parent / "metrics.json").exists():
        stored = report.read_metrics(args.weights.parent)
        print(
            f"metrics.json  {stored['test_accuracy']:.2f}%, with flip TTA {stored['test_accuracy_tta']:.2f}%, "
            f"loss {stored['test_loss']:.4f} ({stored['data']})"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.test:
            test(args)
            return 0
        model = load_weights(CustomResNet(), args.weights).to(runtime.pick_device(args.device))
        for picture in args.picture:
            answers = classify_file(model, picture, CIFAR10_CLASSES, args.top)
            print(f"{picture}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in answers))
    except (CheckpointError, DatasetError, ValueError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
