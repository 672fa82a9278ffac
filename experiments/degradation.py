"""How fast depth trains: the train error of plain and residual networks of growing depth.

    python -m experiments.degradation        about 40 minutes on one CPU core

Each run is written to ``experiments/results/degradation.json`` as soon as it ends; the same command makes the runs that
the file lacks. He et al. (2015) trained for 64,000 steps; 600 show how fast a network learns, not where it ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import runtime
from utils.dataset import ImageDataset, load_dataset
from utils.runs.cli import run_command
from utils.runs.files import write_json
from utils.runs.machine import device_name
from utils.runtime import ConfigError
from utils.transforms import normalize

STORED = runtime.PROJECT_ROOT / "experiments" / "results" / "degradation.json"
BATCH_SIZE = 50
SETTINGS = {"train_images": 3000, "epochs": 10}
GRID = {"seed": [0, 1, 2], "lr": [3e-4, 1e-3, 3e-3, 1e-2], "depth": [8, 20, 44], "skip": [False, True]}


class DepthNet(nn.Module):
    """A plain or residual network of any depth, after the CIFAR-10 networks of He et al. (2015, section 4.2).

    One convolution, (depth - 2) / 2 blocks of two, and a linear layer, with batch norm after every convolution and He
    initialization. Unlike there, all blocks have 16 channels and the same resolution: every skip is an identity, and
    plain and residual networks have exactly the same parameters.
    ``depth`` is an even number of at least 4. (N, 3, H, W) float -> (N, num_classes) logits.
    """

    def __init__(self, depth: int, skip: bool, num_classes: int = 10):
        super().__init__()
        if depth < 4 or depth % 2:
            raise ValueError(f"depth is {depth}: choose 4, 6, 8, ...")
        width = 16
        self.skip = skip
        self.first = nn.Sequential(*self.layer(3, width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(*self.layer(width, width), nn.ReLU(), *self.layer(width, width))
            for _ in range((depth - 2) // 2)
        )
        self.classifier = nn.Linear(width, num_classes)

    @staticmethod
    def layer(in_channels: int, out_channels: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return conv, nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = F.relu(x + block(x) if self.skip else block(x))
        return self.classifier(x.mean(dim=(2, 3)))


def shrunken(images: np.ndarray) -> Tensor:
    """(N, 32, 32, 3) uint8 images as (N, 3, 8, 8) float32, normalized; each pixel is the mean of the 4x4 it covers."""
    return F.adaptive_avg_pool2d(normalize(torch.from_numpy(images)), 8)


def training_error(
    dataset: ImageDataset, depth: int, skip: bool, *, epochs: int, lr: float = 3e-3, seed: int = 0
) -> np.ndarray:
    """Train a ``DepthNet`` on the CPU, on all train images of ``dataset``, with Adam at a constant LR.

    Args:
        dataset: a small subset; 1,500 images take a few seconds.
        seed: of weights and order; torch's generator is afterwards as before.

    Returns (epochs, 2) float64: mean loss in nats and error in percent on the train images, measured while training.
    """
    images, labels = shrunken(dataset.train_images), torch.from_numpy(dataset.train_labels)
    curve = np.zeros((epochs, 2))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = DepthNet(depth, skip, num_classes=len(dataset.classes))
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        for epoch in range(epochs):
            for index in torch.randperm(len(labels)).split(BATCH_SIZE):
                logits = net(images[index])
                loss = F.cross_entropy(logits, labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve[epoch] += loss.item() * len(index), int((logits.argmax(1) != labels[index]).sum())
    return curve / len(labels) * (1, 100)


def stored_curves(path: str | Path = STORED) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """The stored train errors, each network at the LR with the lowest mean error in the last epoch.

    Returns by kind of network, by depth and LR, (seeds, epochs) train errors in percent; and what the runs are.
    """
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    runs = pd.DataFrame(stored["runs"])
    runs["last"] = runs["error"].str[-1]
    panels: dict[str, dict[str, np.ndarray]] = {"plain": {}, "with skip connections": {}}
    for (skip, depth), tried in runs.groupby(["skip", "depth"]):
        best = tried.groupby("lr")["last"].mean().idxmin()
        curves = np.array(tried.loc[tried["lr"] == best, "error"].tolist())
        panels["with skip connections" if skip else "plain"][f"{depth} layers, LR {best:g}"] = curves
    lrs = ", ".join(f"{lr:g}" for lr in sorted(runs["lr"].unique()))
    return panels, (
        f"{stored['train_images']:,} train images of {stored['data']}, {stored['epochs']} epochs, "
        f"{runs['seed'].nunique()} seeds, each network with the best of the learning rates {lrs}; {stored['device']}"
    )


def run_all(dataset: ImageDataset, out: Path, settings: dict, grid: dict) -> dict:
    """Make every run of ``grid`` that ``out`` does not hold yet, and write the file after each; returns its content.

    Raises ConfigError if the images are a stand-in, or ``out`` holds runs with other settings or data.
    """
    about = {**settings, "data": dataset.description, "device": device_name(torch.device("cpu"))}
    stored = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {**about, "runs": []}
    if dataset.is_stand_in or any(stored[name] != about[name] for name in (*settings, "data")):
        raise ConfigError(f"{out} is not for these settings and images, {about}: name CIFAR-10, or move the file away")
    done = [{name: run[name] for name in grid} for run in stored["runs"]]
    small = dataset.subset(settings["train_images"])
    for case in (dict(zip(grid, values)) for values in itertools.product(*grid.values())):
        if case not in done:
            loss, error = training_error(small, **case, epochs=settings["epochs"]).T.round(4).tolist()
            stored["runs"].append({**case, "loss": loss, "error": error, "torch": torch.__version__})
            write_json(out, stored)
            runtime.say(f"{case}: train error {error[-1]:.1f}%")
    return stored


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # for --help
    sys.exit(run_command("experiments.degradation", lambda: run_all(load_dataset(), STORED, SETTINGS, GRID)))
