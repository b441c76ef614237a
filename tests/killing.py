"""Storage failures for tests: `kill -9` before a chosen change to files, in a child process, and a full disk."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.link", "os.chmod", "os.truncate", "os.rmdir")


def killed_at(change: int, work: Callable[[], Any]) -> bool:
    """Runs `work` in a child that kills itself before one of its changes to files; returns whether it was killed.

    Args:
        change: number of the change, from 0.
        work: opens, renames, links and removes files; changes by C libraries are not counted.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        remaining = change

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal remaining
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes and arguments[0] != os.devnull) or event in _CHANGES:
                remaining -= 1
                if remaining < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            # The child creates its thread pool on first use, which only one thread may do (PyTorch 2.13).
            torch.set_num_threads(torch.get_num_threads())
            sys.addaudithook(hook)
            work()
            code = 0
        except BaseException:
            os.write(write_end, traceback.format_exc()[-8000:].encode())  # fits into the pipe's buffer
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        reason = pipe.read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the work itself failed:\n{reason}"
    return os.WIFSIGNALED(status)


def fill(disk: Path) -> Path:
    """Fills the disk `disk` with one file, and returns it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(512))
    return filler
