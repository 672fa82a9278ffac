"""What is measured. Each ``Workload`` runs in its own process, so that its peak memory is its own too.

The images are random pixels: the time depends on how many there are, not on what they show.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference
from models import CustomResNet
from models.packed import pack_small_maps
from utils.config import Config
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.engine import build_model, evaluate, start, train_epoch
from utils.loaders import make_loaders
from utils.runtime import Precision, Session10Error, pick_device, seed_everything, set_threads

MIB = 1 << 20
# Before each pass that counts, by device type. While a process waits for its turn, the memory it freed goes to others
# (on a virtual machine even back to the host). The usual way frees most of its memory every step and took three passes
# to settle. A GPU's memory stays with the process.
WARM_UP_PASSES = {"cpu": 3, "cuda": 0, "mps": 0}
MANY_EPOCHS = 1000  # length of the LR cycle: more epochs than are ever measured


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    ``part`` is "training" (loader and step), "step" (the same batch again and again), "evaluation", "augmentation" (the
    train loader alone) or "matmul" (the machine's rate for matrix products).
    """

    part: str
    name: str
    images: int  # per pass; for "matmul", the number of products
    batch_size: int  # for "matmul", the side of the square matrices
    device: str  # "cpu", "cuda" or "cuda:N"
    reference: bool = False  # the usual way instead of ours
    padding: str = "zeros"  # of the reference's convolutions, "replicate" or "zeros"; ours pads with zeros
    precision: str = "fp32"  # "fp32", "bf16" or "fp16"; the reference is fp32
    packed: bool = False  # lay small maps side by side (models/packed.py)
    tta: bool = False  # evaluate the mirror images too
    num_workers: int = 0  # loader processes of the reference
    threads: int | None = None  # CPU threads, None for torch's choice
    compile: str = "off"  # torch.compile's mode
    width: int = 64  # channels of the network's first layer


