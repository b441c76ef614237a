"""llama.cpp's own server on loopback, in a process of its own that ends with the one that started it.

Every local user, and every web page that this user opens, can send requests to a port of loopback. So each process has
a random key, which it reads from its standard input: a command line and an environment can be read by others.
"""

from __future__ import annotations

import json
import queue
import secrets
import subprocess
import sys
import threading
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
class Serving:
    """What is served, and with how much.

    Attributes:
        file: a GGUF file.
        threads: CPU threads.
        context_tokens: of prompt and answer together, for each slot.
        slots: requests answered at once.
    """

    file: str
    threads: int
    context_tokens: int
    slots: int = 1


class LlamaServer:
    """Starts llama.cpp's server at once; `url` answers as soon as the constructor returns.

    Attributes:
        url: of the server, without `/v1`.
        key: that requests have to bear; only `/health` answers without.
        file: that is served.

    Args:
        serving: what is served.
        deadline_s: for opening the model.

    Raises:
        ArtifactError: the model does not open, or not in time.
    """

    def __init__(self, serving: Serving, deadline_s: float = 60.0) -> None:
        self.key, self.file = secrets.token_urlsafe(32), serving.file
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lilliput.llama_server.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment_without_secrets(),
        )
        self._account = psutil.Process(self._process.pid)
        told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, args=(told,), daemon=True)
        self._listener.start()
        try:
            self._send(json.dumps({"serving": asdict(serving), "key": self.key}))
            self.url = json.loads(told.get(timeout=deadline_s))["url"]
        except (queue.Empty, ValueError, KeyError):
            self.stop()
            raise ArtifactError(f"{serving.file}: llama.cpp's server did not start in {deadline_s:g} s") from None

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the listener hears
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _listen(self, told: queue.SimpleQueue[str]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                told.put(line)
        told.put("")  # it has ended

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process.poll() is None

    def cpu_seconds(self) -> float | None:
        """Those that its process has used; None once it has ended."""
        try:
            used = self._account.cpu_times()
        except psutil.Error:
            return None
        return used.user + used.system

    def stop(self) -> None:
        """Ends it; answers under way are lost."""
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


def _serve(serving: Serving, key: str) -> None:
    import xllamacpp

    engine: Any = xllamacpp  # compiled, and without types
    params = engine.CommonParams()
    params.model.path = str(Path(serving.file))
    params.n_ctx, params.n_parallel, params.n_gpu_layers = serving.context_tokens * serving.slots, serving.slots, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = serving.threads
    params.warmup, params.verbosity, params.use_jinja = False, 0, True
    require_key(params, key)
    server = engine.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    wait_for_stdin()


if __name__ == "__main__":
    _told = json.loads(sys.stdin.readline())
    _serve(Serving(**_told["serving"]), _told["key"])
