"""Ends a child process together with its parent, however the parent ends.

A parent that holds the writing end of the child's standard input needs no polling: the system closes that pipe when the
parent dies, and the parent can close it to stop the child. A child without such a pipe polls the id of its parent.
"""

from __future__ import annotations

import os
import threading
import time
from typing import NoReturn

import psutil

EXIT_ORPHANED = 137  # as if killed: 128 + SIGKILL
_POLL_S = 1.0


def end_with_stdin() -> None:
    """Ends this process and its children, from a thread, once standard input is closed."""
    threading.Thread(target=wait_for_stdin, daemon=True).start()


def wait_for_stdin() -> NoReturn:
    """Waits until standard input is closed, then ends this process and its children."""
    os.read(0, 1)  # not sys.stdin: its lock would be held when the interpreter ends
    _end()


def end_with_parent() -> None:
    """Ends this process and its children, from a thread, within a second of the parent's end."""
    threading.Thread(target=_wait_for_parent, args=[os.getppid()], daemon=True).start()


def _wait_for_parent(parent: int) -> NoReturn:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    _end()


def _end() -> NoReturn:
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(EXIT_ORPHANED)
