"""Several processes that train one run, over gloo on the CPU: the same steps as one process, and safe if one dies."""

import multiprocessing
import os
import signal
import socket
import sys
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F

import train
from tests.small_runs import TinyNet, arguments, identical, outcome, shrink
from utils import engine
from utils.config import Config, quick
from utils.engine import make_optimizer
from utils.loaders import make_loaders
from utils.runs.checkpoint import decode
from utils.runs.machine import RankError, explain_failures
from utils.runs.ranks import Ranks, join_ranks, leave_ranks
from utils.runtime import ConfigError, Precision

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
WORLD = 2


@pytest.fixture
def start_ranks(tmp_path):
    """Start ``target(rank, *args)`` on two ranks; kills what is left of them after the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__name__, __name__])
    started = []

    def start(target, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path / f"log{len(started)}"
        processes = [context.Process(target=_rank, args=(rank, port, log, target, args)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        started.extend(processes)
        return processes, log

    yield start
    for process in started:
        process.kill()
        process.join()


def _rank(rank: int, port: int, log, target, args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(f"{log}.{rank}", "a", buffering=1)
    torch.set_num_threads(1)
    sys.exit(target(rank, *args))


def said(log, rank: int) -> str:
    with open(f"{log}.{rank}") as file:
        return file.read()


def join(processes) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


# --- a step -----------------------------------------------------------------------------------------------------------


def small_config() -> Config:
    return quick(train_images=None, test_images=None, batch_size=20, epochs=4, peak_epoch=1, ema_every=1)


def new_network(num_classes: int) -> TinyNet:
    torch.manual_seed(0)
    model = TinyNet(num_classes)
    model.dropout.p = 0.0
    return model


def two_steps(rank, dataset, out) -> None:
    """Two Adam steps on two ranks; saves each rank's gradients of the first and weights after the second."""
    config, (ranks, _) = small_config(), join_ranks("cpu")
    loader, _ = make_loaders(dataset, config, CPU, rank=ranks.rank, world=ranks.world)
    model = new_network(10)
    state = engine.start(model, config, 1e-3, 1e-2, len(loader), FP32)
    state.criterion, state.parallel = ranks.weigh(state.criterion), ranks.parallel(model, CPU)
    zero_grad, kept = state.optimizer.zero_grad, []
    state.optimizer.zero_grad = lambda: (kept.append([p.grad.clone() for p in model.parameters()]), zero_grad())
    for images, labels in list(loader)[-2:]:  # in the smaller last batch the ranks have different numbers of rows
        engine.train_step(state, images, labels)
    torch.save({"gradients": kept[0], "weights": [p.detach() for p in model.parameters()]}, f"{out}.{rank}")
    leave_ranks()


