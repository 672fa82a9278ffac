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
from utils import colab, report

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
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", ".*_cache", ".hypothesis")
    return Path(shutil.copytree(ROOT, tmp_path / "project", ignore=ignored))


@pytest.fixture
def fake(tmp_path) -> Path:
    """A folder for PYTHONPATH whose ``sitecustomize`` runs first in every Python process."""
    (tmp_path / "fake").mkdir()
    return tmp_path / "fake"


# --- it runs ------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1500)
def test_every_cell_runs_on_real_images_and_checked_outputs_agree(cifar10, tmp_path):
    done = run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=1200", "-q", "-p", "no:cacheprovider",
         "-o", "addopts=", "-o", "testpaths=", "-o", "timeout=0", "Session10.ipynb"],
        ROOT,
        S10_RUN_NAME=str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 30  # three times chance
    figures = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert figures >= {
        "train.png", "test.png", "lr_finder.png", "one_cycle.png", "model_viz.png", "mis.png",
        "confusion_matrix.png", "class_accuracy.png", "network.png",
    }  # fmt: skip


@pytest.mark.timeout(1500)
def test_without_data_and_network_it_runs_on_digits_and_leaves_results_alone(copy, fake):
    (fake / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*args, **kwargs):\n"
        "    raise OSError('no network')\n"
        "socket.create_connection = refuse\n"
    )
    before = digest(copy / "Results")
    done = run([sys.executable, "run_notebook.py"], copy, CIFAR10_DIR="", PYTHONPATH=str(fake), S10_RUN_NAME="digits")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NOT CIFAR-10" in done.stdout
    assert str(copy / "runs" / "digits") in done.stdout
    assert (copy / "runs" / "digits" / "Session10.ipynb").exists()
    assert json.loads((copy / "runs" / "digits" / "metrics.json").read_text())["source"] == "digits"
    assert digest(copy / "Results") == before


# --- Colab ----------------------------------------------------------------------------------------------------------


def first_cell(notebook, folder: Path, fake: Path, repository: str) -> subprocess.CompletedProcess:
    """The first code cell in an otherwise empty folder, in a process that looks like Colab."""
    (fake / "sitecustomize.py").write_text(
        "import sys, types\n"
        "sys.modules['google'] = types.ModuleType('google')\n"
        "sys.modules['google.colab'] = types.ModuleType('google.colab')\n"
    )
    folder.mkdir(exist_ok=True)
    source = code_cells(notebook)[0].source.replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
    return run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, '')\n" + source + "\nprint('in', os.getcwd())"],
        folder,
        PYTHONPATH=str(fake),
    )


@pytest.fixture
def published(copy) -> Path:
    """The copy as a git repository that can be cloned."""
    for command in (["init", "-q"], ["add", "-A"],
                    ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "state"]):  # fmt: skip
        subprocess.run(["git", *command], cwd=copy, check=True)
    return copy


def test_on_colab_the_first_cell_clones_installs_nothing_needless_and_survives_a_restart(
    notebook, tmp_path, fake, published
):
    for _ in range(2):  # the second time is a restarted kernel, back in the notebook's folder
        done = first_cell(notebook, tmp_path / "content", fake, str(published))
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Everything needed is here already." in done.stdout
        assert done.stdout.rstrip().endswith("session10")


def test_on_colab_an_unset_address_says_what_to_do(notebook, tmp_path, fake):
    done = first_cell(notebook, tmp_path / "content", fake, "")
    assert done.returncode == 1
    assert "Fill in REPOSITORY above" in done.stderr


def test_colab_installs_only_what_is_missing_and_pins_the_rest(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("numpy>=2\nno-such-package>=1,<2  # a comment\npytest>=8\nno-such-checker\n")
    assert colab.missing_requirements(requirements) == ["no-such-package>=1,<2", "no-such-checker"]

    calls = []

    def pip(command, **options):
        calls.append(command)
        if "install" in command:
            calls.append(Path(command[command.index("--constraint") + 1]).read_text())
        return subprocess.CompletedProcess(command, 0, "numpy==2.4.0\ntorch==2.11.0+cu130\nx @ file:///x\n", "")

    monkeypatch.setattr(colab, "missing_requirements", lambda: ["no-such-package>=1,<2"])
    monkeypatch.setattr(colab.subprocess, "run", pip)
    assert colab.install_missing() == ["no-such-package>=1,<2"]
    assert calls[1][-1] == "no-such-package>=1,<2"
    assert calls[2].splitlines() == ["numpy==2.4.0", "torch==2.11.0+cu130"]


def test_a_failing_install_shows_pips_reason(monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, int("install" in command), "", "no matching distribution")

    monkeypatch.setattr(colab, "missing_requirements", lambda: ["no-such-package"])
    monkeypatch.setattr(colab.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=r"(?s)could not install no-such-package.*no matching distribution"):
        colab.install_missing()


# --- it stays readable ------------------------------------------------------------------------------------------


def test_cells_are_short_and_define_nothing(notebook):
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), cell.source


def test_every_figure_is_explained_below_it(notebook):
    """Right below, or below the figures and printed checks that belong to it."""
    cells = notebook.cells
    figures = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and cell.source.endswith("figure")]
    assert len(figures) > 8
    for index in figures:
        text = next(cell.source for cell in cells[index + 1 :] if cell.cell_type == "markdown")
        assert "**What to see.**" in text, cells[index].source


def test_it_was_run_top_to_bottom_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_it_is_small_and_carries_no_noise(notebook):
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not [cell for cell in notebook.cells if set(cell.metadata) - {"tags"}]
    assert run_notebook.WIDGET not in NOTEBOOK.read_text()


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
    assert len(answers) == text.count("<details>") == 5
    done = run([sys.executable, "-c", "\n".join(answers)], ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    for claim in ("76%", "9 x 9 = 81", "5 x 5 = 25", "peak at epoch 5: 53%", "peak at epoch 12: 53%", "True"):
        assert claim in done.stdout
    assert "False" not in done.stdout
