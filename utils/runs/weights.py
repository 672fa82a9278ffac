"""Trained weights to keep or share: safetensors, which cannot hold code, with all that is needed to use them again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models import CustomResNet
from utils.runs.files import write_atomically
from utils.runtime import Session10Error

WEIGHTS_NAME = "custom_resnet.safetensors"
HEADER_KEY = "session10"


class WeightsError(Session10Error):
    """Weights that cannot be written or used; the message says why."""


def rounded_to_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, with floats rounded to float16."""
    return {name: (v.half() if v.is_floating_point() else v).cpu().contiguous() for name, v in weights.items()}


def save_weights(model: CustomResNet, path: str | Path, metadata: dict) -> None:
    """Write the weights atomically as float16 safetensors, 13 MB, with a checksum in the file's metadata.

    ``metadata`` holds JSON values: ``classes``, a list of names, and whatever else is useful. Raises WeightsError if a
    weight is not finite, or too large for float16.
    """
    half = rounded_to_half(model.state_dict())
    _check_finite(half)
    network = {"width": model.fc.in_features // 8, "residual": model.layer1.skip, "logit_scale": model.logit_scale}
    metadata = {**metadata, **network}  # the tensors alone do not show all of it
    # A single key: safetensors writes several in an order that changes from call to call, and so the file's bytes.
    header = json.dumps({**metadata, "sha256": _digest(half, metadata)}, sort_keys=True)
    write_atomically(Path(path), save(half, metadata={HEADER_KEY: header}))


def load_model(path: str | Path) -> tuple[CustomResNet, dict]:
    """The network in a weights file, float32 on the CPU in eval mode, and the file's metadata; WeightsError if it is
    missing, damaged, not safetensors, or not of this network.
    """
    if not Path(path).is_file():
        raise WeightsError(f"no weights file {path}: train first, or check the path")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = json.loads((file.metadata() or {})[HEADER_KEY])
        if metadata["sha256"] != _digest(weights, metadata):
            raise WeightsError("its content does not match its checksum")
        _check_finite(weights)
        network = {"width": metadata["width"], "skip": metadata["residual"], "logit_scale": metadata["logit_scale"]}
        with torch.device("meta"):  # allocates nothing, whatever the width, and draws no random numbers
            model = CustomResNet(len(metadata["classes"]), **network)
        model.load_state_dict({n: v.float() if v.is_floating_point() else v for n, v in weights.items()}, assign=True)
    except (SafetensorError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; pickled weights are never loaded"
        raise WeightsError(f"{path} is not an undamaged weights file of this project ({reason})") from error
    return model.eval(), metadata


def _check_finite(weights: dict[str, Tensor]) -> None:
    if bad := [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise WeightsError(f"{bad[0]} is not finite in float16: the run has diverged")


def _digest(weights: dict[str, Tensor], metadata: dict) -> str:
    """SHA-256 of every tensor and of the metadata without the checksum itself."""
    described = json.dumps({name: value for name, value in metadata.items() if name != "sha256"}, sort_keys=True)
    digest = hashlib.sha256(described.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
