"""The benchmark's table and JSON hold every row, with units. Nothing here depends on how fast the machine is."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import speed
from utils.runtime import PROJECT_ROOT

PARTS = ("training", "step", "evaluation", "augmentation")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What ``python -m benchmarks.speed --quick`` prints, and the JSON it writes."""
    path = tmp_path_factory.mktemp("benchmarks") / "speed.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--device", "cpu", "--threads", "1", "--out", path]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def rows_of(result, part):
    return {row["name"]: row for row in result["rows"] if row["part"] == part}


def test_every_part_has_its_baseline_and_ours(output):
    _, result = output
    for part in ("training", "step"):
        rows = rows_of(result, part)
        assert list(rows)[:2] == ["usual way, fp32", "ours, fp32"]
    assert any(row["tta"] for row in rows_of(result, "evaluation").values())
    assert list(rows_of(result, "augmentation")) == [
        "Albumentations, DataLoader",
        "Albumentations, in process",
        "ours",
    ]


def test_every_row_holds_its_numbers_and_every_number_its_unit(output):
    _, result = output
    for row in result["rows"]:
        assert row["first_pass_seconds"] > 0
    numbers = ("images_per_second", "images_per_core_second", "seconds_per_epoch", "gflop_per_second", "speedup")
    for row in result["rows"]:
        assert 50 < row["peak_memory_mib"] < 100_000
        assert row["repeats"] == 2
        for name in {*numbers, "matmul_fraction", "peak_memory_mib"} & set(row):
            assert name in result["units"]
        for name in set(numbers) & set(row):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        assert ("matmul_fraction" in row) == (row["part"] != "augmentation")
    # The first row of a part is what the others are compared with.
    for part in PARTS:
        assert next(iter(rows_of(result, part).values()))["speedup"] == {"median": 1, "min": 1, "max": 1}
    # A speedup above 1 means more images a second.
    usual, ours = list(rows_of(result, "training").values())[:2]
    rate, base = ours["images_per_second"], usual["images_per_second"]
    assert rate["min"] / base["max"] <= ours["speedup"]["median"] <= rate["max"] / base["min"]
    # An epoch is 50,000 images, whatever was measured.
    assert ours["seconds_per_epoch"]["max"] == pytest.approx(50_000 / rate["min"])


@pytest.mark.parametrize(("device", "modes"), [("cpu", ["default"]), ("cuda", ["default", "reduce-overhead"])])
def test_a_whole_benchmark_also_compiles_and_says_what_that_cost(monkeypatch, device, modes):
    monkeypatch.setattr(shutil, "which", lambda name: name)  # a compiler is there
    monkeypatch.setattr(speed, "pick_device", lambda name: torch.device(device))
    parts = speed.make_parts(speed.parse_args([]), torch.device(device), "bf16")
    assert [row.compile for row in parts["step"] if row.compile != "off"] == modes
    row = dict(name="ours, bf16, compile default", compile="default", images=512, first_pass_seconds=45.4)
    assert speed.row_name(row) == "ours, bf16, compile default (first 512 images: 45 s)"


def test_the_work_an_image_takes_is_counted(output):
    _, result = output
    # 3x3 convolutions by hand, multiply-adds: 32x32x3x64, 32x32x64x128, 2 of 16x16x128x128, 16x16x128x256,
    # 8x8x256x512, 2 of 4x4x512x512; and the linear layer.
    multiply_adds = 9 * (1024 * (3 * 64 + 64 * 128) + 256 * (2 * 128**2 + 128 * 256) + 64 * 256 * 512 + 32 * 512**2)
    forward = 2 * (multiply_adds + 512 * 10)
    first_layer = 2 * 9 * 1024 * 3 * 64
    assert result["flop_per_image"] == {"training": 3 * forward - first_layer, "evaluation": forward}


def test_the_table_shows_every_row_and_the_machine(output):
    table, result = output
    lines = [line for line in table.splitlines() if line.startswith("  ") and "images/s" not in line]
    assert len(lines) == len(result["rows"])
    for line, row in zip(lines, result["rows"]):
        assert line.strip().startswith(row["name"])
        assert f" {row['peak_memory_mib']:,.0f} " in line
    assert result["machine"]["device"] in table
    assert result["machine"]["versions"]["torch"] in table
    assert "fp32 to fp32" in table
