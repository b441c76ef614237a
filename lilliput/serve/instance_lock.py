"""One gateway per deployment folder: the lock that it holds, and the file that names its process and address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lilliput.artifacts import write_json
from lilliput.errors import BusyError
from lilliput.serve.deployment import GATEWAY

_LOCK = "gateway.lock"  # not GATEWAY itself: a process that tries a lock empties its file


@contextmanager
def owning(home: Path) -> Iterator[None]:
    """Holds `home` for this process's gateway; the system frees it even when the process is killed.

    Raises:
        BusyError: another gateway serves `home`; the message has its process id and address.
    """
    lock = FileLock(home / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"{home}: another gateway serves this folder ({_owner(home)}); use that one, or end it first with "
            f"`python -m flows.deploy {home.resolve().name} --stop`"
        ) from None
    try:
        announce(home, None)
        yield
    finally:
        (home / GATEWAY).unlink(missing_ok=True)
        lock.release()


def announce(home: Path, url: str | None) -> None:
    """Writes down that this process serves `home` at `url`; None as long as it starts."""
    process = psutil.Process()
    write_json(home / GATEWAY, {"url": url, "pid": process.pid, "started": process.create_time()})


def _owner(home: Path) -> str:
    try:
        known = json.loads((home / GATEWAY).read_text(encoding="utf-8"))
        return f"process {known['pid']}, {known['url'] or 'which is starting'}"
    except (OSError, ValueError, KeyError):  # in the moment before it is written
        return "which is starting"
