"""Training and testing, on networks so small that every claim can be checked directly."""

import copy
import math
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils import engine
from utils.config import quick
from utils.engine import (
    NonFiniteLossError,
    TrainState,
    WeightAverage,
    evaluate,
    fit,
    make_criterion,
    make_optimizer,
    predict_batches,
    start,
    train_epoch,
)
from utils.loaders import BatchedLoader, make_loaders
from utils.metrics import RunningMetrics, table_header
from utils.runs.machine import CompileError, explain_failures
from utils.runtime import Precision, seed_everything
from utils.schedule import one_cycle_lrs
from utils.transforms import normalize

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
LR_MIN, LR_MAX = 1e-3, 1e-2


class TinyModel(nn.Sequential):
    """Convolution, batch norm and linear layer, like the real network."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 5, stride=4, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10)
        )

    def forward(self, x):  # of its own: torch.compile may skip what is all torch's own
        return super().forward(x)


def tiny_model(seed=0):
    seed_everything(seed)
    return TinyModel()


def linear_model():
    """Behaves the same in train and eval mode."""
    seed_everything(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def tiny_config(**changes):
    """Four steps an epoch on the toy images, the last of them a partial batch."""
    settings = dict(
        train_images=None, test_images=None, batch_size=16, epochs=4, peak_epoch=1, ema_decay=0.5, ema_every=2
    )
    return quick(**{**settings, **changes})


def begin(toy, config, precision=FP32):
    """The state and the two loaders of a new run."""
    loaders = make_loaders(toy, config, CPU)
    return start(tiny_model(config.seed), config, LR_MIN, LR_MAX, len(loaders[0]), precision), *loaders


def train(toy, config=None, precision=FP32, **options):
    """A whole run; returns its state."""
    config = config or tiny_config()
    state, *loaders = begin(toy, config, precision)
    fit(state, *loaders, config.epochs, **options)
    return state


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def logits_and_labels(model, images, labels):
    """Of a whole split at once, in the model's current mode, as float32."""
    with torch.no_grad():
        return model(normalize(torch.from_numpy(images))), torch.from_numpy(labels)


