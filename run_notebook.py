"""Execute Session10.ipynb and keep the executed copy: what `make run` does.

    python run_notebook.py               go on with the unfinished run of the same settings, else begin a new one
    python run_notebook.py --new         begin a new one in any case
    python run_notebook.py --publish     and let a full run replace Results/, training_logs.md and the README's tables
    python run_notebook.py --in-place    and store the outputs in Session10.ipynb itself

Runs live in runs/notebook-PROFILE, -2, -3 and so on. `S10_PROFILE`, `S10_SOURCE`, `CIFAR10_DIR` and `S10_RUN_DIR` work
as in the notebook; `S10_RUN_NAME` names the folder below runs/ yourself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from utils import config as configs
from utils.runs.door import run_door
from utils.runtime import PROJECT_ROOT, Session10Error, pick_device, say, write_atomically

NOTEBOOK = PROJECT_ROOT / "Session10.ipynb"
RUNS = PROJECT_ROOT / "runs"
RECORD_NAME = "notebook.json"  # in a run's folder: what it was started with, and whether it came to its end
WIDGET = "application/vnd.jupyter.widget-view+json"
LINES_SHOWN = 40  # of what a cell prints
GRACE_SECONDS = 20.0  # for an interrupted cell to end by itself


class NotebookError(Session10Error):
    """The notebook did not come to its end; the message says why."""


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path):
    """The notebook in a file.

    Raises:
        NotebookError: the file is no notebook.
    """
    try:
        return nbformat.read(path, as_version=4)
    except ValueError as error:
        raise NotebookError(f"{path} is not a notebook ({error}): get a fresh copy") from error


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
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):  # a widget that left a picture is shown as that picture
                    output.data.pop(WIDGET, None)
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
    return notebook


def save(notebook, path: Path) -> None:
    write_atomically(path, (nbformat.writes(without_noise(notebook)) + "\n").encode())


# --- the folder -------------------------------------------------------------------------------------------------------


def settings_from_environment() -> dict:
    """What a notebook run is made of: profile with its settings, and where the images come from."""
    profile = os.environ.get("S10_PROFILE") or ("full" if pick_device().type == "cuda" else "quick")
    folder = os.environ.get("CIFAR10_DIR")
    return {
        "profile": profile,
        "config": configs.from_profile(profile).to_dict(),
        "images": str(Path(folder).expanduser().resolve()) if folder else "",
        "source": os.environ.get("S10_SOURCE") or "auto",
    }


def choose_folder(runs: Path, settings: dict, new: bool = False) -> tuple[Path, bool]:
    """The folder to run in, and whether an unfinished run of the same settings goes on there.

    Args:
        runs: the folder that holds the runs' folders.
        settings: from ``settings_from_environment``.
        new: take a folder of its own, even where a run is unfinished.
    """
    first = runs / f"notebook-{settings['profile']}"
    taken = list(itertools.takewhile(Path.exists, _numbered(first)))
    if not new:
        for folder in reversed(taken):
            with contextlib.suppress(OSError, ValueError):  # another kind of run, which is left alone
                record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
                if record == {"settings": settings, "finished": False}:
                    return folder, True
    return next(itertools.islice(_numbered(first), len(taken), None)), False


def _numbered(first: Path) -> Iterator[Path]:
    """``first``, then the same with -2, -3 and so on behind it."""
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))


def write_record(folder: Path, settings: dict, finished: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "finished": finished}
    write_atomically(folder / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())


# --- the run ----------------------------------------------------------------------------------------------------------


def execute(notebook, environment: dict[str, str]) -> None:
    """Run every cell in a fresh kernel, naming each section as it begins; outputs are put into ``notebook``.

    Ctrl-C and SIGTERM interrupt the cell that runs, as Jupyter's stop button does, and a second one kills the kernel.

    Args:
        notebook: from ``read``.
        environment: of the kernel.

    Raises:
        NotebookError: a cell failed, or the kernel died; what was executed so far is in ``notebook``.
        KeyboardInterrupt: likewise, with the signal's number unless that is Ctrl-C's.
    """
    section = ""
    stopped = False

    def announce(cell, cell_index):
        nonlocal section
        if stopped:  # between two cells there is nothing to interrupt
            raise NotebookError("stopped")
        before = (heading_of(earlier) for earlier in reversed(notebook.cells[: cell_index + 1]))
        heading = next((name for name in before if name), "")
        if heading != section:
            section = heading
            say(f"  {time.strftime('%H:%M:%S')}  {heading}")

    def echo(cell, cell_index, execute_reply):
        for output in cell.outputs:
            if output.get("name") == "stdout":
                for line in output.text.splitlines()[:LINES_SHOWN]:
                    say(f"            {line}")

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(PROJECT_ROOT)}},
        on_cell_start=announce,
        on_cell_executed=echo,
        store_widget_state=False,
    )
    if os.name == "posix":  # sockets that only this user can reach, instead of TCP ports, about which the kernel warns
        client.create_kernel_manager()
        client.km.transport = "ipc"

    # In a thread of its own nbclient leaves the signals alone; it would kill the kernel and what the cell has printed.
    with asyncio.Runner() as runner, ThreadPoolExecutor(1) as pool:
        loop = runner.get_loop()
        done = pool.submit(runner.run, client.async_execute(env=environment))

        async def tell_kernel(kill: bool) -> None:
            if client.km is not None and client.km.has_kernel:
                await (client.km.shutdown_kernel(now=True) if kill else client.km.interrupt_kernel())

        try:
            done.result()
        except KeyboardInterrupt as signal:
            stopped = True
            asyncio.run_coroutine_threadsafe(tell_kernel(kill=False), loop)
            try:
                finished = wait([done], timeout=GRACE_SECONDS).done
            except KeyboardInterrupt:
                finished = False
            if not finished:
                asyncio.run_coroutine_threadsafe(tell_kernel(kill=True), loop)
                wait([done])
            raise KeyboardInterrupt(*signal.args) from None
        except CellExecutionError as error:
            raise NotebookError(f"stopped in {section!r} by {error.ename}: {error.evalue}") from error
        except DeadKernelError as error:
            raise NotebookError(
                f"the kernel died in {section!r}, often for lack of memory: close what else uses it"
            ) from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path, default=NOTEBOOK, help="default: Session10.ipynb")
    parser.add_argument("--new", action="store_true", help="begin a new run, even where one is unfinished")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="a full run on CIFAR-10 replaces Results/, training_logs.md and the README's tables (sets S10_PUBLISH=1)",
    )
    parser.add_argument("--in-place", action="store_true", help="store the outputs in the notebook itself, too")
    args = parser.parse_args(argv)
    executed: Path | None = None

    def run() -> None:
        nonlocal executed
        began = time.monotonic()
        notebook = read(args.notebook)
        settings = settings_from_environment()
        name = os.environ.get("S10_RUN_NAME")
        folder, goes_on = (RUNS / name, False) if name else choose_folder(RUNS, settings, args.new)
        write_record(folder, settings, finished=False)
        say(
            f"going on with the unfinished run in {folder} (--new begins another one)"
            if goes_on
            else f"executing {args.notebook.name} in {folder}; a quick run takes 2 to 5 minutes on a 2-core CPU"
        )
        environment = {**os.environ, "S10_RUN_NAME": str(folder), "S10_PROFILE": settings["profile"]}
        if args.publish:
            environment["S10_PUBLISH"] = "1"
        try:
            execute(notebook, environment)
        finally:
            save(notebook, folder / args.notebook.name)
            executed = folder / args.notebook.name
        write_record(folder, settings, finished=True)
        if args.in_place:
            save(notebook, args.notebook)
        say(
            f"done in {(time.monotonic() - began) / 60:.1f} min; the executed notebook and its results are in\n  {folder}"
        )

    def kept() -> str:
        if executed is None:
            return ""
        return f"the notebook up to there is {executed}; run it again to go on from the last epoch that was finished"

    return run_door("run_notebook.py", run, kept)


if __name__ == "__main__":
    sys.exit(main())
