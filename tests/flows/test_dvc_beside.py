"""A `dvc` command beside a flow, and the reverse: the second is refused and changes nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dvc.repo import Repo

from flows.engine.lineage import Lineage
from flows.engine.workspace import exclusive
from lilliput.errors import BusyError
from tests.flows.conftest import PROJECT

PIPELINE = """\
stages:
  make:
    cmd: python make.py
    deps: [input]
    outs: [model]
"""
# Waits while `hold` exists, like a long training.
MAKE = """\
import time
from pathlib import Path
Path("began").touch()
while Path("hold").exists():
    time.sleep(0.05)
Path("model").write_text(Path("input").read_text())
"""
HOLDER = """\
import sys, time
from pathlib import Path
from flows.engine.workspace import exclusive
with exclusive(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""
pytestmark = pytest.mark.filterwarnings("default")  # DVC and pygtrie emit warnings about each other


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A DVC repository of one stage, recorded for the input `one`; its present input is `two`."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    Repo.init(str(project), no_scm=True).close()
    for name, text in (("dvc.yaml", PIPELINE), ("make.py", MAKE), ("input", "one")):
        (project / name).write_text(text)
    assert dvc("repro").returncode == 0
    (project / "began").unlink()
    (project / "input").write_text("two")
    return project


def dvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_dvc(*arguments), capture_output=True, text=True, timeout=120)


def _dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.parametrize("command", ["repro", "checkout --force", "gc --workspace --force"])
def test_a_dvc_command_beside_a_flow_is_refused_and_changes_nothing(folder, command):
    if command.startswith("checkout"):
        (folder / "model").unlink()
        (folder / "model").write_text("being written")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with exclusive(folder):
        before |= {path.name: path.read_bytes() for path in folder.glob(".democratize.*")}
        refused = dvc(*command.split())
        assert refused.returncode != 0
        assert "Unable to acquire lock" in refused.stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_changes_are_found_beside_a_flow(folder):
    with exclusive(folder):  # like `--plan` in another process
        assert Lineage(folder).changes("make") == ["input: modified"]


def test_a_flow_beside_dvc_repro_is_refused_and_the_stage_is_recorded(folder):
    (folder / "hold").touch()
    repro = subprocess.Popen(_dvc("repro"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(folder / "began")  # now DVC locks the outputs of the stage instead of the repository
        with pytest.raises(BusyError, match="`dvc` command is running"), exclusive(folder):
            pass
        (folder / "hold").unlink()
        _, stderr = repro.communicate(timeout=60)
    finally:
        repro.kill()
    assert repro.returncode == 0, stderr
    assert (folder / "model").read_text() == "two"
    assert Lineage(folder).changes("make") == []


def test_the_lock_ends_with_its_holder(folder):
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(PROJECT)})
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    with pytest.raises(BusyError), exclusive(folder):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=60)
    with exclusive(folder):
        pass
