"""make's set-up refuses an old Python in one line, and clears what a failed set-up left."""

import os
import shutil
import subprocess
import sys

import pytest

from utils.runtime import PROJECT_ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
# Stands in for a Python of some version: checks run in the real one, and environments are empty.
PYTHON = """#!/bin/sh
case "$1 $2" in
  --version*) echo Python {version} ;;
  -c*) exec {executable} -S -c "import sys; sys.version_info = ({numbers}, 'final', 0); exec(sys.argv[1])" "$2" ;;
  "-m venv")
    echo "$@" >> calls
    for folder; do :; done
    mkdir -p $folder/bin
    cp "$0" $folder/bin/python ;;
esac
"""


@pytest.mark.parametrize("folder", [".venv", ".venv-oldest"])
def test_an_old_python_is_refused_and_with_a_newer_one_what_is_there_is_cleared(tmp_path, folder):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(PROJECT_ROOT / name, tmp_path)
    shutil.copytree(PROJECT_ROOT / "constraints", tmp_path / "constraints")
    for name, version in (("python3.11", "3.11.2"), ("old", "3.9.1"), ("new", "3.13.0")):
        numbers = version.replace(".", ", ")
        (tmp_path / name).write_text(PYTHON.format(version=version, numbers=numbers, executable=sys.executable))
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def make(python: str) -> subprocess.CompletedProcess:
        command = ["make", f"{folder}/.ready", f"PYTHON={python}"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    refused = make("old")
    assert refused.returncode == 2
    message = "Python 3.11.4 or newer is needed, this is 3.9.1: make PYTHON=python3.12 ..."
    assert refused.stderr.splitlines()[0] == message
    assert not (tmp_path / folder).exists()

    for _ in range(2):
        done = make("new")
        assert done.returncode == 0, done.stderr
        os.utime(tmp_path / folder / ".ready", (0, 0))  # as after a change of requirements.txt
    assert ("no python3.11 here that is new enough: using Python 3.13.0" in done.stdout) == (folder == ".venv-oldest")
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls == [f"-m venv --clear {folder}", f"-m venv {folder}"]  # the second only brings it up to date
