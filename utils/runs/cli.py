"""What the command lines share: one line on stderr for an error that the user can fix, and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from utils.config import PROFILES, Config, from_profile
from utils.runtime import ConfigError, Session10Error

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # as torch says it


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: a shutdown, or a cluster's time limit."""


def run_command(
    program: str, body: Callable[[], object], saved_message: Callable[[BaseException], str] = lambda error: ""
) -> int:
    """Call ``body``; returns 0, 1 (failed), 2 (wrong settings), 130 (Ctrl-C) or 143 (SIGTERM).

    ``saved_message(error)`` says what is kept, at the end of the line. An unknown error keeps its traceback.
    """
    warnings.showwarning = lambda message, *_: print_error(f"{program}: warning: {message}")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        body()
        return 0
    except (KeyboardInterrupt, RuntimeError, OSError, MemoryError) as error:
        text, code = _explain(error)
        if not code:
            raise
        if isinstance(error, BrokenPipeError):  # nobody reads stdout, and Python would fail on it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print_error(f"{program}: " + "; ".join(filter(None, (text, saved_message(error)))))
        return code


def print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _terminate(number, frame):
    raise Terminated


def _explain(error: BaseException) -> tuple[str, int]:
    """The error in a line, and the exit code; 0 if its traceback says more."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 143 if isinstance(error, Terminated) else 130
    if isinstance(error, Session10Error | OSError):
        return str(error), 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return "out of memory: begin a new run with a smaller --batch-size, or free memory and resume", 1
    return "", 0


# --- flags made from Config -------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting; those that are not given stay None."""
    for field in dataclasses.fields(Config):
        about = Config.__pydantic_fields__[field.name]
        default = str(field.default).replace("None", "not set")
        if field.name in PROFILES["quick"]:
            default += f"; quick: {PROFILES['quick'][field.name]}"
        if field.name == "profile":
            default = "full with a GPU, else quick"
        options: dict[str, Any] = {"help": f"{about.description} (default: {default})", "default": None}
        if about.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(about.annotation) is Literal:
            options["choices"] = get_args(about.annotation)
        else:
            options["metavar"] = "X" if "float" in str(about.annotation) else "N"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


def from_arguments(args: argparse.Namespace) -> Config:
    """The settings on a command line that ``add_arguments`` prepared; ``args.profile`` must be set."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)}
    name = given.pop("profile")
    return from_profile(name, **{setting: value for setting, value in given.items() if value is not None})
