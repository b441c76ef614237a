"""How long a stage may take, where somebody says so: one that hangs would hold up the night."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from lilliput.errors import ConfigError
from tasks.process.console import EXIT_REFUSED

VARIABLE = "LILLIPUT_STAGE_HOURS"


@contextmanager
def deadline(tell: Callable[[str], None]) -> Iterator[None]:
    """Ends this process and its children, as a kill would, if the block takes longer than LILLIPUT_STAGE_HOURS.

    From a thread: what hangs is often a kernel that hears of no signal. Waiting for the machine does not count.

    Args:
        tell: hears why.

    Raises:
        ConfigError: the variable is no positive number.
    """
    said = os.environ.get(VARIABLE)
    if said is None:
        yield
        return
    timer = threading.Timer(3600 * _hours(said), _end, [f"not done after {said} h ({VARIABLE}) and stopped", tell])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _hours(said: str) -> float:
    try:
        hours = float(said)
    except ValueError:
        hours = 0.0
    if not 0 < hours < threading.TIMEOUT_MAX / 3600:
        raise ConfigError(f"{VARIABLE}={said}: hours a stage may take, a number above 0, or leave it out")
    return hours


def _end(why: str, tell: Callable[[str], None]) -> None:
    tell(why)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(EXIT_REFUSED)
