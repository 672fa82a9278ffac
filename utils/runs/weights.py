"""Trained weights to keep or share: safetensors, which cannot hold code, with all that is needed to use them again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models import CustomResNet
from utils.runs.checkpoint import model_differences
from utils.runtime import Session10Error, write_atomically

WEIGHTS_NAME = "custom_resnet.safetensors"
HEADER_KEY = "session10"


class WeightsError(Session10Error):
    """A weights file that cannot be used; the message names it, the reason and the fix."""


def rounded_to_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors rounded to what float16 can hold, on the CPU; others as they are."""
    return {
        name: value.detach().cpu().half() if value.is_floating_point() else value.detach().cpu().clone()
        for name, value in weights.items()
    }


def save_weights(model: nn.Module, path: str | os.PathLike, metadata: dict) -> None:
    """Write the weights as float16 safetensors, 13 MB, atomically, with a checksum in the file's header.

    Args:
        model: its ``state_dict`` is written.
        path: ends in ``.safetensors``.
        metadata: JSON values for the header: ``classes``, a list of names, is needed to load the file again; ``width``,
            ``logit_scale`` and ``residual`` where they are not the recipe's; anything else may be told too.

    Raises:
        WeightsError: a weight is not finite, or too large for float16.
    """
    half = {name: value.contiguous() for name, value in rounded_to_half(model.state_dict()).items()}
    _check_finite(half, path)
    # One key only: safetensors writes several in an order that changes from call to call, and the bytes with it.
    header = json.dumps({**metadata, "sha256": _digest(half)}, sort_keys=True)
    write_atomically(Path(path), save(half, metadata={HEADER_KEY: header}))


def load_model(path: str | os.PathLike) -> tuple[CustomResNet, dict]:
    """The network that a weights file holds, in float32 on the CPU, and the file's metadata.

    Raises:
        WeightsError: the file is missing, damaged, no safetensors, or not of this network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = json.loads((file.metadata() or {}).get(HEADER_KEY, "null"))
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}: train first, or check the path") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}): get a fresh copy. Pickled weights (.pt, .pth) are "
            "refused, since they can run code"
        ) from error
    classes = metadata.get("classes") if isinstance(metadata, dict) else None
    if not (isinstance(classes, list) and len(classes) >= 2 and all(isinstance(name, str) for name in classes)):
        raise WeightsError(f"{path} does not name its classes, so it was not written by this project: use such a file")
    if metadata.get("sha256") != _digest(weights):
        raise WeightsError(f"{path} is damaged: its weights do not match their checksum; get a fresh copy")
    settings = {name: metadata[name] for name in ("width", "logit_scale") if name in metadata}
    try:
        model = CustomResNet(len(classes), **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} describes a network that cannot be built ({error}): get a fresh copy") from error
    differing = model_differences(weights, model)
    if differing:
        raise WeightsError(f"{path} is of {differing}: this project cannot load it")
    for name, value in weights.items():
        if value.is_floating_point() and value.dtype not in (torch.float16, torch.float32):
            raise WeightsError(f"{path} holds {name} as {value.dtype}: float16 and float32 are read")
        if value.is_floating_point() != model.state_dict()[name].is_floating_point():
            raise WeightsError(f"{path} holds {name} as {value.dtype}: that is no weight of this network")
    _check_finite(weights, path)
    model.load_state_dict(weights)
    return model.eval(), metadata


def _check_finite(weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WeightsError(
                f"{path}: {name} holds values that are not finite in float16 (its largest is 65,504): the run has "
                "diverged, or the file is damaged"
            )


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes())
    return digest.hexdigest()
