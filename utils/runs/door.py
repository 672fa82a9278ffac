"""What all command lines of this project share: one line for an error, exit codes, signals, broken outputs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from utils.runtime import ConfigError, Session10Error

EXIT_FAILED = 1  # the message says why, and what is kept
EXIT_USAGE = 2  # a wrong setting, as in argparse
EXIT_SIGNAL = 128  # plus the signal's number, as in shells: 130 for Ctrl-C, 143 for SIGTERM
AGAIN_SECONDS = 0.02  # until an interrupt that Python dropped is raised again

# What ended the work, kept to the end of the process: it holds the loaders it interrupted, whose destructors could wait
# for ever for a lock that the interrupted thread left closed. When the process ends, they no longer wait.
_ended_by: list[BaseException] = []


def run_door(program: str, body: Callable[[], object], kept: Callable[[BaseException], str] = lambda error: "") -> int:
    """Call ``body`` and return the exit code; an error that the user can fix becomes one line on stderr.

    Args:
        program: its name, with which the line begins.
        body: the work.
        kept: called with the error; what this end leaves behind, in words, with which the line ends.
    """
    prepare_streams()
    with warnings.catch_warnings(), interrupts_from_outside() as asked:
        warnings.showwarning = lambda message, *_: complain(f"{program}: warning: {message}")
        try:
            body()
        except ConfigError as error:
            complain(f"{program}: {error}")
            return EXIT_USAGE
        except (KeyboardInterrupt, Session10Error, OSError) as error:
            _ended_by.append(error)
            # After a signal any failure counts as the interrupt, such as that of a loader process that got it too.
            is_interrupt = asked or isinstance(error, KeyboardInterrupt)
            words = "interrupted" if is_interrupt else str(error)
            complain(f"{program}: " + "; ".join(filter(None, (words, kept(error)))))
            return EXIT_SIGNAL + (asked or [signal.SIGINT])[0] if is_interrupt else EXIT_FAILED
    return 0


class Output:
    """A text stream that may lose its reader (``| head -1``, a full disk) and then drops whatever is written."""

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
            # The stream's buffer still holds the text, and Python would fail on it again at exit.
            with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError):
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Make stdout and stderr writable, in any encoding, even if the caller closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for folder names that the terminal's encoding lacks
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream))


def complain(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts_from_outside() -> Iterator[list[int]]:
    """Within it, SIGTERM (a shutdown, a cluster's time limit) raises ``KeyboardInterrupt``, as Ctrl-C does.

    If a whole process group is signalled, only the first process answers. Python drops an exception raised in a
    destructor or around a fork and prints a traceback instead; the interrupt is then raised again, soon after.

    Yields:
        The numbers of the signals received so far.
    """
    first, asked, is_over = os.getpid(), [], threading.Event()
    print_unraisable = sys.unraisablehook

    def interrupt(number, frame):
        if os.getpid() != first:  # a loader process that has not set its own handlers yet
            os._exit(EXIT_SIGNAL + number)
        asked.append(number)
        raise KeyboardInterrupt

    def again(number):
        if not is_over.wait(AGAIN_SECONDS):
            if os.name == "nt":  # there os.kill would end the process at once
                signal.raise_signal(number)
            else:
                os.kill(first, number)

    def unraisable(lost):
        if isinstance(lost.exc_value, KeyboardInterrupt) and asked:
            threading.Thread(target=again, args=asked[-1:], daemon=True).start()
        elif not asked:
            print_unraisable(lost)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, for example in the background
        numbers.append(signal.SIGINT)
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    sys.unraisablehook = unraisable
    try:
        yield asked
    finally:
        is_over.set()
        sys.unraisablehook = print_unraisable
        for number, handler in previous.items():
            signal.signal(number, handler)
