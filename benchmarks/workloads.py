"""What is measured: each ``Workload`` runs in a process of its own, so that its peak memory is its own too.

Images are random pixels: the time of every workload depends on their number, never on what they show.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import make_reference_model, make_reference_optimizer, train_reference_epoch
from models import CustomResNet
from utils.config import Config
from utils.dataset import CIFAR10_CLASSES, ImageDataset
from utils.engine import evaluate, make_criterion, start, train_epoch
from utils.loaders import make_loaders
from utils.runtime import Precision, seed_everything

MIB = 1 << 20
# Before each pass that counts, by device type. While a process waits for its turn, the memory it has freed goes elsewhere
# (from a virtual machine even back to its host), and the usual way, which frees most of it every step, took three passes to
# settle. A GPU's memory stays with the process.
WARM_UP_PASSES = {"cpu": 3, "cuda": 0}
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
        precision: "fp32", "bf16" or "fp16"; the reference is fp32.
        tta: evaluate the mirror images too.
        num_workers: loader processes of the reference.
        threads: CPU threads, None for torch's choice.
        compile: ``torch.compile``'s mode, or "off".
    """

    part: str
    name: str
    images: int
    batch_size: int
    device: str
    reference: bool = False
    precision: str = "fp32"
    tta: bool = False
    num_workers: int = 0
    threads: int | None = None
    compile: str = "off"


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
        pipeline="albumentations" if workload.reference else "batched",
        num_workers=workload.num_workers,
        compile=workload.compile,
    )
    train_loader, test_loader = make_loaders(_random_images(workload), config, device, precision.dtype)
    if workload.part == "augmentation":
        return lambda: _exhaust(train_loader)
    if workload.part == "step":
        images, labels = next(iter(train_loader))
        train_loader = [(images.to(device), labels.to(device))] * len(train_loader)
    if workload.reference:
        model = make_reference_model().to(device)
        optimizer = make_reference_optimizer(model)
        return lambda: train_reference_epoch(model, train_loader, optimizer, device)

    seed_everything(config.seed)  # as in a real run: it also lets cuDNN choose the fastest algorithms
    model = CustomResNet(logit_scale=config.logit_scale)
    state = start(model, config, 1e-5, 1e-4, len(train_loader), precision)
    if workload.part == "evaluation":
        return lambda: evaluate(state.tested_model, test_loader, precision=precision, tta=workload.tta)
    return lambda: train_epoch(
        state.model,
        train_loader,
        state.optimizer,
        state.scheduler,
        make_criterion(config),
        precision=precision,
        scaler=state.scaler,
        ema=state.ema,
        ema_every=config.ema_every,
    )


def _random_images(workload: Workload) -> ImageDataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (workload.images, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, len(CIFAR10_CLASSES), workload.images)
    tested = slice(None if workload.part == "evaluation" else 1)  # a second copy would count as memory in use
    return ImageDataset(images, labels, images[tested], labels[tested], CIFAR10_CLASSES, "random", "random pixels")


def _exhaust(loader: Iterable) -> None:
    for _ in loader:
        pass


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


def count_flop(part: str) -> int:
    """Floating-point operations an image takes in a pass, counted by torch on tensors without data.

    Only convolutions and the linear layer count, a multiply-add as two. Training is three times the forward pass,
    less the first layer's gradient by its input, which nobody needs.
    """
    with torch.device("meta"):
        model, image = CustomResNet(), torch.empty(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        logits = model(image)
        if part in ("training", "step"):
            logits.sum().backward()
    return counter.get_total_flops() // len(image)


# --- in a process of its own --------------------------------------------------------------------------------------------

_workload: Workload
_pass: Callable[[], object]
_first_seconds: float


class Worker:
    """A process that sets ``workload`` up and runs a first pass; ``measure`` warms it up again and measures one pass.

    Use as a context manager.
    """

    def __init__(self, workload: Workload):
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # one import for all processes
        self.workload = workload
        self._pool = ProcessPoolExecutor(1, mp_context=context)

    def __enter__(self) -> Worker:
        self._pool.submit(_prepare, self.workload).result()
        return self

    def __exit__(self, *exc) -> None:
        self._pool.shutdown()

    def measure(self) -> Measurement:
        return self._pool.submit(_measure).result()

    def profile(self, rows: int) -> str:
        """A table of the operations that one pass spends most time in."""
        return self._pool.submit(_profile, rows).result()


def measure(workloads: list[Workload], repeats: int) -> list[list[Measurement]]:
    """``repeats`` measurements of each workload, taken in turns."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(workload)) for workload in workloads]
        rounds = [[worker.measure() for worker in workers] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds)]


def _prepare(workload: Workload) -> None:
    global _workload, _pass, _first_seconds
    if sys.platform == "linux":
        set_start_method("fork", force=True)  # the DataLoader's processes: the quickest start, to be fair to it
    if workload.threads:
        torch.set_num_threads(workload.threads)
    _workload, _pass = workload, make_pass(workload)
    began = time.perf_counter()
    _pass()
    _synchronize()
    _first_seconds = time.perf_counter() - began


def _synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.device(_workload.device).type == "cuda":
        torch.cuda.synchronize()


def _measure() -> Measurement:
    device_type = torch.device(_workload.device).type
    on_cuda = device_type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP_PASSES[device_type]):
        _pass()
    _synchronize()
    cpu_began, began = _cpu_seconds(), time.perf_counter()
    _pass()
    _synchronize()
    seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - cpu_began
    peak = torch.cuda.max_memory_allocated() if on_cuda else _peak_resident_bytes()
    return Measurement(seconds, cpu_seconds, peak, _first_seconds)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def _profile(rows: int) -> str:
    on_cuda = torch.device(_workload.device).type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities) as profiler:
        _pass()
    sort_by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=sort_by, row_limit=rows, max_name_column_width=60)
