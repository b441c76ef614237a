"""A lock that lets one heavy stage at a time use this machine."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from platformdirs import user_cache_path

# Stages that use all cores for minutes. Two at once would slow each other and distort the measured latencies.
HEAVY = ("compress", "evaluate", "caching", "compile", "devices", "offload")


@contextmanager
def machine_lock(stage: str, terminal: TextIO) -> Iterator[None]:
    """Waits for this machine and locks it for a heavy stage; the system releases the lock if the process is killed.

    With LILLIPUT_SHARE_MACHINE=trainings, which a flow of several workers sets, `compress` stages share the lock,
    because their results do not depend on timing; stages that measure still run alone. With 1 a stage takes no lock.
    """
    share = os.environ.get("LILLIPUT_SHARE_MACHINE")
    if not stage.startswith(HEAVY) or share == "1":
        yield
        return
    mode = fcntl.LOCK_SH if share == "trainings" and stage.startswith("compress") else fcntl.LOCK_EX
    # One lock per machine, because several machines may share a home folder.
    path = user_cache_path("lilliput", ensure_exists=True) / f"machine-{platform.node()}.lock"
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{stage}: waiting for others on this machine (--share-machine does not)", file=terminal)
            fcntl.flock(lock, mode)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was forked meanwhile must not keep the lock
