"""What every module builds on: errors, seeds, device, precision, and files written whole."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
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
MOST_THREADS = 1024  # a larger number is a typing error, and would crash the process


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
        if deterministic:
            # cuBLAS reads this at its first call; without it the linear layer is not reproducible.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)


def rng_states() -> dict:
    """The state of every global generator (for CUDA: of the current GPU) as plain values and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_states(states: dict) -> None:
    """Restore what ``rng_states`` returned; the GPU's state only if there was a GPU then and is one now."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# --- device and precision ---------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device to train on. ``"auto"`` prefers CUDA, then Apple's mps, then the CPU.

    ``"cuda:1"`` also becomes the current GPU, for code that does not name one. A GPU that this torch was not built for is
    not chosen, with a warning.

    Raises:
        ConfigError: torch does not know the device or was not built for it, or this machine does not have it.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        if has["cuda"] and (reason := _why_unusable(torch.device("cuda"))):
            warnings.warn(f"{reason}: computing without it", stacklevel=1)  # one place, so one warning a process
            has["cuda"] = False
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
        return torch.device(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}: choose 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'") from None
    if device.type not in has:
        raise ConfigError(f"device is {name!r}: Session 10 runs on 'cpu', 'cuda' and 'mps'")
    if not has[device.type]:
        raise ConfigError(f"device is {name!r}, but torch sees no such GPU here: use --device cpu, or install a driver")
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise ConfigError(f"device is {name!r}, but this machine has {count} GPU(s), counted from 0")
        torch.cuda.set_device(device)
    if device.type == "cuda" and (reason := _why_unusable(device)):
        raise ConfigError(f"device is {name!r}, but {reason}: choose another GPU, such as a T4, or --device cpu")
    return device


def _why_unusable(gpu: torch.device) -> str | None:
    """Why this torch has no code for ``gpu``; None if it has.

    Code for ``sm_80`` runs on compute capability 8.0 and on later ones of the same generation, ``compute_80`` on all
    later ones.
    """
    capability = torch.cuda.get_device_capability(gpu)
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in torch.cuda.get_arch_list()]
    if not all(built):  # AMD's GPUs have other names
        return None
    for kind, *digits in (match.groups() for match in built):
        major, minor = map(int, digits)
        if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
            return None
    number = ".".join(map(str, capability))
    return f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(gpu)} (compute capability {number})"


def set_threads(count: int) -> None:
    """Compute with ``count`` CPU threads; bit-identical runs need the same number.

    Raises:
        ConfigError: ``count`` is below 1 or above ``MOST_THREADS``.
    """
    if not 1 <= count <= MOST_THREADS:
        raise ConfigError(f"threads is {count}: choose between 1 and {os.cpu_count()}, this machine's cores")
    torch.set_num_threads(count)


# Parameters of glibc's mallopt(3): number and value, in bytes. First the one that some versions refuse.
_MALLOPT = {
    "M_MMAP_THRESHOLD": (-3, 1 << 30),  # only larger blocks live outside the heap, and are returned when freed
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),  # never return free memory at the end of the heap to the kernel
    "M_TOP_PAD": (-2, 256 << 20),  # grow the heap in steps of this size
}


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep the CPU memory it frees, for the next training step.

    By default glibc returns large blocks to the kernel, which must clear every page again in the next step. Measured on
    2 cores with AVX512-BF16: a bf16 step of batch 512 fell from 2.29 s to 1.72 s, with 8% more peak memory. The results
    stay the same.

    Returns:
        False if the C library is not glibc (macOS, Windows, Alpine), or a glibc before 2.35, whose threshold ends at
        32 MiB; nothing is changed there.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(number, value) == 1 for number, value in _MALLOPT.values())  # ends at the first that is refused


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


# --- files ------------------------------------------------------------------------------------------------------------


def remove_parts(folder: Path) -> None:
    """Remove the temporary files of killed processes from ``folder``; no other process may be writing there."""
    with contextlib.suppress(OSError):
        for part in folder.glob(".*.s10part"):
            if part.stem.rpartition(".")[2].isdigit():  # the process that wrote it
                part.unlink()


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace ``path`` in one step: after a crash or on a full disk it holds the old content or the new.

    Args:
        path: the file to write; its folder exists.
        content: its new bytes.
        keep: where the old file goes. A crash may leave it there while ``path`` is missing.

    Raises:
        OSError: it could not be written; ``path`` is as before, the file at ``keep`` may be lost.
    """
    keeps_old = keep is not None and path.exists()
    part = path.with_name(f".{path.name}.{os.getpid()}.s10part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keeps_old:
            os.replace(path, keep)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may be read-only or gone
            if keeps_old and not path.exists():
                os.replace(keep, path)
            part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # flush the renames too, where the system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: dict) -> None:
    """Replace ``path``, like ``write_atomically``, with indented JSON.

    Raises:
        OSError: as ``write_atomically``.
        ValueError: ``content`` holds NaN or an infinite number, which JSON does not know.
    """
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
