import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.console import EXIT_REFUSED

PROJECT = Path(__file__).resolve().parent.parent.parent
FULL_DISK = """
import errno, tasks.source, tasks.__main__ as commands
def fetch(params):
    raise OSError(errno.ENOSPC, "No space left on device", "models/.source.partial/model.gguf")
tasks.source.fetch = fetch
commands._run("source", "fetch")
"""


@pytest.fixture
def run(tmp_path):
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", tmp_path / "params.yaml")

    def command(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return command


def test_a_full_disk_is_told_as_what_it_is(run):
    done = run("-c", FULL_DISK)
    assert done.returncode == EXIT_REFUSED
    assert "No space left on device" in done.stderr
    assert "free some space and run this again" in done.stderr
    assert "a bug" not in done.stderr


def test_a_name_that_is_not_compiled_is_refused_with_those_that_are(run):
    done = run("-m", "tasks", "compile", "pocket")
    assert done.returncode == EXIT_REFUSED
    assert "unknown name `pocket`; params.yaml has under compile: pocket-gguf, pocket-onnx" in done.stderr
