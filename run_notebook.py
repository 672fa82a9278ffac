"""Execute Session10.ipynb and keep the executed copy: what `make run` does.

    python run_notebook.py               into a new folder below runs/
    python run_notebook.py --in-place    and store the outputs in Session10.ipynb itself

`S10_PROFILE`, `CIFAR10_DIR` and `S10_RUN_NAME` (the folder below runs/) work as in the notebook.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent
NOTEBOOK = ROOT / "Session10.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"


def heading_of(cell) -> str | None:
    """The first heading of a markdown cell."""
    lines = cell.source.splitlines() if cell.cell_type == "markdown" else []
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), None)


def without_noise(notebook):
    """Drop what only made sense live, progress bars and timings of cells, so that the file stays small and stable.

    GitHub refuses notebooks that refer to widgets without their state.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
    return notebook


def execute(notebook, run_dir: Path):
    """Run every cell in a fresh kernel, naming each section as it begins.

    Raises:
        CellExecutionError: a cell failed; what was executed so far is in ``notebook``.
    """
    section = ""

    def announce(cell, cell_index):
        nonlocal section
        before = (heading_of(earlier) for earlier in reversed(notebook.cells[: cell_index + 1]))
        heading = next((name for name in before if name), "")
        if heading != section:
            section = heading
            print(f"  {time.strftime('%H:%M:%S')}  {heading}", flush=True)

    def echo(cell, cell_index, execute_reply):
        for output in cell.outputs:
            if output.get("name") == "stdout":
                print("".join(f"            {line}\n" for line in output.text.splitlines()[:40]), end="", flush=True)

    os.environ["S10_RUN_NAME"] = str(run_dir)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
        on_cell_start=announce,
        on_cell_executed=echo,
        store_widget_state=False,
    )
    if os.name == "posix":  # sockets that only this user can reach, instead of TCP ports, about which the kernel warns
        client.create_kernel_manager()
        client.km.transport = "ipc"
    client.execute()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute Session10.ipynb.")
    parser.add_argument("--in-place", action="store_true", help="store the outputs in Session10.ipynb itself, too")
    args = parser.parse_args(argv)

    began = time.monotonic()
    run_dir = ROOT / "runs" / (os.environ.get("S10_RUN_NAME") or time.strftime("notebook-%Y%m%d-%H%M%S"))
    run_dir.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    print(f"Executing {NOTEBOOK.name}; a quick run takes 2 to 5 minutes on a 2-core CPU")
    try:
        execute(notebook, run_dir)
        failed = None
    except CellExecutionError as error:
        failed = f"{error.ename}: {error.evalue}"
    nbformat.write(without_noise(notebook), run_dir / NOTEBOOK.name)
    if failed:
        print(f"stopped: {failed}\nThe notebook up to there: {run_dir / NOTEBOOK.name}", file=sys.stderr)
        return 1
    if args.in_place:
        nbformat.write(notebook, NOTEBOOK)
    print(
        f"done in {(time.monotonic() - began) / 60:.1f} min; the executed notebook and its results are in\n  {run_dir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
