"""Runs the product's `python -m …` children as forks, which need not import torch again: seconds instead of minutes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import IO, Any

import pytest

_POLL_S = 0.05


class Fork:
    """The part of `subprocess.Popen` that the product uses, for the command `python -m module arguments …`."""

    def __init__(self, command: Sequence[str], *, stdout: IO[bytes], stderr: IO[bytes], **_: Any) -> None:
        assert list(command[:2]) == [sys.executable, "-m"], command
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._become(list(command[2:]), stdout, stderr)

    def _become(self, command: list[str], stdout: IO[bytes], stderr: IO[bytes]) -> None:
        code = 1
        try:
            for stream, number in ((stdout, 1), (stderr, 2)):
                os.dup2(stream.fileno(), number)
            sys.argv = command
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """Returns the exit status; None while the child runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self) -> None:
        """Ends the child."""
        if self.poll() is None:
            os.kill(self.pid, 9)

    def wait(self, timeout: float = float("inf")) -> int | None:
        """Waits for the end of the child, for up to `timeout` seconds."""
        started = time.monotonic()
        while self.poll() is None:
            time.sleep(_POLL_S)
            if time.monotonic() - started > timeout:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode


class _AtOnce:
    """An executor that does the work when it is submitted: no fork happens beside another thread."""

    def __init__(self, _workers: int) -> None: ...

    def __enter__(self) -> _AtOnce:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Returns the finished work."""
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def _run(command: Sequence[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile() as output:
        child, started = Fork(command, stdout=output, stderr=output), time.monotonic()
        while child.poll() is None:
            time.sleep(_POLL_S)
            if time.monotonic() - started > timeout:
                child.kill()
                child.wait()
                raise subprocess.TimeoutExpired(list(command), timeout)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return subprocess.CompletedProcess(list(command), child.returncode or 0, text, text)


class _Forking:
    """Replaces the module `subprocess` in the product's modules."""

    Popen, run = Fork, staticmethod(_run)
    DEVNULL, TimeoutExpired = subprocess.DEVNULL, subprocess.TimeoutExpired


@contextmanager
def forked_children() -> Iterator[None]:
    """Makes parity checks and ONNX Runtime's builder run as forks for the length of a block."""
    import onnxruntime_genai  # noqa: F401 - imported once, before the forks
    import xllamacpp  # noqa: F401

    from lilliput.compile import onnx, parity
    from lilliput.devices import runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "subprocess", _Forking)
        patch.setattr(onnx, "subprocess", _Forking)
        patch.setattr(parity, "ThreadPoolExecutor", _AtOnce)
        yield