@dataclass(frozen=True)
class Measurement:
    """One pass.

    ``cpu_seconds`` includes loader processes. ``peak_bytes`` is the peak so far: the GPU's allocations on CUDA, else
    the resident memory of the process without its loader processes. ``first_seconds`` is the process's first pass, in
    which torch.compile compiles.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    first_seconds: float


# --- one pass ---------------------------------------------------------------------------------------------------------


def make_pass(workload: Workload) -> Callable[[], object]:
    """Set ``workload`` up; each call of the result is one pass over its images."""
    if workload.part == "matmul":
        return _make_matmul(workload)
    device = torch.device(workload.device)
    precision = Precision(workload.precision, device)
    config = Config(
        batch_size=workload.batch_size,
        eval_batch_size=workload.batch_size,
        epochs=MANY_EPOCHS,
        compile=workload.compile,
        width=workload.width,
    )
    tested = workload.images if workload.part == "evaluation" else 1  # no second copy where it is not used
    dataset = random_images(workload.images, tested)
    if workload.reference:
        # A pass may be a single batch, with which starting processes must not be counted: an epoch starts them once. In
        # "augmentation" they end with each pass, since only then does the system tell how much CPU time they took.
        keep = workload.part == "training"
        train_loader = reference.make_loader(dataset, workload.batch_size, workload.num_workers, device, keep)
    else:
        train_loader, test_loader = make_loaders(dataset, config, device, precision.dtype)
    if workload.part == "augmentation":
        return lambda: _exhaust(train_loader)
    if workload.part == "step":
        images, labels = next(iter(train_loader))
        train_loader = [(images.to(device), labels.to(device))] * len(train_loader)
    if workload.reference:
        model = reference.make_model(workload.padding, workload.width).to(device)
        optimizer = reference.make_optimizer(model)
        return lambda: reference.train_epoch(model, train_loader, optimizer, device)

    seed_everything(config.seed)  # as in a real run: it also lets cuDNN choose the fastest algorithms
    model = build_model(config, len(CIFAR10_CLASSES))
    if workload.packed:
        pack_small_maps(model)
    state = start(model, config, 1e-5, 1e-4, len(train_loader), precision)
    if workload.part == "evaluation":
        return lambda: evaluate(state.tested_model, test_loader, precision=precision, tta=workload.tta)
    return lambda: train_epoch(state, train_loader)


def random_images(train: int, test: int) -> ImageDataset:
    """Train and test images of random pixels, with random labels of ten classes."""
    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, len(CIFAR10_CLASSES), count)

    return ImageDataset(*split(train), *split(test), CIFAR10_CLASSES, "random", "random pixels")


def _exhaust(loader: Iterable) -> None:
    for _ in loader:
        pass


def _make_matmul(workload: Workload) -> Callable[[], object]:
    if torch.backends.cudnn.allow_tf32:  # cuDNN's fp32 convolutions may use TF32, so the yardstick does as well
        torch.set_float32_matmul_precision("high")
    side, device = workload.batch_size, torch.device(workload.device)
    left, right = torch.randn(2, side, side, device=device).to(Precision(workload.precision, device).dtype)
    product = torch.empty_like(left)

    def multiply():
        for _ in range(workload.images):
            torch.mm(left, right, out=product)

    return multiply


def count_flop(part: str, width: int) -> int:
    """Floating-point operations per image in a pass, counted by torch on tensors without data.

    Only convolutions and the linear layer count; a multiply-add counts as two. Training takes three times the forward
    pass, less the gradient with respect to the images, which nobody needs.
    """
    with torch.device("meta"):
        model, image = CustomResNet(width=width), torch.empty(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        logits = model(image)
        if part in ("training", "step"):
            logits.sum().backward()
    return counter.get_total_flops() // len(image)


# --- a process for each row -------------------------------------------------------------------------------------------


class RowError(Session10Error):
    """A row could not be measured; the others can."""


class Worker:
    """A process that calls functions on ``device``. Use as a context manager; leaving it ends the process.

    Args:
        device: "cpu", "cuda" or "cuda:N", which becomes the process's current GPU.
        threads: CPU threads, None for torch's choice.
    """

    def __init__(self, device: str, threads: int | None):
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # one import for all processes
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, device, threads))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc) -> None:
        self._connection.close()  # ends the process when it next waits for a call
        self._process.join(timeout=0 if exc[0] else 5)
        self._process.kill()
        self._process.join()

    def call(self, function: Callable, *args, timeout: float | None = None):
        """``function(*args)`` in the process; function, arguments and result are pickled.

        Args:
            timeout: seconds after which the process is killed.

        Raises:
            RowError: the function raised, the process died, or the time was up.
        """
        try:
            self._connection.send((function, args))
            if not self._connection.poll(timeout):
                self._process.kill()
                raise RowError(f"cut after {timeout:.0f} s")
            worked, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=5)
            raise RowError(f"its process died (exit code {self._process.exitcode})") from None
        if not worked:
            raise RowError(value)
        return value


def _serve(connection, device: str, threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the calling process
    if sys.platform == "linux":
        set_start_method("fork", force=True)  # the DataLoader's processes: the quickest start, to be fair to it
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            pick_device(device)
            if threads:
                set_threads(threads)
            answer = True, function(*args)
        except Exception as error:
            lines = str(error).strip().splitlines()
            answer = False, f"{type(error).__name__}: {lines[0] if lines else ''}"
        connection.send(answer)


def measure(workloads: list[Workload], repeats: int, done: Callable[[str], None]) -> list[list[Measurement] | str]:
    """``repeats`` measurements of each workload, or the reason why it failed.

    All are on one device. On a CPU they take turns, so that anything else on the machine slows them all alike. A GPU
    is rarely shared and its memory is limited: there each workload is finished, and its memory freed, before the next
    begins. ``done`` is called with a few words after each first pass and each measurement.
    """
    if torch.device(workloads[0].device).type != "cpu" and len(workloads) > 1:
        return [measure([workload], repeats, done)[0] for workload in workloads]
    results: list[list[Measurement] | str] = [[] for _ in workloads]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(workload.device, workload.threads)) for workload in workloads]
        for turn in range(repeats + 1):
            for number, (workload, worker) in enumerate(zip(workloads, workers)):
                if isinstance(results[number], str):
                    continue
                try:
                    if turn == 0:
                        worker.call(prepare, workload)
                        done(f"{workload.name}, first pass")
                    else:
                        results[number].append(worker.call(measure_pass))
                        done(f"{workload.name}, pass {turn} of {repeats}")
                except RowError as error:
                    results[number] = str(error)
                    done(f"{workload.name}, failed: {error}")
    return results


# --- called in a worker -----------------------------------------------------------------------------------------------

_prepared: tuple[Workload, Callable[[], object], float]


def prepare(workload: Workload) -> None:
    """Set ``workload`` up and run a first pass."""
    global _prepared
    run_pass = make_pass(workload)
    _prepared = workload, run_pass, timed(run_pass)


def measure_pass() -> Measurement:
    """Warm up, then measure one pass of the prepared workload."""
    workload, run_pass, first_seconds = _prepared
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP_PASSES[torch.device(workload.device).type]):
        run_pass()
    cpu_began = _cpu_seconds()
    seconds = timed(run_pass)
    return Measurement(seconds, _cpu_seconds() - cpu_began, _peak_bytes(), first_seconds)


def timed(action: Callable[[], object]) -> float:
    """Seconds that ``action`` takes, including the work it gives the GPU."""
    _synchronize()
    began = time.perf_counter()
    action()
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak_bytes() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
