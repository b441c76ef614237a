"""The folder lock: one run in a folder at a time, started by a flow, by DVC or by hand."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from lilliput.errors import ConfigError
from tasks.process.folder_lock import folder_lock
from tests.tasks.test_commands import PROJECT, run

__all__ = ["run"]  # a fixture
HOLD = """
import sys, time
from pathlib import Path
from tasks.process.folder_lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_error_for_a_second_run_names_the_first_and_a_killed_run_releases_the_lock(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
    )
    try:
        assert first.stdout and first.stdout.readline() == b"held\n"
        message = rf"another run is active here since .*: process {first.pid}, `python"
        with pytest.raises(ConfigError, match=message), folder_lock(tmp_path):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with folder_lock(tmp_path):
        pass
    assert not list(tmp_path.glob("*.holder"))


def test_a_stage_by_hand_or_by_dvc_is_refused_during_a_run_and_does_not_touch_its_log(run, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "source.log").write_text("the log of the running stage")
    with folder_lock(tmp_path):
        done = run("-m", "tasks", "source")
    assert done.returncode == 2
    assert re.fullmatch(rf"error: source: .*process {os.getpid()}, .*", done.stderr.strip())
    assert (tmp_path / "logs" / "source.log").read_text() == "the log of the running stage"
