"""A lock that lets one run at a time work in a folder; the error for the second run names the first."""

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

_LOCK, _HOLDER = ".democratize.lock", ".democratize.holder"  # two files, because trying a lock empties its file


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Locks `folder` for one run; the system releases the lock even if the run is killed.

    Raises:
        BusyError: another run holds the lock; the message names its process and start time.
    """
    lock, holder_file = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{folder}: another run is active here{_holder_of(holder_file)}; wait for it") from None
    try:
        write_json(holder_file, _this_process())
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def stage_folder_lock() -> Iterator[None]:
    """Locks the working directory for a stage started by `dvc repro` or by hand; a flow locks it for its stages.

    Raises:
        BusyError: another run holds the lock.
    """
    with nullcontext() if started_by_flow() else folder_lock(Path.cwd()):
        yield


def started_by_flow() -> bool:
    """Whether a flow started this process as a stage; it then ends with the flow."""
    return os.environ.get("LILLIPUT_ENDS_WITH_STDIN") == "1"


def _this_process() -> dict[str, str | int]:
    executable, *arguments = psutil.Process().cmdline()
    return {
        "pid": os.getpid(),
        "machine": platform.node(),
        "since": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}",
        "command": shlex.join([Path(executable).name, *arguments]),
    }


def _holder_of(holder_file: Path) -> str:
    """Returns a description of the process that holds the lock; empty until it has written its file."""
    with suppress(OSError, ValueError, KeyError):
        holder = json.loads(holder_file.read_text(encoding="utf-8"))
        machine = "" if holder["machine"] == platform.node() else f" on {holder['machine']}"
        return f" since {holder['since']}: process {holder['pid']}{machine}, `{holder['command']}`"
    return ""
