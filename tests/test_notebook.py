"""The notebook: it runs, its checked outputs hold, and it stays readable."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import run_notebook
from experiments import page
from utils.runs import report

ROOT = Path(run_notebook.__file__).resolve().parent
NOTEBOOK = ROOT / "Session10.ipynb"
MAX_LINES = 15
MAX_BYTES = 2_000_000  # GitHub shows no larger notebook


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "S10_PROFILE": "quick", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1500)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the project, without data, runs and environments."""
    left_out = {".git", ".venv", "data", "runs", ".pytest_cache", ".ruff_cache", ".hypothesis"}  # utils/runs stays
    everywhere = shutil.ignore_patterns("__pycache__", ".venv-*")

    def ignored(folder: str, names: list[str]) -> set[str]:
        return everywhere(folder, names) | (left_out if Path(folder) == ROOT else set())

    return Path(shutil.copytree(ROOT, tmp_path / "project", ignore=ignored))


# --- it runs ------------------------------------------------------------------------------------------------------


# A first cell that only these tests add, with settings that a slow core runs in two minutes.
SMALL = """
import torch
from utils import config
torch.set_num_threads(1)
quick = config.quick
small = dict(train_images=1000, test_images=100, batch_size=50, epochs=3, peak_epoch=1, range_test_start=1e-5)
config.quick = lambda **changes: quick(**{**small, "range_test_steps": 60, "width": 16, **changes})
"""


def small_copy(folder: Path) -> Path:
    """``folder/Small.ipynb``: the notebook with ``SMALL`` before its cells."""
    small = nbformat.read(NOTEBOOK, as_version=4)
    small.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    path = folder / "Small.ipynb"
    nbformat.write(small, path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_cell_runs_on_real_images_and_checked_outputs_agree(cifar10, copy, tmp_path):
    before = contents(copy / "Results"), (copy / "README.md").read_bytes()
    done = run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=1200", "-q", "-p", "no:cacheprovider",
         "-o", "addopts=", "-o", "testpaths=", "-o", "timeout=0", small_copy(copy)],
        copy,
        S10_RUN_NAME=str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["epochs"] == 3
    figures = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert figures >= {path.name for path in report.RESULTS.glob("*.png")}
    # Nothing is published unless asked for.
    assert (contents(copy / "Results"), (copy / "README.md").read_bytes()) == before


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_without_data_and_network_it_runs_on_digits(copy, tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "sitecustomize.py").write_text(  # runs first in every Python process
        "import socket\n"
        "def refuse(*args, **kwargs):\n"
        "    raise OSError('no network')\n"
        "socket.create_connection = refuse\n",
        encoding="utf-8",
    )
    small_copy(copy).replace(copy / NOTEBOOK.name)
    before = contents(copy / "Results")
    environment = {"CIFAR10_DIR": "", "PYTHONPATH": str(tmp_path / "fake"), "S10_RUN_NAME": "digits"}
    done = run([sys.executable, "run_notebook.py"], copy, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "NOT CIFAR-10" in done.stdout
    assert (copy / "runs" / "digits" / "Session10.ipynb").exists()
    metrics = json.loads((copy / "runs" / "digits" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["source"] == "digits"
    assert contents(copy / "Results") == before


# --- it stays readable ------------------------------------------------------------------------------------------


def test_cells_are_short_and_define_nothing(notebook):
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), cell.source


def test_every_figure_is_explained_below_it(notebook):
    """Directly below, or below the figures and printed checks that belong to it."""
    cells = notebook.cells
    last_lines = [cell.source.splitlines()[-1] if cell.cell_type == "code" else "" for cell in cells]
    drawn = [i for i, line in enumerate(last_lines) if re.match(r"(figures|plotting|page)\.\w+\(", line)]
    assert len(drawn) > 10
    for index in drawn:
        text = next(cell.source for cell in cells[index + 1 :] if cell.cell_type == "markdown")
        assert "**What to see.**" in text, cells[index].source


def test_a_number_in_the_text_has_a_source_or_a_check(notebook):
    """Percentages, factors and counts: in a cell that cites, or next to a cell that prints."""
    cells = notebook.cells
    claims = r"\d+(?:\.\d+)?(?:%| times| points| orders)"
    for index, cell in enumerate(cells):
        if cell.cell_type != "markdown" or not re.search(claims, cell.source) or "<details>" in cell.source:
            continue
        around = cells[max(0, index - 2) : index + 2]
        sources = ("print(", "figures.", "page.")  # of a check, of the run, of the published experiments
        checked = any(source in near.source for source in sources for near in around if near is not cell)
        assert checked or "](http" in cell.source, cell.source


def test_it_was_run_top_to_bottom_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_it_is_small_and_carries_no_noise(notebook):
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not [cell for cell in notebook.cells if set(cell.metadata) - {"tags"}]
    assert run_notebook.WIDGET not in NOTEBOOK.read_text(encoding="utf-8")


def test_its_stored_outputs_are_the_published_run(notebook):
    metrics = report.read_metrics()
    printed = "".join(o.get("text", "") for cell in code_cells(notebook) for o in cell.outputs)
    expected = f"test accuracy {metrics['test_accuracy']:.2f}%, with flip TTA {metrics['test_accuracy_tta']:.2f}%"
    assert expected in printed
    for name, accuracy in metrics["per_class_accuracy"].items():
        assert f"Accuracy for class: {name} is {accuracy:.1f} %" in printed
    shown = "".join(o.get("data", {}).get("text/markdown", "") for cell in code_cells(notebook) for o in cell.outputs)
    blocks = report.readme_blocks(metrics)
    assert blocks["headline"] in shown
    assert blocks["comparison"] in shown
    records = page.comparable(page.published())
    for stage in ("confirm", "ablations"):
        assert page.variants_section(records, stage) in shown


def test_the_exercises_answers_run(notebook):
    text = next(cell.source for cell in notebook.cells if cell.source.startswith("## 12. Exercises"))
    answers = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(answers) == text.count("<details>") == 7
    done = run([sys.executable, "-c", "\n".join(answers)], ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    claims = ["onset: ", "no cutout: {'cutout': 0}", "76%", "9 x 9 = 81", "5 x 5 = 25", "True\nTrue\n"]
    for claim in [*claims, "peak at epoch 5: 50%", "peak at epoch 12: 50%"]:
        assert claim in done.stdout
