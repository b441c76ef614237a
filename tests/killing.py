"""What storage has to survive: `kill -9` at a chosen change to the files, in a process of its own, and a full disk."""

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
    """Runs `work` in a child that kills itself right before one of its changes to files; whether it got that far.

    Args:
        change: which one, from 0.
        work: opens, renames, links and removes files; what C libraries do without Python is not counted.
    """
    told, telling = os.pipe()
    child = os.fork()
    if not child:
        left = change

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes and arguments[0] != os.devnull) or event in _CHANGES:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            # A child's pool of threads is made anew at its first use, which only one thread may do (PyTorch 2.13).
            torch.set_num_threads(torch.get_num_threads())
            sys.addaudithook(hook)
            work()
            code = 0
        except BaseException:
            os.write(telling, traceback.format_exc()[-8000:].encode())  # fits into the pipe
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    os.close(telling)
    with os.fdopen(told) as pipe:
        reason = pipe.read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the work itself failed:\n{reason}"
    return os.WIFSIGNALED(status)


def fill(disk: Path) -> Path:
    """The file that takes what was left on the disk `disk`."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(512))
    return filler
