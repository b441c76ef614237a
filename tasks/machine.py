"""How a stage's process shares the machine with others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import psutil
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

# Stages that take all cores for minutes; two at once would slow each other and spoil the measured latencies.
HEAVY = ("compress", "evaluate", "caching", "compile", "devices", "offload")


@contextmanager
def machine_for(stage: str, terminal: TextIO) -> Iterator[None]:
    """Holds this machine for a heavy stage, waiting its turn; the system frees it even if this process is killed.

    LILLIPUT_SHARE_MACHINE=1 waits for nobody.
    """
    if not stage.startswith(HEAVY) or os.environ.get("LILLIPUT_SHARE_MACHINE") == "1":
        yield
        return
    path = user_cache_path("lilliput", ensure_exists=True) / "machine.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"{stage}: waiting for another training on this machine (--share-machine does not)", file=terminal)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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