def assert_metrics_of(metrics, logits, labels):
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics.correct == (logits.argmax(1) == labels).sum()
    assert metrics.count == len(labels)
    assert metrics.accuracy == pytest.approx(100 * metrics.correct / len(labels))


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [30, 16, 7, 1])
def test_evaluation_weights_every_image_alike_for_any_batch_size(toy, batch_size):
    model = tiny_model().eval()
    metrics = evaluate(model, BatchedLoader(toy.test_images, toy.test_labels, batch_size), precision=FP32)
    assert_metrics_of(metrics, *logits_and_labels(model, toy.test_images, toy.test_labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_train_loss_is_the_per_image_mean_without_label_smoothing(toy, smoothing):
    # At LR 0 the network does not change, so the mean over the epoch can be computed at once; 60 = 16 + 16 + 16 + 12.
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    state = TrainState(model, optimizer, criterion, FP32, FP32.grad_scaler(), scheduler)
    metrics = train_epoch(state, BatchedLoader(toy.train_images, toy.train_labels, 16))
    assert model.training
    assert_metrics_of(metrics, *logits_and_labels(model, toy.train_images, toy.train_labels))


def test_label_smoothing_is_part_of_the_minimized_loss():
    config = tiny_config(label_smoothing=0.2)
    logits, labels = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    smoothed = -(0.8 * logits.log_softmax(1)[range(8), labels] + 0.2 * logits.log_softmax(1).mean(1)).mean()
    torch.testing.assert_close(make_criterion(config)(logits, labels), smoothed)


def test_running_metrics_find_the_first_bad_step():
    running = RunningMetrics()
    labels = torch.tensor([0, 1])
    for value in (1.0, 2.0, math.nan, 1.0, math.inf):
        running.update(torch.full((2, 2), value), labels)
    assert running.first_bad_step() == 2


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_runs_in_eval_mode_and_changes_nothing(toy, training):
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


def test_the_mode_is_restored_after_an_error():
    model = tiny_model().train()
    with pytest.raises(RuntimeError):
        evaluate(model, [(torch.zeros(1, 5, 32, 32), torch.zeros(1, dtype=torch.int64))], precision=FP32)
    assert model.training


def test_tta_averages_the_logits_of_an_image_and_its_mirror_image(toy):
    model = tiny_model().eval()
    loader = BatchedLoader(toy.test_images, toy.test_labels, 16)
    plain, labels = logits_and_labels(model, toy.test_images, toy.test_labels)
    mirrored, _ = logits_and_labels(model, toy.test_images[:, :, ::-1].copy(), toy.test_labels)
    logits = torch.cat([logits for logits, _ in predict_batches(model, loader, precision=FP32, tta=True)])
    torch.testing.assert_close(logits, (plain + mirrored) / 2)
    assert not torch.allclose(logits, plain)
    assert_metrics_of(evaluate(model, loader, precision=FP32, tta=True), logits, labels)


# --- training -------------------------------------------------------------------------------------------------------


def test_every_epoch_has_an_entry_in_the_history_and_a_row(toy, capsys):
    config = tiny_config()
    state = train(toy, config)
    history = state.history
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == table_header()
    assert len(rows) == 1 + config.epochs
    lists = [value for value in history.to_dict().values() if isinstance(value, list)]
    assert [len(each) for each in lists] == [history.epochs] * 6 == [config.epochs] * 6
    lrs = one_cycle_lrs(LR_MIN, LR_MAX, config.epochs, config.peak_epoch, 4)
    np.testing.assert_allclose(history.lr, lrs[3::4], rtol=1e-9)  # of the last step of each epoch
    assert (history.train_size, history.test_size) == (60, 30)
    for epoch, row in enumerate(rows[1:]):
        assert row.split()[0] == str(epoch + 1)
        assert f"{history.train_loss[epoch]:.4f}" in row
        assert f"{history.test_accuracy[epoch]:.2f}%" in row


def test_every_step_has_its_lr_of_the_cycle(toy, monkeypatch):
    taken, train_step = [], engine.train_step

    def recording(state, *batch):
        taken.append(state.optimizer.param_groups[0]["lr"])
        return train_step(state, *batch)

    monkeypatch.setattr(engine, "train_step", recording)
    train(toy)
    np.testing.assert_allclose(taken, one_cycle_lrs(LR_MIN, LR_MAX, 4, 1, 4), rtol=1e-9)


def test_only_the_same_seed_gives_bit_identical_runs(toy):
    first, second, other = train(toy), train(toy), train(toy, tiny_config(seed=1))
    assert_same_weights(first.model, second.model)
    assert_same_weights(first.tested_model, second.tested_model)
    assert first.history.train_loss == second.history.train_loss
    assert first.history.test_loss == second.history.test_loss
    assert first.history.train_loss != other.history.train_loss


def test_fit_continues_from_the_state(toy):
    class StopError(Exception):
        pass

    def stop_after_two(state):
        if state.history.epochs == 2:
            raise StopError

    config = tiny_config()
    state, *loaders = begin(toy, config)
    with pytest.raises(StopError):
        fit(state, *loaders, config.epochs, after_epoch=stop_after_two)
    _, *new_loaders = begin(toy, config)
    fit(state, *new_loaders, config.epochs)
    whole = train(toy, config)
    assert state.history.train_loss == whole.history.train_loss
    assert_same_weights(state.model, whole.model)


def test_a_finished_run_only_shows_its_table(toy, capsys):
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


def test_the_weight_average_follows_its_definition(toy, monkeypatch):
    monkeypatch.setattr(engine, "SHORT_RUN", 0)
    config = tiny_config(ema_decay=0.8, ema_every=2)
    state, *loaders = begin(toy, config)
    weights = state.model.state_dict()
    expected = {name: value.clone() for name, value in weights.items() if value.is_floating_point()}
    schedule_step, steps = state.scheduler.step, []
    decays = [(1 + t) / (10 + t) for t in range(8)]  # all below 0.8 ** 2

    def step():
        schedule_step()
        steps.append(1)
        if len(steps) % 2 == 0:
            decay = decays[len(steps) // 2 - 1]
            for name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * weights[name]

    state.scheduler.step = step
    fit(state, *loaders, config.epochs)
    assert len(steps) == 16
    assert state.tested_model is not state.model
    averaged = state.tested_model.state_dict()
    for name, value in expected.items():  # weights, and the statistics of batch norm
        torch.testing.assert_close(averaged[name], value, msg=name)
    assert not torch.allclose(averaged["4.weight"], weights["4.weight"])


def test_the_average_soon_forgets_the_untrained_weights_and_then_keeps_its_decay():
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
    average.update(model, 0)
    assert average.module.weight.item() == pytest.approx(0.9)
    copied = WeightAverage(model, decay=0.9)
    copied.load_state_dict(average.state_dict())
    for each in (average, copied):  # the copy continues from the same state
        each.update(model, 0)
        assert each.module.weight.item() == pytest.approx(0.81)


@pytest.mark.parametrize("short_run", [0, 200])
@pytest.mark.parametrize("batch_size", [16, 30])
def test_a_run_of_few_steps_is_not_tested_on_its_untrained_weights(toy, batch_size, short_run, monkeypatch):
    # 4 steps an epoch, or 2: fewer than ema_every, which would never reach its first update.
    monkeypatch.setattr(engine, "SHORT_RUN", short_run)
    config = tiny_config(batch_size=batch_size, epochs=8, ema_decay=0.9, ema_every=5)
    history = train(toy, config).history
    assert history.train_accuracy[-1] > 50
    assert history.test_accuracy[-1] > history.train_accuracy[-1] - 25
    assert history.test_loss[-1] < 2.0


def test_further_averages_change_nothing(toy, monkeypatch):
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
def test_the_average_is_tested_if_there_is_one(toy, ema_decay):
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
    """The configuration of the compiler behind ``torch.compile``, with nothing compiled before or after."""
    torch.compiler.reset()
    yield torch._inductor.config
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_network_trains_to_the_same_weights(toy, inductor):
    expected = train(toy, tiny_config(epochs=2))
    compiled = train(toy, tiny_config(epochs=2, compile="default"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it really was compiled
    for name, value in expected.model.state_dict().items():  # under the same names
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_error_without_a_compiler_names_the_fix(toy, inductor):
    with (
        inductor.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}),
        pytest.raises(CompileError, match=r"torch\.compile failed \(.*C\+\+ compiler.*\): use --compile off"),
        explain_failures(1),
    ):
        train(toy, tiny_config(compile="default"))


# --- a loss that is not finite --------------------------------------------------------------------------------------


class PoisonedLoader:
    """Wraps a loader; the images of one step of one epoch (both counted from 0) are NaN."""

    def __init__(self, loader, epoch, step):
        self.loader, self.bad_epoch, self.bad_step, self.epoch = loader, epoch, step, 0

    def __iter__(self):
        for step, (images, labels) in enumerate(self.loader):
            bad = self.epoch == self.bad_epoch and step == self.bad_step
            yield (images * math.nan if bad else images), labels


@pytest.fixture
def poisoned(toy):
    """``poisoned(epoch, step)``: a state, and ``fit`` for it on images that are NaN at that step."""

    def poisoned(epoch, step):
        config = tiny_config()
        state, train_loader, test_loader = begin(toy, config)
        return state, partial(fit, state, PoisonedLoader(train_loader, epoch, step), test_loader, config.epochs)

    return poisoned


def test_a_loss_that_is_not_finite_stops_with_step_lr_and_hint_and_keeps_the_history(poisoned):
    state, fit_state = poisoned(epoch=2, step=1)
    lr = one_cycle_lrs(LR_MIN, LR_MAX, 4, 1, 4)[2 * 4 + 1]
    message = f"epoch 3/4: the loss is not finite at step 2, where the LR was {lr:.2e}: lower lr_max"
    with pytest.raises(NonFiniteLossError, match=f"^{re.escape(message)} .*NaN"):
        fit_state()
    assert state.history.epochs == 2
    assert np.isfinite(state.history.train_loss).all()


def test_the_progress_bar_notices_a_loss_that_is_not_finite_before_the_epoch_ends(poisoned, monkeypatch):
    monkeypatch.setattr(engine, "BAR_SECONDS", -1.0)  # read at every step
    state, fit_state = poisoned(epoch=0, step=0)
    with pytest.raises(NonFiniteLossError, match="at step 1, where"):
        fit_state()
    assert state.scheduler.last_epoch == 1  # one step was taken, not four


# --- no waiting for the device --------------------------------------------------------------------------------------


def test_a_step_exchanges_no_values_with_the_device(toy, monkeypatch):
    # Both reading a tensor and making one from Python values wait for a GPU; their calls are counted here.
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
        state, train_loader, _ = begin(toy, config)
        calls.clear()
        train_epoch(state, train_loader)
        return sorted(calls)

    calls_of_an_epoch(30)  # tensors that are made once per device are made here
    few, many = calls_of_an_epoch(30), calls_of_an_epoch(2)  # 2 steps, 30 steps
    assert few == many
    assert few  # the metrics, at the end


# --- optimizer ------------------------------------------------------------------------------------------------------


def step_without_gradient(lr_max=0.01, **settings):
    """The model before and after an optimizer step in which only the weight decay moves the parameters."""
    model = tiny_model()
    nn.init.ones_(model[4].bias)
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, tiny_config(**settings), lr_max)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return before, model


@pytest.mark.parametrize("lr_max", [0.01, 0.5])
def test_the_decoupled_decay_at_the_peak_is_the_setting(lr_max):
    before, after = step_without_gradient(lr_max, decay_at_peak=2e-3)
    for old, new in zip(before.parameters(), after.parameters()):
        torch.testing.assert_close(new, old * (1 - 2e-3))


def test_batch_norm_and_biases_can_be_left_out_of_the_decay():
    before, after = step_without_gradient(decay_at_peak=2e-3, decay_norm_and_bias=False)
    for old, new in zip(before.parameters(), after.parameters()):
        torch.testing.assert_close(new, old * (1 - 2e-3) if old.ndim > 1 else old)


def test_coupled_decay_is_an_l2_penalty_that_adam_rescales():
    before, after = step_without_gradient(coupled_decay=1e-4)
    moved = (before[4].weight - after[4].weight).abs().median().item()
    assert moved == pytest.approx(0.01, rel=0.05)  # Adam's first step is as large as the LR, whatever the gradient


def test_without_a_peak_there_is_no_weight_decay():
    before, after = step_without_gradient(lr_max=None)
    assert_same_weights(before, after)


def test_the_optimizer_is_adam_with_the_configured_settings():
    (group,) = make_optimizer(linear_model(), tiny_config(beta1=0.8, beta2=0.95, eps=1e-6), 0.01).param_groups
    assert group["betas"] == (0.8, 0.95)
    assert group["eps"] == 1e-6


@pytest.mark.parametrize("cycle_beta1", [False, True])
def test_beta1_cycles_only_when_the_config_says_so(toy, cycle_beta1):
    state, *_ = begin(toy, tiny_config(cycle_beta1=cycle_beta1))
    assert state.optimizer.param_groups[0]["betas"] == (0.95 if cycle_beta1 else 0.9, 0.99)


def test_bf16_autocast_keeps_weights_and_metrics_in_float32(toy):
    state = train(toy, precision=Precision("bf16", CPU))
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())
    assert state.history.test_accuracy[-1] > 30
    test_loader = BatchedLoader(toy.test_images, toy.test_labels, 30)
    logits, _ = next(predict_batches(state.model, test_loader, precision=Precision("bf16", CPU)))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())  # computed in bf16
