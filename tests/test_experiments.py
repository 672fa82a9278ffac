"""The campaign: what its figures mean, which runs are made, shared, repeated or kept. Trainings are pretended."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

import experiments.__main__ as command
from experiments import campaign as campaign_module
from experiments import page, variants
from experiments.campaign import STAGES, Campaign, Run, all_records, config_of, is_current
from experiments.effects import Effect, main_effects, paired
from utils.config import full
from utils.engine import NonFiniteLossError
from utils.lr_finder import LRRangeError
from utils.runs import report
from utils.runs.folder import RunLockedError
from utils.runtime import Session10Error

CPU = torch.device("cpu")
ABLATIONS = {variant.name: variant for variant in variants.ablations()}
NO_CUTOUT, CONSTANT_LR = ABLATIONS["no cutout"], ABLATIONS["constant LR 0.1 LRMAX"]  # the second one fails: see trained
RECIPES = [Run(STAGES["seeds"], variants.RECIPE, seed) for seed in (100, 101)]


class Sealed:
    """Stands in for arrays that must not be read: every use of it fails."""

    def _opened(self, *args, **kwargs):
        raise AssertionError("the test set was opened")

    __getattr__ = __len__ = __getitem__ = __iter__ = __array__ = _opened


def planted(config) -> float:
    """A pretended accuracy: what the screen's settings add, and a little for the seed."""
    factors = variants.FACTORS
    worth = sum((number - 4) / 10 for number, f in enumerate(factors) if getattr(config, f.field) == f.high)
    return 90.0 + worth + (config.seed % 7) / 100 - (0.5 if not config.cutout else 0.0)


