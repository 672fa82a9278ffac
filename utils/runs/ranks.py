"""Several processes, one run: ``torchrun --nproc-per-node 2 train.py`` on a machine with two GPUs.

Every rank draws the same order and augmentation and takes its rows of each batch, so the batch does not change.
DistributedDataParallel averages the gradients. Only rank 0 finds the learning rates, tests, saves and prints.

Batch norm normalizes each rank's rows by their own statistics, as one GPU with half the batch would; the running
statistics are rank 0's, sent to all ranks at every step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import runtime
from utils.metrics import Metrics
from utils.runtime import ConfigError

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=2)  # for another rank; NCCL's own 10 minutes are too short for a slow download


@dataclass(frozen=True)
class Ranks:
    """This process's ``rank``, from 0, among ``world`` processes; a single process exchanges nothing."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.is_first:
            runtime.say(text)

    def share(self, value: T) -> T:
        """Rank 0's ``value``, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_then_others(self, action: Callable[[], T]) -> T:
        """``action()`` on rank 0, then on the others, who find what it left, such as a download."""
        found = action() if self.is_first else None
        if self.world > 1:
            dist.barrier()
        return found if self.is_first else action()

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module | None:
        """``model`` with its gradients averaged over all ranks in each backward pass; None for a single process."""
        if self.world == 1:
            return None
        index = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=index, gradient_as_bucket_view=True)

    def weigh(self, criterion: nn.Module) -> nn.Module:
        """``criterion``, a mean over a rank's rows, weighted so that the ranks' average is the mean over all rows."""
        return criterion if self.world == 1 else _RowWeighted(criterion, self.world)

    def total(self, metrics: Metrics) -> Metrics:
        """The metrics over all ranks' images."""
        if self.world == 1:
            return metrics
        parts: list[Metrics | None] = [None] * self.world
        dist.all_gather_object(parts, metrics)
        count = sum(part.count for part in parts)
        loss = sum(part.loss * part.count for part in parts) / count
        return Metrics(loss, sum(part.correct for part in parts), count)


class _RowWeighted(nn.Module):
    def __init__(self, criterion: nn.Module, world: int):
        super().__init__()
        self.criterion = criterion
        self.world = world

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        rows = torch.full((), float(len(labels)), device=logits.device)
        dist.all_reduce(rows)
        return self.criterion(logits, labels) * (self.world * len(labels) / rows)


def join_ranks(device_name: str) -> tuple[Ranks, str]:
    """Join the processes that torchrun started, if it did; returns this process's rank and the device to pick.

    Args:
        device_name: as for ``runtime.pick_device``; with several processes "auto" and "cuda" become this rank's GPU.

    Raises:
        ConfigError: more processes than GPUs, or one GPU for all of them.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or "RANK" not in os.environ:  # some clusters set WORLD_SIZE for every job
        return Ranks(), device_name
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name not in ("cpu", "cuda"):
        raise ConfigError(
            f"device is {device_name!r}, but {world} processes cannot share one: leave it out, or choose 'cpu'"
        )
    if device_name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"nproc-per-node is above {torch.cuda.device_count()}, the number of GPUs here: start as many processes as "
                "there are GPUs, or add --device cpu"
            )
        device_name = f"cuda:{local_rank}"
    backend = "nccl" if device_name.startswith("cuda") else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=LONGEST_WAIT)
    return Ranks(rank, world), device_name


def leave_ranks() -> None:
    """Close the connections to the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
