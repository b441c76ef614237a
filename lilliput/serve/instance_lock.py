"""One gateway per deployment folder: its lock, and the file with its process and address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lilliput.artifacts import write_json
from lilliput.errors import BusyError
from lilliput.serve.files import GATEWAY

_LOCK = "gateway.lock"  # not GATEWAY itself: an attempt to lock empties the file


@contextmanager
def hold_folder(home: Path) -> Iterator[None]:
    """Locks `home` for this process's gateway. The operating system releases the lock of a killed process.

    Raises:
        BusyError: another gateway serves `home`; the message names its process id and address.
    """
    lock = FileLock(home / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"{home}: another gateway serves this folder ({_describe_holder(home)}); use it, or stop it with "
            f"`python -m flows.deploy {home.resolve().name} --stop`"
        ) from None
    try:
        write_gateway_file(home, None)
        yield
    finally:
        (home / GATEWAY).unlink(missing_ok=True)
        lock.release()


def write_gateway_file(home: Path, url: str | None) -> None:
    """Writes this process and its `url` to `home`; None while it starts."""
    process = psutil.Process()
    write_json(home / GATEWAY, {"url": url, "pid": process.pid, "started": process.create_time()})


def _describe_holder(home: Path) -> str:
    try:
        gateway = json.loads((home / GATEWAY).read_text(encoding="utf-8"))
        return f"process {gateway['pid']}, {gateway['url'] or 'which is starting'}"
    except (OSError, ValueError, KeyError):  # the file is not written yet
        return "which is starting"