@pytest.fixture
def trained(monkeypatch):
    """Trainings are pretended; returns the (config, dataset) of each."""
    calls = []

    def run_job(config, dataset, run_dir, *, device):
        print("epoch table")
        with FileLock(run_dir / ".lock", timeout=5):
            calls.append((config, dataset))
            accuracy = planted(config)
            if config.lr_max_factor == 0.1:
                raise NonFiniteLossError("epoch 2: the loss is not finite")
            metrics = {"test_accuracy": accuracy, "test_accuracy_tta": accuracy + 0.4, "test_loss": 5 - accuracy / 20}
            metrics |= {"lr_min": 1e-3, "lr_max": 1e-2, "weight_decay": 0.1, "wall_seconds": 60.0, "device": "a CPU"}
            metrics |= {"train_images": len(dataset.train_labels), "test_images": 20, "data": dataset.description}
            metrics |= {"history": {"train_accuracy": [50.0, 97.0]}, "config": config.to_dict()}
            if config.ema_also:
                decays = (0.99, *config.ema_also)
                metrics["averages"] = {str(decay): {"accuracy": accuracy + 10 * (decay - 0.99)} for decay in decays}
            (run_dir / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")

    monkeypatch.setattr(campaign_module, "run_job", run_job)
    monkeypatch.setattr(campaign_module, "WAIT_SECONDS", 0.01)
    return calls


@pytest.fixture
def campaign(toy, tmp_path) -> Campaign:
    return Campaign(lambda: toy, tmp_path, CPU, small=True)


# --- effects ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_planted_effects_are_recovered_exactly(data):
    numbers = st.floats(-5, 5)
    effects = np.array(data.draw(st.lists(numbers, min_size=11, max_size=11)))
    blocks = data.draw(st.integers(1, 3))
    offsets = np.array(data.draw(st.lists(numbers, min_size=blocks, max_size=blocks)))
    levels = np.vstack([variants.plackett_burman()] * blocks + [-np.ones((2, 11))])
    block = np.array([*np.repeat(np.arange(blocks), 12), 0, 0])
    values = offsets[block] + (levels > 0) @ effects
    found, errors = main_effects(levels, block, values)
    np.testing.assert_allclose(found, effects, atol=1e-9)
    np.testing.assert_allclose(errors, 0, atol=1e-9)


def test_an_effect_is_the_difference_of_means_with_the_design_s_standard_error():
    levels = variants.plackett_burman()
    assert (levels.T @ levels == 12 * np.eye(11)).all()  # no two settings are confounded
    noise = np.random.default_rng(0).normal(0, 0.3, (2000, 24))
    twice, blocks = np.vstack([levels, levels]), np.repeat([0, 1], 12)
    found, errors = main_effects(twice, blocks, noise[0])
    assert found[3] == pytest.approx(noise[0][twice[:, 3] > 0].mean() - noise[0][twice[:, 3] < 0].mean())
    assert errors == pytest.approx(np.full(11, errors[0]))
    every = np.array([main_effects(twice, blocks, row) for row in noise[:400]])
    assert every[:, 0].std() == pytest.approx(2 * 0.3 / np.sqrt(24), rel=0.05)
    assert np.sqrt((every[:, 1] ** 2).mean()) == pytest.approx(2 * 0.3 / np.sqrt(24), rel=0.05)


def test_too_few_runs_give_no_error_and_fewer_no_effects():
    levels = variants.plackett_burman()
    assert main_effects(levels, np.zeros(12), np.arange(12.0))[1] is None
    with pytest.raises(ValueError, match="11 runs cannot tell 11 factors apart"):
        main_effects(levels[1:], np.zeros(11), np.zeros(11))


def test_pairs_cancel_what_seeds_share():
    reference = {0: 90.0, 1: 94.0, 2: 80.0}
    effect = paired("x", {0: 90.5, 1: 94.7, 9: 0.0}, reference)
    assert (effect.value, effect.count) == (pytest.approx(0.6), 2)
    assert effect.error == pytest.approx(0.1)
    assert paired("x", {0: 91.0}, reference) == Effect("x", 1.0, None, 1, (1.0,))
    assert paired("x", {9: 91.0}, reference) is None


# --- plans --------------------------------------------------------------------------------------------------------------


def test_every_variant_is_a_config_of_its_own():
    for listed in (variants.screen_design(), [variants.RECIPE, *variants.ablations()]):
        names, configs = [v.name for v in listed], [full(**v.changes) for v in listed]
        assert len(set(names)) == len(names)
        assert all(configs.count(config) == 1 for config in configs)
    for factor in variants.FACTORS:
        assert factor.low != factor.high
        full(**{factor.field: factor.high})


def test_confirmed_is_what_exceeds_its_error():
    effects = [Effect(f.name, number - 5, 1.5, 15) for number, f in enumerate(variants.FACTORS)]
    base, *proposals = variants.confirm(effects)
    assert base == variants.BASE
    assert [variant.name for variant in proposals] == [
        "all that helped",
        "the three that helped most",
        "all that helped, decay x 2",
        "all that helped, label smoothing 0.2",
    ]
    three, regularized = proposals[1:3]
    assert {f.name for f in variants.FACTORS if regularized.changes[f.field] == f.high} == {
        "decay x 2",
        *(factor.name for factor in variants.FACTORS[7:]),
    }
    assert set(three.shows.split(", ")) == {factor.name for factor in variants.FACTORS[8:]}
    assert three.changes["beta2"] == 0.95
    assert three.changes["decay_at_peak"] == variants.BASE.changes["decay_at_peak"]
    assert variants.confirm([]) == [variants.BASE]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({}, "base"),
        ({"all that helped": (0.4, 0.5)}, "all that helped"),
        ({"all that helped": (0.9, -0.7)}, "base"),  # its mean is within its standard error
        ({"all that helped": (0.4, 0.5), "the three that helped most": (0.6, 0.7)}, "the three that helped most"),
        ({"all that helped": (0.4, 0.5), "the three that helped most": (2.9, -0.9)}, "base"),  # the largest is unclear
        ({"all that helped": (0.4, 0.5), "the three that helped most": (0.9, None)}, "all that helped"),
        (
            {"all that helped": (0.4, 0.5), "all that helped, a": (2.9, -0.9), "all that helped, b": (0.6, 0.7)},
            "all that helped, b",
        ),
        ({"all that helped": (0.4, 0.5), "all that helped, decay x 2": (0.6, 0.8)}, "all that helped, decay x 2"),
        ({"all that helped": (0.4, 0.5), "all that helped, decay x 2": (0.2, 0.8)}, "all that helped"),
        ({"all that helped": (-0.4, -0.5), "all that helped, decay x 2": (0.6, 0.7)}, "base"),
        ({"all that helped": (0.4, None)}, "base"),  # one pair says nothing about the noise
        ({"all that helped": (0.4, 0.5, "failed")}, "base"),
        ({"all that helped": (0.4, 0.5), "all that helped, decay x 2": (0.6, 0.8, "failed")}, "all that helped"),
    ],
)
def test_the_confirmation_chooses_what_is_clearly_better(gains, expected):
    accuracies = {"base": (0.0, 0.0), **gains}
    records = [
        {
            "stage": "confirm",
            "variant": name,
            "seed": seed,
            "config": {"width": 64},
            **(
                {"status": "failed"}
                if gain == "failed"
                else {"status": "done", "test_accuracy": 94.0 + gain, "test_accuracy_tta": 94.4 + gain}
            ),
        }
        for name, pair in accuracies.items()
        for seed, gain in enumerate(pair)
        if gain is not None
    ]
    assert page.chosen(records) == expected


