"""Imports go one way and use no network, and the versions that are tested fit the requirements."""

import ast
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from utils.runtime import PROJECT_ROOT

# Each level may import only from those before it.
LEVELS = [
    "models utils.runtime",
    "utils.transforms",
    "utils.config utils.sources",
    "utils.dataset utils.schedule utils.metrics utils.averaging",
    "utils.loaders utils.engine",
    "utils.lr_finder utils.analysis",
    "utils.plotting",
    "utils.lesson",
    "utils.runs.cli utils.runs.files utils.runs.machine utils.runs.figures",
    "utils.runs.checkpoint utils.runs.weights utils.runs.ranks",
    "utils.runs.report",
    "utils.runs.job",
    "train predict run_notebook experiments benchmarks",
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names.split()}
FILES = sorted(
    path
    for pattern in ("*.py", "models/*.py", "utils/**/*.py", "experiments/*.py", "benchmarks/*.py")
    for path in PROJECT_ROOT.glob(pattern)
    if pattern == "*.py" or path.parent.name not in ("utils", "runs") or path.name != "__init__.py"
)


def unit_of(module: str) -> str | None:
    """The name in ``LEVEL`` that a module belongs to; None for other people's."""
    parts = module.split(".")
    return next((name for n in (3, 2, 1) if (name := ".".join(parts[:n])) in LEVEL), None)


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {unit for name in names if (unit := unit_of(name))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT_ROOT)))
def test_imports_go_one_way(path):
    own = unit_of(".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts))
    assert own, "not in LEVELS"
    assert [name for name in imported(path) - {own} if LEVEL[name] >= LEVEL[own]] == []


@pytest.mark.slow
def test_imports_use_no_network_and_no_user_name(tmp_path):
    """Audit events report every look-up and connection of a fresh interpreter, even if its error is caught."""
    code = """if True:
        import getpass, importlib, pwd, sys
        pwd.getpwuid = {}.__getitem__  # no such user
        watched = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
        sys.addaudithook(lambda event, args: event in watched and sys.exit(f"{event} {args}"))
        [importlib.import_module(name) for name in sys.argv[1:]]
        getpass.getuser()"""
    names = [name for name in LEVEL if name.startswith(("utils", "train", "predict"))]
    environment = {"PATH": "", "HOME": str(tmp_path)}  # without NO_ALBUMENTATIONS_UPDATE, which our modules set
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=PROJECT_ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["oldest", "colab"])
def test_the_versions_tested_fit_the_requirements(name):
    def read(*parts):
        lines = PROJECT_ROOT.joinpath(*parts).read_text("utf-8").splitlines()
        return {
            r.name: r.specifier for line in lines if re.match(r"\w", line) for r in [Requirement(line.split("#")[0])]
        }

    bounds = read("requirements.txt") | read("requirements-dev.txt")
    pins = {package: str(pin) for package, pin in read("constraints", f"{name}.txt").items()}
    pinned = {package: pin.strip("=") for package, pin in pins.items() if pin.startswith("==")}  # not what others need
    assert {package for package, version in pinned.items() if version not in bounds[package]} == set()
