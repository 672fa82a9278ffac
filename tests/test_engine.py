"""Training and testing, on networks small enough for every claim to be checked by hand."""

import copy
import math
import platform
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils import engine, runtime
from utils.config import quick
from utils.engine import (
    NonFiniteLossError,
    RunningMetrics,
    TrainState,
    WeightAverage,
    evaluate,
    fit,
    make_criterion,
    make_optimizer,
    predict_batches,
    start,
    table_header,
    train_epoch,
)
from utils.loaders import BatchedLoader, make_loaders
from utils.runtime import (
    CompileError,
    ConfigError,
    Precision,
    explain_failures,
    keep_freed_memory,
    pick_device,
    pick_precision,
    seed_everything,
)
from utils.schedule import one_cycle_lrs
from utils.transforms import normalize

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
LR_MIN, LR_MAX = 1e-3, 1e-2


def tiny_model(seed=0):
    """A stand-in for the network with all that training touches: convolution, batch norm, linear layer."""
    seed_everything(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)
    )


def linear_model():
    """The same in train and eval mode."""
    seed_everything(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def tiny_config(**changes):
    """Four steps an epoch on the toy images, the last of them a partial batch."""
    settings = dict(
        train_images=None, test_images=None, batch_size=16, epochs=4, peak_epoch=1, ema_decay=0.5, ema_every=2
    )
    return quick(**{**settings, **changes})


def train(toy, config=None, model=None, precision=FP32, **options):
    """A whole run; returns its state."""
    config = config or tiny_config()
    train_loader, test_loader = make_loaders(toy, config, CPU)
    state = start(model or tiny_model(config.seed), config, LR_MIN, LR_MAX, len(train_loader), precision)
    fit(state, train_loader, test_loader, config.epochs, **options)
    return state


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def run_train_epoch(model, loader, lr=0.0, criterion=None):
    """One epoch with plain gradient descent at a constant LR."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    criterion = criterion or nn.CrossEntropyLoss()
    return train_epoch(TrainState(model, optimizer, criterion, FP32, FP32.grad_scaler(), scheduler), loader)


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [30, 16, 7, 1])
def test_evaluation_weights_every_image_alike_whatever_the_batches(toy, batch_size):
    model = tiny_model().eval()
    with torch.no_grad():
        logits = model(normalize(torch.from_numpy(toy.test_images)))
    labels = torch.from_numpy(toy.test_labels)
    metrics = evaluate(model, BatchedLoader(toy.test_images, toy.test_labels, batch_size), precision=FP32)
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics.correct == (logits.argmax(1) == labels).sum()
    assert metrics.count == 30
    assert metrics.accuracy == pytest.approx(100 * metrics.correct / 30)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_train_loss_is_the_per_image_mean_without_label_smoothing(toy, smoothing):
    # At LR 0 the network stays what it is, so the epoch's mean can be computed at once; 60 = 16 + 16 + 16 + 12.
    model = linear_model()
    loader = BatchedLoader(toy.train_images, toy.train_labels, 16)
    metrics = run_train_epoch(model, loader, criterion=nn.CrossEntropyLoss(label_smoothing=smoothing))
    logits = model(normalize(torch.from_numpy(toy.train_images)))
    labels = torch.from_numpy(toy.train_labels)
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics.correct == (logits.argmax(1) == labels).sum()
    assert metrics.count == 60
    assert model.training


def test_label_smoothing_is_in_what_is_minimized(toy):
    # The gradient differs although the reported loss does not.
    config = tiny_config(label_smoothing=0.2)
    logits, labels = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    smoothed = -(0.8 * logits.log_softmax(1)[range(8), labels] + 0.2 * logits.log_softmax(1).mean(1)).mean()
    torch.testing.assert_close(make_criterion(config)(logits, labels), smoothed)


def test_running_metrics_remember_the_first_bad_step():
    running = RunningMetrics()
    labels = torch.tensor([0, 1])
    for value in (1.0, 2.0, math.nan, 1.0, math.inf):
        running.update(torch.full((2, 2), value), labels)
    assert running.first_bad_step() == 2


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_runs_in_eval_mode_and_leaves_no_trace(toy, training):
    model = tiny_model().train(training)
    before = copy.deepcopy(model)
    loader = BatchedLoader(toy.test_images, toy.test_labels, 16)
    first, second = (evaluate(model, loader, precision=FP32) for _ in range(2))
    assert first == second
    assert model.training is training
    assert model[1].training is training
    assert_same_weights(model, before)  # batch-norm statistics included
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(logits.requires_grad for logits, _ in predict_batches(model, loader, precision=FP32))


def test_the_mode_is_put_back_after_an_error(toy):
    model = tiny_model().train()
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(1, 5, 32, 32), torch.zeros(1, dtype=torch.int64))], precision=FP32)
    assert model.training


def test_tta_averages_the_logits_of_an_image_and_its_mirror_image(toy):
    model = tiny_model().eval()
    loader = BatchedLoader(toy.test_images, toy.test_labels, 16)
    images, labels = normalize(torch.from_numpy(toy.test_images)), torch.from_numpy(toy.test_labels)
    with torch.no_grad():
        plain, mirrored = model(images), model(images.flip(3))
    logits = torch.cat([logits for logits, _ in predict_batches(model, loader, precision=FP32, tta=True)])
    torch.testing.assert_close(logits, (plain + mirrored) / 2)
    metrics = evaluate(model, loader, precision=FP32, tta=True)
    assert metrics.loss == pytest.approx(F.cross_entropy((plain + mirrored) / 2, labels).item(), rel=1e-5)
    assert metrics.loss != pytest.approx(F.cross_entropy(plain, labels).item(), rel=1e-5)


# --- training -------------------------------------------------------------------------------------------------------


def test_a_few_epochs_learn_the_toy_images(toy):
    history = train(toy, tiny_config(epochs=5)).history
    assert history.test_accuracy[-1] > 30  # three times chance
    assert history.train_loss[-1] < history.train_loss[0]


def test_the_history_has_one_entry_an_epoch_and_every_epoch_a_row(toy, capsys):
    config = tiny_config()
    state = train(toy, config)
    history = state.history
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == table_header()
    assert len(rows) == 1 + config.epochs
    assert history.epochs == config.epochs
    for name in ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds"):
        assert len(getattr(history, name)) == config.epochs
    lrs = one_cycle_lrs(LR_MIN, LR_MAX, config.epochs, config.peak_epoch, 4)
    np.testing.assert_allclose(history.lr, lrs[3::4], rtol=1e-9)  # of the last step of each epoch
    assert (history.train_size, history.test_size) == (60, 30)
    for epoch, row in enumerate(rows[1:]):
        assert row.split()[0] == str(epoch + 1)
        assert f"{history.train_loss[epoch]:.4f}" in row
        assert f"{history.test_accuracy[epoch]:.2f}%" in row


def test_the_lr_moves_with_every_step_from_lr_min_to_lr_min(toy, monkeypatch):
    taken, train_step = [], engine.train_step

    def recording(state, *batch):
        taken.append(state.optimizer.param_groups[0]["lr"])
        return train_step(state, *batch)

    monkeypatch.setattr(engine, "train_step", recording)
    train(toy)
    np.testing.assert_allclose(taken, one_cycle_lrs(LR_MIN, LR_MAX, 4, 1, 4), rtol=1e-9)


def test_the_same_seed_gives_bit_identical_runs_and_another_one_does_not(toy):
    first, second, other = train(toy), train(toy), train(toy, tiny_config(seed=1))
    assert_same_weights(first.model, second.model)
    assert_same_weights(first.tested_model, second.tested_model)
    assert first.history.train_loss == second.history.train_loss
    assert first.history.test_loss == second.history.test_loss
    assert first.history.train_loss != other.history.train_loss


def test_fit_goes_on_where_the_state_stands(toy):
    class StopError(Exception):
        pass

    def stop_after_two(state):
        if state.history.epochs == 2:
            raise StopError

    config = tiny_config()
    loaders = make_loaders(toy, config, CPU)
    state = start(tiny_model(), config, LR_MIN, LR_MAX, 4, FP32)
    with pytest.raises(StopError):
        fit(state, *loaders, config.epochs, after_epoch=stop_after_two)
    fit(state, *make_loaders(toy, config, CPU), config.epochs)
    whole = train(toy, config)
    assert state.history.train_loss == whole.history.train_loss
    assert_same_weights(state.model, whole.model)


def test_a_finished_run_trains_no_further_and_shows_its_table(toy, capsys):
    config = tiny_config()
    state = train(toy, config)
    before, table = copy.deepcopy(state.model), capsys.readouterr().out
    fit(state, *make_loaders(toy, config, CPU), config.epochs)
    assert_same_weights(state.model, before)
    assert capsys.readouterr().out == table


def test_after_epoch_sees_the_state_with_that_epoch_in_its_history(toy):
    seen = []
    state = train(toy, after_epoch=lambda state: seen.append((state, state.history.epochs)))
    assert seen == [(state, epoch) for epoch in (1, 2, 3, 4)]


def test_the_average_of_the_weights_is_the_one_defined(toy, monkeypatch):
    monkeypatch.setattr(engine, "SHORT_RUN", 0)
    config = tiny_config(ema_decay=0.8, ema_every=2)
    loaders = make_loaders(toy, config, CPU)
    model = tiny_model()
    expected = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    state = start(model, config, LR_MIN, LR_MAX, 4, FP32)
    schedule_step, steps = state.scheduler.step, []
    # 8 updates of decay 0.8 ** 2 = 0.64, the first of them less: (1 + t) / (10 + t).
    decays = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17]

    def step():
        schedule_step()
        steps.append(1)
        if len(steps) % 2 == 0:
            decay = decays[len(steps) // 2 - 1]
            for name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * state.model.state_dict()[name]

    state.scheduler.step = step
    fit(state, *loaders, config.epochs)
    assert len(steps) == 16
    assert state.tested_model is not state.model
    averaged = state.tested_model.state_dict()
    for name, value in expected.items():  # weights, and the statistics of batch norm
        torch.testing.assert_close(averaged[name], value, msg=name)
    assert not torch.allclose(averaged["4.weight"], state.model.state_dict()["4.weight"])


def test_the_average_forgets_the_untrained_weights_soon_and_then_keeps_its_decay():
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)  # the untrained weights are 0, the trained ones 1
    average = WeightAverage(model, decay=0.9)
    nn.init.ones_(model.weight)
    seen = []
    for _ in range(200):
        average.update(model, 0)
        seen.append(average.module.weight.item())
    assert seen[0] == pytest.approx(0.9)
    assert seen[1] == pytest.approx(1 - 0.1 * 2 / 11)
    assert seen[-1] == pytest.approx(1)
    nn.init.zeros_(model.weight)
    average.update(model, 0)  # by now the first updates are long over
    assert average.module.weight.item() == pytest.approx(0.9)
    copied = WeightAverage(model, decay=0.9)
    copied.load_state_dict(average.state_dict())
    for each in (average, copied):  # goes on where the other stands
        each.update(model, 0)
        assert each.module.weight.item() == pytest.approx(0.81)


@pytest.mark.parametrize("batch_size", [16, 30])
def test_a_run_of_few_steps_is_not_tested_on_its_untrained_weights(toy, batch_size):
    # 4 steps an epoch, or 2: fewer than ema_every, which would never reach its first update.
    config = tiny_config(batch_size=batch_size, epochs=8, ema_decay=0.9, ema_every=5)
    history = train(toy, config).history
    assert history.train_accuracy[-1] > 50
    assert history.test_accuracy[-1] > history.train_accuracy[-1] - 25
    assert history.test_loss[-1] < 2.0


def test_further_averages_ride_along_and_change_nothing(toy, monkeypatch):
    monkeypatch.setattr(engine, "SHORT_RUN", 0)
    alone, accompanied = train(toy), train(toy, tiny_config(ema_also=(0.9, 0.0)))
    assert_same_weights(alone.tested_model, accompanied.tested_model)
    assert_same_weights(accompanied.averages[2].module, accompanied.model)  # a decay of 0 has no memory
    assert not torch.equal(*(state["4.weight"] for state in (a.module.state_dict() for a in accompanied.averages[:2])))


def test_testing_less_often_changes_nothing_but_the_gaps_in_the_table(toy, capsys):
    often, seldom = train(toy), train(toy, eval_every=3)
    assert_same_weights(often.model, seldom.model)
    tested = seldom.history.test_accuracy
    assert [value is not None for value in tested] == [False, False, True, True]  # the last epoch always
    assert tested[-1] == often.history.test_accuracy[-1]
    assert [row.count("%") for row in capsys.readouterr().out.splitlines()[-4:]] == [1, 1, 2, 2]


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_what_is_tested_is_the_average_where_there_is_one(toy, ema_decay):
    config = tiny_config(ema_decay=ema_decay)
    state = train(toy, config)
    assert (state.tested_model is state.model) == (ema_decay == 0)
    _, test_loader = make_loaders(toy, config, CPU)
    metrics = evaluate(state.tested_model, test_loader, precision=FP32)
    assert state.history.test_loss[-1] == metrics.loss
    assert state.history.test_accuracy[-1] == metrics.accuracy


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def inductor():
    """The compiler behind ``torch.compile``, as if this process had compiled nothing yet, then and after."""
    torch.compiler.reset()
    yield torch._inductor.config
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_network_trains_to_the_same_weights(toy, inductor):
    expected = train(toy, tiny_config(epochs=2))
    compiled = train(toy, tiny_config(epochs=2, compile="default"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled, not merely marked
    for name, value in expected.model.state_dict().items():  # under the same names: weights and checkpoints are as ever
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_without_a_compiler_the_error_says_how_to_do_without(toy, inductor, monkeypatch):
    monkeypatch.setattr(inductor.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with (
        pytest.raises(CompileError, match=r"torch\.compile failed \(.*C\+\+ compiler.*\): use --compile off"),
        explain_failures(1),
    ):
        train(toy, tiny_config(compile="default"))


def test_a_gpu_that_triton_does_not_know_is_told_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(CompileError, match=r"compile is 'default', but Tesla T4 .*7\.5.*: use --compile off"):
        runtime.check_compile("default", torch.device("cuda"))
    runtime.check_compile("off", torch.device("cuda"))
    runtime.check_compile("default", CPU)


# --- a loss that is not finite --------------------------------------------------------------------------------------


class PoisonedLoader:
    """The loader of another, with NaN for the images of one step of one epoch (both counted from 0)."""

    def __init__(self, loader, epoch, step):
        self.loader, self.bad_epoch, self.bad_step, self.epoch = loader, epoch, step, 0

    def __iter__(self):
        for step, (images, labels) in enumerate(self.loader):
            bad = self.epoch == self.bad_epoch and step == self.bad_step
            yield (images * math.nan if bad else images), labels


def test_a_loss_that_is_not_finite_stops_with_step_lr_and_hint_and_keeps_the_history(toy):
    config = tiny_config()
    train_loader, test_loader = make_loaders(toy, config, CPU)
    state = start(tiny_model(), config, LR_MIN, LR_MAX, 4, FP32)
    with pytest.raises(NonFiniteLossError) as error:
        fit(state, PoisonedLoader(train_loader, epoch=2, step=1), test_loader, config.epochs)
    lr = one_cycle_lrs(LR_MIN, LR_MAX, config.epochs, config.peak_epoch, 4)[2 * 4 + 1]
    expected = f"epoch 3/4: the loss is not finite at step 2, where the LR was {lr:.2e}: lower lr_max"
    assert str(error.value).startswith(expected)
    assert "NaN" in str(error.value)
    assert state.history.epochs == 2
    assert np.isfinite(state.history.train_loss).all()


def test_the_progress_bar_notices_a_loss_that_is_not_finite_before_the_epoch_ends(toy, monkeypatch):
    monkeypatch.setattr(engine, "BAR_SECONDS", -1.0)  # read at every step
    config = tiny_config()
    train_loader, test_loader = make_loaders(toy, config, CPU)
    state = start(tiny_model(), config, LR_MIN, LR_MAX, 4, FP32)
    with pytest.raises(NonFiniteLossError, match="at step 1, where"):
        fit(state, PoisonedLoader(train_loader, epoch=0, step=0), test_loader, config.epochs)
    assert state.scheduler.last_epoch == 1  # one step was taken, not four


# --- no waiting for the device --------------------------------------------------------------------------------------


def test_the_loop_exchanges_no_value_with_the_device_at_every_step(toy, monkeypatch):
    # Reading a tensor and making one from Python values both wait for a GPU; here their calls are counted.
    monkeypatch.setattr(engine, "BAR_SECONDS", math.inf)
    calls = []

    def count(owner, name):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        count(torch.Tensor, name)
    for name in ("tensor", "as_tensor", "from_numpy"):
        count(torch, name)

    def calls_of_an_epoch(batch_size):
        config = tiny_config(batch_size=batch_size, ema_every=1)
        train_loader, _ = make_loaders(toy, config, CPU)
        state = start(tiny_model(), config, LR_MIN, LR_MAX, len(train_loader), FP32)
        calls.clear()
        train_epoch(state, train_loader)
        return sorted(calls)

    calls_of_an_epoch(30)  # what is made once a device is made here
    few, many = calls_of_an_epoch(30), calls_of_an_epoch(2)  # 2 steps, 30 steps
    assert few == many
    assert few  # the metrics, at the end


# --- optimizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr_max", [0.01, 0.5])
def test_weight_decay_at_the_peak_is_the_setting_and_is_decoupled(lr_max):
    model = linear_model()
    optimizer = make_optimizer(model, tiny_config(decay_at_peak=2e-3), lr_max)
    before = model[1].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # without a gradient only the decay moves the weights
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before * (1 - 2e-3))


def test_batch_norm_and_biases_can_be_left_out_of_the_decay():
    model = tiny_model()
    optimizer = make_optimizer(model, tiny_config(decay_at_peak=2e-3, decay_norm_and_bias=False), 0.01)
    nn.init.ones_(model[4].bias)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[4].weight, before[4].weight * (1 - 2e-3))
    for kept, old in ((model[4].bias, before[4].bias), (model[1].weight, before[1].weight)):
        assert torch.equal(kept, old)


def test_coupled_decay_is_an_l2_penalty_that_adam_rescales():
    model = linear_model()
    optimizer = make_optimizer(model, tiny_config(coupled_decay=1e-4), 0.01)
    before = model[1].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # Adam's first step has the size of the LR whatever the gradient's
    torch.testing.assert_close((before - model[1].weight.detach()).abs().median().item(), 0.01, rtol=0.05, atol=0)


def test_without_a_peak_there_is_no_weight_decay():
    (group,) = make_optimizer(linear_model(), tiny_config()).param_groups
    assert group["weight_decay"] == 0


def test_the_optimizer_is_adam_with_the_configured_settings():
    (group,) = make_optimizer(linear_model(), tiny_config(beta1=0.8, beta2=0.95, eps=1e-6), 0.01).param_groups
    assert group["betas"] == (0.8, 0.95)
    assert group["eps"] == 1e-6


@pytest.mark.parametrize("cycle_beta1", [False, True])
def test_beta1_cycles_only_when_the_config_says_so(toy, cycle_beta1):
    state = start(tiny_model(), tiny_config(cycle_beta1=cycle_beta1), LR_MIN, LR_MAX, 4, FP32)
    assert state.optimizer.param_groups[0]["betas"] == (0.95 if cycle_beta1 else 0.9, 0.99)


# --- device and precision -------------------------------------------------------------------------------------------


def test_bf16_autocast_keeps_weights_and_metrics_in_float32(toy):
    state = train(toy, precision=Precision("bf16", CPU))
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())
    assert state.history.test_accuracy[-1] > 30
    logits, _ = next(
        predict_batches(state.model, make_loaders(toy, tiny_config(), CPU)[1], precision=Precision("bf16", CPU))
    )
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())  # computed in bf16


@pytest.mark.parametrize(
    ("name", "device", "capability", "flags", "expected"),
    [
        ("auto", "cuda", (9, 0), {}, "bf16"),
        ("auto", "cuda", (8, 0), {}, "bf16"),
        ("auto", "cuda", (7, 5), {}, "fp16"),  # T4: claims bf16, and emulates it
        ("auto", "cpu", None, {"avx512_bf16": True}, "bf16"),
        ("auto", "cpu", None, {"amx_bf16": True}, "bf16"),
        ("auto", "cpu", None, {"avx512_bf16": False, "avx2": True}, "fp32"),
        ("auto", "cpu", None, {}, "fp32"),
        ("fp32", "cuda", (9, 0), {}, "fp32"),
        ("fp16", "cuda", (9, 0), {}, "fp16"),
        ("bf16", "cpu", None, {}, "bf16"),
    ],
)
def test_auto_precision_is_what_the_hardware_really_computes_in(monkeypatch, name, device, capability, flags, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    precision = pick_precision(name, torch.device(device))
    assert precision.name == expected
    assert precision.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[expected]


def test_a_torch_that_lists_no_cpu_capabilities_means_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_precision("auto", CPU).name == "fp32"


def test_fp16_on_a_cpu_is_refused_with_the_alternatives():
    with pytest.raises(ConfigError, match="precision is 'fp16' on a CPU: use 'fp32', or 'bf16' where"):
        pick_precision("fp16", CPU)


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_automatic_device_is_the_gpu_where_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto").type == expected
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("gpu", 1, "device is 'gpu': choose 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
        ("", 1, "device is '': choose 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
        ("meta", 1, "device is 'meta': Session 10 runs on 'cpu', 'cuda' and 'mps'"),
        ("cuda", 0, "device is 'cuda', but torch sees no such GPU here: use --device cpu, or install a driver"),
        ("mps", 0, "device is 'mps', but torch sees no such GPU here"),
        ("cuda:2", 2, "device is 'cuda:2', but this machine has 2 GPU(s), counted from 0"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_the_alternatives(monkeypatch, name, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=re.escape(message)):
        pick_device(name)


def test_a_numbered_gpu_that_is_there_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]  # for code that names none, such as the generators' states


def test_an_apple_gpu_is_taken_where_there_is_no_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = pick_device("auto")
    assert device.type == "mps"
    assert pick_precision("auto", device).name == "fp32"
    assert pick_precision("fp16", device).name == "fp16"


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_a_number_of_threads_that_no_machine_has_is_refused(count):
    with pytest.raises(ConfigError, match=f"threads is {count}: choose between 1 and"):
        runtime.set_threads(count)


KEPT_MEMORY = """
import resource, torch
from utils.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12 << 20)  # 48 MiB, freed at once; below 32 MiB glibc soon learns to keep them by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept_for_the_next_step():
    done = subprocess.run(
        [sys.executable, "-c", KEPT_MEMORY], cwd=runtime.PROJECT_ROOT, capture_output=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before > 20 * 1000  # pages that the kernel hands out again, each cleared
    assert after < before / 10


def test_elsewhere_memory_is_left_alone(monkeypatch):
    keep_freed_memory.cache_clear()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
    keep_freed_memory.cache_clear()


def test_seeding_repeats_every_global_generator():
    def draw():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_a_result_can_be_quoted_with_its_circumstances(monkeypatch):
    versions = runtime.versions()
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__
    assert f"{torch.get_num_threads()} threads" in runtime.device_name(CPU)
