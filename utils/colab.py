"""Set-up on Google Colab, and nowhere else: install what is missing, leave Colab's own packages alone."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Where a package's import name is not its name with "-" as "_".
_IMPORT_NAMES = {"pillow": "PIL", "scikit-learn": "sklearn", "grad-cam": "pytorch_grad_cam"}
# Needed for `make run` and `make test`, not by the notebook.
_NOT_ON_COLAB = {"jupyter", "nbval", "pytest", "pytest-timeout", "hypothesis", "ruff"}


def on_colab() -> bool:
    """True in a Colab kernel (which has imported ``google.colab`` before the first cell)."""
    return "google.colab" in sys.modules


def missing_requirements(path: Path = ROOT / "requirements.txt") -> list[str]:
    """The lines of requirements.txt that the notebook needs and that cannot be imported here."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    names = {line: re.match(r"[\w.-]+", line)[0] for line in lines if line}
    return [
        line
        for line, name in names.items()
        if name not in _NOT_ON_COLAB
        and importlib.util.find_spec(_IMPORT_NAMES.get(name, name.replace("-", "_"))) is None
    ]


def install_missing() -> list[str]:
    """Install ``missing_requirements`` with every present package pinned to its version: Colab's NumPy and torch stay.

    Returns:
        What was installed; an empty list when nothing was missing, as after a restart.

    Raises:
        RuntimeError: pip failed; the message ends with its last lines.
    """
    missing = missing_requirements()
    if not missing:
        return []
    pip = [sys.executable, "-m", "pip"]
    present = subprocess.run([*pip, "freeze", "--exclude-editable"], capture_output=True, text=True, check=True).stdout
    pins = [line for line in present.splitlines() if re.fullmatch(r"[\w.-]+==\S+", line)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as constraints:
        constraints.write("\n".join(pins))
    try:
        done = subprocess.run(
            [*pip, "install", "--quiet", "--constraint", constraints.name, *missing], capture_output=True, text=True
        )
    finally:
        os.unlink(constraints.name)
    if done.returncode:
        raise RuntimeError("pip could not install " + ", ".join(missing) + ":\n" + done.stderr.strip()[-600:])
    return missing


def gpu_advice() -> str:
    """A sentence about the GPU: its name, or how to get one."""
    import torch  # only after install_missing

    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}. The full profile runs here."
    if on_colab():
        return "No GPU: choose Runtime > Change runtime type > T4 GPU, or go on with the quick profile on the CPU."
    return "No GPU: the quick profile runs on the CPU in a few minutes."


def prepare() -> None:
    """The set-up cell's work after the clone: install what is missing and say what was done."""
    if on_colab():
        installed = install_missing()
        print("Installed: " + ", ".join(installed) if installed else "Everything needed is here already.")
    print(gpu_advice())
