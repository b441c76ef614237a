"""How a stage's process shares the machine with others."""

from __future__ import annotations

import fcntl
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import psutil
from platformdirs import user_cache_path

# Stages that take all cores for minutes; two at once would slow each other and spoil the measured latencies.
HEAVY = ("compress", "evaluate", "caching", "compile", "devices", "offload")


@contextmanager
def machine_for(stage: str, terminal: TextIO) -> Iterator[None]:
    """Holds this machine for a heavy stage, waiting its turn; the system frees it even if this process is killed.

    LILLIPUT_SHARE_MACHINE=trainings, as a flow of several workers says, lets `compress` stages that say so hold it
    together: what they make does not depend on it. Whatever measures is alone. With 1 a stage waits for nobody.
    """
    share = os.environ.get("LILLIPUT_SHARE_MACHINE")
    if not stage.startswith(HEAVY) or share == "1":
        yield
        return
    mode = fcntl.LOCK_SH if share == "trainings" and stage.startswith("compress") else fcntl.LOCK_EX
    # A home may be shared by machines, which do not wait for each other.
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
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was forked meanwhile must not keep it


def end_with_stdin() -> None:
    """Ends this process and its children when the one that started it dies: its end of our stdin then closes."""
    if os.environ.get("LILLIPUT_ENDS_WITH_STDIN") != "1":
        return

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: its lock would be held when the interpreter ends
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(137)

    threading.Thread(target=wait, daemon=True).start()
