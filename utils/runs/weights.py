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
from utils import engine
from utils.config import Config
from utils.runs.checkpoint import model_differences
from utils.runtime import ConfigError, Session10Error, write_atomically

WEIGHTS_NAME = "custom_resnet.safetensors"
HEADER_KEY = "session10"
NETWORK_SETTINGS = ("width", "logit_scale", "residual", "conv_padding")  # of Config; the tensors alone do not show them


class WeightsError(Session10Error):
    """A weights file that cannot be used; the message names it, the reason and the fix."""


def rounded_to_half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, with floats rounded to float16."""
    rounded = {}
    for name, value in weights.items():
        value = value.detach().cpu()
        rounded[name] = (value.half() if value.is_floating_point() else value).contiguous()
    return rounded


def save_weights(model: nn.Module, path: str | os.PathLike, metadata: dict) -> None:
    """Write the weights atomically as float16 safetensors, 13 MB, with a checksum in the file's header.

    Args:
        model: its ``state_dict`` is written.
        path: ends in ``.safetensors``.
        metadata: JSON values for the header. ``load_model`` needs ``classes``, a list of names, and those of
            ``NETWORK_SETTINGS`` that differ from the recipe; the rest is free.

    Raises:
        WeightsError: a weight is not finite, or too large for float16.
    """
    half = rounded_to_half(model.state_dict())
    _check_finite(half, path)
    # A single key: safetensors writes several in an order that changes from call to call, and so the file's bytes.
    header = json.dumps({**metadata, "sha256": _digest(half, metadata)}, sort_keys=True)
    write_atomically(Path(path), save(half, metadata={HEADER_KEY: header}))


def load_model(path: str | os.PathLike) -> tuple[CustomResNet, dict]:
    """The network in a weights file, in float32 on the CPU and in eval mode, and the file's metadata.

    Raises:
        WeightsError: the file is missing, damaged, not safetensors, or not of this network.
    """
    path = Path(path)
    weights, metadata = _read(path)
    classes = metadata.get("classes")
    if not (isinstance(classes, list) and len(classes) >= 2 and all(isinstance(name, str) for name in classes)):
        raise WeightsError(
            f"{path} does not name its classes, so this project did not write it: use a file that it wrote"
        )
    try:
        config = Config(**{name: metadata[name] for name in NETWORK_SETTINGS if name in metadata})
        with torch.device("meta"):  # allocates nothing, whatever the width, and draws no random numbers
            model = engine.build_model(config, len(classes))
    except (ConfigError, RuntimeError, OverflowError) as error:
        raise WeightsError(f"{path} describes a network that cannot be built ({error}): get a fresh copy") from error
    differing = model_differences(weights, model)
    if differing:
        raise WeightsError(f"{path} is of {differing}: this project cannot load it")
    for name, expected in model.state_dict().items():
        known = (torch.float16, torch.float32) if expected.is_floating_point() else (expected.dtype,)
        if weights[name].dtype not in known:
            raise WeightsError(
                f"{path} holds {name} as {weights[name].dtype}, but it must be {known[0]}: get a fresh copy"
            )
    if metadata.get("sha256") != _digest(weights, metadata):
        raise WeightsError(f"{path} is damaged: its content does not match its checksum; get a fresh copy")
    _check_finite(weights, path)
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval(), metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A safetensors file's tensors, and what this project wrote into its header (empty if another program wrote it)."""
    if not path.exists():
        raise WeightsError(f"no weights at {path}: train first, or check the path")
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: name the weights file itself, such as {path / WEIGHTS_NAME}")
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}): make it readable for this user") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not a complete safetensors file ({error}): get a fresh copy. Pickled weights (.pt, .pth) are "
            "refused, since they can run code"
        ) from error
    return weights, metadata if isinstance(metadata, dict) else {}


def _check_finite(weights: dict[str, Tensor], path: str | os.PathLike) -> None:
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WeightsError(
                f"{path}: {name} holds values that are not finite in float16 (its largest is 65,504): the run has "
                "diverged, or the file is damaged"
            )


def _digest(weights: dict[str, Tensor], metadata: dict) -> str:
    """SHA-256 of every tensor and of the metadata without the checksum itself."""
    described = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
