"""The baseline: the usual way to train this network, kept as slow as it is usually written.

Albumentations image by image in loader processes, float32, NCHW, Adam one parameter at a time, and a wait for the
device after every step to read the loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from models import CustomResNet
from models.variants import pad_by_replication
from utils.dataset import ImageDataset
from utils.loaders import AlbumentationsDataset
from utils.transforms import train_transform


def make_loader(
    dataset: ImageDataset, batch_size: int, num_workers: int, device: torch.device, keep_workers: bool = False
) -> DataLoader:
    """torch's own loader of augmented (B, 3, 32, 32) float32 images, in NCHW on the CPU, and (B,) int64 labels.

    ``keep_workers``: start the loader processes once instead of in every pass.
    """
    augmented = AlbumentationsDataset(dataset.train_images, dataset.train_labels, train_transform())
    return DataLoader(
        augmented,
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=keep_workers and num_workers > 0,
    )


def make_model(padding: str, width: int) -> CustomResNet:
    """Our network with unscaled logits: the same parameters, the same FLOPs.

    Args:
        padding: of the convolutions: "replicate", as in the original write-up, or "zeros", the common choice.
        width: channels of the first layer.
    """
    model = CustomResNet(logit_scale=1.0, width=width)
    if padding == "replicate":
        pad_by_replication(model)
    return model


def make_optimizer(model: nn.Module) -> Adam:
    """Adam with coupled weight decay, launching a handful of kernels for each parameter."""
    return Adam(model.parameters(), lr=1e-4, weight_decay=1e-4, foreach=False, fused=False)


def train_epoch(model: nn.Module, loader: Iterable, optimizer: Adam, device: torch.device) -> float:
    """One pass over ``loader`` as most tutorials write it; returns the mean of the batches' losses."""
    model.train()
    loss_sum = correct = count = 0
    bar = tqdm(loader, leave=False, unit="batch")
    for images, labels in bar:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        correct += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
        bar.set_postfix(loss=f"{loss_sum / (bar.n + 1):.4f}", accuracy=f"{100 * correct / count:.2f}%")
    return loss_sum / len(loader)
