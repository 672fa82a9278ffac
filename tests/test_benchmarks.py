"""The benchmark's tables hold every row. Nothing here depends on how fast the machine is."""

import contextlib
import json
import statistics
import types

import pytest
import torch

from benchmarks import speed

MACHINE = {"device": "a CPU", "loader_processes": 2, "versions": {"torch": "2.14"}, "quick": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where ``python -m benchmarks.speed --quick`` has written its file."""
    out = tmp_path_factory.mktemp("bench")
    assert speed.main(["--quick", "--device", "cpu", "--repeats", "2", "--out", str(out)]) == 0
    return out


def read(path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.slow
def test_every_part_is_measured_beside_its_baseline(folder):
    rows = read(folder / "speed-cpu.json")["rows"]
    assert {row["part"] for row in rows} == set(speed.PARTS)
    for part in ("training", "step", "evaluation", "augmentation", "run"):
        names = [row["name"] for row in rows if row["part"] == part]
        assert names[0].startswith("baseline")
        assert len(names) > 1
        assert all(name.startswith("this project") for name in names[1:])
    for row in rows:
        assert "error" not in row
        assert row["seconds"] == statistics.median(row.get("repeats", [row["seconds"]])) > 0


@pytest.mark.slow
def test_only_measures_the_named_parts_anew(folder, capsys):
    before = read(folder / "speed-cpu.json")["rows"]
    argv = ["--quick", "--device", "cpu", "--repeats", "1", "--out", str(folder), "--only", "augmentation"]
    assert speed.main([*argv, "--note", "Beside another run."]) == 0
    stored = read(folder / "speed-cpu.json")
    changed = [row["part"] for row in stored["rows"] if row not in before]
    assert set(changed) == {"augmentation"}
    assert len(stored["rows"]) == len(before)
    shown = capsys.readouterr().out
    assert "Beside another run." in shown
    assert all(f"| {row['name']} |" in shown for row in before)


def test_the_speed_up_is_over_the_first_row_and_a_failure_says_why():
    rows = [
        {"part": "step", "name": "baseline", "images": 512, "seconds": 2.0, "repeats": [2.0]},
        {"part": "step", "name": "this project", "images": 512, "seconds": 0.5, "launches": 3.0, "gpu_ms": 6.25},
        {"part": "step", "name": "compiled", "images": 512, "error": "no such GPU"},
        {"part": "checkpoint", "name": "one", "images": 0, "seconds": 0.25},
    ]
    lines = speed.results_table({"machine": MACHINE, "note": "", "rows": rows}).splitlines()[4:]
    assert lines == [
        "| **step** |  |  |  |  |",
        "| baseline | 2 | 256 | 1.0 |  |",
        "| this project | 0.5 | 1,024 | 4.0 | 3 launches, 6.2 ms of GPU time |",
        "| compiled |  |  |  | failed: no such GPU |",
        "| **checkpoint** |  |  |  |  |",
        "| one | 0.25 |  |  |  |",
    ]


def test_a_row_that_fails_does_not_end_the_benchmark():
    def prepare():
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    args = types.SimpleNamespace(device=torch.device("cpu"), repeats=1)
    found = speed.measure([({"part": "step", "name": "large", "images": 1}, prepare)], args)
    assert found == [{"part": "step", "name": "large", "images": 1, "error": "CUDA out of memory."}]


def test_a_gpu_has_rows_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    sizes = dict.fromkeys(speed.PARTS, (512, 10))
    args = types.SimpleNamespace(device=torch.device("cuda"), has_gpu_rows=True, sizes=sizes, epochs=24)
    settings = {row["name"]: prepare.keywords for row, prepare in speed.make_rows(args) if row["part"] == "run"}
    assert settings == {
        "baseline, fp32": {},
        "this project, bf16, recorded": {},
        "this project, bf16, eager": {"recorded": "off"},
        "this project, bf16, deterministic": {"deterministic": True},
        "this project, bf16, compiled and recorded": {"compile": "default"},
        "this project, fp16, recorded": {"precision": "fp16"},
        "this project, bf16, recorded, one test at the end": {"eval_every": 24},
    }


def test_a_step_is_counted_without_views():
    counter = speed.count_operations(batch_size=16, ghost_batch=4, width=8)
    assert counter.calls["convolution"] == counter.calls["native_batch_norm"] == 8
    assert counter.calls["_fused_adamw_"] == 1
    assert counter.calls["view"] == 0
    assert counter.bytes["relu"] == 2 * 2 * 16 * 8 * (1024 + 3 * 512 + 256 + 3 * 128)  # read and written, in bf16
    assert f"| all that are no views | {counter.calls.total()} |" in speed.operations_table(counter)


def test_measured_files_are_published_and_trials_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    readme, path = tmp_path / "README.md", tmp_path / "speed-cpu.json"
    readme.write_text("Speed\n<!-- generated: speed -->\nold\n<!-- end: speed -->\n", "utf-8")
    stored = {"machine": {**MACHINE, "quick": True}, "note": "Alone.", "rows": []}
    path.write_text(json.dumps(stored), "utf-8")
    assert speed.main(["--publish", str(path)]) == 2
    assert "was measured with --quick" in capsys.readouterr().err
    path.write_text(json.dumps({**stored, "machine": MACHINE}), "utf-8")
    assert speed.main(["--publish", str(path)]) == 0
    assert read(tmp_path / "results" / "speed-cpu.json") == read(path)
    assert "a CPU, 2 loader processes; torch 2.14. Alone." in readme.read_text("utf-8")


def test_the_readme_shows_the_stored_files():
    assert speed.readme_block() in (speed.HERE / "README.md").read_text("utf-8")


def test_gpu_time_counts_each_kernel_once(monkeypatch):
    """The profiler also lists "Optimizer.step#Adam.step" on the GPU, from its first kernel to its last."""

    def event(key: str, device: str, microseconds: float, is_user_annotation: bool = False):
        kind, times = types.SimpleNamespace(name=device), dict(self_device_time_total=microseconds, count=4)
        return types.SimpleNamespace(key=key, device_type=kind, is_user_annotation=is_user_annotation, **times)

    events = [event("conv", "CUDA", 6000), event("adam", "CUDA", 2000), event("cudaLaunchKernel", "CPU", 0)]
    events.append(event("Optimizer.step#Adam.step", "CUDA", 5000, is_user_annotation=True))
    profiler = types.SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(speed, "profile", lambda activities: contextlib.nullcontext(profiler))
    found = speed.profile_steps(lambda: None, steps=2)
    assert found == {"launches": 2.0, "gpu_ms": 4.0, "kernels": [("conv", 3.0), ("adam", 1.0)]}
