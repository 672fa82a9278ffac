"""Seeds, device, precision, threads and memory, and what ``runs.machine`` says about the machine."""

import ctypes
import platform
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils import runtime
from utils.runs import machine
from utils.runtime import ConfigError, keep_freed_memory, pick_device, pick_precision, seed_everything

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device", "capability", "flags", "expected"),
    [
        ("auto", "cuda", (9, 0), {}, "bf16"),
        ("auto", "cuda", (8, 0), {}, "bf16"),
        ("auto", "cuda", (7, 5), {}, "fp16"),  # a T4 only emulates bf16
        ("auto", "cpu", None, {"avx512_bf16": True}, "bf16"),
        ("auto", "cpu", None, {"amx_bf16": True}, "bf16"),
        ("auto", "cpu", None, {"avx512_bf16": False, "avx2": True}, "fp32"),
        ("auto", "cpu", None, {}, "fp32"),
        ("fp32", "cuda", (9, 0), {}, "fp32"),
        ("fp16", "cuda", (9, 0), {}, "fp16"),
        ("bf16", "cpu", None, {}, "bf16"),
        ("auto", "mps", None, {}, "fp32"),
        ("fp16", "mps", None, {}, "fp16"),
    ],
)
def test_auto_precision_is_what_the_hardware_computes_in(monkeypatch, name, device, capability, flags, expected):
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


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_automatic_device_is_the_fastest_one(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == expected
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_75", "sm_80", "sm_90"], True),  # as on 8.0
        ((6, 0), ["sm_75", "sm_80"], False),
        ((7, 0), ["sm_75", "compute_75"], False),
        ((9, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((9, 4), ["gfx90a", "gfx942"], True),  # AMD
    ],
)
def test_a_gpu_that_this_torch_has_no_code_for_is_not_used(monkeypatch, capability, built_for, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if runs:
        assert pick_device("auto").type == pick_device("cuda").type == "cuda"
        return
    reason = rf"has no code for Tesla P100 \(compute capability {capability[0]}\.{capability[1]}\)"
    with pytest.warns(UserWarning, match=f"{reason}: computing without it"):
        assert pick_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match=f"device is 'cuda', but torch .* {reason}: choose another GPU"):
        pick_device("cuda")


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
def test_a_missing_device_is_refused_with_the_alternatives(monkeypatch, name, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=re.escape(message)):
        pick_device(name)


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_an_impossible_number_of_threads_is_refused(count):
    with pytest.raises(ConfigError, match=f"threads is {count}: choose between 1 and"):
        runtime.set_threads(count)


KEPT_MEMORY = """
import resource, torch
from utils.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12 << 20)  # 48 MiB, freed at once; blocks below 32 MiB glibc soon keeps anyway
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
    assert before > 20 * 1000  # pages that the kernel cleared again
    assert after < before / 10


@pytest.mark.parametrize("library", ["", "glibc"])
def test_without_glibc_or_in_one_that_refuses_the_threshold_memory_settings_stay_unchanged(monkeypatch, library):
    changed = []

    def mallopt(number, value):
        if number == -3 and value > 32 << 20:  # M_MMAP_THRESHOLD, before glibc 2.35
            return 0
        changed.append(number)
        return 1

    keep_freed_memory.cache_clear()
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert not keep_freed_memory()
    assert changed == []
    keep_freed_memory.cache_clear()


def test_seeding_repeats_every_global_generator():
    def draw():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_versions_describe_this_machine():
    versions = machine.versions()
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__


@pytest.mark.parametrize(("threads", "words"), [(1, "CPU, 1 thread"), (4, "CPU, 4 threads")])
def test_a_cpu_is_named_with_its_threads(monkeypatch, threads, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert runtime.device_name(CPU).endswith(words)


def test_a_gpu_that_triton_does_not_support_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(machine.CompileError, match=r"compile is 'default', but Tesla T4 .*7\.5.*: use --compile off"):
        machine.check_compile("default", torch.device("cuda"))
    machine.check_compile("off", torch.device("cuda"))
    machine.check_compile("default", CPU)
