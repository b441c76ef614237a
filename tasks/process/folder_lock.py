"""A folder is one run's at a time: whoever comes second is told who is at work there."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lilliput.artifacts import write_json
from lilliput.errors import BusyError

_LOCK, _HOLDER = ".democratize.lock", ".democratize.holder"  # apart, because whoever tries the lock empties its file


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds `folder` for one run; the system frees it even when the run is killed.

    Raises:
        BusyError: another run holds it; the message says which, and since when.
    """
    lock, holder = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"{folder}: another run is at work here{_told(holder)}; wait for it, or use another --params file"
        ) from None
    try:
        write_json(holder, _myself())
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextmanager
def alone_here() -> Iterator[None]:
    """`alone_in` this folder for a stage that no flow started: under `dvc repro`, or by hand.

    Raises:
        BusyError: another run is at work here.
    """
    with nullcontext() if started_by_flow() else alone_in(Path.cwd()):  # a flow holds the folder for its stages
        yield


def started_by_flow() -> bool:
    """Whether this process is a stage of a flow, which ends it when it ends."""
    return os.environ.get("LILLIPUT_ENDS_WITH_STDIN") == "1"


def _myself() -> dict[str, str | int]:
    executable, *arguments = psutil.Process().cmdline()
    return {
        "pid": os.getpid(),
        "machine": platform.node(),
        "since": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}",
        "command": shlex.join([Path(executable).name, *arguments]),
    }


def _told(holder: Path) -> str:
    """Who holds the folder; nothing in the moment before that is written down."""
    with suppress(OSError, ValueError, KeyError):
        found = json.loads(holder.read_text(encoding="utf-8"))
        place = "" if found["machine"] == platform.node() else f" on {found['machine']}"
        return f" since {found['since']}: process {found['pid']}{place}, `{found['command']}`"
    return ""
