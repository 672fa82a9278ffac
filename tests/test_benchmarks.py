"""The benchmark's table and JSON hold every row, with units. Nothing here depends on how fast the machine is."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import gpu, reference, speed, workloads
from utils.runtime import PROJECT_ROOT, ConfigError, pick_precision

CPU = torch.device("cpu")
QUICK = ("--quick", "--device", "cpu", "--threads", "1")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What ``python -m benchmarks.speed --quick`` prints, and the JSON it writes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks.speed", *QUICK, "--out", folder]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "speed-cpu.json").read_text(encoding="utf-8"))


def rows_of(result, part):
    return {row["name"]: row for row in result["rows"] if row["part"] == part}


def planned(part, *argv, precision="bf16"):
    """The rows that a command line gives on a CPU."""
    args = speed.parse_args(list(argv))
    speed.fill_in(args, CPU)
    return speed.make_parts(args, CPU, precision)[part]


@pytest.mark.slow
def test_every_part_has_its_baseline_and_ours(output):
    _, result = output
    usual = ["usual way, fp32, replicated borders", "usual way, fp32, zero padding"]
    for part in ("training", "step"):
        assert list(rows_of(result, part))[:3] == [*usual, "ours, fp32"]
    assert any(row["tta"] for row in rows_of(result, "evaluation").values())
    loaders = ["Albumentations, DataLoader", "Albumentations, in process", "ours"]
    assert list(rows_of(result, "augmentation")) == loaders


@pytest.mark.slow
def test_every_row_holds_its_numbers_and_every_number_its_unit(output):
    _, result = output
    numbers = {"images_per_second", "images_per_core_second", "seconds_per_epoch", "gflop_per_second", "speedup"}
    for row in result["rows"]:
        assert row["first_pass_seconds"] > 0
        assert 50 < row["peak_memory_mib"] < 100_000
        assert row["repeats"] == 2
        assert {*numbers, "matmul_fraction", "peak_memory_mib"} & row.keys() <= result["units"].keys()
        for name in numbers & row.keys():
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        assert ("matmul_fraction" in row) == (row["part"] != "augmentation")
    # The first row of a part is what the others are compared with.
    for part in ("training", "step", "evaluation", "augmentation"):
        assert next(iter(rows_of(result, part).values()))["speedup"] == {"median": 1, "min": 1, "max": 1}
    # A speedup above 1 means more images a second.
    usual, _, ours = list(rows_of(result, "training").values())[:3]
    rate, base = ours["images_per_second"], usual["images_per_second"]
    assert rate["min"] / base["max"] <= ours["speedup"]["median"] <= rate["max"] / base["min"]
    # An epoch is 50,000 images, whatever was measured.
    assert ours["seconds_per_epoch"]["max"] == pytest.approx(50_000 / rate["min"])


@pytest.mark.slow
def test_the_table_shows_every_row_and_the_machine(output):
    table, result = output
    lines = [line for line in table.splitlines() if line.startswith("|") and "MiB" in line]
    assert len(lines) == len(result["rows"])
    for line, row in zip(lines, result["rows"]):
        assert line.startswith(f"| {row['name']}")
        assert f" {row['peak_memory_mib']:,.0f} MiB" in line
    assert result["machine"]["device"] in table
    assert result["machine"]["versions"]["torch"] in table
    assert re.search(r"\[ 1/\d+, +\d+ s\] training: usual way", table)  # progress, while it runs


def test_compiled_rows_are_asked_for_and_say_what_compiling_cost():
    rows = planned("step", "--compile", "default", "reduce-overhead")
    assert [row.compile for row in rows if row.compile != "off"] == ["default", "reduce-overhead"]
    row = dict(name="ours, bf16, compile default", compile="default", images=512, first_pass_seconds=45.4)
    assert speed.row_name(row) == "ours, bf16, compile default (first 512 images: 45 s)"


def test_packed_and_unpacked_are_measured_in_the_same_run():
    assert [row.packed for row in planned("step") if row.name.startswith("ours, bf16")] == [False, True]


def test_a_row_measures_what_its_name_says(monkeypatch):
    seen = []
    monkeypatch.setattr(workloads, "pack_small_maps", lambda model: seen.append("packed"))
    monkeypatch.setattr(workloads, "evaluate", lambda *args, precision, tta: seen.append(f"tta {tta}"))
    monkeypatch.setattr(reference, "make_model", lambda padding, width: seen.append(padding) or torch.nn.Linear(1, 1))

    def start(model, config, lr_min, lr_max, steps, precision):
        seen.append(f"{precision.name}, compile {config.compile}")
        return types.SimpleNamespace(tested_model=model)

    monkeypatch.setattr(workloads, "start", start)

    def found(row):
        seen.clear()
        run_pass = workloads.make_pass(row)
        if row.part == "evaluation":
            run_pass()
        return seen.copy()

    rows = [*planned("step", *QUICK, "--compile", "default"), *planned("evaluation", *QUICK)]
    assert [found(row) for row in rows if row.part != "matmul"] == [
        ["replicate"],
        ["zeros"],
        ["fp32, compile off"],
        ["bf16, compile off"],
        ["packed", "bf16, compile off"],
        ["packed", "bf16, compile default"],
        ["fp32, compile off", "tta False"],
        ["bf16, compile off", "tta False"],
        ["packed", "bf16, compile off", "tta False"],
        ["packed", "bf16, compile off", "tta True"],
    ]


def test_passes_are_fair_to_the_usual_way(monkeypatch):
    """Its processes start once in a row, since a pass may be a single batch; and every step's images are counted."""
    args = ("--batch-size", "8", "--images", "20", *QUICK)
    assert [row.images for row in planned("step", *args)[:5]] == [16] * 5
    keeps = []
    monkeypatch.setattr(reference, "make_loader", lambda *args: keeps.append(args[-1]))
    for part in ("training", "augmentation"):
        workloads.make_pass(planned(part, *args)[0])
    assert keeps == [True, False]


