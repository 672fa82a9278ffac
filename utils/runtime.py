"""What every module builds on: errors, seeds, device, precision."""

from __future__ import annotations

import os
import platform
import random
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class Session10Error(RuntimeError):
    """An error the user can fix: the message names the value or file, the reason and the fix."""


class ConfigError(Session10Error):
    """A setting that cannot work."""


def say(text: str) -> None:
    """Print a line at once, even when the output goes to a file or a pipe."""
    print(text, flush=True)


# --- seeds ------------------------------------------------------------------------------------------------------------


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


# --- device and precision ---------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device to train on. ``"auto"`` prefers CUDA, then Apple's mps, then the CPU.

    ``"cuda:1"`` also becomes the current GPU. Raises ConfigError if this machine or torch does not have the device.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        if has["cuda"] and (reason := why_unusable(torch.device("cuda"))):
            warnings.warn(f"{reason}: computing without it", stacklevel=1)  # one place: one warning
            has["cuda"] = False
        name = next(kind for kind, is_here in has.items() if is_here)
    try:
        device = torch.device(name)
        if not has.get(device.type):
            raise RuntimeError(f"torch sees no {device.type} here")
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
            if reason := why_unusable(device):
                raise RuntimeError(reason)
    except RuntimeError as error:
        raise ConfigError(
            f"device is {name!r} ({error}): choose one of {', '.join(d for d in has if has[d])}"
        ) from None
    return device


def why_unusable(gpu: torch.device) -> str | None:
    """Why this torch has no code for ``gpu``, such as Kaggle's P100; None if it has.

    Code for ``sm_80`` runs on later GPUs of the same major version, ``compute_80`` on all later ones.
    """
    capability = torch.cuda.get_device_capability(gpu)
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list()]
    if not all(built):  # AMD's GPUs have other names
        return None
    for kind, *digits in (match.groups() for match in built):
        major, minor = map(int, digits)
        if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
            return None
    return f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(gpu)}"


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
    where it more than doubles the speed of the full model; emulated, it would be slower than fp32.

    Raises:
        ConfigError: fp16 on a CPU, where autocast does not support it for training.
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


def device_name(device: torch.device) -> str:
    """A name for logs: the GPU's, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU of {platform.machine()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
    threads = torch.get_num_threads()
    return f"{name} CPU, {threads} thread{'s' if threads > 1 else ''}"


def printable(path: str | os.PathLike) -> str:
    """A path as text that every stream can print, even if its bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")
