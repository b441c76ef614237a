"""The optional time limit of a stage, so that one that hangs does not block the rest of a run."""

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
def deadline(report: Callable[[str], None]) -> Iterator[None]:
    """Kills this process and its children if the block takes longer than LILLIPUT_STAGE_HOURS.

    A thread does it, because native code that hangs often handles no signal. Time spent waiting for the machine does
    not count.

    Args:
        report: receives the reason before the process ends.

    Raises:
        ConfigError: the variable is not a positive number.
    """
    setting = os.environ.get(VARIABLE)
    if setting is None:
        yield
        return
    reason = f"not done after {setting} h ({VARIABLE}) and stopped"
    timer = threading.Timer(3600 * _hours(setting), _kill, [reason, report])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _hours(setting: str) -> float:
    try:
        hours = float(setting)
    except ValueError:
        hours = 0.0
    if not 0 < hours < threading.TIMEOUT_MAX / 3600:
        raise ConfigError(f"{VARIABLE}={setting}: not a number of hours above 0; correct or unset it")
    return hours


def _kill(reason: str, report: Callable[[str], None]) -> None:
    report(reason)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(EXIT_REFUSED)