def test_a_row_that_fails_says_why_and_the_others_go_on():
    good = planned("evaluation", *QUICK, precision="fp32")[0]
    bad = dataclasses.replace(good, name="bad", precision="fp8")
    said = []
    worked, failed = workloads.measure([good, bad], 1, said.append)
    assert worked[0].seconds > 0
    assert "fp8" in failed
    assert any("bad, failed" in words for words in said)
    stored = {
        "machine": {"device": "a CPU", "loader_processes": 2, "versions": {}, "warm_up_passes": 0},
        "matmul_gflop_per_second": {},
        "rows": [speed.summarize(bad, failed, None)],
    }
    assert "failed: " in speed.results_table(stored)


def test_a_row_that_the_time_limit_cuts_is_measured_again_unless_it_needs_more_than_the_limit(tmp_path, monkeypatch):
    clock = [0.0]

    class PretendedWorker(contextlib.nullcontext):
        def __init__(self, *args):
            super().__init__(self)

        def call(self, function, timeout):
            seconds = function()
            clock[0] += min(seconds, timeout)
            if seconds > timeout:
                raise workloads.RowError("cut")
            return {"text": f"{seconds} s"}

    lengths = {"short": 30, "medium": 50, "too long": 100, "last": 5}
    rows = [("part", name, lambda seconds=seconds: seconds) for name, seconds in lengths.items()]
    monkeypatch.setattr(gpu, "make_rows", lambda args, device: rows)
    monkeypatch.setattr(gpu, "Worker", PretendedWorker)
    monkeypatch.setattr(gpu, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    measured = []
    for _ in range(4):
        assert gpu.main([*QUICK, "--out", str(tmp_path), "--budget-minutes", "1"]) == 0
        stored = json.loads((tmp_path / gpu.FILE_NAME).read_text(encoding="utf-8"))["rows"]
        measured.append([row.get("text", "cut") for row in stored])
    assert measured == [["30 s"], ["30 s", "50 s"], ["30 s", "50 s", "cut"], ["30 s", "50 s", "cut", "5 s"]]


def test_a_gpu_is_never_measured_on_the_digits_instead_of_cifar10(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "load_dataset", lambda: toy)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "the times are those of 50,000 images, but these are " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_everything_for_a_gpu_is_one_command_that_goes_on_where_it_stopped(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CIFAR10_DIR", str(image_folder))
    argv = [*QUICK, "--num-workers", "0", "--out", str(tmp_path)]
    assert gpu.main([*argv, "--budget-minutes", "0.001"]) == 0
    assert "the time is up" in capsys.readouterr().out
    assert gpu.main(argv) == 0
    first = json.loads((tmp_path / gpu.FILE_NAME).read_text(encoding="utf-8"))
    names = {row["name"] for row in first["rows"]}
    ours = f"ours, {pick_precision('auto', CPU).name}"  # bf16 on CPUs that have units for it
    assert names >= {ours, "usual way, fp32, zero padding", "ours, deterministic", "a checkpoint", "a step"}
    assert [row for row in first["rows"] if "error" in row] == []
    assert first["ratio"] == first["rows"][1]["seconds"] / first["rows"][0]["seconds"]
    capsys.readouterr()
    monkeypatch.setattr(speed, "code_commit", lambda: "another")
    assert gpu.main(argv) == 2
    assert "of another commit: move it away" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("CIFAR10_DIR", str(image_folder))
    assert gpu.main(argv) == 0  # nothing is measured twice
    assert capsys.readouterr().out.count("measured before") == len(first["rows"])
    assert json.loads((tmp_path / gpu.FILE_NAME).read_text(encoding="utf-8")) == first


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{}", "is not what a benchmark writes"), ('{"machine": {"quick": true}}', "was measured with --quick")],
)
def test_only_real_measurements_are_published(tmp_path, content, reason):
    path = tmp_path / "speed-cpu.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason):
        speed.publish([path], readme=tmp_path / "README.md")


def test_the_work_an_image_takes_is_counted():
    # 3x3 convolutions by hand, multiply-adds: 32x32x3x64, 32x32x64x128, 2 of 16x16x128x128, 16x16x128x256,
    # 8x8x256x512, 2 of 4x4x512x512; and the linear layer.
    multiply_adds = 9 * (1024 * (3 * 64 + 64 * 128) + 256 * (2 * 128**2 + 128 * 256) + 64 * 256 * 512 + 32 * 512**2)
    forward = 2 * (multiply_adds + 512 * 10)
    first_layer = 2 * 9 * 1024 * 3 * 64
    assert workloads.count_flop("training", 64) == 3 * forward - first_layer
    assert workloads.count_flop("evaluation", 64) == forward
