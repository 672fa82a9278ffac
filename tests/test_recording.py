"""The recorded step, with a stand-in for the CUDA graph that records a step's operations on a CPU and replays them."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import ghost_norm
from utils import engine
from utils.config import from_profile
from utils.engine import RecordedStep, train_step
from utils.runtime import Precision
from utils.schedule import lrs_for, scheduler

FP32 = Precision("fp32", torch.device("cpu"))
CONFIG = from_profile("full", width=4, ghost_batch=16, epochs=8, peak_epoch=2, decay_at_peak=0.02)
STEPS_PER_EPOCH = 5


class Operations(TorchDispatchMode):
    """Every operation that torch carries out, backward pass and optimizer included."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Names(TorchDispatchMode):
    """The names of the operations that compute or copy something; it holds no result, which would cost copies."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not (function.is_view or name == "_unsafe_view" or "record_function" in name):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class GraphOnCPU:
    """Like ``engine.cuda_graph``: recording leaves the run as it was, and a replay computes on the recorded memory."""

    def __init__(self, state):
        self.state = state
        self.recordings = 0

    def __call__(self, step):
        self.recordings += 1
        kept = [(each, each.clone()) for each in tensors_of(self.state)]
        with Operations() as operations:
            result = step()
        with torch.no_grad():
            for each, before in kept:
                each.copy_(before)

        def replay():
            for function, args, kwargs, recorded in operations.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return torch.no_grad()(replay), result


def tensors_of(state):
    """What a step changes: weights, statistics, Adam's memory, and the loss scale."""
    adam = [each for memory in state.optimizer.state.values() for each in memory.values()]
    scale = [state.scaler._scale, state.scaler._growth_tracker] if state.scaler.is_enabled() else []
    return [*state.model.state_dict().values(), *adam, *scale]


def new_state(is_recorded: bool, scaler: torch.amp.GradScaler | None = None):
    torch.manual_seed(0)
    state = engine.start(engine.build_model(CONFIG, 10), CONFIG, (1e-4, 1e-2), STEPS_PER_EPOCH, FP32)
    lrs = lrs_for(CONFIG, 1e-4, 1e-2, STEPS_PER_EPOCH).astype(np.float32)  # as ``start`` has them on a GPU
    state.scheduler = scheduler(state.optimizer, lrs)
    state.scaler = scaler or state.scaler
    if is_recorded:
        state.step = RecordedStep(is_compiled=True, capture=GraphOnCPU(state))
    return state


def batches(steps: int):
    """Every fifth batch is smaller, as at the end of an epoch."""
    generator = torch.Generator().manual_seed(1)
    for number in range(1, steps + 1):
        count = 20 if number % STEPS_PER_EPOCH == 0 else 32
        images = torch.randn(count, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
        yield images, torch.randint(10, (count,), generator=generator)


def train(state, loader):
    return engine.train_epoch(state, loader)


def assert_same_run(first, second):
    averages = [list(state.average.module.state_dict().values()) for state in (first, second)]
    for one, other in zip([*tensors_of(first), *averages[0]], [*tensors_of(second), *averages[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_forty_steps_with_changing_lr_and_smaller_batches_equal_eager_ones_bit_for_bit():
    eager, recorded = new_state(False), new_state(True)
    metrics = [train(state, list(batches(40))) for state in (eager, recorded)]
    assert metrics[0] == metrics[1]
    assert recorded.step.capture.recordings == 1
    assert_same_run(eager, recorded)


def test_overflows_skip_the_same_steps():
    def batches_with_overflows():
        for number, (images, labels) in enumerate(batches(12)):
            yield images + (float("inf") if number in (1, 7) else 0), labels

    scaled = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2)]
    eager, recorded = new_state(False, scaled[0]), new_state(True, scaled[1])
    for state in (eager, recorded):
        for images, labels in batches_with_overflows():
            (state.step or train_step)(state, images, labels)
            state.scheduler.step()
    assert eager.scaler.get_scale() == 64.0  # halved twice
    assert eager.scaler.state_dict() == recorded.scaler.state_dict()
    assert_same_run(eager, recorded)


def test_a_resumed_run_equals_one_without_interruption():
    whole, first = new_state(True), new_state(True)
    loader = list(batches(20))
    train(whole, loader)
    train(first, loader[:10])
    resumed = new_state(True)
    for name in ("model", "optimizer", "scheduler", "average"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(first, name).state_dict()))
    train(resumed, loader[10:])
    assert_same_run(whole, resumed)


def test_a_checkpoint_holds_python_floats_after_recording():
    state = new_state(True)
    train(state, list(batches(8)))
    group = state.optimizer.state_dict()["param_groups"][0]
    assert state.step.replay is not None
    assert isinstance(group["lr"], float)
    assert not group["capturable"]


@pytest.mark.filterwarnings("ignore:the training step could not be recorded")
def test_a_gpu_that_refuses_the_recording_trains_eagerly():
    eager, refused = new_state(False), new_state(True)

    def refuse(step):  # fails half-way: gradients and the optimizer's settings are left behind
        GraphOnCPU(refused)(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    refused.step.capture = refuse
    metrics = [train(state, list(batches(9))) for state in (eager, refused)]
    assert metrics[0] == metrics[1]
    assert_same_run(eager, refused)


def test_a_refused_recording_is_one_warning_with_the_cause():
    state = new_state(True)

    def refuse(step):  # like torch, in the middle of Adam's step, which then tries to end the recording
        state.optimizer.grad_scale = torch.tensor(2.0)
        try:
            raise RuntimeError("not permitted\nand advice")
        finally:
            raise RuntimeError("a previous error")

    state.step.capture = refuse
    with pytest.warns(UserWarning, match=r"could not be recorded \(not permitted\): training") as warned:
        train(state, list(batches(9)))
    assert len(warned) == 1
    assert not hasattr(state.optimizer, "grad_scale")  # the next step's would be multiplied by it


def test_several_ranks_train_eagerly():
    state = new_state(True)
    state.parallel = state.model
    train(state, list(batches(8)))
    assert state.step.capture.recordings == 0


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_step_that_is_not_finite_is_named(is_recorded):
    state = new_state(is_recorded)
    loader = list(batches(9))
    loader[6][0].fill_(float("nan"))
    with pytest.raises(engine.NonFiniteLossError, match="step 7"):
        train(state, loader)


def test_a_step_takes_fewer_than_225_operations(monkeypatch):
    """Those that are no views, in the form for GPUs: each is at least one launch there."""
    monkeypatch.setattr(ghost_norm, "prefers_small_calls", lambda device: False)
    state = new_state(False)
    images, labels = next(batches(1))
    train_step(state, images, labels)  # makes Adam's memory
    with Names() as operations:
        train_step(state, images, labels)
    assert 150 < len(operations.names) < 200


def test_eager_and_recorded_forms_of_ghost_norm_agree(monkeypatch):
    outputs = []
    for small in (True, False):
        monkeypatch.setattr(ghost_norm, "prefers_small_calls", lambda device, small=small: small)
        state = new_state(False)
        train(state, itertools.islice(batches(3), 3))
        outputs.append([each.clone() for each in state.model.state_dict().values()])
    for one, other in zip(*outputs):  # on most processors to the bit
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
