"""Runs Python commands as forked children of a `lilliput.fork_server`; where that is impossible, as plain processes."""

from __future__ import annotations

import json
import os
import platform
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lilliput.errors import StageError
from lilliput.redaction import is_secret

ADDRESS = "LILLIPUT_FORK_SERVER"  # the server's socket, for processes below one that started it
_HEADER = struct.Struct("!I")
_PADDING = "." * 80  # room for the command lines of children
_KILL_S = 10.0
_START_S, _POLL_S = 120.0, 0.05


def can_fork() -> bool:
    """Whether stages may be forked: on Linux since 5.14, without an NVIDIA GPU, whose driver forbids it."""
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():
        return False
    return tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2]) >= (5, 14)


class ForkServer:
    """A fork server that ends with this process.

    Args:
        folder: working directory; its `logs/fork_server.log` gets the output of the imports.
        environment: of the server, read by the libraries at import; secrets are left out, and only given to children.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="lilliput-")
        self.address = str(Path(self._scratch.name, "socket"))
        self.log = folder / "logs" / "fork_server.log"
        self.log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "lilliput.fork_server", self.address, _PADDING]
        public = {name: value for name, value in environment.items() if not is_secret(name)}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=public, stdin=subprocess.PIPE, stdout=log, stderr=log
            )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._scratch.cleanup()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        output: IO[Any] | None = None,
    ) -> Forked:
        """Starts `python -m <module> <arguments>` with a pipe as standard input.

        It writes to `output`; to the output of this process without one.

        Raises:
            StageError: the server has ended, does not answer, or cannot fork.
        """
        command = (module, arguments, folder, {**environment, ADDRESS: self.address})
        deadline = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(FileNotFoundError, ConnectionError):  # it imports libraries before it listens
                return Forked(self.address, command, output)
            time.sleep(_POLL_S)
        code = self._process.poll()
        problem = f"has not answered for {_START_S:g} s" if code is None else f"ended with exit code {code}"
        hint = "; the system may be out of memory" if code == -signal.SIGKILL else ""
        raise StageError(
            f"the fork server, which imports libraries for the stages, {problem}{hint}; its log: {self.log}; the same "
            "command starts a new one, and `dvc repro` runs the stages without one"
        )


class Forked:
    """A child of a fork server; used like `subprocess.Popen`.

    Attributes:
        stdin: writing end of its standard input.
        pid: of the child.
        cpu_s: CPU-seconds of the child, once it has ended.

    Raises:
        OSError: nothing listens at `address`, or the server has just ended.
        StageError: the server cannot fork.
    """

    def __init__(
        self,
        address: str,
        command: tuple[str, Sequence[str], Path, Mapping[str, str]],
        output: IO[Any] | None = None,
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.connect(address)
        except OSError:
            self._connection.close()
            raise
        module, arguments, folder, environment = command
        job = {
            "module": module,
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": dict(environment),
        }
        content = json.dumps(job).encode()
        reading, writing = os.pipe()
        streams = [reading, *([output.fileno()] * 2 if output else [1, 2])]
        socket.send_fds(self._connection, [_HEADER.pack(len(content))], streams)
        self._connection.sendall(content)
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")
        (self.pid,) = _HEADER.unpack(self._connection.recv(_HEADER.size, socket.MSG_WAITALL) or bytes(_HEADER.size))
        if not self.pid:
            raise StageError(
                f"{module}: the fork server did not fork; logs/fork_server.log says why; the same command tries again"
            )
        self.cpu_s, self._code, self._ended = 0.0, -signal.SIGKILL, threading.Event()
        self._handle = os.pidfd_open(self.pid)
        threading.Thread(target=self._follow, daemon=True).start()

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stdin.close()
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: the child runs longer than `timeout` seconds.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self._code

    def kill(self) -> None:
        """Kills the child."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _follow(self) -> None:
        """Waits for the server's report. If the server died, its children must not outlive it."""
        report = b""
        with suppress(OSError):
            while part := self._connection.recv(4096):
                report += part
        if report:
            end = json.loads(report)
            self._code, self.cpu_s = end["code"], end["cpu_s"]
        else:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            select.select([self._handle], [], [], _KILL_S)
        os.close(self._handle)
        self._connection.close()
        self._ended.set()


_forked_cpu_s = 0.0


def forked_cpu_s() -> float:
    """Returns the CPU-seconds of the ended children that `run_fresh` forked; the system counts them for the server."""
    return _forked_cpu_s


def run_fresh(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Runs `python -m <module> <arguments>` in a process that shares no state with this one.

    It is a child of the fork server if this process has one, whose libraries are imported; otherwise a new interpreter.

    Returns:
        The exit code and the output.
    """
    global _forked_cpu_s
    address = os.environ.get(ADDRESS)
    with tempfile.TemporaryFile() as output:
        if address:
            with Forked(address, (module, arguments, Path.cwd(), environment), output) as child:
                code = child.wait()
            _forked_cpu_s += child.cpu_s
        else:
            command = [sys.executable, "-m", module, *arguments]
            code = subprocess.run(command, stdout=output, stderr=output, check=False, env=environment).returncode
        output.seek(0)
        return code, output.read().decode(errors="replace")
