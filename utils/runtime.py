"""What every module builds on: errors, seeds, device, precision."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if os.name == "posix" and "USER" not in os.environ:  # some containers have no name, for which torch 2.11 asks
    os.environ.setdefault("LOGNAME", str(os.getuid()))

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class Session10Error(RuntimeError):
    """An error the user can fix: the message names the value or file, the reason and the fix."""


class ConfigError(Session10Error):
    """A setting that cannot work."""


def say(text: str) -> None:
    """Print a line at once, even when the output goes to a file or a pipe."""
    print(text, flush=True)


def progress_bar(items: Iterable | None, description: str | None, **options) -> tqdm:
    """A tqdm bar that leaves nothing behind; text in notebooks too, where a saved widget would be an error message.

    There is none without a ``description``, nor in a log, which would keep its every state.
    """
    in_notebook = "ipykernel" in type(sys.stdout).__module__
    if description is None or not (in_notebook or sys.stderr.isatty()):
        options["disable"] = True
    stream = sys.stdout if in_notebook else sys.stderr  # Jupyter shows stderr on red
    return tqdm(items, description, file=stream, leave=False, **options)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed the global generators of Python, NumPy and torch.

    On a CPU, the same seed and number of threads then give bit-identical runs. On CUDA this also needs
    ``deterministic``, which trades the fastest convolution algorithms for reproducible ones.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
        if deterministic:  # cuBLAS reads this at its first call
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)


def pick_device(name: str = "auto") -> torch.device:
    """The device to train on. ``"auto"`` prefers CUDA, then Apple's mps, then the CPU.

    ``"cuda:1"`` also becomes the current GPU. Raises ConfigError if this machine or torch does not have the device.
    """
    here = [kind for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if backend.is_available()]
    for wanted in [*here, "cpu"] if name == "auto" else [name]:
        try:
            device = torch.device(wanted)
            if device.type not in (*here, "cpu"):
                raise RuntimeError(f"torch sees no {device.type} here")
            if device.type == "cuda":
                torch.cuda.set_device(device.index or 0)
            torch.conv2d(*torch.ones(2, 1, 1, 3, 3, device=device))  # torch or cuDNN may lack a GPU's code, as a P100's
            return device
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            if name == "auto":
                warnings.warn(f"{wanted} is there but fails ({reason}): computing without it", stacklevel=1)
    raise ConfigError(f"device is {name!r} ({reason}): choose one of {', '.join([*here, 'cpu'])}")


def set_threads(count: int) -> None:
    """Compute with ``count`` CPU threads, at most one per core; bit-identical runs need the same number."""
    if not 1 <= count <= os.cpu_count():
        raise ConfigError(f"threads is {count}: choose between 1 and {os.cpu_count()}, this machine's cores")
    torch.set_num_threads(count)


@dataclass(frozen=True)
class Precision:
    """The precision of the forward pass on ``device``: ``name`` is "fp32", "bf16" or "fp16".

    Weights, optimizer state and loss stay in float32; autocast lowers only operations that tolerate it.
    """

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self) -> torch.autocast:
        """The context manager for the forward pass; it does nothing in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss so that fp16 gradients do not underflow; it does nothing in fp32 and bf16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def pick_precision(name: str, device: torch.device) -> Precision:
    """Resolve ``"auto"``: bf16 if the hardware computes in it, else fp16 on CUDA and fp32 elsewhere.

    GPUs have bf16 from Ampere on; a T4 claims to, but emulates it, and gets fp16. CPUs have it with AVX512-BF16 or AMX,
    where it more than doubles the speed of the full model; emulated, it would be slower than fp32. Raises ConfigError for
    fp16 on a CPU, where autocast does not support it for training.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and cpu_has("avx512_bf16", "amx_bf16", "amx_tile") else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("precision is 'fp16' on a CPU: use 'fp32', or 'bf16' where the processor has it")
    return Precision(name, device)


def cpu_has(*flags: str) -> bool:
    """True if torch lists any of these instruction sets; older versions of torch list none."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(flag, False) for flag in flags)
