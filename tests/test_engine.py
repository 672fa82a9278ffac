"""Training and testing, against the same computed by hand."""

import copy
import itertools
import math
import re
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils import engine, metrics
from utils.averaging import WeightAverage
from utils.config import from_profile
from utils.loaders import BatchedLoader, make_loaders
from utils.runtime import Precision, seed_everything
from utils.schedule import one_cycle_lrs
from utils.transforms import normalize

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
ENDS = (1e-3, 1e-2)


def tiny_config(**changes):
    """Four steps per epoch on the toy images, the last of them smaller: 60 = 16 + 16 + 16 + 12."""
    settings = dict(train_images=None, test_images=None, batch_size=16, epochs=4, peak_epoch=1, width=4, init="default")
    return from_profile("quick", **{**settings, **changes})


def begin(toy, config, precision=FP32):
    """The state and the two loaders of a new run."""
    seed_everything(config.seed)
    loaders = make_loaders(toy, config, precision)
    model = engine.build_model(config, 10, precision, config.epochs * len(loaders[0]))
    return engine.start(model, config, ENDS, len(loaders[0]), precision), *loaders


def train(toy, config=None, show=None, **options):
    """A whole run; returns its state."""
    config = config or tiny_config()
    state, *loaders = begin(toy, config)
    engine.fit(state, *loaders, config.epochs, show=show, **options)
    return state


def assert_same(one, other):
    """Bit-identical networks."""
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("coupled", [0.0, 1e-2])
def test_steps_are_those_of_adam_written_by_hand(toy, coupled):
    config = tiny_config(batch_size=30, coupled_decay=coupled, decay_at_peak=2e-3)
    state, loader, _ = begin(toy, config)
    moments = [[0.0, 0.0] for _ in state.model.parameters()]
    lrs = one_cycle_lrs(*ENDS, config.epochs, config.peak_epoch, 2)
    for step, (images, labels) in enumerate(itertools.chain(loader, loader)):
        by_hand = copy.deepcopy(state.model).train()
        weights = list(by_hand.parameters())
        loss = F.cross_entropy(by_hand(images), labels, label_smoothing=0.2)
        for weight, moment, gradient in zip(weights, moments, torch.autograd.grad(loss, weights)):
            gradient = gradient + coupled * weight.data
            moment[:] = 0.9 * moment[0] + 0.1 * gradient, 0.99 * moment[1] + 0.01 * gradient**2
            mean, square = moment[0] / (1 - 0.9 ** (step + 1)), moment[1] / (1 - 0.99 ** (step + 1))
            weight.data *= 1 if coupled else 1 - lrs[step] * 2e-3 / ENDS[1]
            weight.data -= lrs[step] * mean / (square.sqrt() + 1e-8)
        engine.train_epoch(state, [(images, labels)])
        for found, expected in zip(state.model.parameters(), weights):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_keeps_weights_and_logits_in_float32(toy):
    bf16 = Precision("bf16", CPU)
    state, loader, _ = begin(toy, tiny_config(), bf16)
    engine.train_epoch(state, loader)
    logits = next(engine.predict_views(state.model, loader, bf16, count=1))[0][0]
    assert {tensor.dtype for tensor in (logits, *state.model.parameters())} == {torch.float32}
    assert torch.equal(logits, logits.bfloat16().float())  # computed in bf16


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_reported_train_loss_is_the_mean_per_image_without_label_smoothing(toy, smoothing):
    # A linear model at LR 0 does not change, so the mean over the epoch can be computed at once.
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    criterion = engine.make_criterion(tiny_config(label_smoothing=smoothing))
    state = engine.TrainState(model, optimizer, criterion, FP32, FP32.grad_scaler(), scheduler)
    found = engine.train_epoch(state, BatchedLoader(toy.train_images, toy.train_labels, 16))
    logits, labels = model(normalize(torch.from_numpy(toy.train_images))), torch.from_numpy(toy.train_labels)
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (found.correct, found.count) == ((logits.argmax(1) == labels).sum(), 60)
    smoothed = (1 - smoothing) * F.cross_entropy(logits, labels) - smoothing * logits.log_softmax(1).mean()
    torch.testing.assert_close(criterion(logits, labels), smoothed)


@pytest.mark.parametrize(("batch_size", "training"), [(30, True), (16, False), (7, True)])
def test_evaluation_weights_every_image_alike_and_changes_nothing(toy, batch_size, training):
    model = engine.build_model(tiny_config(), 10).train(training)
    before = copy.deepcopy(model)
    found = engine.evaluate(model, BatchedLoader(toy.test_images, toy.test_labels, batch_size), precision=FP32)
    assert_same(model, before)  # batch-norm statistics included
    with pytest.raises(RuntimeError):
        engine.evaluate(model, [(torch.zeros(1, 5, 32, 32), torch.zeros(1, dtype=torch.int64))], precision=FP32)
    assert all(module.training is training for module in model.modules())
    logits, labels = model.eval()(normalize(torch.from_numpy(toy.test_images))), torch.from_numpy(toy.test_labels)
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (found.correct, found.count) == ((logits.argmax(1) == labels).sum(), 30)


