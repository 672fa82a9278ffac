"""What a run needs to know of its machine: which features work, why something failed, which versions ran."""

from __future__ import annotations

import contextlib
import platform
import subprocess

import numpy as np
import torch

from utils.runtime import PROJECT_ROOT, ConfigError, Precision, Session10Error, cpu_has

OLDEST_TRITON_GPU = (8, 0)  # compute capability


class OutOfMemoryError(Session10Error):
    """A batch does not fit into the device's memory."""


class LoaderError(Session10Error):
    """A DataLoader worker died."""


class RankError(Session10Error):
    """Another process of a run on several devices ended."""


class CompileError(Session10Error):
    """``torch.compile`` does not work on this machine."""


# --- features ---------------------------------------------------------------------------------------------------------


def check_compile(mode: str, device: torch.device) -> None:
    """Check that ``torch.compile`` supports this device, before time is spent on the run.

    Raises:
        CompileError: Triton, which compiles for GPUs, does not support this one (a T4, for example).
    """
    if mode == "off" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_TRITON_GPU:
        major, minor = capability
        raise CompileError(
            f"compile is {mode!r}, but {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) is "
            "not supported by Triton, which compiles for GPUs: use --compile off"
        )


def packing_pays(precision: Precision) -> bool:
    """True where ``models.packed`` is worth its copies: in bf16 on a CPU with AMX, whose tiles small maps leave empty.

    Measured there: a whole training step is 1.4 times as fast with one thread, 1.55 times with two.
    """
    return precision.name == "bf16" and precision.device.type == "cpu" and cpu_has("amx_bf16", "amx_tile")


# --- failures ---------------------------------------------------------------------------------------------------------

# What torch says when memory runs out: on a GPU, in cuDNN or cuBLAS, on the CPU, in oneDNN, and in shared memory.
_OUT_OF_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine",
    "not enough memory",
    "can't allocate memory",
    "could not create a primitive",
)
_SHARED_MEMORY = ("insufficient shared memory", "unable to allocate shared memory", "Bus error", "unable to mmap")
_DEAD_WORKER = "DataLoader worker (pid"
_DEAD_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")


@contextlib.contextmanager
def explain_failures(batch_size: int | None = None):
    """Turn failures of the machine into errors that name the fix.

    Args:
        batch_size: the one in use; None: the user cannot choose it.

    Raises:
        OutOfMemoryError: the CPU or GPU ran out of memory.
        LoaderError: a DataLoader worker died, or shared memory ran out.
        RankError: gloo or NCCL failed, mostly since another process of the run ended.
        CompileError: ``torch.compile`` found no working C++ compiler or Triton.
        ConfigError: ``deterministic`` came too late for this process.
    """
    try:
        yield
    except Session10Error:
        raise
    except (RuntimeError, MemoryError, ConnectionError, EOFError) as error:
        text = str(error)
        reason = text.splitlines()[0].rstrip(". ") if text else "its connection ended"

        def says(*phrases: str) -> bool:
            return any(phrase in text for phrase in phrases)

        if says(*_SHARED_MEMORY):
            raise LoaderError(
                f"the DataLoader workers ran out of shared memory ({reason}): resume with a smaller --num-workers (0 "
                "needs none), or start anew with --pipeline batched in another --run-dir"
            ) from error
        if isinstance(error, MemoryError) or says(*_OUT_OF_MEMORY):
            if batch_size is None:
                raise OutOfMemoryError("out of memory: free what other programs use, or add --device cpu") from error
            raise OutOfMemoryError(
                f"out of memory with batch_size {batch_size}: start anew with a smaller one, such as "
                f"{max(1, batch_size // 2)}, or free memory that other programs use and resume"
            ) from error
        if says("CUBLAS_WORKSPACE_CONFIG"):  # cuBLAS reads it at its first call in a process
            raise ConfigError(
                "deterministic is True, but this process has used the GPU without it: restart it (in a notebook, the "
                "kernel) and run it again"
            ) from error
        if torch.distributed.is_available() and torch.distributed.is_initialized() and says(*_DEAD_RANK):
            cause = " ... ".join(dict.fromkeys([reason, text.splitlines()[-1].strip()]))  # NCCL's comes last
            raise RankError(
                f"the exchange with another process of this run failed ({cause}), mostly because that one ended: see its "
                "message, if it left one, then start all of them again, with --resume if the run had begun"
            ) from error
        # A tensor on its way from a dying process ends as a broken connection; a BrokenPipeError is our own output's.
        lost_connection = isinstance(error, (ConnectionError, EOFError)) and not isinstance(error, BrokenPipeError)
        if says(_DEAD_WORKER) or lost_connection:
            raise LoaderError(
                f"a DataLoader worker died ({reason}), often for lack of memory or shared memory: resume, and if one "
                "dies again, resume with a smaller --num-workers (0 needs none), or start anew with --pipeline batched "
                "in another --run-dir"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            # In older versions the first line only names the backend.
            reason = " ".join(text.splitlines()[:2]).rstrip(". ")
            raise CompileError(
                f"torch.compile failed ({reason}): use --compile off, or install what it needs here (a C++ compiler "
                "for a CPU, Triton for a GPU)"
            ) from error
        raise


# --- where a result comes from ----------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The versions that a result is quoted with."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def code_commit() -> str:
    """The commit of the running code, with ``+`` appended if Python files differ from it; "unknown" outside git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
