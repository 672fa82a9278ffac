"""What every command line of this project does alike: one line for an error, exit codes, signals, broken outputs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from utils.runtime import ConfigError, Session10Error

EXIT_FAILED = 1  # the work could not be finished; the message says why and what is kept
EXIT_USAGE = 2  # a wrong setting, as argparse has it
EXIT_SIGNAL = 128  # plus the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM


def run_door(program: str, body: Callable[[], object], kept: Callable[[], str] = lambda: "") -> int:
    """Call ``body`` and return the exit code; what a user can mend becomes one line on stderr.

    Args:
        program: what the line begins with.
        body: the work.
        kept: what is kept when it ends early, in words, for the line's end.
    """
    prepare_streams()
    with warnings.catch_warnings(), sigterm_like_ctrl_c():
        warnings.showwarning = lambda message, *_: complain(f"{program}: warning: {message}")
        try:
            body()
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0] if interrupt.args else signal.SIGINT
            complain(f"{program}: " + "; ".join(filter(None, ("interrupted", kept()))))
            return EXIT_SIGNAL + number
        except ConfigError as error:
            complain(f"{program}: {error}")
            return EXIT_USAGE
        except (Session10Error, OSError) as error:
            complain(f"{program}: " + "; ".join(filter(None, (str(error), kept()))))
            return EXIT_FAILED
    return 0


class Output:
    """A text stream that may lose its reader (``| head -1``, a full disk): from then on, what is written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._until_nobody_reads():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._until_nobody_reads():
            self._stream.flush()

    @contextlib.contextmanager
    def _until_nobody_reads(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # The stream's buffer still holds the text, and Python would fail on it once more at exit.
            with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError):
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Give the process streams that can be written to, in any encoding, whatever its caller closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a folder's name may not exist in the terminal's encoding
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream))


def complain(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """Within it, SIGTERM (a shutdown, a cluster's time limit) ends the work as Ctrl-C does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
