"""What the machine offers: seeds, device, precision, whole files, and the versions a result is quoted with."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PROJECT_ROOT = Path(__file__).resolve().parent.parent
OLDEST_TRITON_GPU = (8, 0)  # compute capability
MOST_THREADS = 1024  # more is a slip of the keyboard, and would abort the process


class Session10Error(RuntimeError):
    """Something that a user can mend: the message names the value or file, the reason and the fix."""


class ConfigError(Session10Error):
    """A setting that cannot work."""


class OutOfMemoryError(Session10Error):
    """A batch does not fit the device's memory; the message names a smaller one."""


class LoaderError(Session10Error):
    """A loader process died; the message says how to do without."""


class RankError(Session10Error):
    """Another process of a run on several devices ended; the message says how to go on."""


class CompileError(Session10Error):
    """``torch.compile`` does not work on this machine; the message says how to do without."""


# --- seeds ------------------------------------------------------------------------------------------------------------


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python's, NumPy's and torch's global generators.

    On CPU the same seed and thread count then give bit-identical runs, at no cost. On CUDA that also takes
    ``deterministic``, which swaps the fastest convolution algorithms for reproducible ones.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
        if deterministic:
            # cuBLAS reads this once, at its first call; without it the linear layer stays nondeterministic.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)


def rng_states() -> dict:
    """Python's, NumPy's and torch's generators as plain values and tensors; of the GPUs, the current one's."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_states(states: dict) -> None:
    """Put ``rng_states()`` back; a GPU's is left out where there is none, now or then."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# --- device and precision ---------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """The device to train on: ``"auto"`` is CUDA where there is one, then Apple's mps, else the CPU.

    ``"cuda:1"`` becomes the current GPU, so that code that names none uses it.

    Raises:
        ConfigError: a device that torch does not know or this machine does not have.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}: choose 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'") from None
    if device.type not in has:
        raise ConfigError(f"device is {name!r}: Session 10 runs on 'cpu', 'cuda' and 'mps'")
    if not has[device.type]:
        raise ConfigError(f"device is {name!r}, but torch sees no such GPU here: use --device cpu, or install a driver")
    if device.type == "cuda":
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device is {name!r}, but this machine has {torch.cuda.device_count()} GPU(s), counted from 0"
            )
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def set_threads(count: int) -> None:
    """Compute with so many CPU threads; bit-identical runs need the same number.

    Raises:
        ConfigError: fewer than one, or more than any machine has.
    """
    if not 1 <= count <= MOST_THREADS:
        raise ConfigError(f"threads is {count}: choose between 1 and {os.cpu_count()}, this machine's cores")
    torch.set_num_threads(count)


# glibc's mallopt(3): the parameters' numbers, and what they are set to, in bytes.
_MALLOPT = {
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),  # free memory at the heap's end that goes back to the kernel: none
    "M_TOP_PAD": (-2, 256 << 20),  # what the heap grows by
    "M_MMAP_THRESHOLD": (-3, 1 << 30),  # blocks from this size on live outside the heap and go back when freed
}


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep what it frees on the CPU, so that the next training step finds it there.

    glibc hands large blocks back to the kernel, which then clears every page of them again in the next step. On 2 cores
    with AVX512-BF16, keeping them took a bf16 step of batch 512 from 2.29 s to 1.72 s. Numbers do not change; the peak
    memory was 8% higher.

    Returns:
        False where the C library is not glibc (macOS, Windows, Alpine) and nothing was done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(number, value) == 1 for number, value in _MALLOPT.values()])


@dataclass(frozen=True)
class Precision:
    """How the forward pass computes: ``name`` is "fp32", "bf16" or "fp16" on ``device``.

    Weights, optimizer state and the loss stay in float32; autocast lowers only the operations that tolerate it.
    """

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self) -> torch.autocast:
        """A context manager for the forward pass; does nothing in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "fp32")

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss so that fp16 gradients do not underflow; a no-op in fp32 and bf16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def pick_precision(name: str, device: torch.device) -> Precision:
    """Resolve ``"auto"``: bf16 where the hardware really computes in it, else fp16 on CUDA and fp32 elsewhere.

    An Ampere or newer GPU has bf16; a T4 claims to but emulates it, so it gets fp16. A CPU has it with AVX512-BF16 or
    AMX, where it more than doubles the speed of the full model; elsewhere bf16 would be emulated and slower than fp32.

    Raises:
        ConfigError: fp16 asked for on a CPU, where autocast to it is not supported for training.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        else:
            name = "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("precision is 'fp16' on a CPU: use 'fp32', or 'bf16' where the processor has it")
    return Precision(name, device)


def check_compile(mode: str, device: torch.device) -> None:
    """Refuse what ``torch.compile`` cannot do on this device before anything is spent on it.

    Raises:
        CompileError: a GPU that Triton, the compiler behind it, has no support for, such as a T4.
    """
    if mode == "off" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_TRITON_GPU:
        major, minor = capability
        raise CompileError(
            f"compile is {mode!r}, but {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) is not "
            "supported by Triton, which compiles for GPUs: use --compile off"
        )


