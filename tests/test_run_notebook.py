"""run_notebook.py as its user meets it: a run continues where it stopped, and nothing ends in a traceback."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import run_notebook
from utils.runtime import PROJECT_ROOT

SLEEP = "import time\nprint('begun', flush=True)\ntime.sleep(300)"


@pytest.fixture
def notebook(tmp_path):
    """``notebook(source)`` -> the path of a notebook of three code cells, with ``source`` in the middle."""

    def write(source: str):
        cells = [
            new_markdown_cell("# Beginning"),
            new_code_cell("print('first')"),
            new_markdown_cell("# Middle"),
            new_code_cell(source),
            new_code_cell("print('last')"),
        ]
        for cell in cells:
            cell.pop("id")  # not in notebook format 4.4
        nbformat.write(new_notebook(cells=cells, nbformat_minor=4), tmp_path / "small.ipynb")
        return tmp_path / "small.ipynb"

    return write


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """The folder of all runs."""
    monkeypatch.setattr(run_notebook, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("S10_PROFILE", "quick")
    for name in ("S10_RUN_NAME", "S10_SOURCE", "S10_PUBLISH", "CIFAR10_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "runs"


def printed(path) -> str:
    """What the cells of an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_an_unfinished_run_is_continued_and_after_a_finished_one_a_new_one_begins(notebook, runs, capsys):
    """The cell fails in a new run folder and succeeds in one that it has seen, as interrupted training would."""
    path = notebook(
        "import os, pathlib\n"
        "mark = pathlib.Path(os.environ['S10_RUN_NAME'], 'mark')\n"
        "known = mark.exists()\n"
        "mark.touch()\n"
        "assert known, 'no mark yet'\n"
        "print('publish', os.environ.get('S10_PUBLISH'))"
    )
    assert run_notebook.main([str(path)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "stopped in 'Middle' by AssertionError: no mark yet" in message
    assert f"the notebook up to there is {runs / 'notebook-quick' / 'small.ipynb'}; run it again to continue" in message
    assert message.endswith("or with --new to begin another run\n")
    assert printed(runs / "notebook-quick" / "small.ipynb") == "first\n"

    assert run_notebook.main([str(path), "--publish", "--in-place"]) == 0
    assert f"continuing the unfinished run in {runs / 'notebook-quick'}" in capsys.readouterr().out
    assert printed(runs / "notebook-quick" / "small.ipynb") == "first\npublish 1\nlast\n"
    assert printed(path) == "first\npublish 1\nlast\n"

    assert run_notebook.main([str(path)]) == 1  # in a new folder, which has no mark
    assert f"in {runs / 'notebook-quick-2'};" in capsys.readouterr().out


def test_what_a_cell_prints_is_stored_in_one_piece(notebook):
    path = notebook("import time\nprint('begun', flush=True)\ntime.sleep(0.5)\nprint('done')")
    assert run_notebook.main([str(path), "--in-place"]) == 0
    assert [output.text for output in nbformat.read(path, as_version=4).cells[3].outputs] == ["begun\ndone\n"]


def test_it_runs_from_any_folder_and_leaves_nothing_there(notebook, runs, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_notebook.main([str(notebook("print('middle')"))]) == 0
    assert printed(runs / "notebook-quick" / "small.ipynb") == "first\nmiddle\nlast\n"
    assert [*PROJECT_ROOT.glob("kernel-*"), *(tmp_path / "elsewhere").iterdir()] == []


def test_a_kernel_that_does_not_start_is_one_message(notebook, monkeypatch, capsys):
    async def deaf(self, *args, **kwargs):
        raise RuntimeError("Kernel didn't respond in 60 seconds")

    monkeypatch.setattr(run_notebook.NotebookClient, "async_start_new_kernel_client", deaf)
    assert run_notebook.main([str(notebook("1"))]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "the kernel did not start (Kernel didn't respond in 60 seconds)" in message


def test_a_new_run_in_a_folder_that_exists_is_refused(notebook, runs, monkeypatch, capsys):
    monkeypatch.setenv("S10_RUN_NAME", "mine")
    assert run_notebook.main([str(notebook("1")), "--new"]) == 0
    assert run_notebook.main([str(notebook("1")), "--new"]) == 2
    assert "S10_RUN_NAME is 'mine', and its folder exists" in capsys.readouterr().err


def test_the_folder_of_an_unknown_user_is_left_to_the_notebook(monkeypatch):
    monkeypatch.setenv("CIFAR10_DIR", "~nobody-here/cifar")
    assert run_notebook.settings_from_environment()["images"].endswith("cifar")


def test_only_an_unfinished_run_of_the_same_settings_is_continued(runs, monkeypatch):
    settings = run_notebook.settings_from_environment()
    first, second, third = (runs / f"notebook-quick{ending}" for ending in ("", "-2", "-3"))
    run_notebook.write_record(first, settings, finished=False)
    second.mkdir()  # without a record
    assert run_notebook.choose_folder(runs, settings) == (first, True)
    assert run_notebook.choose_folder(runs, settings, new=True) == (third, False)

    monkeypatch.setenv("CIFAR10_DIR", str(runs))
    assert run_notebook.choose_folder(runs, run_notebook.settings_from_environment()) == (third, False)
    changed = {**settings, "config": {**settings["config"], "epochs": 99}}
    assert run_notebook.choose_folder(runs, changed) == (third, False)

    run_notebook.write_record(third, settings, finished=False)
    assert run_notebook.choose_folder(runs, settings) == (third, True)  # the newest
    run_notebook.write_record(third, settings, finished=True)
    assert run_notebook.choose_folder(runs, settings) == (first, True)


def test_a_dead_kernel_ends_with_one_message_and_the_outputs_are_kept(notebook, runs, capsys):
    path = notebook("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
    assert run_notebook.main([str(path)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "the kernel died in 'Middle'" in message
    assert printed(runs / "notebook-quick" / "small.ipynb") == "first\n"


@pytest.mark.parametrize(
    "content",
    [
        '{"cells": [',
        "[]",
        "{}",
        '{"cells": 3, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}',
        '{"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}',
    ],
)
def test_a_file_that_is_not_a_notebook_is_named(tmp_path, content, capsys):
    (tmp_path / "torn.ipynb").write_text(content, encoding="utf-8")
    assert run_notebook.main([str(tmp_path / "torn.ipynb")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "torn.ipynb is not a notebook (" in message
    assert message.endswith("): get a fresh copy")


def test_an_unknown_profile_is_named(monkeypatch, capsys):
    monkeypatch.setenv("S10_PROFILE", "fast")
    assert run_notebook.main([]) == 2
    message = capsys.readouterr().err
    assert "fast" in message
    assert "Traceback" not in message


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_one_message_and_the_outputs_are_kept(notebook, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "run_notebook.py", str(notebook(SLEEP))],
        cwd=PROJECT_ROOT,
        env={**os.environ, "S10_RUN_NAME": str(tmp_path / "run")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert any("Middle" in line for line in process.stdout)
        time.sleep(3)  # from the announcement until the cell sleeps
        os.killpg(process.pid, number)
        message = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert message.count("\n") == 1
    assert "interrupted; the notebook up to there is" in message
    assert printed(tmp_path / "run" / "small.ipynb") == "first\nbegun\n"
    assert json.loads((tmp_path / "run" / "notebook.json").read_text(encoding="utf-8"))["finished"] is False


@pytest.mark.parametrize("mode", ["RGBA", "RGB"])
@pytest.mark.parametrize("opacity", [255, 100])
def test_saved_pictures_keep_their_pixels_and_get_no_larger(tmp_path, mode, opacity):
    ramp = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64)
    pixels = np.dstack([ramp % 256, ramp // 16 % 256, ramp % 7, np.full_like(ramp, opacity)]).astype(np.uint8)
    picture, content = Image.fromarray(pixels).convert(mode), io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    stored = base64.b64encode(content.getvalue()).decode()
    cell = new_code_cell("1", outputs=[new_output("display_data", {"image/png": stored})])
    run_notebook.save(new_notebook(cells=[cell]), tmp_path / "saved.ipynb")
    saved = nbformat.read(tmp_path / "saved.ipynb", as_version=4).cells[0].outputs[0].data["image/png"]
    assert len(saved) < len(stored)
    shown = Image.open(io.BytesIO(base64.b64decode(saved))).convert("RGBA")
    assert np.array_equal(shown, picture.convert("RGBA"))
