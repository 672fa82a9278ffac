"""Execute a notebook and keep the executed copy in runs/; an unfinished run of the same settings goes on.

`S10_PROFILE`, `S10_SOURCE`, `S10_RUN_NAME`, `S10_COPY_TO` and `CIFAR10_DIR` work as in the notebook.
"""

import argparse
import functools
import logging
import os
import sys
from itertools import count, takewhile
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError

from utils.runs.checkpoint import NEWEST
from utils.runs.cli import run_command
from utils.runs.report import METRICS_NAME
from utils.runtime import PROJECT_ROOT, Session10Error, pick_device, say

RUNS = PROJECT_ROOT / "runs"


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove what differs each time: warnings and timings."""
    for metadata in (notebook.metadata, *(cell.metadata for cell in notebook.cells)):
        for key in ("papermill", "execution", *(() if metadata.get("tags") else ["tags"])):
            metadata.pop(key, None)
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        outputs[:] = [each for each in outputs if each.get("name") != "stderr"]


def execute(notebook: Path, copy: Path, in_place: bool) -> None:
    """Run every cell in a new kernel and print its output as it comes; ``copy`` is the notebook after the latest cell.

    A failed cell or a dead kernel is a ``Session10Error``.
    """
    copy.parent.mkdir(exist_ok=True)
    copy.unlink(missing_ok=True)
    section = notebook.name

    def announce(cell: nbformat.NotebookNode, **_) -> None:
        nonlocal section
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            section = cell.source.splitlines()[0].lstrip("# ")
            say(f"\n--- {section}")

    options = dict(kernel_name="python3", cwd=PROJECT_ROOT, extra_arguments=["--log-level=CRITICAL"])
    shown = dict(on_cell_start=announce, stdout_file=sys.stdout, stderr_file=sys.stderr, progress_bar=False)
    try:
        papermill.execute_notebook(notebook, copy, coalesce_streams=True, **options, **shown)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise Session10Error(f"{notebook} is not a notebook: get a fresh copy") from error
    except papermill.PapermillExecutionError as error:
        raise Session10Error(f"{section}, cell {error.cell_index + 1}: {error.ename}: {error.evalue}") from error
    except DeadKernelError as error:
        raise Session10Error(f"{section}: the kernel died, often for lack of memory") from error
    finally:
        if copy.exists():
            executed = nbformat.read(copy, as_version=4)
            clean(executed)
            nbformat.write(executed, copy)
    if in_place:
        notebook.write_bytes(copy.read_bytes())
    say(f"\nThe executed notebook is {copy}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", nargs="?", type=Path, default=PROJECT_ROOT / "Session10.ipynb")
    parser.add_argument("--new", action="store_true", help="take a fresh run folder, even if a run is unfinished")
    parser.add_argument("--publish", action="store_true", help="a full run on CIFAR-10 replaces the published one")
    parser.add_argument("--in-place", action="store_true", help="also store the outputs in the notebook itself")
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default: one in runs/, named by its settings)")
    args = parser.parse_args(argv)
    profile = os.environ.get("S10_PROFILE") or ("full" if pick_device().type == "cuda" else "quick")
    folder = args.run_dir.resolve() if args.run_dir else RUNS / (os.environ.get("S10_RUN_NAME") or f"{profile}-seed100")
    later = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    taken = [folder, *takewhile(Path.exists, later)]
    unfinished = [each for each in taken if (each / NEWEST).exists() and not (each / METRICS_NAME).exists()]
    if args.new and folder.exists():
        folder = folder.with_name(f"{folder.name}-{len(taken) + 1}")
    elif unfinished and not (args.new or args.run_dir or os.environ.get("S10_RUN_NAME")):
        folder = unfinished[-1]
    if args.new or args.run_dir or folder != taken[0]:
        os.environ["S10_RUN_NAME"] = str(folder)
    if args.publish:
        os.environ["S10_PUBLISH"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # a stored output keeps every state of a bar
    copy = RUNS / f"{args.notebook.stem}-{folder.name}.ipynb"
    body = functools.partial(execute, args.notebook.resolve(), copy, args.in_place)
    return run_command("run_notebook.py", body, lambda error: f"the notebook so far is {copy}" if copy.exists() else "")


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # what papermill and asyncio say of a kernel that was ended
    sys.exit(main())
