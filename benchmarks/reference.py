"""The baseline: the usual way to train this network, kept as slow as it is usually written.

Albumentations image by image in loader processes, float32, NCHW, convolutions padded by replication, Adam one parameter
at a time, and a wait for the device after every step to read the loss.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam
from tqdm.auto import tqdm

from models import CustomResNet


def make_reference_model() -> CustomResNet:
    """Our network with ``padding_mode="replicate"`` and unscaled logits: the same parameters, the same FLOPs."""
    model = CustomResNet(logit_scale=1.0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "replicate"
    return model


def make_reference_optimizer(model: nn.Module) -> Adam:
    """Adam with coupled weight decay and a handful of kernels for each parameter."""
    return Adam(model.parameters(), lr=1e-4, weight_decay=1e-4, foreach=False, fused=False)


def train_reference_epoch(model: nn.Module, loader: Iterable, optimizer: Adam, device: torch.device) -> float:
    """One pass over ``loader`` as most tutorials write it.

    Args:
        model: the network, on ``device``.
        loader: (B, 3, 32, 32) float32 images and (B,) int64 labels.
        optimizer: updates ``model``.
        device: where the batches go.

    Returns:
        Mean of the batches' losses.
    """
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
