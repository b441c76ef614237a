"""Runs the command of a stage in a process of its own, which ends when its parent does."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from flows.lineage import Stage
from lilliput.errors import StageError, TemporaryError
from tasks import layout
from tasks.console import EXIT_TEMPORARY, last_error


def run_process(stage: Stage, folder: Path, environment: dict[str, str]) -> None:
    """Runs `stage` in `folder`; its progress bars go to this terminal, the rest to its log.

    A process of its own gives a stage's memory back to the system, keeps a crash of a kernel from taking the flow
    along, and makes this the very command that `dvc repro` runs.

    Raises:
        TemporaryError: it could not fetch something; another try may.
        StageError: it ended badly; the message is the stage's own.
    """
    command = shlex.split(stage.command)
    if command[0] == "python":
        command[0] = sys.executable
    # The child holds the reading end of this pipe: when this process dies, however it dies, the child ends too.
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, env=os.environ | environment | {"LILLIPUT_ENDS_WITH_STDIN": "1"}
    ) as process:
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code == EXIT_TEMPORARY:
        raise TemporaryError(_explain(stage, code, folder / layout.log(stage.name)))
    if code:
        raise StageError(_explain(stage, code, folder / layout.log(stage.name)))


def _explain(stage: Stage, code: int, log: Path) -> str:
    if code < 0:
        hint = "; the system may be out of memory" if code == -9 else ""
        return f"{stage.name} was killed by signal {-code}{hint}; its log: {log}"
    return last_error(log) or f"{stage.name} ended with exit code {code}; its log: {log}"
