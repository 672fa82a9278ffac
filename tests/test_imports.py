"""Which module may import which; and imports must not use the network."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import utils
import utils.runs
from utils.runtime import PROJECT_ROOT


def listed(package) -> list[str]:
    """The modules in the numbered list of a package's docstring, in its order."""
    return re.findall(r"^\d+\. +``(\w+)``", package.__doc__, flags=re.MULTILINE)


# Each may import only those before it.
LESSON, RUNS = listed(utils)[:-1], [f"runs.{name}" for name in listed(utils.runs)]
ORDER = [*LESSON, *RUNS, "train", "predict", "run_notebook", "experiments", "benchmarks"]
SCRIPTS = [path.stem for path in PROJECT_ROOT.glob("*.py")]


def name_of(path) -> str:
    """A file's name in ``ORDER``."""
    parts = path.relative_to(PROJECT_ROOT).with_suffix("").parts
    if parts[0] != "utils":
        return parts[0]
    return ".".join(parts[1:]) if parts[1] == "runs" else parts[1]


FILES = sorted(
    path
    for pattern in ("*.py", "utils/**/*.py", "experiments/*.py", "benchmarks/*.py")
    for path in PROJECT_ROOT.glob(pattern)
    if path.name != "__init__.py"
)


def imported(path) -> Iterator[str]:
    """The full names of what a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path) -> set[str]:
    """The modules of this project that a file imports, by their names in ``ORDER``."""
    found = set()
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "utils" and rest:
            found.add(".".join(rest[:2]) if rest[0] == "runs" else rest[0])
        elif top in {"models", "experiments", "benchmarks", "tests", *SCRIPTS}:
            found.add(top)
    return found


def test_the_reading_order_names_every_module():
    assert {name_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT_ROOT)))
def test_imports_go_one_way(path):
    name = name_of(path)
    allowed = {"models", *ORDER[: ORDER.index(name)]}
    if name == "sources":
        allowed = {"sources", "runtime"}
    if name in ("experiments", "benchmarks"):
        allowed = allowed - {"train", "predict", "run_notebook", "experiments"} | {name}
    assert own_imports(path) <= allowed


def test_the_lesson_imports_nothing_from_runs():
    lesson = [path for path in FILES if name_of(path) in LESSON]
    assert len(lesson) > 10
    assert not [path.name for path in lesson if any(name.startswith("runs") for name in own_imports(path))]


@pytest.mark.parametrize("path", sorted((PROJECT_ROOT / "models").glob("*.py")), ids=lambda path: path.name)
def test_the_network_stands_alone(path):
    assert own_imports(path) <= {"models"}


# For a fresh interpreter: audit events report every look-up and connection, even if its error is caught.
WATCHED_IMPORT = """
import importlib, sys
calls = []
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
sys.addaudithook(lambda event, args: calls.append((event, args)) if event in NETWORK else None)
for name in sys.argv[1:]:
    importlib.import_module(name)
    if calls:
        sys.exit(f"importing {name} used the network: {calls}")
"""


def test_imports_use_no_network(tmp_path):
    names = ["utils", "models", *(f"utils.{name}" for name in [*LESSON, *RUNS]), "train"]
    result = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, *names],
        cwd=PROJECT_ROOT,
        env={"PATH": "", "HOME": str(tmp_path)},  # no NO_ALBUMENTATIONS_UPDATE: our modules set it
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
