"""The two notebooks: they run, their checked outputs hold, and a reader finds them as they should be."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from experiments import tables
from utils import config, runtime
from utils.runs import machine, report
from utils.runtime import PROJECT_ROOT

NAMES = ("Session10", "Appendix")
NOTEBOOKS = {name: nbformat.read(PROJECT_ROOT / f"{name}.ipynb", as_version=4) for name in NAMES}
LIMITS = {"Session10": {"cells": 60, "words": 3200}, "Appendix": {"cells": 36, "words": 1800}}
MAX_BYTES = 1_300_000  # GitHub shows no much larger ones
# What the tests leave out, so that one slow core needs few minutes.
SHORTER = {
    "dict(seed=100)": "dict(seed=100, train_images=600, test_images=100, batch_size=30, epochs=3, peak_epoch=1, width=8, "
    "range_test_start=1e-5, range_test_steps=60)",
    "epochs=8, seed=seed": "epochs=1, seed=seed",
    "small_run(small, ": "small_run(small, epochs=3, ",
    "subset(2000)": "subset(200)",
    "subset(10, 500)": "subset(10, 50)",
}


def cells(name: str, kind: str = "code") -> list:
    return [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == kind]


def outputs(name: str, part: str = "") -> str:
    """All text that the cells with ``part`` in their source left."""
    found = [output for cell in cells(name) if part in cell.source for output in cell.outputs]
    return "\n".join(one.get("text", "") + one.get("data", {}).get("text/markdown", "") for one in found)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def few_pictures(folder: Path) -> str:
    """CIFAR-10's folder; of 60,000 pictures, a folder with links to 1,500, which load in a second."""
    whole = Path(os.environ["CIFAR10_DIR"]).resolve()
    for split, count in (("train", 130), ("test", 20)):
        for classes in (whole / split).glob("*"):
            (folder / "few" / split / classes.name).mkdir(parents=True)
            for picture in sorted(classes.iterdir())[:count]:
                (folder / "few" / split / classes.name / picture.name).symlink_to(picture)
    return str(folder / "few" if (folder / "few").exists() else whole)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("name", "source"), [("Session10", "auto"), ("Session10", "digits"), ("Appendix", "auto")])