def cpu_has_bf16() -> bool:
    """True where torch lists bf16 matrix instructions (x86; a torch without such a list counts as without them)."""
    return _cpu_has("avx512_bf16", "amx_bf16", "amx_tile")


def packing_pays(precision: Precision) -> bool:
    """True where ``models.packed`` is worth its copies: bf16 on a CPU with AMX, whose tiles small maps leave empty.

    Measured there: 1.4 times the speed of the whole training step with one thread, 1.55 times with two.
    """
    return precision.name == "bf16" and precision.device.type == "cpu" and _cpu_has("amx_bf16", "amx_tile")


def _cpu_has(*flags: str) -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(flag, False) for flag in flags)


def device_name(device: torch.device) -> str:
    """What the device is called, for logs: the GPU's name, or the processor's with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU of {platform.machine()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
    return f"{name} CPU, {torch.get_num_threads()} threads"


# --- failures ---------------------------------------------------------------------------------------------------------

# What torch says when it runs out of memory: on a GPU, in cuDNN or cuBLAS, on the CPU, in oneDNN, and in shared memory.
_OUT_OF_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "not enough memory",
    "can't allocate memory",
    "could not create a primitive",
)
_SHARED_MEMORY = ("insufficient shared memory", "unable to allocate shared memory", "Bus error", "unable to mmap")
_DEAD_WORKER = "DataLoader worker (pid"
_DEAD_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")


@contextlib.contextmanager
def explain_failures(batch_size: int):
    """Within it, running out of memory, losing a loader process and failing to compile raise errors that name the fix.

    Args:
        batch_size: in use when it happens.

    Raises:
        OutOfMemoryError: instead of what torch raises on a CPU or a GPU.
        LoaderError: instead of the DataLoader's RuntimeError.
        RankError: instead of what gloo or NCCL raise when another process of the run is gone.
        CompileError: instead of whatever ``torch.compile`` raises without a working C++ compiler or Triton.
    """
    try:
        yield
    except Session10Error:
        raise
    except (RuntimeError, MemoryError, ConnectionError, EOFError) as error:
        text = str(error)
        reason = text.splitlines()[0].rstrip(". ") if text else "its connection ended"
        if any(phrase in text for phrase in _SHARED_MEMORY):
            raise LoaderError(
                f"the loader processes ran out of shared memory ({reason}): resume with a smaller --num-workers (0 needs "
                "none), or with --pipeline batched"
            ) from error
        if isinstance(error, MemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY):
            raise OutOfMemoryError(
                f"out of memory with batch_size {batch_size}: start anew with a smaller one, such as "
                f"{max(1, batch_size // 2)}, or close what else uses this memory and resume"
            ) from error
        has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        if has_ranks and any(phrase in text for phrase in _DEAD_RANK):
            raise RankError(
                "another process of this run ended, so that this one stops too: start all of them again with --resume"
            ) from error
        # A tensor on its way from a process that dies ends as a broken connection.
        if _DEAD_WORKER in text or (isinstance(error, (ConnectionError, EOFError)) and not _is_output(error)):
            raise LoaderError(
                f"a loader process died ({reason}), often for lack of memory: resume, and if it dies again use a smaller "
                "--num-workers, or --pipeline batched, which needs none"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise CompileError(
                f"torch.compile failed ({reason}): use --compile off, or install what it needs here (a C++ compiler for "
                "a CPU, Triton for a GPU)"
            ) from error
        raise


def _is_output(error: Exception) -> bool:
    """True for the broken pipe of whoever read our output, which says nothing about a loader."""
    return isinstance(error, BrokenPipeError)


def say(text: str) -> None:
    """Print a line at once, also where the output goes to a file or a pipe."""
    print(text, flush=True)


# --- files ------------------------------------------------------------------------------------------------------------


def part_of(path: Path) -> Path:
    """The temporary file that ``write_atomically`` uses for ``path`` in this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.s10part")


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left half written in ``folder``; nobody else may be writing there."""
    with contextlib.suppress(OSError):
        for part in folder.glob(".*.s10part"):
            if part.stem.rpartition(".")[2].isdigit():
                part.unlink()


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace ``path`` by ``content`` in one step that a crash or a full disk cannot split.

    Args:
        path: the file to write; its folder exists.
        content: its new bytes.
        keep: where the file that was there goes, instead of being lost. A crash may leave it there with no ``path``.

    Raises:
        OSError: it could not be written; ``path`` and ``keep`` are as before.
    """
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder may be read-only or gone
            part.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # flush the renames too; Windows and some network drives cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- where a result comes from ----------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The versions a result is quoted with."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def code_commit() -> str:
    """The commit of the code that is running, with ``+`` behind it when files differ; "unknown" outside git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
