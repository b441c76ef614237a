"""How a command ends: after Ctrl-C, SIGTERM, and an error that a person can repair, with one message."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flows.engine.output import fail
from lilliput.errors import LilliputError
from tasks.process.console import EXIT_REFUSED, EXIT_STOPPED, EXIT_TERMINATED


class Terminated(KeyboardInterrupt):
    """SIGTERM; a KeyboardInterrupt, so that libraries clean up as they do for Ctrl-C."""


@contextmanager
def stoppable(stop_message: str) -> Iterator[None]:
    """Ends this process with `stop_message` after Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the cleanup
        fail(stop_message, EXIT_TERMINATED if isinstance(interrupt, Terminated) else EXIT_STOPPED)


@contextmanager
def rejected_input() -> Iterator[None]:
    """Ends this process with the message of an error that a person can repair."""
    try:
        yield
    except Exception as error:
        if not is_reported(error):
            raise
        fail(str(error), EXIT_REFUSED)


def is_reported(error: BaseException) -> bool:
    """Whether `error` needs no traceback: one of this project, or of DVC, which only runs that use it import."""
    dvc = sys.modules.get("dvc.exceptions")
    return isinstance(error, LilliputError) or (dvc is not None and isinstance(error, dvc.DvcException))


def _terminate(_signal: int, _frame: object) -> None:
    raise Terminated
