"""A notebook opened without its project sets itself up, and requirements.txt names what the code imports."""

import importlib.metadata
import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
import torch
from packaging.requirements import Requirement

from tests.test_imports import imported
from utils import colab

ROOT = colab.ROOT
# Stands in for the module that imports torch, which is slow, and for Colab's own module.
DOWNLOAD = """
import sys, types
sys.modules["utils.runtime"] = runtime = types.ModuleType("utils.runtime")
runtime.pick_device = lambda: types.SimpleNamespace(type="cpu")
runtime.device_name = str
"""
COLAB = (
    DOWNLOAD
    + """
sys.modules["google"] = types.ModuleType("google")
sys.modules["google.colab"] = types.ModuleType("google.colab")
"""
)


# --- the first cell ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A repository that can be cloned, with what the first cell needs of the project."""
    folder = tmp_path_factory.mktemp("origin") / "project"
    (folder / "utils").mkdir(parents=True)
    for name in ("requirements.txt", "utils/__init__.py", "utils/colab.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for command in (["init", "-q"], ["add", "-A"],
                    ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "state"]):  # fmt: skip
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def first_cell(folder: Path, repository: object, before: str = DOWNLOAD) -> subprocess.CompletedProcess:
    """Run the notebook's first code cell in ``folder``, in a new process that runs ``before`` first."""
    notebook = nbformat.read(ROOT / "Session10.ipynb", as_version=4)
    source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert 'REPOSITORY = ""' in source, "the notebook must not name a repository: whoever opens it alone fills it in"
    source = source.replace('REPOSITORY = ""', f"REPOSITORY = {str(repository)!r}")
    folder.mkdir(exist_ok=True)
    program = f"import sys; sys.path.insert(0, '')\n{before}\n{source}\nprint('in', os.getcwd())"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("before", [COLAB, DOWNLOAD], ids=["Colab", "a download"])
def test_a_lone_notebook_fetches_the_project_and_survives_a_restart(tmp_path, published, before):
    for _ in range(2):  # the second time is a restarted kernel, back in the notebook's folder
        done = first_cell(tmp_path / "content", published, before)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Everything needed is here already." in done.stdout
        assert done.stdout.rstrip().endswith("session10")


def test_beside_the_project_nothing_is_fetched(published):
    done = first_cell(published, "")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith(published.name)


@pytest.mark.parametrize(
    ("repository", "words"), [("", "Fill in REPOSITORY"), ("no-such-repository", "could not be cloned")]
)
def test_an_address_that_cannot_be_cloned_says_what_to_do(tmp_path, repository, words):
    done = first_cell(tmp_path / "content", repository)
    assert done.returncode == 1
    assert words in done.stderr


# --- packages ---------------------------------------------------------------------------------------------------------


def test_missing_and_untested_packages_are_found(tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "numpy>=1\nno-such-package>=1,<2  # a comment\nscikit-learn>=999\nopencv-python-headless\npytest>=999\n",
        encoding="utf-8",
    )
    missing, differing = colab.check_requirements(requirements)
    assert [Requirement(line) for line in missing] == [Requirement("no-such-package>=1,<2")]
    assert differing == [f"scikit-learn {importlib.metadata.version('scikit-learn')} (tested: >=999)"]


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: records its command and constraints, and exits with ``code``."""
    called = types.SimpleNamespace(code=0)

    def run(command, **options):
        called.command = command
        called.constraints = Path(command[command.index("--constraint") + 1]).read_text(encoding="utf-8").splitlines()
        return subprocess.CompletedProcess(command, called.code, "", "no matching distribution")

    monkeypatch.setattr(colab.subprocess, "run", run)
    monkeypatch.setattr(colab, "check_requirements", lambda: (["no-such-package>=1,<2"], ["numpy 1.0 (tested: >=2)"]))
    return called


def test_a_hosted_notebook_installs_what_is_missing_and_pins_the_rest(pip, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    colab.prepare()
    assert pip.command[-1] == "no-such-package>=1,<2"
    for name in ("numpy", "torch"):
        assert f"{name}=={importlib.metadata.version(name)}" in pip.constraints
    printed = capsys.readouterr().out
    assert "Installed: no-such-package>=1,<2" in printed
    assert "numpy 1.0 (tested: >=2)" in printed
    pip.code = 1
    with pytest.raises(RuntimeError, match=r"(?s)could not install no-such-package.*no matching distribution"):
        colab.prepare()


def test_elsewhere_nothing_is_installed_unasked(pip, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    with pytest.raises(RuntimeError, match=r"missing packages: no-such-package.*%pip install -r"):
        colab.prepare()
    assert not hasattr(pip, "command")


@pytest.mark.parametrize(("has_mps", "words"), [(True, "Apple GPU: the quick"), (False, "No GPU: the quick")])
def test_the_gpu_that_will_be_used_is_named(has_mps, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    monkeypatch.setattr(colab, "on_colab", lambda: False)
    assert colab.gpu_advice().startswith(words)


def test_drive_is_mounted_and_receives_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("S10_RUN_DIR", "")
    with pytest.raises(RuntimeError, match="S10_RUN_DIR"):
        colab.mount_drive()
    drive = types.SimpleNamespace(mount=lambda path: Path(path, "MyDrive").mkdir(parents=True))
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    target = colab.mount_drive("mine")
    assert target == tmp_path / "drive" / "MyDrive" / "mine"
    assert target.is_dir()
    assert os.environ["S10_RUN_DIR"] == str(target)


# --- requirements.txt -------------------------------------------------------------------------------------------------


def test_every_package_that_is_imported_is_named():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("needs git to list the project's files")
    packages = {name.split(".")[0] for file in files for name in imported(ROOT / file)}
    ours = {Path(file).parts[0].removesuffix(".py") for file in files} | {Path(file).stem for file in files}
    foreign = packages - set(sys.stdlib_module_names) - ours - {"google", "pydantic_core"}  # Colab's; pydantic's
    named = {colab.IMPORT_NAMES.get(line.name, line.name.replace("-", "_")) for line in colab.read_requirements()}
    assert foreign - named == set()


def test_the_lower_bounds_are_the_oldest_versions_that_are_tested():
    requirements = {line.name: line.specifier for line in colab.read_requirements()}
    oldest = {line.name: line.specifier for line in colab.read_requirements(ROOT / "constraints" / "oldest.txt")}
    assert oldest.keys() == requirements.keys() - {"jupyter", "ruff"}
    for name, specifier in oldest.items():
        (pin,) = specifier
        (bound,) = (part for part in requirements[name] if part.operator == ">=")
        assert pin.version.startswith(bound.version), name  # 4.10.0.84 is 4.10's first build


def test_colabs_versions_are_among_those_that_are_asked_for():
    requirements = {line.name: line.specifier for line in colab.read_requirements()}
    for line in colab.read_requirements(ROOT / "constraints" / "colab.txt"):
        (pin,) = line.specifier
        assert requirements[line.name].contains(pin.version), line.name
