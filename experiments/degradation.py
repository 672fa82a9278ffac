"""The train error of plain and residual networks of growing depth: the longer run that the notebook shows.

    python -m experiments.degradation        about 20 minutes on one CPU core

Each run is written to ``experiments/results/degradation.json`` as soon as it ends. The same command goes on after an
interruption, and does nothing when all runs are there. A file with runs on other images is refused and stays as it is.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from utils import lesson, runtime
from utils.dataset import ImageDataset, load_dataset
from utils.runs import machine
from utils.runs.door import run_door
from utils.runtime import ConfigError

SETTINGS = {"train_images": 3000, "epochs": 10, "depths": [8, 20, 44], "lrs": [1e-3, 3e-3], "seeds": [0, 1, 2]}


def run_all(dataset: ImageDataset, out: Path, settings: dict) -> dict:
    """Make every run that ``out`` does not hold yet.

    Args:
        dataset: a class-balanced ``settings["train_images"]`` of its train images are trained on.
        out: a JSON file, written after every run.
        settings: as ``SETTINGS``.

    Returns:
        The file's content: the settings, the data, device and versions, and ``runs``, each with ``skip``, ``depth``,
        ``lr``, ``seed``, and for each epoch ``loss`` (nats) and ``error`` (percent) on the train images.

    Raises:
        ConfigError: the images are a stand-in, or ``out`` holds runs with other settings or data.
    """
    if dataset.is_stand_in:
        raise ConfigError(f"these are {dataset.description}: the curves need CIFAR-10, so name a copy in $CIFAR10_DIR")
    about = {**settings, "data": dataset.description}
    if out.exists():
        stored = json.loads(out.read_text(encoding="utf-8"))
        if differing := [f"{name} {stored.get(name)}" for name in about if stored.get(name) != about[name]]:
            raise ConfigError(
                f"{out} holds runs of other settings or data ({'; '.join(differing)}): move it away first"
            )
    else:
        device = runtime.device_name(runtime.pick_device("cpu"))
        stored = {**about, "device": device, "versions": machine.versions(), "runs": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(run["seed"], run["lr"], run["depth"], run["skip"]) for run in stored["runs"]}
    small = dataset.subset(settings["train_images"])
    for case in itertools.product(settings["seeds"], settings["lrs"], settings["depths"], (False, True)):
        if case in done:
            continue
        seed, lr, depth, skip = case
        curve = lesson.training_error(small, depth, skip, epochs=settings["epochs"], lr=lr, seed=seed)
        loss, error = curve.T.round(4).tolist()
        stored["runs"].append({"seed": seed, "lr": lr, "depth": depth, "skip": skip, "loss": loss, "error": error})
        runtime.write_json(out, stored)
        kind = "residual" if skip else "plain"
        runtime.say(f"seed {seed}, LR {lr:g}, {kind} {depth} layers: train error {error[-1]:.1f}%")
    return stored


def main() -> int:
    return run_door(
        "experiments.degradation",
        lambda: run_all(load_dataset(), lesson.STORED_DEGRADATION, SETTINGS),
        lambda _: "the same command goes on with the runs that are left",
    )


if __name__ == "__main__":
    sys.exit(main())
