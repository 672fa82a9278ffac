"""Several processes that train one run, over gloo on the CPU, take the steps of one."""

import dataclasses
import os
import signal
import socket
from functools import partial

import numpy as np
import pytest
import torch

from tests.small_runs import STEPS, arguments, at_step, exit_code, start_run
from utils.runs.checkpoint import RunFolder
from utils.runs.ranks import Ranks, join_ranks
from utils.runtime import ConfigError

WORLD = 2
FLAGS = "--pad 0 --no-flip --cutout 0 --ghost-batch 0 --train-images 36 --batch-size 10"


def run_ranks(argv, dataset, logs, stopped_at: int | None = None) -> list[int]:
    """train.py in two processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        start_run(argv, dataset, partial(as_torchrun_does, rank, port, stopped_at), log)
        for rank, log in enumerate(logs)
    ]
    try:
        return [exit_code(process) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def as_torchrun_does(rank: int, port: int, stopped_at: int | None):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if stopped_at is not None:
        at_step(stopped_at, lambda: signal.raise_signal(signal.SIGTERM))


def test_two_processes_stopped_and_resumed_end_with_the_weights_of_one(tmp_path, toy):
    # Batch norm sees the rows of each rank by themselves. With one picture under many labels, their statistics are those
    # of the whole batch, and the labels tell whether each row is learned once. The last batch has 6 rows.
    one_picture = dataclasses.replace(toy, train_images=np.repeat(toy.train_images[:1], 60, axis=0))
    logs = [tmp_path / f"log{rank}" for rank in range(WORLD)]
    assert exit_code(start_run(arguments(tmp_path / "one", *FLAGS.split()), one_picture)) == 0
    argv = arguments(tmp_path / "two", "--resume", *FLAGS.split())
    assert run_ranks(argv, one_picture, logs, 2 * STEPS + 2) == [143] * WORLD
    assert run_ranks(argv, one_picture, logs) == [0] * WORLD

    first, second = (log.read_text(encoding="utf-8") for log in logs)
    for words in ("2 processes", "resuming after epoch 2", "done: test accuracy"):
        assert words in first
    assert "epoch" not in second  # only rank 0 prints
    one, two = (RunFolder(tmp_path / name).load() for name in ("one", "two"))
    for name in ("fc.weight", "fc.bias"):  # Adam makes much of the rounding in the convolutions' tiny gradients
        torch.testing.assert_close(two["model"][name], one["model"][name], rtol=0, atol=5e-4)
    np.testing.assert_allclose(two["history"]["train_loss"], one["history"]["train_loss"], rtol=1e-4)
    assert two["history"]["train_size"] == 36


@pytest.mark.parametrize(("batch_size", "images"), [(15, 60), (10, 45)])
def test_batches_that_do_not_divide_by_the_processes_are_refused(batch_size, images):
    with pytest.raises(ConfigError, match=f"batch_size is {batch_size} and there are {images} .* multiples of 2"):
        Ranks(0, WORLD).check_rows(batch_size, images)


def test_a_cluster_that_sets_world_size_gets_a_single_run(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "4")
    assert join_ranks("cpu") == (Ranks(), "cpu")
