"""Device, precision, seeds, and files written whole."""

import io
import resource

import numpy as np
import pytest
import torch

from utils import runtime
from utils.runs import files, machine
from utils.runs.checkpoint import rng_states, set_rng_states
from utils.runs.files import write_atomically
from utils.runtime import ConfigError, pick_device, pick_precision, progress_bar
from utils.sources import printable

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device", "capability", "flags", "expected"),
    [
        ("auto", "cuda", (9, 0), [], "bf16"),
        ("auto", "cuda", (7, 5), [], "fp16"),  # a T4 only emulates bf16
        ("auto", "cpu", None, ["avx512_bf16"], "bf16"),
        ("auto", "cpu", None, ["avx2"], "fp32"),
        ("auto", "mps", None, [], "fp32"),
        ("bf16", "cpu", None, [], "bf16"),
    ],
)
def test_auto_precision_is_what_the_hardware_computes_in(monkeypatch, name, device, capability, flags, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True), raising=False)
    assert pick_precision(name, torch.device(device)).name == expected


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda: pick_device("gpu"), "device is 'gpu'.*: choose one of cpu"),
        (lambda: pick_device("cuda:2"), "device is 'cuda:2'.*: choose one of cpu"),
        (lambda: pick_precision("fp16", CPU), "precision is 'fp16' on a CPU: use 'fp32', or 'bf16'"),
        (lambda: runtime.set_threads(100_000), "threads is 100000: choose between 1 and"),
    ],
)
def test_what_this_machine_lacks_is_refused_with_the_alternatives(monkeypatch, choose, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(ConfigError, match=message):
        choose()


def test_a_gpu_that_torch_has_no_code_for_is_passed_over_or_refused(monkeypatch):
    def ones(*shape: int, device: torch.device) -> torch.Tensor:
        if device.type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nand four lines of advice")
        return torch.zeros(shape)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.warns(
        UserWarning, match=r"cuda is there but fails \(CUDA error: no kernel image .*\): computing without"
    ):
        assert pick_device("auto").type != "cuda"
    with pytest.raises(ConfigError, match=r"device is 'cuda' \(CUDA error: no kernel image is available\): choose"):
        pick_device("cuda")


def test_a_progress_bar_is_on_a_terminal_or_in_a_notebook_and_leaves_nothing(monkeypatch, capsys):
    assert list(progress_bar(range(3), "work")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")  # a log
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    list(progress_bar(range(3), None))
    list(progress_bar(range(3), "work"))
    terminal = capsys.readouterr().err
    notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr("sys.stdout", notebook)
    list(progress_bar(range(3), "work"))
    for text in (terminal, notebook.getvalue()):
        assert text.count("work: ") >= 1
        assert not text.replace("\r", "\n").splitlines()[-1].strip()
    assert capsys.readouterr().err == ""


def test_seeds_and_saved_states_repeat_the_draws():
    runtime.seed_everything(3)
    states, first, numpys = rng_states(), torch.rand(4), np.random.rand()
    set_rng_states(states)
    assert torch.equal(torch.rand(4), first)
    runtime.seed_everything(3)
    assert torch.equal(torch.rand(4), first)
    assert np.random.rand() == numpys


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path):
    path, old = tmp_path / "run.json", tmp_path / "old"
    files.write_json(path, {"loss": 0.5})
    write_atomically(path, b"new", keep=old)
    assert (path.read_bytes(), old.read_text()) == (b"new", '{\n "loss": 0.5\n}\n')
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # stands in for a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"new"
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "old"}


def test_a_result_names_its_versions_device_and_commit():
    assert machine.versions()["torch"] == torch.__version__
    assert machine.device_name(CPU).endswith("CPU, 1 thread")
    assert machine.code_commit() == "unknown" or len(machine.code_commit().rstrip("+")) == 40
    assert printable("caf\udce9") == "caf\\xe9"


def test_a_gpu_that_is_too_old_for_cudnn_costs_no_run(monkeypatch):
    def version():
        raise RuntimeError("cuDNN version 91900 is not compatible with devices with SM < 7.5")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert machine.versions()["torch"] == torch.__version__
