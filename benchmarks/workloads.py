"""What is measured: each ``Workload`` runs in a process of its own, so that its peak memory is its own too.

Images are random pixels: the time of every workload depends on their number, never on what they show.
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
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import (
    make_reference_loader,
    make_reference_model,
    make_reference_optimizer,
    train_reference_epoch,
)
from models import CustomResNet
from models.packed import pack_small_maps
from utils.config import Config
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.engine import build_model, evaluate, start, train_epoch
from utils.loaders import make_loaders
from utils.runtime import Precision, Session10Error, pick_device, seed_everything, set_threads

MIB = 1 << 20
# Before each pass that counts, by device type. While a process waits for its turn, the memory it has freed goes elsewhere
# (from a virtual machine even back to its host), and the usual way, which frees most of it every step, took three passes to
# settle. A GPU's memory stays with the process.
WARM_UP_PASSES = {"cpu": 3, "cuda": 0, "mps": 0}
MANY_EPOCHS = 1000  # length of the LR cycle, more than are ever measured


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        part: "training" (loader and step), "step" (one ready batch again and again), "evaluation", "augmentation"
            (the train loader alone), or "matmul" (the machine's rate for matrix products).
        name: what the row is called.
        images: how many a pass takes; for "matmul", how many products.
        batch_size: images a batch; for "matmul", the side of the square matrices.
        device: "cpu", "cuda" or "cuda:N".
        reference: the usual way instead of ours.
        padding: of the reference's convolutions, "replicate" or "zeros"; ours pads with zeros.
        precision: "fp32", "bf16" or "fp16"; the reference is fp32.
        packed: lay small maps side by side (models/packed.py).
        native_norm: torch's own batch norm also where cuDNN's would run (on CUDA, in fp32 and fp16).
        tta: evaluate the mirror images too.
        num_workers: loader processes of the reference.
        threads: CPU threads, None for torch's choice.
        compile: ``torch.compile``'s mode, or "off".
        width: channels of the network's first layer.
    """

    part: str
    name: str
    images: int
    batch_size: int
    device: str
    reference: bool = False
    padding: str = "zeros"
    precision: str = "fp32"
    packed: bool = False
    native_norm: bool = False
    tta: bool = False
    num_workers: int = 0
    threads: int | None = None
    compile: str = "off"
    width: int = 64


@dataclass(frozen=True)
class Measurement:
    """One pass: wall time, CPU time of the process and its loader processes, and the peak memory so far.

    ``first_seconds`` is the wall time of the process's first pass, in which torch.compile compiles. Memory is the GPU's
    allocations on CUDA, else the resident memory of the process (loader processes not counted).
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    first_seconds: float


# --- one pass ---------------------------------------------------------------------------------------------------------


def make_pass(workload: Workload) -> Callable[[], object]:
    """Set ``workload`` up; each call of what comes back is one pass over its images."""
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
        train_loader = make_reference_loader(dataset, workload.batch_size, workload.num_workers, device)
    else:
        train_loader, test_loader = make_loaders(dataset, config, device, precision.dtype)
    if workload.part == "augmentation":
        return lambda: _exhaust(train_loader)
    if workload.part == "step":
        images, labels = next(iter(train_loader))
        train_loader = [(images.to(device), labels.to(device))] * len(train_loader)
    if workload.reference:
        model = make_reference_model(workload.padding, workload.width).to(device)
        optimizer = make_reference_optimizer(model)
        return lambda: train_reference_epoch(model, train_loader, optimizer, device)

    seed_everything(config.seed)  # as in a real run: it also lets cuDNN choose the fastest algorithms
    model = build_model(config, len(CIFAR10_CLASSES))
    if workload.packed:
        pack_small_maps(model)
    if workload.native_norm:
        without_cudnn_norm(model)
    state = start(model, config, 1e-5, 1e-4, len(train_loader), precision)
    if workload.part == "evaluation":
        return lambda: evaluate(state.tested_model, test_loader, precision=precision, tta=workload.tta)
    return lambda: train_epoch(state, train_loader)


def random_images(train: int, test: int) -> ImageDataset:
    """So many images of random pixels, labelled at random in ten classes."""
    rng = np.random.default_rng(0)
    halves = [
        (rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, len(CIFAR10_CLASSES), count))
        for count in (train, test)
    ]
    return ImageDataset(*halves[0], *halves[1], CIFAR10_CLASSES, "random", "random pixels")


def _exhaust(loader: Iterable) -> None:
    for _ in loader:
        pass


class _NativeBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x):
        with torch.backends.cudnn.flags(enabled=False):  # the backward pass keeps to what the forward pass chose
            return super().forward(x)


def without_cudnn_norm(model: nn.Module) -> None:
    """Let every batch norm of ``model`` use torch's own kernels, in place. (In bf16 they are used anyway.)"""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _NativeBatchNorm2d


def _make_matmul(workload: Workload) -> Callable[[], object]:
    if torch.backends.cudnn.allow_tf32:  # cuDNN's fp32 convolutions may use TF32, so the yardstick does as well
        torch.set_float32_matmul_precision("high")
    side, device = workload.batch_size, torch.device(workload.device)
    left, right = (torch.randn(side, side, device=device).to(Precision(workload.precision, device).dtype) for _ in "ab")
    product = torch.empty_like(left)

    def multiply():
        for _ in range(workload.images):
            torch.mm(left, right, out=product)

    return multiply


