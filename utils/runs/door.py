"""What every command line of this project does alike: one line for an error, exit codes, signals, broken outputs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator

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


def prepare_streams() -> None:
    """Give the process streams that can be written to, in any encoding, whatever its caller closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a folder's name may not exist in the terminal's encoding


def complain(text: str) -> None:
    """Write a line to stderr, if anybody is there to read it."""
    with contextlib.suppress(OSError):
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