def test_choices_are_made_without_the_test_set(toy, tmp_path, trained):
    sealed = dataclasses.replace(toy, test_images=Sealed(), test_labels=Sealed())
    campaign = Campaign(lambda: sealed, tmp_path, CPU)
    stages = [dataclasses.replace(STAGES[name], holdout=20) for name in ("screen", "confirm")]
    runs = [Run(stage, variants.BASE, seed) for stage in stages for seed in (stage.first_seed, stage.first_seed + 1)]
    again = [run for run in command.plan({"screen": stages[0]}, "screen", []) if run.variant == variants.BASE][1:]
    assert campaign.work([*runs, *again]) == 0
    held_out = [dataset.test_images for _, dataset in trained]
    assert [len(images) for images in held_out] == [20] * 7
    assert not np.array_equal(held_out[0], held_out[1])  # another fold per seed
    # The base's runs are repeated on the same images: only noise tells them apart.
    assert all(np.array_equal(images, held_out[0]) for images in held_out[4:])
    assert [config.seed for config, _ in trained] == [0, 1, 50, 51, 10, 20, 30]
    assert {config.eval_every for config, _ in trained} == {24}
    assert [config.width for config, _ in trained] == [32, 32, 64, 64, 32, 32, 32]


def test_ablations_at_another_width_are_compared_with_the_recipe_at_that_width():
    stages = {**STAGES, "ablations": dataclasses.replace(STAGES["ablations"], width=32)}
    runs = command.plan(stages, "ablations", [])
    assert (runs[0].stage.name, runs[0].variant) == ("seeds", variants.RECIPE)
    assert {config_of(run).width for run in runs} == {32}


def test_a_stand_in_is_refused_but_for_a_trial(toy, tmp_path):
    digits = dataclasses.replace(toy, source="digits", description="digits")
    with pytest.raises(Session10Error, match="need CIFAR-10"):
        _ = Campaign(lambda: digits, tmp_path, CPU).dataset
    assert Campaign(lambda: digits, tmp_path, CPU, small=True).dataset.is_stand_in


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_is_made_once_even_if_it_fails(campaign, trained, capsys):
    runs = [Run(STAGES["ablations"], variant, 100) for variant in (CONSTANT_LR, NO_CUTOUT)]
    assert campaign.work(runs) == 0
    assert campaign.work(runs) == 0
    assert len(trained) == 2
    printed = capsys.readouterr().out
    assert "failed, epoch 2: the loss is not finite" in printed
    assert "no cutout, seed 100: " in printed
    assert "epoch table" not in printed
    failed, done = map(campaign.record, runs)
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert (done["variant"], done["split"], done["seed"], done["config"]["cutout"]) == ("no cutout", "test", 100, 0)
    assert done["train_accuracy"] == 97.0
    assert failed["reason"] == "epoch 2: the loss is not finite"