def count_flop(part: str, width: int = 64) -> int:
    """Floating-point operations an image takes in a pass, counted by torch on tensors without data.

    Only convolutions and the linear layer count, a multiply-add as two. Training is three times the forward pass,
    less the first layer's gradient by its input, which nobody needs.
    """
    with torch.device("meta"):
        model, image = CustomResNet(width=width), torch.empty(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        logits = model(image)
        if part in ("training", "step"):
            logits.sum().backward()
    return counter.get_total_flops() // len(image)


# --- a process of its own ---------------------------------------------------------------------------------------------


class RowError(Session10Error):
    """A row could not be measured; the others can."""


class RowCutError(RowError):
    """A row took longer than it was given."""


class Worker:
    """A process that calls functions on ``device``. Use as a context manager; leaving it ends the process.

    Args:
        device: "cpu", "cuda" or "cuda:N", which becomes the process's current GPU.
        threads: CPU threads, None for torch's choice.
    """

    def __init__(self, device: str, threads: int | None = None):
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # one import for all processes
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, device, threads))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc) -> None:
        self._connection.close()  # the process ends by itself when nobody can call it any more
        self._process.join(timeout=0 if exc[0] else 5)
        self._process.kill()
        self._process.join()

    def call(self, function: Callable, *args, timeout: float | None = None):
        """``function(*args)`` there; all three are pickled. After a ``timeout`` (seconds) nothing more can be called.

        Raises:
            RowError: it raised, or the process died.
            RowCutError: it took longer than ``timeout``.
        """
        try:
            self._connection.send((function, args))
            if not self._connection.poll(timeout):
                self._process.kill()
                raise RowCutError(f"cut after {timeout:.0f} s")
            worked, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=5)
            raise RowError(f"its process died (exit code {self._process.exitcode})") from None
        if not worked:
            raise RowError(value)
        return value


def _serve(connection, device: str, threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that calls
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


def measure(
    workloads: list[Workload], repeats: int, done: Callable[[str], None] = lambda what: None
) -> list[list[Measurement] | str]:
    """``repeats`` measurements of each workload; of one that failed, the reason.

    On a CPU they take turns, so that what else the machine does hits all of them. A GPU is rarely shared and its memory is
    small: there one is built, measured and freed before the next.

    Args:
        workloads: all on one device.
        repeats: passes of each that count.
        done: called with a few words after each first pass and each measurement.
    """
    results: list[list[Measurement] | str] = [[] for _ in workloads]
    on_cpu = torch.device(workloads[0].device).type == "cpu"
    everyone = range(len(workloads))
    for group in [everyone] if on_cpu else [[index] for index in everyone]:
        with ExitStack() as stack:
            workers = {}
            for turn in range(repeats + 1):
                for index in group:
                    workload = workloads[index]
                    try:
                        if turn == 0:
                            worker = stack.enter_context(Worker(workload.device, workload.threads))
                            worker.call(prepare, workload)
                            workers[index] = worker
                        elif index in workers:
                            results[index].append(workers[index].call(measure_pass))
                        else:
                            continue
                        done(f"{workload.name}, pass {turn} of {repeats}" if turn else f"{workload.name}, first pass")
                    except RowError as error:
                        workers.pop(index, None)
                        results[index] = str(error)
                        done(f"{workload.name}, failed: {error}")
    return results


# --- called in a worker -----------------------------------------------------------------------------------------------

_workload: Workload
_pass: Callable[[], object]
_first_seconds: float


def prepare(workload: Workload) -> None:
    """Set ``workload`` up and run a first pass."""
    global _workload, _pass, _first_seconds
    _workload, _pass = workload, make_pass(workload)
    _first_seconds = timed(_pass)


def timed(action: Callable[[], object]) -> float:
    """Seconds that ``action`` takes, the GPU's work included."""
    synchronize()
    began = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU, where this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def measure_pass() -> Measurement:
    """Warm up again, then measure one pass of what was prepared."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP_PASSES[torch.device(_workload.device).type]):
        _pass()
    cpu_began = _cpu_seconds()
    seconds = timed(_pass)
    return Measurement(seconds, _cpu_seconds() - cpu_began, peak_bytes(), _first_seconds)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_bytes() -> int:
    """The most memory so far: of the GPU's allocations, or resident in this process where it uses none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def profile_pass(steps: int, rows: int = 20) -> dict:
    """What one pass of what was prepared spends its time on.

    Args:
        steps: how many a pass has.
        rows: of the table.

    Returns:
        ``table`` (text: the operations that take most time), ``ms_per_step`` (without the profiler) and, on a GPU,
        ``gpu_ms_per_step`` (sum of its kernels' times) and ``launches_per_step``.
    """
    on_cuda = torch.device(_workload.device).type == "cuda"
    seconds = timed(_pass)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        timed(_pass)
    events = profiler.key_averages()
    sort_by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    found = {
        "table": events.table(sort_by=sort_by, row_limit=rows, max_name_column_width=60),
        "ms_per_step": 1000 * seconds / steps,
    }
    if on_cuda:
        kernels = [
            event
            for event in events
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        found["gpu_ms_per_step"] = sum(event.self_device_time_total for event in kernels) / 1000 / steps
        found["launches_per_step"] = sum(event.count for event in events if "LaunchKernel" in event.key) / steps
    return found
