"""run_notebook.py as its user meets it: output as it comes, a copy that opens everywhere, one message at a bad end."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import run_notebook
from utils.runtime import PROJECT_ROOT


@pytest.fixture
def notebook(tmp_path):
    """``notebook(source)`` -> the path of a notebook with ``source`` in its middle cell."""

    def write(source: str):
        first, last = new_code_cell("print('first')"), new_code_cell("print('last')")
        cells = [new_markdown_cell("# Beginning"), first, new_markdown_cell("## Middle"), new_code_cell(source), last]
        nbformat.write(new_notebook(cells=cells), tmp_path / "small.ipynb")
        return tmp_path / "small.ipynb"

    return write


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """The folder of all runs."""
    monkeypatch.setattr(run_notebook, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("S10_PROFILE", "quick")
    for name in ("S10_RUN_NAME", "S10_PUBLISH", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # restored after the test, whatever it sets
        monkeypatch.delenv(name)
    return tmp_path / "runs"


def printed(path) -> str:
    """What the cells of an executed notebook printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.mark.slow
def test_outputs_are_shown_and_stored(notebook, runs, capfd):
    path = notebook(
        "import os, sys\nfrom utils.runtime import progress_bar\n"
        "for epoch in progress_bar(range(2), 'bar'): print('epoch', epoch, flush=True)\n"
        "print('a warning', file=sys.stderr)\nprint(os.environ.get('S10_RUN_NAME'), os.environ.get('S10_PUBLISH'))"
    )
    assert run_notebook.main([str(path), "--in-place"]) == 0
    shown = capfd.readouterr().out
    assert "--- Beginning\nfirst\n\n--- Middle\nepoch 0\nepoch 1\nNone None\nlast\n" in shown
    assert f"The executed notebook is {runs / 'small-quick-seed100.ipynb'}" in shown
    assert printed(path) == "first\nepoch 0\nepoch 1\nNone None\nlast\n"  # without the bar and the warning
    executed = nbformat.read(path, as_version=4)
    assert [cell.metadata for cell in executed.cells] == [{}] * 5
    assert executed.metadata.keys() == {"language_info"}
    assert len(executed.cells[3].outputs) == 1


@pytest.mark.slow
def test_the_run_folder_and_publishing_reach_the_notebook(notebook, runs):
    (runs / "quick-seed100").mkdir(parents=True)
    path = notebook("import os\nprint(os.environ['S10_RUN_NAME'], os.environ['S10_PUBLISH'])")
    assert run_notebook.main([str(path), "--new", "--publish"]) == 0
    folder = runs / "quick-seed100-2"
    assert printed(runs / "small-quick-seed100-2.ipynb") == f"first\n{folder} 1\nlast\n"


@pytest.mark.slow
def test_the_newest_unfinished_run_goes_on(notebook, runs):
    for name, files in (("quick-seed100", ("checkpoint.pt", "metrics.json")), ("quick-seed100-2", ("checkpoint.pt",))):
        (runs / name).mkdir(parents=True)
        for file in files:
            (runs / name / file).touch()
    assert run_notebook.main([str(notebook("import os\nprint(os.environ['S10_RUN_NAME'])"))]) == 0
    assert printed(runs / "small-quick-seed100-2.ipynb") == f"first\n{runs / 'quick-seed100-2'}\nlast\n"
    path = str(runs / "quick-seed100")  # a folder that is named is the one
    assert run_notebook.main([str(notebook("import os\nprint(os.environ['S10_RUN_NAME'])")), "--run-dir", path]) == 0
    assert printed(runs / "small-quick-seed100.ipynb") == f"first\n{path}\nlast\n"


def test_a_file_that_is_no_notebook_is_named(runs, tmp_path, capsys):
    (tmp_path / "notes.ipynb").write_text("notes")
    assert run_notebook.main([str(tmp_path / "notes.ipynb")]) == 1
    assert (
        capsys.readouterr().err == f"run_notebook.py: {tmp_path / 'notes.ipynb'} is not a notebook: get a fresh copy\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("1 / 0", "Middle, cell 4: ZeroDivisionError: division by zero"),
        ("import os\nos.kill(os.getpid(), 9)", "Middle: the kernel died, often for lack of memory"),
    ],
)
def test_a_bad_end_is_one_message_that_names_the_cell(notebook, runs, capsys, source, reason):
    assert run_notebook.main([str(notebook(source)), "--run-dir", str(runs / "mine")]) == 1
    assert capsys.readouterr().err.endswith(
        f"run_notebook.py: {reason}; the notebook so far is {runs / 'small-mine.ipynb'}\n"
    )
    assert printed(runs / "small-mine.ipynb") == "first\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_one_message_and_the_outputs_are_kept(notebook, tmp_path, number):
    path = notebook("import time\nprint('begun', flush=True)\ntime.sleep(300)")
    command = [sys.executable, "run_notebook.py", path, "--run-dir", tmp_path / f"run-{os.getpid()}"]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    copy = PROJECT_ROOT / "runs" / f"small-run-{os.getpid()}.ipynb"
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, **streams)
    try:
        assert any("begun" in line for line in process.stdout)
        time.sleep(0.5)
        process.send_signal(number)
        message = process.communicate(timeout=120)[1]
        assert process.returncode == 128 + number
        assert message == f"run_notebook.py: interrupted; the notebook so far is {copy}\n"
        assert printed(copy) == "first\nbegun\n"
    finally:
        process.kill()
        copy.unlink(missing_ok=True)


def test_a_copy_has_no_warnings_and_keeps_tags():
    warning, stays = (new_output("stream", name=name, text="text") for name in ("stderr", "stdout"))
    cell = new_code_cell("1", outputs=[warning, stays], metadata={"tags": ["raises-exception"], "papermill": {}})
    notebook = new_notebook(cells=[cell], metadata={"papermill": {}})
    run_notebook.clean(notebook)
    assert notebook.metadata == {}
    assert cell.metadata == {"tags": ["raises-exception"]}
    assert cell.outputs == [stays]
