"""llama.cpp's server on loopback, in a child process that ends with its parent.

Every local user, and every web page that the user opens, can send requests to a loopback port. So each process has a
random key. It reads the key from standard input, because other users can read command lines and environments.
"""

from __future__ import annotations

import ctypes
import json
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from lilliput.child import wait_for_stdin
from lilliput.errors import ArtifactError
from lilliput.redaction import environment_without_secrets
from lilliput.runtime.loopback import require_key


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        file: a GGUF file.
        threads: CPU threads.
        context_tokens: prompt and answer together, per slot.
        slots: concurrent requests.
    """

    file: str
    threads: int
    context_tokens: int
    slots: int = 1


class LlamaServer:
    """Starts llama.cpp's server. It accepts requests when the constructor returns.

    Attributes:
        url: its address, without `/v1`.
        key: the API key that all requests but `/health` need.
        file: the served file.

    Args:
        settings: settings of the server.
        deadline_s: time limit for opening the model.

    Raises:
        ArtifactError: the model does not open, or not in time.
    """

    def __init__(self, settings: ServerSettings, deadline_s: float = 60.0) -> None:
        self.key, self.file = secrets.token_urlsafe(32), settings.file
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lilliput.llama_server.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment_without_secrets(),
        )
        self._clock = cpu_clock(self._process.pid)
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, args=(lines,), daemon=True)
        self._listener.start()
        try:
            self._send(json.dumps({"serving": asdict(settings), "key": self.key}))
            self.url = json.loads(lines.get(timeout=deadline_s))["url"]
        except (queue.Empty, ValueError, KeyError):
            self.stop()
            raise ArtifactError(f"{settings.file}: llama.cpp's server did not start in {deadline_s:g} s") from None

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; the listener notices that
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _listen(self, lines: queue.SimpleQueue[str]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                lines.put(line)
        lines.put("")  # the process has ended

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def cpu_seconds(self) -> float | None:
        """CPU-seconds that the process has used; None once it has ended."""
        return self._clock() if self.running else None

    def stop(self) -> None:
        """Kills the process; running requests fail."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a line that the process did not read
                pipe.close()

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def cpu_clock(pid: int) -> Callable[[], float | None]:
    """Returns a function that returns the CPU-seconds of the process `pid`; None where they are unknown.

    Two readings are taken for each answer. A CPU clock of POSIX needs microseconds and counts nanoseconds; psutil
    reads a file in a tenth of a millisecond, and counts hundredths of a second.
    """
    clock = ctypes.c_int()
    find = getattr(ctypes.CDLL(None), "clock_getcpuclockid", None)  # macOS has none
    if find is not None and find(pid, ctypes.byref(clock)) == 0:
        return lambda: _cpu_time(clock.value)
    process = psutil.Process(pid)
    return lambda: _psutil_time(process)


def _cpu_time(clock: int) -> float | None:
    try:
        return time.clock_gettime(clock)
    except OSError:
        return None


def _psutil_time(process: psutil.Process) -> float | None:
    try:
        used = process.cpu_times()
    except psutil.Error:
        return None
    return used.user + used.system


def _serve(settings: ServerSettings, key: str) -> None:
    import xllamacpp

    engine: Any = xllamacpp  # a compiled module without type hints
    params = engine.CommonParams()
    params.model.path = str(Path(settings.file))
    params.n_ctx, params.n_parallel, params.n_gpu_layers = settings.context_tokens * settings.slots, settings.slots, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
    params.warmup, params.verbosity, params.use_jinja = False, 0, True
    require_key(params, key)
    server = engine.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    wait_for_stdin()


if __name__ == "__main__":
    _message = json.loads(sys.stdin.readline())
    _serve(ServerSettings(**_message["serving"]), _message["key"])