@pytest.mark.parametrize("error", [NonFiniteLossError("not finite"), LRRangeError("no answer")], ids=str)
def test_how_a_run_failed_is_its_result(campaign, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(campaign_module, "run_job", fail)
    record = campaign.make(Run(STAGES["ablations"], NO_CUTOUT, 100))
    assert (record["status"], record["reason"]) == ("failed", str(error))


def test_a_run_of_other_settings_in_its_folder_is_named(campaign, trained):
    campaign.make(Run(STAGES["ablations"], NO_CUTOUT, 100))
    other = Run(STAGES["ablations"], dataclasses.replace(NO_CUTOUT, changes={"cutout": 4}), 100)
    words = r"no-cutout-seed100 holds a run with other settings.*cutout 0 there, 4 here"
    with pytest.raises(Session10Error, match=words):
        campaign.record(other)


def test_runs_made_elsewhere_count_if_their_settings_are_equal(campaign, trained, tmp_path):
    run = Run(STAGES["screen"], variants.BASE, 0)
    record = json.loads(json.dumps(campaign.make(run)))
    elsewhere = Campaign(campaign.load, tmp_path / "other", CPU, small=True, records=[record])
    assert elsewhere.work([run]) == 0
    assert len(trained) == 1
    assert is_current(record, small=True)
    older = {**record, "config": {**record["config"], "label_smoothing": 0.3}}
    assert not is_current(older, small=True)
    assert Campaign(campaign.load, tmp_path / "other", CPU, small=True, records=[older]).record(run) is None
    assert len(all_records(tmp_path, [older, record])) == 2
    published = {**record, "device": "another CPU"}  # the same run, which was then made here too
    assert all_records(tmp_path, [published]) == [published]


def test_runs_of_a_smaller_width_are_not_shown_as_failed(campaign, trained):
    record = campaign.make(RECIPES[0])
    wider = {**record, "config": {**record["config"], "width": 64}}
    assert "| recipe | 1 |" in page.render_page([record, wider], 2, "")


def test_averages_that_a_run_is_too_short_for_are_left_out(campaign, trained):
    campaign.work([Run(STAGES["screen"], variant, 0) for variant in variants.screen_design()])
    records = [
        {**record, "train_images": 40_000, "config": {**record["config"], "batch_size": 512, "epochs": 24}}
        for record in all_records(campaign.runs, [])
    ]
    text = page.render_page(records, 12, "")
    assert "| 0.995 | 12 | 90.60 | +0.05 ± 0.00 |" in text
    assert "| 0.998 |" not in text


def test_another_proposal_under_the_same_name_is_not_mixed_in(campaign, trained):
    screen = [Run(STAGES["screen"], variant, 0) for variant in variants.screen_design()]
    base = [Run(STAGES["screen"], variants.BASE, seed) for seed in (10, 20, 30)]
    campaign.work([*screen, *base])
    records = page.comparable(all_records(campaign.runs, []), small=True)
    proposed = variants.confirm(page.screen_effects(records))[1]
    other = dataclasses.replace(proposed, changes={**proposed.changes, "beta2": variants.FACTORS[8].low})
    for variant in (proposed, other):
        campaign.make(Run(STAGES["confirm"], variant, 50 if variant is proposed else 51))
    compared = page.comparable(all_records(campaign.runs, []), small=True)
    assert [record["seed"] for record in compared if record["stage"] == "confirm"] == [50]


def test_a_single_wider_run_hides_no_finished_stage(campaign, trained):
    records = [campaign.make(run) for run in (*RECIPES, Run(STAGES["ablations"], NO_CUTOUT, 100))]
    narrow = [{**record, "config": {**record["config"], "width": 32}} for record in records]
    more = {**narrow[2], "seed": 101}
    wide = {**records[2], "config": {**records[2]["config"], "width": 64}}
    assert "| no cutout | 2 |" in page.render_page([*narrow, more, wide], 5, "")
    assert "## The result" in page.render_page(narrow, 3, "")
    result = page.render_page(narrow, 3, "").partition("## The result")[2].partition("## ")[0]
    assert "No run of it is finished yet." in result


def test_a_locked_run_is_left_for_later(campaign, trained, monkeypatch):
    make, refused = Campaign.make, []

    def locked_at_first(self, run):
        if run == RECIPES[0] and len(refused) < 2:
            refused.append(run)
            raise RunLockedError("in use by another process")
        return make(self, run)

    monkeypatch.setattr(Campaign, "make", locked_at_first)
    assert campaign.work(RECIPES) == 0
    assert [config.seed for config, _ in trained] == [101, 100]


def test_a_run_that_another_process_makes_meanwhile_is_not_made_again(campaign, trained, monkeypatch):
    make = Campaign.make

    def make_and_let_others_work(self, run):
        if not trained:
            make(self, RECIPES[1])
        return make(self, run)

    monkeypatch.setattr(Campaign, "make", make_and_let_others_work)
    assert campaign.work(RECIPES) == 0
    assert [config.seed for config, _ in trained] == [101, 100]


def test_no_run_begins_when_the_time_is_up(campaign, trained, capsys):
    assert campaign.work(RECIPES, deadline=0.0) == 2
    assert not trained
    assert "2 runs are left" in capsys.readouterr().out


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def execute(toy, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(command, "load_dataset", lambda folder: toy)
    monkeypatch.setattr(command.report, "RECIPE_TRAIN_IMAGES", len(toy.train_labels))
    monkeypatch.setattr(page, "RESULTS", tmp_path / "published")
    monkeypatch.setattr(command, "README", tmp_path / "README.md")
    command.README.write_text("old\n<!-- generated: experiments -->\n<!-- end: experiments -->\n", encoding="utf-8")
    return lambda *args: command.main([*args, "--small", "--runs", str(tmp_path / "runs")])


def test_all_leads_from_the_screen_to_the_page(execute, trained, tmp_path, capsys):
    assert execute("confirm") == 1
    assert "run `screen` first" in capsys.readouterr().err
    assert execute("all") == 0
    screen, confirm = ([config for config, _ in trained if config.seed // 50 == number] for number in (0, 1))
    assert len(screen) == 15
    assert len({config.beta2 for config in confirm}) == 2  # the base, and with what helped
    folder = tmp_path / "runs" / "results"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| pad with grey | +0.60 ± 0.0" in text
    assert "| LRMIN by onset | -0.40 ± 0.0" in text
    assert "| label smoothing 0.2 | +0.00 ± 0.01 |" in text
    mean = np.mean([planted(full(cutout=0, seed=seed)) for seed in (100, 101, 102)])
    measured = f"{mean:.2f} ± 0.01 | {mean + 0.4:.2f} ± 0.01 | {5 - mean / 20:.4f} ± 0.0005"
    assert f"| no cutout | 3 | {measured} | -0.50 ± 0.00 | -0.50 ± 0.00 |" in text
    rows = [line.split(" | ")[0] for line in text.partition("## What each part is worth")[2].splitlines()]
    assert [row for row in rows if row[2:] in ABLATIONS or row == "| recipe"] == [
        "| recipe",
        *(f"| {name}" for name in ABLATIONS),
    ]
    assert "| constant LR 0.1 LRMAX | 0 (3 failed) |" in text
    assert "EMA decay" not in text  # three epochs are too short for any
    assert "\n\n20 train and 20 validation images of toy images, width 8, on a CPU. Differences are paired" in text
    for name in ("screen.png", "ablations.png", "runs.md"):
        assert (folder / name).stat().st_size > 0
    assert len(json.loads((folder / "runs.json").read_text(encoding="utf-8"))) == len(trained)
    assert not (tmp_path / "published").exists()

    # Again from the runs alone; what was written by hand stays.
    by_hand = text.replace(page.NOT_FROZEN, "Frozen: nothing new,\nsince nothing helped.")
    (folder / "README.md").write_text(by_hand, encoding="utf-8")
    count = len(trained)
    assert execute("table") == 0
    assert len(trained) == count
    assert (folder / "README.md").read_text(encoding="utf-8") == by_hand


def test_the_confirmation_with_other_seeds_follows_the_usual_screen(execute, trained):
    assert execute("screen") == 0
    assert execute("confirm", "--seeds", "2") == 0
    assert {config.seed for config, _ in trained[15:]} == {50, 51}


def test_all_stages_share_one_budget(execute, trained, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 60.0 * len(trained))  # a run takes a minute
    monkeypatch.setattr(campaign_module, "time", clock)
    monkeypatch.setattr(command, "time", clock)
    assert execute("all", "--budget-minutes", "17") == 0
    assert len(trained) == 17  # the screen takes 15


def test_what_was_made_before_an_interruption_is_shown(execute, trained, tmp_path, monkeypatch):
    make = Campaign.make

    def make_two(self, run):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return make(self, run)

    monkeypatch.setattr(Campaign, "make", make_two)
    assert execute("screen") == 130
    assert len(json.loads((tmp_path / "runs" / "results" / "runs.json").read_text(encoding="utf-8"))) == 2


def test_a_trial_is_never_published(execute):
    with pytest.raises(SystemExit):
        execute("seeds", "--publish")


def test_publishing_shows_the_first_seed_among_all(execute, trained, tmp_path, monkeypatch):
    published = []
    monkeypatch.setattr(command.report, "publish", lambda first, others: published.append((first, others)))
    monkeypatch.setattr(command.report, "check_publishable", lambda config, dataset: None)
    arguments = ["seeds", "--publish", "--seeds", "2", "--runs", str(tmp_path / "runs")]
    assert command.main([*arguments, "--budget-minutes", "0"]) == 0
    assert not published
    assert command.main(arguments) == 0
    ((first, others),) = published
    assert [first.name, *(other.name for other in others)] == ["seeds-64-recipe-seed100", "seeds-64-recipe-seed101"]
    assert (tmp_path / "published" / "runs.json").exists()


def test_a_failed_or_foreign_seed_is_named_instead_of_published(execute, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.report, "check_publishable", lambda config, dataset: None)
    arguments = ["seeds", "--publish", "--seeds", "2", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(command.report, "publish", lambda first, others: None)
    assert command.main(arguments) == 0
    path = page.RESULTS / page.RECORDS_NAME
    first, second = page.published()
    path.write_text(json.dumps([{**first, "wall_seconds": 61.0}, second]), encoding="utf-8")  # of another machine
    assert command.main(arguments) == 2
    assert "for want of the weights and curves of seeds-64-recipe-seed100:" in capsys.readouterr().err
    path.write_text(json.dumps([first, second]), encoding="utf-8")
    (tmp_path / "runs" / "seeds-64-recipe-seed101").rename(tmp_path / "elsewhere")
    assert command.main(arguments) == 2
    assert "for want of the weights and curves of seeds-64-recipe-seed101" in capsys.readouterr().err


def test_only_the_recipe_replaces_the_published_results(execute, trained, tmp_path, capsys):
    arguments = ["seeds", "--publish", "--width", "32", "--runs", str(tmp_path / "runs")]
    assert command.main(arguments) == 2
    assert "settings other than the recipe's (width 32, not 64)" in capsys.readouterr().err
    assert not trained


def test_runs_on_other_images_are_not_published(execute, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.report, "RECIPE_TRAIN_IMAGES", 50_000)
    arguments = ["ablations", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    words = "runs on toy images cannot be published, because it has 60 train images, not 50,000: leave out --publish"
    assert command.main([*arguments, "--publish"]) == 2
    assert words in capsys.readouterr().err
    assert not trained
    assert command.main(arguments) == 0
    assert command.main(["table", *arguments[3:], "--publish"]) == 2
    assert words in capsys.readouterr().err
    assert not page.RESULTS.exists()


def test_records_published_meanwhile_are_kept(execute, trained, tmp_path, monkeypatch):
    arguments = ["ablations", "--publish", "--seeds", "1"]
    assert command.main([*arguments, "--runs", str(tmp_path / "there")]) == 0
    there = (page.RESULTS / page.RECORDS_NAME).read_bytes()
    (page.RESULTS / page.RECORDS_NAME).write_text("[]", encoding="utf-8")

    def work(self, runs, deadline):
        (page.RESULTS / page.RECORDS_NAME).write_bytes(there)
        return 0

    monkeypatch.setattr(Campaign, "work", work)
    assert command.main([*arguments, "--runs", str(tmp_path / "here")]) == 0
    assert len(page.published()) == len(trained) > 10


def test_a_screen_with_failed_runs_says_how_to_go_on(execute, trained, tmp_path, capsys):
    assert execute("screen") == 0
    folder = tmp_path / "runs" / "screen-32-design-9-seed0"
    (folder / "metrics.json").unlink()
    assert execute("confirm") == 1
    assert "1 runs of the screen are still to be made" in capsys.readouterr().err
    failed = {"reason": "it diverged", "config": trained[8][0].to_dict(), "device": "", "versions": {}, "commit": ""}
    (folder / "failed.json").write_text(json.dumps(failed), encoding="utf-8")
    assert execute("confirm") == 1
    assert "these runs failed: design 9. `screen --seeds 2` repeats" in capsys.readouterr().err


def test_the_readme_shows_what_is_finished(execute, trained, tmp_path):
    arguments = ["ablations", "--publish", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    assert command.main([*arguments, "--budget-minutes", "0"]) == 0
    empty = "old\n<!-- generated: experiments -->\n\n<!-- end: experiments -->\n"
    assert command.README.read_text(encoding="utf-8") == empty
    assert command.main(arguments) == 0
    text = command.README.read_text(encoding="utf-8")
    one = planted(full(cutout=0, seed=100))
    measured = f"{one:.2f} | {one + 0.4:.2f} | {5 - one / 20:.4f}"
    assert f"| no cutout | 1 | {measured} | -0.50 | -0.50 | what cutout buys |" in text
    assert "(experiments/results/ablations.png)" in text
    assert "Differences are paired by seed. A difference from a single pair has no standard error" in text
    assert "Still to be made" not in text
    assert page.variants_section(page.comparable(page.published())[:3], "ablations").count("Still to be made: ") == 1
    assert "screen.png" not in text


def test_pairs_made_on_different_machines_are_counted():
    def made_on(device, variant, seed):
        about = {"stage": "ablations", "status": "done", "config": {"width": 64}, "split": "test", "shows": ""}
        return {**about, "variant": variant, "seed": seed, "device": device, **measured}

    measured = {"test_accuracy": 90, "test_accuracy_tta": 90, "test_loss": 1}
    measured |= {"data": "toy images", "train_images": 9, "test_images": 9}
    records = [made_on("GPU", "recipe", 100), made_on("CPU", "recipe", 101)]
    records += [made_on("GPU", name, seed) for name in ("no flip", "no EMA") for seed in (100, 101)]
    assert "In 2 of 4 pairs the two runs were made on different machines." in page.variants_section(
        records, "ablations"
    )
    assert "different machines" not in page.variants_section(records[::2], "ablations")


def test_the_published_page_and_readme_are_what_the_records_say():
    published = page.published()
    current = page.comparable(published)
    readme = command.README.read_text(encoding="utf-8")
    assert report.replace_block(readme, "experiments", page.readme_part(current)) == readme
    assert (page.RESULTS / page.RUNS_NAME).read_text(encoding="utf-8") == page.runs_table(published)
    stored = (page.RESULTS / page.PAGE_NAME).read_text(encoding="utf-8")
    by_hand = stored.partition(page.FROZEN[0] + "\n")[2].partition("\n" + page.FROZEN[1])[0]
    assert stored == page.render_page(current, len(published), by_hand)
