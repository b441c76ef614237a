"""Stages on a disk that is full, or becomes full: one clear error, nothing half-written, and they go on afterwards."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.killing import fill

PROJECT = Path(__file__).parent.parent.parent


@pytest.fixture
def on_small_disk(project, small_disk):
    """The project on a disk of 64 MiB, in which the first candidate stands made."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    folder = small_disk / "project"
    shutil.copytree(project, folder)
    for stage in (["source"], ["data"], ["compress", "base"]):
        done = stage_in(folder, *stage)
        assert done.returncode == 0, done.stderr
    return folder


def stage_in(folder: Path, *stage: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"PYTHONPATH": str(PROJECT), "LILLIPUT_SHARE_MACHINE": "1"}
    command = [sys.executable, "-m", "tasks", *stage]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one error it ended with."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return message


def leave(filler: Path, size_bytes: int) -> None:
    """Has the disk take so many more bytes, and no more."""
    os.truncate(filler, filler.stat().st_size - size_bytes)


def halves(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith((".partial", ".removed"))]


@pytest.mark.night
def test_stages_that_find_no_room_say_so_and_go_on_when_there_is_some(on_small_disk, small_disk):
    folder = on_small_disk
    filler = fill(small_disk)
    assert "nothing can be written here" in refused(stage_in(folder, "evaluate", "base"))
    leave(filler, 1 << 20)
    assert "about" in refused(stage_in(folder, "compress", "lora"))
    leave(fill(small_disk), 4096)
    assert "free some space" in refused(stage_in(folder, "evaluate", "base"))
    assert not (folder / "metrics" / "base.json").exists()
    leave(filler, 1 << 20)
    assert stage_in(folder, "evaluate", "base").returncode == 0
    leave(fill(small_disk), 1 << 18)
    assert "free some space" in refused(stage_in(folder, "register"))  # MLflow's store is larger
    assert not (folder / "mlruns" / "mlflow.db").exists()
    filler.unlink()
    done = stage_in(folder, "register")
    assert done.returncode == 0, done.stderr
    store = sqlite3.connect(folder / "mlruns" / "mlflow.db")
    assert store.execute("select count(*) from model_versions").fetchone() == (1,)
    store.close()
    assert stage_in(folder, "compress", "lora").returncode == 0
    assert halves(folder) == []


def test_a_folder_that_cannot_be_written_to_is_refused_before_a_stage_starts(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in refused(stage_in(small_disk, "source"))
