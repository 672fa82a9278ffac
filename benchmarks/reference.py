"""The baseline: this network as it is usually trained.

Albumentations image by image in loader processes, float32, NCHW, Adam one parameter at a time, plain batch norm,
unscaled logits, and a wait for the device after every step to read the loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.custom_resnet import CustomResNet


class AlbumentationsDataset(Dataset):
    """``dataset[i]`` is a (3, 32, 32) float32 tensor, newly augmented, and an int label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform):
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(image=self.images[index])["image"], int(self.labels[index])


def make_loader(images: np.ndarray, labels: np.ndarray, transform, batch_size: int, num_workers: int) -> DataLoader:
    """Shuffled batches of (B, 3, 32, 32) float32 images and (B,) int64 labels, on the CPU.

    The loader processes are started once, not in every pass.
    """
    return DataLoader(
        AlbumentationsDataset(images, labels, transform),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def make_model(width: int = 64) -> CustomResNet:
    """The same parameters and the same convolutions, padded with zeros."""
    return CustomResNet(width=width, logit_scale=1.0)


def make_optimizer(model: nn.Module) -> Adam:
    """Adam with coupled weight decay, which launches a handful of kernels for each parameter."""
    return Adam(model.parameters(), lr=1e-4, weight_decay=1e-4, foreach=False, fused=False)


def train_epoch(model: nn.Module, loader: Iterable, optimizer: Adam, device: torch.device) -> None:
    """One pass over ``loader`` as most tutorials write it."""
    model.train()
    correct = count = 0
    bar = tqdm(loader, leave=False, disable=None)
    for images, labels in bar:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        correct += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
        bar.set_description(f"loss {loss.item():.4f}, accuracy {100 * correct / count:.2f}%")


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, device: torch.device) -> float:
    """Accuracy in percent."""
    model.eval()
    correct = sum((model(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in loader)
    return 100 * correct / len(loader.dataset)
