"""Runs the command of a stage in a process of its own, which ends when its parent or its flow does."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from flows.engine.lineage import Stage
from lilliput.errors import StageError, TemporaryError
from tasks import layout
from tasks.process.console import EXIT_TEMPORARY, last_error
from tasks.process.cost import last_peak

# Ray and Dask set these to one for their workers. Other numbers of threads can mean other bytes: the flow's hold.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_BEAT_S = 5.0
_SILENT_LOOKS = 150  # a second each: clients of NFS may show a file as it was a minute ago
_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Site:
    """Where a flow's stages work, on whatever machine: `folder` has to be there under this path.

    Attributes:
        folder: absolute.
        sign: a file in it which is there, and touched now and then, for as long as the flow lives.
        environment: what a stage's process is told besides its worker's environment.
    """

    folder: Path
    sign: Path
    environment: dict[str, str] = field(default_factory=dict)


@contextmanager
def sign_of_life(folder: Path) -> Iterator[Path]:
    """Keeps a `Site.sign` in `folder`, which has to be this flow's alone: those of dead flows are removed."""
    for left in folder.glob(".flow-*.alive"):
        left.unlink(missing_ok=True)
    sign = folder / f".flow-{uuid4().hex}.alive"
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            with suppress(OSError):  # a file server may be away for a moment
                os.utime(sign)

    sign.touch()
    threading.Thread(target=beat, daemon=True).start()
    try:
        yield sign
    finally:
        ended.set()
        sign.unlink(missing_ok=True)


def run_process(stage: Stage, site: Site) -> None:
    """Runs `stage` at `site`; its progress bars go to this terminal, the rest to its log.

    A process of its own gives a stage's memory back to the system, keeps a crash of a kernel from taking the flow
    along, and makes this the very command that `dvc repro` runs.

    Raises:
        TemporaryError: it could not fetch something; another try may.
        StageError: it ended badly, and the message is the stage's own; or the site is not here; or the flow ended.
    """
    if not site.sign.exists():
        raise StageError(
            f"{stage.name}: the worker on {platform.node()} does not find {site.sign}: the flow has ended, or its "
            "folder is not shared with this machine under the same path"
        )
    log_before = _version(site.folder / layout.log(stage.name))
    command = shlex.split(stage.command)
    if command[0] == "python":
        command[0] = sys.executable
    environment = {name: value for name, value in os.environ.items() if name not in THREADS} | site.environment
    # The child holds the reading end of this pipe: when this process dies, however it dies, the child ends too.
    with (
        subprocess.Popen(
            command, cwd=site.folder, stdin=subprocess.PIPE, env=environment | {"LILLIPUT_ENDS_WITH_STDIN": "1"}
        ) as process,
        _ending_with(site.sign, process) as orphaned,
    ):
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    if orphaned.is_set():
        raise StageError(f"{stage.name}: stopped, because its flow has ended")
    if code == EXIT_TEMPORARY:
        raise TemporaryError(_explain(stage, code, site.folder, log_before))
    if code:
        raise StageError(_explain(stage, code, site.folder, log_before))


@contextmanager
def _ending_with(sign: Path, process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Ends `process` when `sign` is gone or touched no more, which the event tells."""
    done, orphaned = threading.Event(), threading.Event()

    def watch() -> None:
        last, silent = None, 0  # looks are counted, not seconds: a laptop that slept is not a flow that died
        while not done.wait(1.0):
            beat = _touched(sign)
            silent = silent + 1 if beat == last else 0
            last = beat
            if beat is None or silent > _SILENT_LOOKS:
                orphaned.set()
                _end(process)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield orphaned
    finally:
        done.set()
        watcher.join()


def _touched(sign: Path) -> int | None:
    try:
        return sign.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    except OSError:
        return 0  # a file server that is away for a moment; silence, if it stays away


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks `process` to end with its children, as if we had died; kills it if it does not."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()


def _explain(stage: Stage, code: int, folder: Path, log_before: tuple[int, int] | None) -> str:
    log = folder / layout.log(stage.name)
    if code < 0:
        hint = f"; the system may be out of memory{last_peak(stage.name, folder)}" if code == -9 else ""
        return f"{stage.name} was killed by signal {-code}{hint}; its log: {log}"
    if _version(log) == log_before:  # an earlier run's log does not explain this one
        return f"{stage.name} ended with exit code {code} before it wrote its log; the reason is on the terminal above"
    return last_error(log) or f"{stage.name} ended with exit code {code}; its log: {log}"


def _version(log: Path) -> tuple[int, int] | None:
    """Modification time (ns) and size (bytes) of `log`; None if there is no such file."""
    try:
        found = log.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
