"""Stages on a full disk: one clear error, no partial files, and success once there is space."""

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
    """The project on a disk of 64 MiB, with the first candidate complete."""
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


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the single error message of a failed stage."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return message


def leave_free(filler: Path, size_bytes: int) -> None:
    """Shrinks `filler`, so that exactly `size_bytes` are free."""
    os.truncate(filler, filler.stat().st_size - size_bytes)


def partial_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith((".partial", ".removed"))]


@pytest.mark.night
def test_stages_report_a_full_disk_and_continue_once_there_is_space(on_small_disk, small_disk):
    folder = on_small_disk
    filler = fill(small_disk)
    assert "nothing can be written here" in error_of(stage_in(folder, "evaluate", "base"))
    leave_free(filler, 1 << 20)
    assert "about" in error_of(stage_in(folder, "compress", "lora"))
    leave_free(fill(small_disk), 4096)
    assert "free some space" in error_of(stage_in(folder, "evaluate", "base"))
    assert not (folder / "metrics" / "base.json").exists()
    leave_free(filler, 1 << 20)
    assert stage_in(folder, "evaluate", "base").returncode == 0
    leave_free(fill(small_disk), 1 << 18)
    assert "free some space" in error_of(stage_in(folder, "register"))  # MLflow's store is larger
    assert not (folder / "mlruns" / "mlflow.db").exists()
    filler.unlink()
    done = stage_in(folder, "register")
    assert done.returncode == 0, done.stderr
    store = sqlite3.connect(folder / "mlruns" / "mlflow.db")
    assert store.execute("select count(*) from model_versions").fetchone() == (1,)
    store.close()
    assert stage_in(folder, "compress", "lora").returncode == 0
    assert partial_files(folder) == []


def test_a_read_only_folder_is_rejected_before_a_stage_starts(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in error_of(stage_in(small_disk, "source"))
