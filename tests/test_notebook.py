"""The notebook: it runs, its checked outputs hold, and it stays readable."""

import hashlib
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
from utils.runs import report

ROOT = Path(run_notebook.__file__).resolve().parent
NOTEBOOK = ROOT / "Session10.ipynb"
MAX_LINES = 15
MAX_BYTES = 2_000_000  # above it GitHub shows no notebook


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command with ``environment`` added; a value of "" removes the variable."""
    env = {**os.environ, "S10_PROFILE": "quick", **environment}
    env = {name: value for name, value in env.items() if value != ""}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1500)


def digest(folder: Path) -> str:
    parts = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts.update(path.relative_to(folder).as_posix().encode() + (path.read_bytes() if path.is_file() else b""))
    return parts.hexdigest()


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the project as it stands, without data, runs and environment."""
    left_out = {".git", ".venv", "data", "runs", ".pytest_cache", ".ruff_cache", ".hypothesis"}  # of the root alone
    names = shutil.ignore_patterns("__pycache__", ".venv-*")
    return Path(
        shutil.copytree(
            ROOT,
            tmp_path / "project",
            ignore=lambda folder, found: names(folder, found) | (left_out if Path(folder) == ROOT else set()),
        )
    )


@pytest.fixture
def fake(tmp_path) -> Path:
    """A folder for PYTHONPATH whose ``sitecustomize`` runs first in every Python process."""
    (tmp_path / "fake").mkdir()
    return tmp_path / "fake"


# --- it runs ------------------------------------------------------------------------------------------------------


# Settings that a slow core runs in two minutes: a first cell that only these tests put before the others.
SMALL = """
import torch
from utils import config
torch.set_num_threads(1)
quick = config.quick
small = dict(train_images=1000, test_images=100, batch_size=50, epochs=3, peak_epoch=1, range_test_start=1e-5)
config.quick = lambda **changes: quick(**{**small, "range_test_steps": 60, "width": 16, **changes})
"""


def small_copy(folder: Path) -> Path:
    """The notebook with ``SMALL`` before its cells."""
    small = nbformat.read(NOTEBOOK, as_version=4)
    small.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    path = folder / "Small.ipynb"
    nbformat.write(small, path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_cell_runs_on_real_images_and_checked_outputs_agree(cifar10, copy, tmp_path):
    before = digest(copy / "Results"), (copy / "README.md").read_bytes()
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
    # Without being asked to, a run publishes nothing.
    assert (digest(copy / "Results"), (copy / "README.md").read_bytes()) == before


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_without_data_and_network_it_runs_on_digits(copy, fake):
    (fake / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*args, **kwargs):\n"
        "    raise OSError('no network')\n"
        "socket.create_connection = refuse\n",
        encoding="utf-8",
    )
    small_copy(copy).replace(copy / NOTEBOOK.name)
    before = digest(copy / "Results")
    done = run([sys.executable, "run_notebook.py"], copy, CIFAR10_DIR="", PYTHONPATH=str(fake), S10_RUN_NAME="digits")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "NOT CIFAR-10" in done.stdout
    assert (copy / "runs" / "digits" / "Session10.ipynb").exists()
    metrics = json.loads((copy / "runs" / "digits" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["source"] == "digits"
    assert digest(copy / "Results") == before


# --- it stays readable ------------------------------------------------------------------------------------------


def test_cells_are_short_and_define_nothing(notebook):
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), cell.source


def test_every_figure_is_explained_below_it(notebook):
    """Right below, or below the figures and printed checks that belong to it."""
    cells = notebook.cells
    last_lines = [cell.source.splitlines()[-1] if cell.cell_type == "code" else "" for cell in cells]
    drawn = [i for i, line in enumerate(last_lines) if re.match(r"(figures|plotting)\.\w+\(", line)]
    assert len(drawn) > 10
    for index in drawn:
        text = next(cell.source for cell in cells[index + 1 :] if cell.cell_type == "markdown")
        assert "**What to see.**" in text or index == len(cells), cells[index].source


def test_a_number_in_the_text_has_a_source_or_a_check(notebook):
    """Percentages, factors and counts: in a cell that cites, or with a printed cell right below or above it."""
    cells = notebook.cells
    claims = r"\d+(?:\.\d+)?(?:%| times| points| orders)"
    for index, cell in enumerate(cells):
        if cell.cell_type != "markdown" or not re.search(claims, cell.source) or "<details>" in cell.source:
            continue
        around = cells[max(0, index - 2) : index + 2]
        checked = any("print(" in near.source or "figures." in near.source for near in around if near is not cell)
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
    shown = "".join(
        "".join(o.get("data", {}).get("text/markdown", "")) for cell in code_cells(notebook) for o in cell.outputs
    )
    blocks = report.readme_blocks(metrics)
    assert blocks["headline"] in shown
    assert blocks["comparison"] in shown


def test_the_exercises_answers_run(notebook):
    text = next(cell.source for cell in notebook.cells if cell.source.startswith("## 11. Exercises"))
    answers = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(answers) == text.count("<details>") == 7
    done = run([sys.executable, "-c", "\n".join(answers)], ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    for claim in (
        "onset: ",
        "no cutout: {'cutout': 0}",
        "76%",
        "9 x 9 = 81",
        "5 x 5 = 25",
        "peak at epoch 5: 53%",
        "peak at epoch 12: 53%",
        "True",
    ):
        assert claim in done.stdout
    assert "True\nTrue\n" in done.stdout