def test_test_time_augmentation_averages_the_logits_of_its_views(toy):
    model = engine.build_model(tiny_config(), 10).eval()
    images = normalize(torch.from_numpy(toy.test_images))
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    plain, left_up, right_down = images, padded[:, :, :32, :32], padded[:, :, 2:, 2:]
    with torch.no_grad():
        one, two, three = ((model(view) + model(view.flip(3))) / 2 for view in (plain, left_up, right_down))
        expected = {"none": model(images), "flip": one, "six views": one / 2 + two / 4 + three / 4}
    loader = BatchedLoader(toy.test_images, toy.test_labels, 16)
    for tta, logits in expected.items():
        views = engine.predict_views(model, loader, FP32, len(engine.TTA[tta]))
        found = torch.cat([engine.mean_logits(each, tta) for each, _ in views])
        torch.testing.assert_close(found, logits)
        assert (tta == "none") == torch.allclose(found, expected["none"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("every", [1, 5])
def test_the_average_of_the_weights_follows_its_formula(every):
    model = nn.BatchNorm1d(3)
    average, expected, updates = WeightAverage(model, 0.9, every), torch.ones(3), 0
    for step in range(100):
        nn.init.normal_(model.weight)
        nn.init.normal_(model.running_mean)
        average.update(model, step)
        if step % every == every - 1:
            decay = min(0.9**every, (1 + updates) / (10 + updates))  # soon forgets the untrained weights
            expected, updates = decay * expected + (1 - decay) * model.weight.detach(), updates + 1
    torch.testing.assert_close(average.module.weight.detach(), expected)
    assert not torch.equal(average.module.running_mean, torch.zeros(3))  # the statistics of batch norm too


@pytest.mark.parametrize(
    ("residual", "train_loss", "test_loss"),
    [(True, [2.2850, 2.1565, 2.0944, 2.0238], 1.8631), (False, [2.2856, 2.2024, 2.1656, 2.1112], 2.0079)],
)
def test_the_recipe_is_frozen(toy, residual, train_loss, test_loss):
    # Recorded when the published run was trained. Processors round differently, and training amplifies that.
    history = train(toy, tiny_config(ghost_batch=8, residual=residual)).history
    assert history.train_loss[:3] == pytest.approx(train_loss[:3], rel=2e-4)
    assert [history.train_loss[3], history.test_loss[-1]] == pytest.approx([train_loss[3], test_loss], rel=5e-3)


@pytest.mark.parametrize("eval_every", [1, 3])
def test_every_epoch_has_an_entry_in_the_history_and_a_row(toy, eval_every):
    rows, tested = [], [epoch % eval_every == 0 or epoch == 4 for epoch in (1, 2, 3, 4)]  # the last one always
    history = train(toy, eval_every=eval_every, show=rows.append).history
    np.testing.assert_allclose(history.lr, one_cycle_lrs(*ENDS, 4, 1, 4)[3::4], rtol=1e-9)  # each epoch's last
    assert rows[0] == metrics.table_header()
    for epoch, (row, is_tested) in enumerate(zip(rows[1:], tested, strict=True)):
        assert row.split()[0] == f"{epoch + 1}/4"
        assert f"{history.train_loss[epoch]:.4f}" in row
        assert (f"{history.test_accuracy[epoch]:.2f}%" in row) if is_tested else history.test_loss[epoch] is None


def test_a_run_that_stopped_ends_like_a_whole_one_bit_by_bit_and_another_seed_does_not(toy):
    def stop_after_two(state):
        if state.history.epochs == 2:
            raise KeyboardInterrupt

    config, rows = tiny_config(), []
    state, *loaders = begin(toy, config)
    with pytest.raises(KeyboardInterrupt):
        engine.fit(state, *loaders, config.epochs, after_epoch=stop_after_two, show=None)
    engine.fit(state, *make_loaders(toy, config, FP32), config.epochs, show=rows.append)
    assert [row.split()[0] for row in rows] == ["epoch", "1/4", "2/4", "3/4", "4/4"]  # the earlier epochs too
    engine.fit(state, *loaders, config.epochs, show=None)  # a finished run stays as it is
    whole, other = train(toy), train(toy, tiny_config(seed=1))
    assert state.history.train_loss == whole.history.train_loss != other.history.train_loss
    assert_same(state.model, whole.model)
    assert_same(state.tested_model, whole.tested_model)


class PoisonedLoader(BatchedLoader):
    """The images of step 1 of epoch 2, both counted from 0, are NaN, and the next batches take ``seconds`` each."""

    def __iter__(self):
        is_bad = self.epoch == 2
        for step, (images, labels) in enumerate(super().__iter__()):
            time.sleep(self.seconds if is_bad and step > 1 else 0)
            self.batches = step + 1
            yield images * (math.nan if is_bad and step == 1 else 1), labels


@pytest.mark.parametrize(("seconds", "batches"), [(0.0, 4), (1.1, 3)])  # a long epoch need not end first
def test_a_loss_that_is_not_finite_stops_with_step_lr_and_hint_and_keeps_the_history(toy, seconds, batches):
    state, _, test_loader = begin(toy, tiny_config())
    loader = PoisonedLoader(toy.train_images, toy.train_labels, 16)
    loader.seconds = seconds
    lr = one_cycle_lrs(*ENDS, 4, 1, 4)[2 * 4 + 1]
    message = f"epoch 3/4: the loss is not finite at step 2, where the LR was {lr:.2e}: lower lr_max"
    with pytest.raises(engine.NonFiniteLossError, match=f"^{re.escape(message)}"):
        engine.fit(state, loader, test_loader, 4, show=lambda row: None)
    assert loader.batches == batches
    assert np.isfinite(state.history.train_loss).all()
    assert state.history.epochs == 2
