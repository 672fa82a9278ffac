"""Several processes, one run: ``torchrun --nproc-per-node 2 train.py`` on a machine with two GPUs.

Every rank draws the same batches and takes its rows; DistributedDataParallel averages the gradients. Rank 0 alone finds
the learning rates, tests, saves and prints. Batch norm sees the rows of each rank by themselves.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import runtime
from utils.metrics import Metrics


@dataclass(frozen=True)
class Ranks:
    """This process's ``rank``, from 0, among ``world`` processes; a single one exchanges nothing."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.is_first:
            runtime.say(text)

    def broadcast(self, value):
        """Rank 0's ``value``, on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def rank0_first(self, action: Callable):
        """``action()`` on rank 0, then on the others, who find what it left, such as a download."""
        found = action() if self.is_first else None
        self.broadcast(None)
        return found if self.is_first else action()

    def check_rows(self, batch_size: int, images: int) -> None:
        """Raises ConfigError unless every rank gets as many rows of each batch, the smaller last one included."""
        if batch_size % self.world or images % self.world:
            raise runtime.ConfigError(
                f"batch_size is {batch_size} and there are {images} train images: with {self.world} processes, set "
                f"--batch-size and --train-images to multiples of {self.world}"
            )

    def parallel(self, model: nn.Module) -> nn.Module | None:
        """``model`` with its gradients averaged over all ranks in each backward pass; None for a single process."""
        return DistributedDataParallel(model) if self.world > 1 else None

    def total(self, metrics: Metrics) -> Metrics:
        """The metrics of all ranks together."""
        if self.world == 1:
            return metrics
        parts = [metrics] * self.world
        dist.all_gather_object(parts, metrics)
        mean = sum(part.loss for part in parts) / self.world
        return Metrics(mean, sum(part.correct for part in parts), sum(part.count for part in parts))


def join_ranks(device_name: str) -> tuple[Ranks, str]:
    """Join the processes that torchrun started, if it did; returns this one's place and the name of its device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # clusters set WORLD_SIZE for reasons of their own
        return Ranks(), device_name
    uses_gpu = device_name.startswith("cuda") or (device_name == "auto" and torch.cuda.is_available())
    wait = timedelta(hours=2)  # NCCL's own 10 minutes are too short for a slow download
    dist.init_process_group("nccl" if uses_gpu else "gloo", timeout=wait)
    atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size()), f"cuda:{os.environ['LOCAL_RANK']}" if uses_gpu else "cpu"
