"""Execute Session10.ipynb and keep the executed copy: what `make run` does.

    python run_notebook.py               continue the unfinished run of the same settings, or begin a new one
    python run_notebook.py --new         always begin a new one
    python run_notebook.py --publish     and let a full run replace Results/, training_logs.md and the README's tables
    python run_notebook.py --in-place    and store the outputs in Session10.ipynb itself

Runs live in runs/notebook-PROFILE, -2, -3 and so on. `S10_PROFILE`, `S10_SOURCE`, `CIFAR10_DIR` and `S10_RUN_DIR` work
as in the notebook; `S10_RUN_NAME` names the folder in runs/ yourself.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image

from utils import config as configs
from utils.runs.door import run_door
from utils.runtime import PROJECT_ROOT, ConfigError, Session10Error, pick_device, say, write_atomically, write_json

NOTEBOOK = PROJECT_ROOT / "Session10.ipynb"
RUNS = PROJECT_ROOT / "runs"
RECORD_NAME = "notebook.json"  # in a run's folder: its settings, and whether it is finished
WIDGET = "application/vnd.jupyter.widget-view+json"
LINES_SHOWN = 40  # of what a cell prints
GRACE_SECONDS = 20.0  # for an interrupted cell to end by itself


class NotebookError(Session10Error):
    """The notebook did not finish; the message says why."""


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path):
    """The notebook in a file; NotebookError if it is not a notebook."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
        nbformat.ValidationError,
    ) as error:  # any JSON can be there
        reason = str(error).partition("\n")[0]
        raise NotebookError(f"{path} is not a notebook ({reason}): get a fresh copy") from error
    return notebook


def heading_of(cell) -> str | None:
    """The first heading of a markdown cell."""
    lines = cell.source.splitlines() if cell.cell_type == "markdown" else []
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), None)


def smaller_png(picture: str) -> str:
    """A base64 PNG with the same pixels in fewer bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "RGBA" and image.getextrema()[3] == (255, 255):  # opaque everywhere
        image = image.convert("RGB")
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    smaller = base64.b64encode(content.getvalue()).decode()
    return min(picture, smaller, key=len)


def save(notebook, path: Path) -> None:
    """Write the notebook without progress bars and cell timings, and pack its pictures, so that it stays small and stable.

    GitHub refuses notebooks that refer to widgets without their state.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):  # a widget that left a picture is shown as that picture
                    output.data.pop(WIDGET, None)
                    output.data["image/png"] = smaller_png(output.data["image/png"])
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
    write_atomically(path, (nbformat.writes(notebook) + "\n").encode())


# --- the folder -------------------------------------------------------------------------------------------------------


def settings_from_environment() -> dict:
    """What defines a notebook run: the profile and its settings, and where the images come from."""
    profile = os.environ.get("S10_PROFILE") or ("full" if pick_device().type == "cuda" else "quick")
    folder = os.environ.get("CIFAR10_DIR")
    return {
        "profile": profile,
        "config": configs.from_profile(profile).to_dict(),
        "images": str(Path(os.path.expanduser(folder)).resolve()) if folder else "",
        "source": os.environ.get("S10_SOURCE") or "auto",
    }


def choose_folder(runs: Path, settings: dict, new: bool = False) -> tuple[Path, bool]:
    """The folder to run in, and whether it holds an unfinished run of the same settings to continue.

    Args:
        runs: the folder of all runs.
        settings: from ``settings_from_environment``.
        new: take a new folder, even if a run is unfinished.
    """
    taken = []
    for number in itertools.count(1):
        folder = runs / f"notebook-{settings['profile']}{f'-{number}' if number > 1 else ''}"
        if not folder.exists():
            break
        taken.append(folder)
    if not new:
        for old in reversed(taken):
            with contextlib.suppress(OSError, ValueError):  # another kind of run
                record = json.loads((old / RECORD_NAME).read_text(encoding="utf-8"))
                if record == {"settings": settings, "finished": False}:
                    return old, True
    return folder, False


def write_record(folder: Path, settings: dict, finished: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD_NAME, {"settings": settings, "finished": finished})


# --- the run ----------------------------------------------------------------------------------------------------------


