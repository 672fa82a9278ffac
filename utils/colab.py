"""Set-up for a notebook opened without its project: on Google Colab, on Kaggle, as a download."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
DRIVE = Path("/content/drive")

# Import names that are not just the package's name with "_" for "-".
IMPORT_NAMES = {
    "ipython": "IPython",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
# Needed for `make run`, `make lab` and the checks, not by the notebook.
FOR_MAKE = {"jupyter", "nbformat", "nbclient", "nbval", "pytest", "pytest-timeout", "hypothesis", "scipy", "ruff"}


def on_colab() -> bool:
    """True in a Colab kernel (which has imported ``google.colab`` before the first cell)."""
    return "google.colab" in sys.modules


def is_hosted() -> bool:
    """True on Colab and Kaggle, whose machines are temporary, so that installing packages harms nobody."""
    return on_colab() or "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def read_requirements(path: Path = ROOT / "requirements.txt") -> list[Requirement]:
    """The lines of a requirements file."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def check_requirements(path: Path = ROOT / "requirements.txt") -> tuple[list[str], list[str]]:
    """Compare this environment with what the notebook needs of a requirements file.

    Returns:
        ``(missing, differing)``: requirements for pip, and descriptions of packages in untested versions.
    """
    missing, differing = [], []
    for requirement in read_requirements(path):
        name = canonicalize_name(requirement.name)
        if name in FOR_MAKE:
            continue
        if importlib.util.find_spec(IMPORT_NAMES.get(name, name.replace("-", "_"))) is None:
            missing.append(str(requirement))
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # installed under another name, as cv2 by opencv-python
        if not requirement.specifier.contains(version, prereleases=True):
            differing.append(f"{name} {version} (tested: {requirement.specifier})")
    return missing, differing


def install(missing: list[str]) -> None:
    """Install requirements, with every installed package pinned to its version: Colab keeps its NumPy and torch.

    Raises:
        RuntimeError: pip failed; the message ends with its last lines.
    """
    pins = {}
    for package in importlib.metadata.distributions():  # of two with one name, the first is the one that is imported
        with contextlib.suppress(InvalidVersion, TypeError):  # such as system packages, which pip does not manage
            pins.setdefault(canonicalize_name(package.name), Version(package.version))
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch, "present.txt")
        constraints.write_text("\n".join(f"{name}=={version}" for name, version in pins.items()), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *missing],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    if done.returncode:
        raise RuntimeError("pip could not install " + ", ".join(missing) + ":\n" + done.stderr.strip()[-600:])


def mount_drive(folder: str = "session10") -> Path:
    """Mount Google Drive and have every checkpoint copied there, so that a new machine can continue from the copy.

    Sets ``S10_RUN_DIR``, so call it before the run's folder is opened. Colab asks for your permission.

    Args:
        folder: below "My Drive"; created if missing.

    Raises:
        RuntimeError: not on Colab.
    """
    if not on_colab():
        raise RuntimeError("Drive can only be mounted on Colab: elsewhere set S10_RUN_DIR to a permanent folder")
    from google.colab import drive

    drive.mount(str(DRIVE))
    target = DRIVE / "MyDrive" / folder
    target.mkdir(parents=True, exist_ok=True)
    os.environ["S10_RUN_DIR"] = str(target)
    return target


def gpu_advice() -> str:
    """A sentence about the GPU: its name, or how to get one."""
    from utils.runtime import device_name, pick_device  # here, since torch may not be installed before

    device = pick_device()
    if device.type == "cuda":
        return f"GPU: {device_name(device)}. The full profile runs here."
    if device.type == "mps":
        return "Apple GPU: the quick profile runs here in a few minutes."
    if on_colab():
        return "No GPU: choose Runtime > Change runtime type > T4 GPU, or go on with the quick profile on the CPU."
    return "No GPU: the quick profile runs on the CPU in a few minutes."


def prepare() -> None:
    """Check the packages, install what is missing if the machine is hosted, and print what was done.

    Raises:
        RuntimeError: a package is missing and could not be installed, or the machine is not hosted.
    """
    missing, differing = check_requirements()
    if missing and not is_hosted():
        raise RuntimeError(
            f"missing packages: {', '.join(missing)}. Run `%pip install -r {ROOT / 'requirements.txt'}` in a cell, "
            "then restart the kernel"
        )
    if missing:
        install(missing)
    print("Installed: " + ", ".join(missing) if missing else "Everything needed is here already.")
    if differing:
        print("Untested versions, the first suspects if something fails: " + "; ".join(differing))
    print(gpu_advice())