def test_two_ranks_take_the_step_of_one_process_whose_batch_norm_sees_the_same_groups(toy, tmp_path, start_ranks):
    dataset = toy.subset(train=55)  # 20 + 20 + 15 images: 8 and 7 rows in the last batch
    processes, log = start_ranks(two_steps, dataset, tmp_path / "out")
    assert join(processes) == [0, 0], said(log, 0) + said(log, 1)
    first, second = (torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(WORLD))
    for name in ("gradients", "weights"):
        assert all(torch.equal(one, other) for one, other in zip(first[name], second[name], strict=True)), name

    config, model = small_config(), new_network(10)
    loader, _ = make_loaders(dataset, config, CPU)
    optimizer, gradients = make_optimizer(model, config, 1e-2), []
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for images, labels in list(loader)[-2:]:
        logits = torch.empty(len(labels), 10)
        for rank in range(WORLD):
            logits[rank::WORLD] = model(images[rank::WORLD])
        F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(first["gradients"], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(first["weights"], model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-3)


# --- a run ------------------------------------------------------------------------------------------------------------


def run_train(rank, dataset, argv, killed_rank=None, after_epoch=None) -> int:
    """train.py on a tiny network; ``killed_rank`` dies once it has trained ``after_epoch`` epochs."""
    shrink(dataset)
    engine.build_model = lambda config, classes: new_network(classes)
    train_epoch, count = engine.train_epoch, 0

    def dying(*args):
        nonlocal count
        if rank == killed_rank and count == after_epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return train_epoch(*args)

    engine.train_epoch = dying
    return train.main(argv)


@pytest.mark.slow
def test_a_run_on_two_ranks_survives_the_death_of_either_and_resumes_bit_for_bit(toy, tmp_path, start_ranks):
    dataset = toy.subset(train=42, test=20)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    processes, log = start_ranks(run_train, dataset, arguments(whole, "--train-images", "42"))
    assert join(processes) == [0, 0], said(log, 0) + said(log, 1)
    assert "done: test accuracy" in said(log, 0)
    assert "2 processes" in said(log, 0)
    assert said(log, 1) == ""  # only rank 0 prints
    assert decode(whole / "checkpoint.pt").record["world"] == WORLD

    argv = arguments(broken, "--train-images", "42", "--resume")
    for killed_rank, after_epoch in ((1, 2), (0, 1)):
        processes, log = start_ranks(run_train, dataset, argv, killed_rank, after_epoch)
        processes[killed_rank].join(120)
        survivor = processes[1 - killed_rank]
        survivor.join(30)  # torchrun would end it; on its own it must notice
        assert survivor.exitcode == 1, said(log, 1 - killed_rank)
        assert "the exchange with another process of this run failed" in said(log, 1 - killed_rank)
        assert len(said(log, 1 - killed_rank).split("Traceback")) == 1
    processes, log = start_ranks(run_train, dataset, argv)
    assert join(processes) == [0, 0], said(log, 0) + said(log, 1)
    assert "resuming after epoch" in said(log, 0)
    assert identical(outcome(whole), outcome(broken))


def run_from_disk(rank, dataset, argv) -> int:
    return train.main(argv)


@pytest.mark.parametrize(
    ("target", "flags", "words"),
    [
        (run_from_disk, ("--data-dir", "/no/such/folder"), "train.py: no folder /no/such/folder: check the path"),
        (run_train, ("--run-dir", __file__), "cannot be used as a run folder"),
    ],
)
def test_an_error_of_the_user_ends_every_rank_without_a_traceback(toy, tmp_path, start_ranks, target, flags, words):
    processes, log = start_ranks(target, toy, arguments(tmp_path / "run", *flags))
    assert join(processes) == [1, 1], said(log, 0) + said(log, 1)
    assert words in said(log, 0)
    assert "the exchange with another process of this run failed" in said(log, 1)
    assert "Traceback" not in said(log, 0) + said(log, 1)


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_one_process_under_torchrun_or_on_a_cluster_is_one_without(monkeypatch, environment):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert join_ranks("auto") == (Ranks(), "auto")
    criterion = torch.nn.CrossEntropyLoss()
    assert Ranks().parallel(new_network(10), CPU) is None
    assert Ranks().weigh(criterion) is criterion
    assert Ranks().share(3) == 3


def test_a_rank_waits_for_a_download_of_an_hour(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    settings = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **more: settings.update(more))
    assert join_ranks("cpu") == (Ranks(1, 2), "cpu")
    assert settings["timeout"] > timedelta(hours=1)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="nproc-per-node is above 2, the number of GPUs here: start as many"):
        join_ranks("auto")


def test_several_processes_on_one_gpu_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="device is 'cuda:0', but 2 processes cannot share one: leave it out"):
        join_ranks("cuda:0")


def test_a_failed_exchange_names_its_cause(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    text = "NCCL error in: NCCLUtils.cpp:77, invalid usage\nLast error:\nDuplicate GPU detected: rank 0 and rank 1"
    words = r"failed \(NCCL error in: .*invalid usage \.\.\. Duplicate GPU detected: rank 0 and rank 1\), mostly"
    with pytest.raises(RankError, match=words), explain_failures(512):
        raise RuntimeError(text)
