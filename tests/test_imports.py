"""Which module may import which, and what importing costs: no network."""

import ast
import re
import subprocess
import sys

import pytest

import utils
from utils.runtime import PROJECT_ROOT

READING_ORDER = re.findall(r"^\d+\. +``(\w+)``", utils.__doc__, flags=re.MULTILINE)
MODULES = sorted(path.stem for path in (PROJECT_ROOT / "utils").glob("*.py") if path.stem != "__init__")
OURS = {"utils", "models", *(path.stem for path in PROJECT_ROOT.glob("*.py"))}  # scripts are importable, too


def own_imports(path):
    """What a file imports of this project: ``utils.x`` as ``x``, anything else by its top name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top in OURS:
                found.add(rest[0] if top == "utils" and rest else top)
    return found


def test_every_module_has_its_place_in_the_reading_order():
    assert set(MODULES) <= set(READING_ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_above_it(module):
    above = READING_ORDER[: READING_ORDER.index(module)]
    assert own_imports(PROJECT_ROOT / "utils" / f"{module}.py") <= {*above, "models"}


@pytest.mark.parametrize("path", sorted((PROJECT_ROOT / "models").glob("*.py")), ids=lambda path: path.name)
def test_the_network_stands_alone(path):
    assert own_imports(path) <= {"models"}


# Runs in a fresh interpreter: audit events tell of every look-up and connection, also of those whose error is caught.
WATCHED_IMPORT = """
import importlib, sys
calls = []
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
sys.addaudithook(lambda event, args: calls.append((event, args)) if event in NETWORK else None)
for name in sys.argv[1:]:
    importlib.import_module(name)
    if calls:
        sys.exit(f"importing {name} reached for the network: {calls}")
"""


def test_importing_reaches_for_no_network(tmp_path):
    names = ["utils", "models", *(f"utils.{name}" for name in READING_ORDER if name in MODULES), "train"]
    result = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, *names],
        cwd=PROJECT_ROOT,
        env={"PATH": "", "HOME": str(tmp_path)},  # without NO_ALBUMENTATIONS_UPDATE: our modules must set it
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