def test_every_cell_runs_and_checked_outputs_agree(cifar10, tmp_path, name, source):
    """Opened without the project around it, but beside a clone of it and another project's ``utils``."""
    text = (PROJECT_ROOT / f"{name}.ipynb").read_text(encoding="utf-8")
    for words, fewer in SHORTER.items():
        text = text.replace(words, fewer)
    if source == "digits":  # an output that says CIFAR-10's figures cannot agree
        text = text.replace("# NBVAL_CHECK_OUTPUT", "")
    (tmp_path / f"{name}.ipynb").write_text(text, encoding="utf-8")
    (tmp_path / "session10").symlink_to(PROJECT_ROOT)
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").touch()
    run, published = tmp_path / "run", contents(report.RESULTS)
    env = {**os.environ, "CIFAR10_DIR": few_pictures(tmp_path) if name == "Appendix" else os.environ["CIFAR10_DIR"]}
    env |= {"S10_PROFILE": "quick", "S10_SOURCE": source, "S10_RUN_NAME": str(run), "S10_PUBLISH": ""}
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-cell-timeout=1200", "-q", f"{name}.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    if name == "Session10":
        assert json.loads((run / report.METRICS_NAME).read_text(encoding="utf-8"))["epochs"] == 3
        assert {path.name for path in run.glob("*.png")} >= {path.name for path in report.RESULTS.glob("*.png")}
    assert contents(report.RESULTS) == published


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short(name):
    text = "\n".join(cell.source for cell in cells(name, "markdown"))
    assert len(NOTEBOOKS[name].cells) <= LIMITS[name]["cells"]
    assert len(text.split()) <= LIMITS[name]["words"]
    assert (PROJECT_ROOT / f"{name}.ipynb").stat().st_size < MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_it_was_run_from_top_to_bottom_and_holds_its_outputs_alone(name):
    assert [cell.execution_count for cell in cells(name)] == list(range(1, len(cells(name)) + 1))
    found = [output for cell in cells(name) for output in cell.outputs]
    assert not [output for output in found if output.output_type == "error" or output.get("name") == "stderr"]
    assert "widget-view" not in str(found)  # a progress bar, which ends with its kernel
    assert set(NOTEBOOKS[name].metadata) <= {"kernelspec", "language_info"}
    assert not re.search(r"/(home|root|tmp|work)/", outputs(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_followed_by_what_to_see(name):
    """In at most 60 words."""
    everything = NOTEBOOKS[name].cells
    drawn = [i for i, cell in enumerate(everything) if re.search(r"^(display|plotting|Image|SVG)\b", cell.source, re.M)]
    assert len(drawn) >= 5
    for index in drawn:
        first = everything[index + 1].source.split("\n\n")[0]
        assert first.startswith("**What to see.**"), everything[index].source
        assert len(first.split()) <= 60, first


def test_no_cell_defines_again_what_a_module_holds():
    modules = [path.read_text(encoding="utf-8") for path in PROJECT_ROOT.glob("[mue]*/**/*.py")]
    text = "\n".join([*modules, *(cell.source for name in NAMES for cell in cells(name))])
    for name in re.findall(r"^(?:def|class) (\w+)", "\n".join(cell.source for cell in cells("Appendix")), re.M):
        assert len(re.findall(rf"^(?:def|class) {name}\b", text, re.M)) == 1 + name.startswith(("My", "my_")), name


def test_changed_settings_get_a_run_folder_of_their_own_name(monkeypatch, capsys):
    monkeypatch.setenv("S10_PROFILE", "quick")
    monkeypatch.setenv("S10_RUN_NAME", "")
    (settings,) = (cell.source for cell in cells("Session10") if cell.source.startswith("settings = "))
    for change, folder in (("", "quick-seed100"), (", dropout=0.1", "quick-seed100-dropout0.1")):
        made = {"os": os, "Path": Path, "runtime": runtime, "machine": machine, "configs": config}
        exec(settings.replace("dict(seed=100)", f"dict(seed=100{change})"), made)
        assert made["run_dir"] == Path("runs") / folder


def test_exercises_wait_for_an_answer_and_the_answers_are_right():
    asked, answered = outputs("Session10", "lesson.check_"), outputs("Appendix", "lesson.check_")
    assert len(re.findall("^not yet: ", asked, re.M)) == len(re.findall("^right$", answered, re.M)) == 6
    assert "not yet" not in answered


def test_stored_tables_are_those_of_the_published_records():
    metrics = report.read_metrics()
    blocks = report.readme_blocks(metrics)
    for part in ("headline", "provenance", "comparison", "log"):
        assert blocks[part] in outputs("Session10")
    records = tables.frame(json.loads((tables.RESULTS / tables.RECORDS_NAME).read_text(encoding="utf-8")))
    assert tables.ablations_section(records, is_page=False) in outputs("Session10")


def test_shown_code_is_the_code_that_runs():
    imports = next(cell.source for cell in cells("Session10") if cell.source.startswith("%matplotlib"))
    made: dict = {}
    exec("\n".join(line for line in imports.splitlines() if not line.startswith("%")), made)
    shown = [cell for cell in cells("Session10") if cell.source.startswith("lesson.show(")]
    assert len(shown) >= 7
    for cell in shown:
        assert cell.outputs[0]["data"]["text/markdown"] == eval(cell.source, made).data


def test_the_stored_run_trained():
    """To its last epoch, in these outputs; a full run is the published one, or from another machine and close to it."""
    printed, published = outputs("Session10"), report.read_metrics()
    assert "already holds" not in printed
    assert len(re.findall(r"^ +\d+/\d+ +\d\.\de-\d+ .*%", printed, re.M)) == (24 if "full profile" in printed else 6)
    if "full profile" in printed:
        final = re.search(r"final test (([\d.]+)%.*)", printed)
        is_elsewhere = published["device"] not in outputs("Session10", "settings = ")
        assert final[1] == report.accuracies(published) or is_elsewhere
        assert abs(float(final[2]) - published["mean_accuracy"]) < 4 * published["std_accuracy"]
