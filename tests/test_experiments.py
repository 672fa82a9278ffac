"""The experiments runner, with a thin network on toy images: what is logged, what is repeated, what is never read."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import experiments.__main__ as command
import experiments.runner as runner_module
from experiments.runner import FULL, Budget, Log, LogError, Run, Runner, Scale
from experiments.tables import sections, write_tables
from experiments.variants import (
    RECIPE,
    Variant,
    ablations,
    annihilation,
    constant_lr,
    constant_variants,
    no_warm_up,
    norm_momentum,
    pad_by_replication,
    remove_skips,
    tuning,
)
from models import CustomLayer, CustomResNet
from utils.config import quick
from utils.dataset import ImageDataset
from utils.engine import start
from utils.loaders import make_loaders
from utils.runtime import Precision

CPU = torch.device("cpu")
SCALE = Scale(
    quick(
        train_images=40,
        test_images=20,
        batch_size=10,
        epochs=2,
        peak_epoch=1,
        lr_min=1e-4,
        lr_max=3e-3,
        precision="fp32",
    ),
    holdout=20,
)
NO_CUTOUT = Variant("no cutout", "what cutout buys", {"cutout": 0})


class ThinResNet(CustomResNet):
    """A sixteenth of the channels: the runner does not care, and a test takes seconds."""

    def __init__(self, num_classes=10, dropout=0.0, logit_scale=0.125):
        super().__init__(num_classes, dropout, logit_scale)
        self.prep = CustomLayer(3, 4, pool=False, dropout=dropout)
        self.layer1 = CustomLayer(4, 8, residual=True, dropout=dropout)
        self.layer2 = CustomLayer(8, 16, dropout=dropout)
        self.layer3 = CustomLayer(16, 32, residual=True, dropout=dropout)
        self.fc = torch.nn.Linear(32, num_classes)


class Sealed:
    """Stands in for arrays that must not be read: every use of it fails."""

    def _opened(self, *args, **kwargs):
        raise AssertionError("the test set was opened")

    __getattr__ = __len__ = __getitem__ = __iter__ = __array__ = _opened


@pytest.fixture(autouse=True)
def _thin_network(monkeypatch):
    monkeypatch.setattr(runner_module, "CustomResNet", ThinResNet)
    monkeypatch.setattr(command, "CustomResNet", ThinResNet)


@pytest.fixture
def make_runner(toy, tmp_path):
    def make(dataset: ImageDataset = toy, scale: Scale = SCALE) -> Runner:
        return Runner(dataset, scale, tmp_path, CPU)

    return make


# --- runs and their log -----------------------------------------------------------------------------------------------


def test_a_second_call_trains_nothing(make_runner, monkeypatch):
    runs = command.plan("validation", [RECIPE, NO_CUTOUT], seeds=1)
    assert make_runner().execute(runs, Budget()) == 0
    first = Log(make_runner().folder).records

    monkeypatch.setattr(Runner, "train", lambda *args: pytest.fail("a finished run was repeated"))
    again = make_runner()
    assert again.execute(runs, Budget()) == 0
    assert again.log.records == first
    assert [record["variant"] for record in first] == ["recipe", "no cutout"]


def test_an_interrupted_run_starts_again_and_gives_the_uninterrupted_result(make_runner, monkeypatch, tmp_path):
    runs = command.plan("validation", [RECIPE, NO_CUTOUT], seeds=1)
    make_runner().execute(runs, Budget())
    whole = Log(tmp_path).records
    (tmp_path / "runs.jsonl").unlink()

    train = runner_module.advance
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the second epoch of the second run
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(runner_module, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_runner().execute(runs, Budget())
    assert [record["variant"] for record in Log(tmp_path).records] == ["recipe"]

    make_runner().execute(runs, Budget())
    assert [record["accuracy"] for record in Log(tmp_path).records] == [record["accuracy"] for record in whole]
    assert [record["loss"] for record in Log(tmp_path).records] == [record["loss"] for record in whole]


def test_tuning_never_opens_the_test_set(make_runner, toy):
    sealed = dataclasses.replace(toy, test_images=Sealed(), test_labels=Sealed())
    runner = make_runner(sealed)
    assert runner.execute(command.tuning_runs(runner, 1)[:2], Budget()) == 0
    assert {record["split"] for record in runner.log.records} == {"validation"}
    with pytest.raises(AssertionError, match="opened"):
        runner.execute([Run("test", RECIPE, 100)], Budget())


def test_a_result_is_evaluated_once_after_the_last_epoch(make_runner, monkeypatch):
    opened = []
    final_test = runner_module.final_test
    monkeypatch.setattr(runner_module, "fit", lambda *args, **kwargs: pytest.fail("tested after every epoch"))
    monkeypatch.setattr(runner_module, "final_test", lambda *args: opened.append(1) or final_test(*args))
    make_runner().execute([Run("test", RECIPE, 101)], Budget())
    assert len(opened) == 1


def test_a_record_says_everything_about_its_run(make_runner):
    runner = make_runner()
    runner.execute([Run("validation", NO_CUTOUT, 3)], Budget())
    (record,) = runner.log.records
    assert record["config"]["cutout"] == 0
    assert record["config"]["seed"] == record["seed"] == 3
    assert (record["train_images"], record["eval_images"]) == (40, 20)
    assert 0 <= record["accuracy"] <= 100
    assert 0 <= record["accuracy_tta"] <= 100
    assert np.mean(list(record["per_class_accuracy"].values())) == pytest.approx(record["accuracy"])
    assert record["weight_decay"] == pytest.approx(SCALE.recipe.decay_at_peak / 3e-3)
    assert record["total_seconds"] >= record["seconds"] > 0
    assert "held out" in record["data"]
    for name in ("device", "precision", "versions", "commit", "lr_range"):
        assert record[name], name


def test_the_range_test_finds_the_lrs_and_the_rule_scales_them(make_runner):
    recipe = dataclasses.replace(SCALE.recipe, lr_min=None, lr_max=None, range_test_steps=40)
    runner = make_runner(scale=Scale(recipe, 20))
    scaled = Variant("scaled", "", lr_min_factor=0.1, lr_max_factor=2.0)
    runner.execute([Run("validation", scaled, 0)], Budget())
    (record,) = runner.log.records
    assert record["status"] == "done"
    assert record["lr_first"] == pytest.approx(0.1 * record["lr_range"]["lr_min"])
    assert record["lr_last"] == pytest.approx(record["lr_first"])
    assert record["lr_peak"] == pytest.approx(2.0 * record["lr_range"]["lr_max"])
    assert record["weight_decay"] == pytest.approx(recipe.decay_at_peak / record["lr_peak"])


def test_a_diverged_run_is_a_result_and_does_not_stop_the_others(make_runner, tmp_path):
    runner = make_runner()
    diverging = Variant("far too high", "", {"lr_min": 1e30, "lr_max": 1e38})
    assert runner.execute([Run("validation", v, 0) for v in (diverging, RECIPE)], Budget()) == 0
    assert [record["status"] for record in runner.log.records] == ["failed", "done"]
    assert "not finite" in runner.log.records[0]["error"]
    (section,) = write_tables(tmp_path)
    assert [row.failed for row in section.rows] == [0, 1]
    assert "1 failed" in (tmp_path / "table.md").read_text()


def test_a_spent_budget_starts_no_further_run(make_runner, capsys):
    budget = Budget(minutes=0.5)
    budget.durations = [3600.0]  # as if a run took an hour
    runner = make_runner()
    assert runner.execute(command.plan("validation", [RECIPE], 3), budget) == 3
    assert runner.log.records == []
    assert "3 runs are left" in capsys.readouterr().out


def test_a_reserve_is_kept_for_later_runs(make_runner):
    runner = make_runner()
    budget = Budget(minutes=1)
    budget.durations = [10.0]
    assert runner.execute([Run("validation", RECIPE, 0)], budget, reserve=10) == 1
    assert runner.execute([Run("validation", RECIPE, 0)], budget, reserve=1) == 0


def test_other_settings_or_images_are_other_runs(make_runner, toy):
    run = Run("validation", RECIPE, 0)
    other_recipe = Scale(dataclasses.replace(SCALE.recipe, label_smoothing=0.2), 20)
    mirrored = dataclasses.replace(toy, train_images=np.ascontiguousarray(toy.train_images[:, :, ::-1]))
    runners = (make_runner(), make_runner(scale=other_recipe), make_runner(mirrored))
    keys = {runner.key(run) for runner in runners} | {runners[0].key(Run("validation", RECIPE, 1))}
    assert len(keys) == 4


def test_images_already_on_the_device_give_the_batches_of_a_new_loader(make_runner):
    config = dataclasses.replace(
        SCALE.recipe,
        seed=9,
        batch_size=8,
        pad=2,
        pad_mode="constant",
        cutout=4,
        alternate_flip=False,
        train_images=None,
    )
    split = make_runner().validation
    expected, _ = make_loaders(split.dataset, config, CPU)
    ours = split.new_train_loader(config)
    assert len(ours) == len(expected) == 5
    for _ in range(2):
        for (images, labels), (expected_images, expected_labels) in zip(ours, expected):
            assert torch.equal(labels, expected_labels)
            assert torch.equal(images, expected_images)


def test_a_damaged_log_is_named_not_overwritten(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\n{"key": "b\n')
    with pytest.raises(LogError, match=r"runs\.jsonl, line 2 is damaged"):
        Log(tmp_path)


# --- commands -----------------------------------------------------------------------------------------------------


def test_ablations_take_the_constant_lr_that_was_best_on_validation(make_runner, monkeypatch):
    names = [variant.name for variant in constant_variants().values()]
    accuracy = dict(zip(names, (50.0, 80.0, 60.0, 70.0)))

    def pretend(self, run):
        value = accuracy.get(run.variant.name, 10.0)
        record = {"key": self.key(run), "split": run.split, "variant": run.variant.name, "seed": run.seed}
        lrs = {"lr_first": 1e-4, "lr_peak": 1e-2, "lr_last": 1e-4}
        return {**record, **lrs, "status": "done", "accuracy": value, "accuracy_tta": value}

    monkeypatch.setattr(Runner, "train", pretend)
    runner = make_runner()
    assert command.ablate(runner, 3, Budget()) == 0
    tested = [record["variant"] for record in runner.log.records if record["split"] == "test"]
    assert [name for name in set(tested) if "constant" in name] == ["constant LR, LRMAX x 0.2"]
    assert {tested.count(name) for name in tested} == {3}
    assert tested[: len(set(tested))] == list(dict.fromkeys(tested))  # each variant once before any a second time


def test_publish_shows_the_first_seed_and_the_spread_of_all(make_runner, tmp_path):
    runner = make_runner()
    with pytest.raises(LogError, match="have no result"):
        command.publish(runner, 2)
    assert command.train_seeds(runner, 2, Budget()) == 0
    folder = command.publish(make_runner(), 2, note="toy images")

    assert folder.is_relative_to(tmp_path)  # toy images never replace Results/
    metrics = json.loads((folder / "metrics.json").read_text())
    records = runner.log.records
    assert metrics["seeds"] == [100, 101]
    assert metrics["test_accuracy"] == records[0]["accuracy"] == metrics["history"]["test_accuracy"][-1]
    assert metrics["seed_accuracies"] == [record["accuracy"] for record in records]
    assert metrics["std_accuracy"] == pytest.approx(np.std(metrics["seed_accuracies"], ddof=1))
    assert (folder / "custom_resnet.safetensors").exists()


def test_command_line(image_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "SMALL", SCALE)
    out = tmp_path / "out"
    args = ["seeds", "--small", "--seeds", "2", "--data-dir", str(image_folder), "--out", str(out), "--device", "cpu"]
    assert command.main(args) == 0
    assert "recipe" in capsys.readouterr().out
    assert len(Log(out).records) == 2
    for name in ("table.json", "table.md", "ablations.png"):
        assert (out / name).stat().st_size > 0
        (out / name).unlink()
    assert command.main(["table", "--out", str(out)]) == 0
    assert (out / "ablations.png").exists()

    assert command.main(["tune", "--data-dir", str(tmp_path / "nowhere"), "--out", str(out)]) == command.EXIT_FAILED
    assert "no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["tune", "--publish"])


# --- table and figure -----------------------------------------------------------------------------------------------


def test_table_compares_like_with_like():
    def record(variant, seed, accuracy, recipe="r", split="test"):
        names = ("variant", "shows", "seed", "accuracy", "accuracy_tta", "recipe", "split", "status", "seconds")
        values = dict(zip(names, (variant, "", seed, accuracy, accuracy + 1, recipe, split, "done", 8.0)))
        setting = dict(data="d", train_images=4, eval_images=2, config={"epochs": 24}, device="x", precision="fp32")
        return {**values, **setting, "commit": "c"}

    records = [record("no cutout", 100, 93.0), record("no cutout", 101, 94.0)]
    records += [record("recipe", 100, 95.0), record("recipe", 101, 95.4)]
    records += [record("recipe", 0, 10.0, split="validation"), record("recipe", 100, 20.0, recipe="older")]
    section, validation, older = sections(records)
    recipe, cutout = section.rows
    assert recipe.variant == "recipe"
    assert recipe.mean == pytest.approx(95.2)
    assert recipe.std == pytest.approx(0.2828, abs=1e-4)
    assert recipe.difference is None
    assert cutout.difference == pytest.approx(-1.7)
    assert cutout.difference_error == pytest.approx(np.sqrt(0.5 / 2 + 0.08 / 2))
    assert cutout.mean_tta == pytest.approx(94.5)
    assert (validation.rows[0].mean, older.rows[0].mean) == (10.0, 20.0)
    assert older.rows[0].std is None


# --- variants -------------------------------------------------------------------------------------------------------


def test_removing_skips_keeps_parameters_and_blocks():
    torch.manual_seed(0)
    model = ThinResNet().eval()
    x = torch.randn(2, 4, 32, 32)
    inside = model.layer1.conv(x)
    expected, with_skip = model.layer1.block(inside), model.layer1(x)
    count = sum(parameter.numel() for parameter in model.parameters())
    remove_skips(model)
    torch.testing.assert_close(model.layer1(x), expected)
    assert not torch.allclose(with_skip, expected)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.layer3.block is None


def test_replicate_padding_changes_only_the_border():
    torch.manual_seed(0)
    model = ThinResNet()
    x = torch.randn(1, 3, 32, 32) + 3
    zeros = model.prep.conv.conv(x)
    pad_by_replication(model)
    replicated = model.prep.conv.conv(x)
    torch.testing.assert_close(zeros[..., 1:-1, 1:-1], replicated[..., 1:-1, 1:-1])
    assert not torch.allclose(zeros[..., 0, :], replicated[..., 0, :])


def test_norm_momentum_reaches_every_batch_norm():
    model = ThinResNet()
    norm_momentum(1.0)(model)
    model(torch.randn(4, 3, 32, 32))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 8
    assert all((norm.running_var != 1).any() for norm in norms)
    assert {norm.momentum for norm in norms} == {1.0}


def lrs_of(edit) -> tuple[list[float], dict]:
    """The LR of all 20 steps of a 4-epoch cycle from 0.001 over 0.1, and the edited group."""
    config = dataclasses.replace(SCALE.recipe, epochs=4, peak_epoch=1)
    state = start(ThinResNet(), config, 0.001, 0.1, 5, Precision("fp32", CPU))
    (group,) = state.optimizer.param_groups
    edit(group)
    lrs = []
    for _ in range(20):
        lrs.append(group["lr"])
        state.optimizer.step()
        state.scheduler.step() if len(lrs) < 20 else None
    return lrs, group


def test_constant_lr():
    lrs, group = lrs_of(constant_lr(0.2))
    assert lrs == pytest.approx([0.02] * 20)
    assert lrs[0] * group["weight_decay"] == pytest.approx(SCALE.recipe.decay_at_peak)


def test_no_warm_up():
    lrs, _ = lrs_of(no_warm_up)
    assert lrs[:5] == pytest.approx([0.1] * 5)
    assert lrs[5:] == pytest.approx(np.linspace(0.1, 0.001, 16)[1:])


def test_annihilation():
    lrs, _ = lrs_of(annihilation)
    assert lrs[0] == pytest.approx(0.001)
    assert lrs[4] == pytest.approx(0.1)
    assert lrs[-1] == pytest.approx(0.00001)


def test_variants_have_names_of_their_own_and_depart_from_the_recipe():
    recipe = FULL.recipe
    tuned = tuning(recipe)
    constant = next(iter(constant_variants().values()))
    for variants in (tuned, ablations(recipe, constant)):
        names = [variant.name for variant in [RECIPE, *variants]]
        assert len(set(names)) == len(names)
        for variant in variants:
            assert variant.departs_from(recipe), variant.name
            dataclasses.replace(recipe, **variant.changes)  # a valid config
    adopted = dataclasses.replace(recipe, label_smoothing=0.2)
    assert "label_smoothing 0.2" in {variant.name for variant in tuned}
    assert "label_smoothing 0.2" not in {variant.name for variant in tuning(adopted)}
