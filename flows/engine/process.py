"""Runs the command of a stage in a separate process, which ends when its parent or its flow does."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from uuid import uuid4

from flows.engine.champions import exclusive_promotion
from flows.engine.stage import Stage
from flows.engine.stage_output import StageOutput, reading_output
from lilliput.errors import StageError, TemporaryError
from lilliput.forked import Forked, ForkServer
from tasks import layout
from tasks.process.console import EXIT_TEMPORARY, last_error
from tasks.process.cost import last_peak
from tasks.process.machine_lock import HEAVY

# Ray and Dask set these to one for their workers. The number of threads can change result bytes: the flow's value wins.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RETRIES, RETRY_DELAY_S = 2, 10  # only after a TemporaryError
SKIP_MESSAGES = {"Cached": "nothing changed, cached", "Restored": "made from these inputs before, restored"}
_BEAT_S = 5.0
_MISSED_CHECKS = 150  # one per second: clients of NFS may see a file as it was a minute ago
_STOP_S = 10.0


@dataclass(frozen=True)
class Site:
    """Where the stages of a flow run, on any machine: `folder` must exist there under the same path.

    Attributes:
        folder: absolute.
        heartbeat: a file in it, touched regularly while the flow lives.
        environment: variables of a stage's process besides its worker's environment.
        forks: starts stages that need torch as forked children, in this process only; None for plain processes.
        hear: gets what stages write to their terminal, by any thread of this process; None drops it.
    """

    folder: Path
    heartbeat: Path
    environment: dict[str, str] = field(default_factory=dict)
    forks: StageForks | None = None
    hear: Callable[[Stage, str], None] | None = None


class StageForks:
    """The fork server of a run, which starts with the first stage that needs it.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._server, self._lock = folder, ExitStack(), threading.Lock()
        self._opened: ForkServer | None = None

    def start(self, command: list[str], environment: dict[str, str], output: IO[bytes]) -> Forked:
        """Starts `command`, which is `python -m <module> …`, in the run's folder; it writes to `output`."""
        with self._lock:
            if self._opened is None:
                self._opened = self._server.enter_context(ForkServer(self._folder, environment))
        return self._opened.start(command[2], command[3:], self._folder, environment, output)

    def close(self) -> None:
        """Ends the server and its children."""
        self._server.close()


@contextmanager
def heartbeat(folder: Path) -> Iterator[Path]:
    """Keeps a heartbeat file in `folder`, which only this flow uses: files of dead flows are removed."""
    for old in folder.glob(".flow-*.alive"):
        old.unlink(missing_ok=True)
    path = folder / f".flow-{uuid4().hex}.alive"
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            with suppress(OSError):  # a file server may be away for a moment
                os.utime(path)

    path.touch()
    threading.Thread(target=beat, daemon=True).start()
    try:
        yield path
    finally:
        ended.set()
        path.unlink(missing_ok=True)


def run_stage(stage: Stage, site: Site) -> None:
    """Runs `stage` at `site` and checks that its outputs exist; only one promotion runs at a time.

    Raises:
        TemporaryError: it could not fetch something; a retry may succeed.
        StageError: it failed, or an output is missing.
    """
    with exclusive_promotion(site.folder) if stage.name == "promote" else nullcontext():
        run_process(stage, site)
    if missing := [path for path in stage.outputs if not (site.folder / path).exists()]:
        raise StageError(
            f"{stage.name} ended without an error, but {', '.join(missing)} does not exist in {site.folder}: "
            "another program removed it; the same command makes it again"
        )


def run_process(stage: Stage, site: Site) -> None:
    """Runs `stage` at `site`; its progress bars and notes go to `site.hear`, everything else to its log.

    A separate process returns its memory to the system, does not take the flow along when a kernel crashes, and makes
    this the same command that `dvc repro` runs.

    Raises:
        TemporaryError: it could not fetch something; a retry may succeed.
        StageError: it failed, with the stage's own message; or the site is not on this machine; or the flow ended.
    """
    if not site.heartbeat.exists():
        raise StageError(
            f"{stage.name}: the worker on {platform.node()} cannot find {site.heartbeat}: the flow has ended, or its "
            "folder is not shared with this machine under the same path"
        )
    log_before = _version(site.folder / layout.log(stage.name))
    # The child holds the reading end of this pipe, and ends when this process does, even after a kill.
    hear = site.hear
    with (
        reading_output(lambda text: hear(stage, text) if hear else None) as output,
        _start(stage, site, output) as process,
        _stopped_with_flow(site.heartbeat, process) as orphaned,
    ):
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
    if orphaned.is_set():
        raise StageError(f"{stage.name}: stopped, because its flow has ended")
    if code == EXIT_TEMPORARY:
        raise TemporaryError(_failure(stage, code, site.folder, log_before, output.error))
    if code:
        raise StageError(_failure(stage, code, site.folder, log_before, output.error))


def _start(stage: Stage, site: Site, output: StageOutput) -> subprocess.Popen[bytes] | Forked:
    """Starts the command of `stage`: forked if it needs torch and the site has a fork server."""
    command = shlex.split(stage.command)
    environment = {name: value for name, value in os.environ.items() if name not in THREADS} | site.environment
    environment["LILLIPUT_ENDS_WITH_STDIN"] = "1"
    environment.setdefault("TQDM_MININTERVAL", "1")  # seconds
    with output.stream as stream:
        if site.forks and command[:3] == ["python", "-m", "tasks"] and command[3:4] and command[3] in HEAVY:
            return site.forks.start(command, environment, stream)
        if command[0] == "python":
            command[0] = sys.executable
        return subprocess.Popen(
            command, cwd=site.folder, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=environment
        )


@contextmanager
def _stopped_with_flow(heartbeat: Path, process: subprocess.Popen[bytes] | Forked) -> Iterator[threading.Event]:
    """Stops `process` when `heartbeat` is removed or no longer touched, and sets the event then."""
    done, orphaned = threading.Event(), threading.Event()

    def watch() -> None:
        last, missed = None, 0  # counts checks, not seconds: a laptop that slept is no dead flow
        while not done.wait(1.0):
            beat = _last_beat(heartbeat)
            missed = missed + 1 if beat == last else 0
            last = beat
            if beat is None or missed > _MISSED_CHECKS:
                orphaned.set()
                _stop(process)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield orphaned
    finally:
        done.set()
        watcher.join()


def _last_beat(heartbeat: Path) -> int | None:
    try:
        return heartbeat.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    except OSError:
        return 0  # a file server is away for a moment; counts as missed if it stays away


def _stop(process: subprocess.Popen[bytes] | Forked) -> None:
    """Closes the pipe, so that `process` ends with its children; kills it if it does not."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _failure(stage: Stage, code: int, folder: Path, log_before: tuple[int, int] | None, error: str) -> str:
    log = folder / layout.log(stage.name)
    if code < 0:
        hint = f"; the system may be out of memory{last_peak(stage.name, folder)}" if code == -9 else ""
        return f"{stage.name} was killed by signal {-code}{hint}; its log: {log}"
    if _version(log) == log_before:  # the log is of an earlier run
        return error or f"{stage.name} ended with exit code {code} before it wrote its log"
    return last_error(log) or f"{stage.name} ended with exit code {code}; its log: {log}"


def _version(log: Path) -> tuple[int, int] | None:
    """Returns modification time (ns) and size (bytes) of `log`; None if it does not exist."""
    try:
        info = log.stat()
    except FileNotFoundError:
        return None
    return info.st_mtime_ns, info.st_size