def execute(notebook, environment: dict[str, str]) -> None:
    """Run every cell in a new kernel, naming each section as it begins; outputs go into ``notebook``.

    Ctrl-C and SIGTERM interrupt the running cell, as Jupyter's stop button does; a second one kills the kernel.

    Args:
        notebook: from ``read``.
        environment: of the kernel.

    Raises:
        NotebookError: a cell failed, or the kernel died or did not start; the outputs so far are in ``notebook``.
        KeyboardInterrupt: the same after a signal.
    """
    headings = [heading_of(cell) for cell in notebook.cells]
    section = ""
    stopped = False

    def announce(cell, cell_index):
        nonlocal section
        if stopped:  # between two cells there is nothing to interrupt
            raise NotebookError("stopped")
        heading = next(filter(None, reversed(headings[: cell_index + 1])), "")
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
        coalesce_streams=True,  # what a cell prints arrives in pieces
    )
    # On the main thread nbclient would answer signals itself: by killing the kernel, with what the cell has printed.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        asyncio.Runner() as runner,
        ThreadPoolExecutor(1) as pool,
    ):
        if os.name == "posix":  # sockets that only this user can reach; the kernel would warn about TCP ports
            client.create_kernel_manager()
            client.km.transport = "ipc"
            client.km.connection_file = os.path.join(scratch, "kernel.json")  # the sockets are beside it
        loop = runner.get_loop()
        done = pool.submit(runner.run, client.async_execute(env=environment))

        async def signal_kernel(kill: bool) -> None:
            if client.km is not None and client.km.has_kernel:
                await (client.km.shutdown_kernel(now=True) if kill else client.km.interrupt_kernel())

        try:
            wait_for(done)
            done.result()
        except KeyboardInterrupt:
            stopped = True
            asyncio.run_coroutine_threadsafe(signal_kernel(kill=False), loop)
            with contextlib.suppress(KeyboardInterrupt):
                wait_for(done, GRACE_SECONDS)
            if not done.done():
                asyncio.run_coroutine_threadsafe(signal_kernel(kill=True), loop)
                wait_for(done)
            raise
        except CellExecutionError as error:
            raise NotebookError(f"stopped in {section!r} by {error.ename}: {error.evalue}") from error
        except DeadKernelError as error:
            raise NotebookError(
                f"the kernel died in {section!r}, often for lack of memory: close what else uses it"
            ) from error
        except RuntimeError as error:
            if section:
                raise
            raise NotebookError(f"the kernel did not start ({error}): close what else uses this machine") from error


def wait_for(work: Future, seconds: float = math.inf) -> None:
    """Wait until ``work`` is done or ``seconds`` are over, in short steps: Windows notices Ctrl-C only between them."""
    end = time.monotonic() + seconds
    while not work.done() and time.monotonic() < end:
        wait([work], timeout=1.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path, default=NOTEBOOK, help="default: Session10.ipynb")
    parser.add_argument("--new", action="store_true", help="begin a new run, even if one is unfinished")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="a full run on CIFAR-10 replaces Results/, training_logs.md and the README's tables (sets S10_PUBLISH=1)",
    )
    parser.add_argument("--in-place", action="store_true", help="also store the outputs in the notebook itself")
    args = parser.parse_args(argv)
    executed: Path | None = None

    def run() -> None:
        nonlocal executed
        began = time.monotonic()
        notebook = read(args.notebook)
        settings = settings_from_environment()
        name = os.environ.get("S10_RUN_NAME")
        if name and args.new and (RUNS / name).exists():
            raise ConfigError(
                f"S10_RUN_NAME is {name!r}, and its folder exists: choose another name for a new run, or leave out --new"
            )
        folder, continues = (RUNS / name, False) if name else choose_folder(RUNS, settings, args.new)
        write_record(folder, settings, finished=False)
        say(
            f"continuing the unfinished run in {folder} (--new begins another one)"
            if continues
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
        minutes = (time.monotonic() - began) / 60
        say(f"done in {minutes:.1f} min; the executed notebook and its results are in\n  {folder}")

    def kept(error: BaseException) -> str:
        if executed is None:
            return ""
        return (
            f"the notebook up to there is {executed}; run it again to continue from the last finished epoch, or with --new "
            "to begin another run"
        )

    return run_door("run_notebook.py", run, kept)


if __name__ == "__main__":
    sys.exit(main())
