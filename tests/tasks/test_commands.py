import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lilliput.errors import ConfigError
from tasks.process.console import EXIT_REFUSED, EXIT_TERMINATED
from tasks.process.cost import measured_cost
from tasks.process.deadline import deadline

PROJECT = Path(__file__).resolve().parent.parent.parent
FULL_DISK = """
import errno, tasks.source, tasks.__main__ as commands
def fetch(params):
    raise OSError(errno.ENOSPC, "No space left on device", "models/.source.partial/model.gguf")
tasks.source.fetch = fetch
commands._run("source", "fetch")
"""
OUT_OF_MEMORY = """
import sys, types, tasks.__main__ as commands
# Replaces tasks/compress.py, which imports torch.
sys.modules["tasks.compress"] = types.SimpleNamespace(compress=lambda params, name: bytearray(2**62))
commands._run("compress", "compress", "base")
"""
ALLOCATIONS = """
import numpy, torch
from tasks.process.cost import out_of_memory
def is_out_of_memory(allocate):
    try:
        allocate()
    except Exception as error:
        return out_of_memory(error)
def wrapped():
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        raise ValueError("no model that opens") from error
for allocate in (lambda: torch.empty(2**50), lambda: numpy.ones(2**50), wrapped, lambda: int("x")):
    print(is_out_of_memory(allocate))
"""
WITH_A_CHILD = """
import subprocess, time, tasks.source, tasks.__main__ as commands
from pathlib import Path
def fetch(params):
    child = subprocess.Popen(["sleep", "600"])
    Path("child").write_text(str(child.pid))
    try:
        time.sleep(600)
    finally:
        child.wait()
        Path("closed").touch()
tasks.source.fetch = fetch
commands._run("source", "fetch")
"""
HANGING = """
import time, tasks.source, tasks.__main__ as commands
tasks.source.fetch = lambda params: time.sleep(600)
commands._run("source", "fetch")
"""


@pytest.fixture
def run(tmp_path):
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", tmp_path / "params.yaml")

    def command(*arguments, **environment):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return command


def test_a_full_disk_is_reported_as_such(run):
    done = run("-c", FULL_DISK)
    assert done.returncode == EXIT_REFUSED
    assert "No space left on device" in done.stderr
    assert "free some space and run this again" in done.stderr
    assert "a bug" not in done.stderr


def test_an_unknown_name_is_rejected_with_the_known_names(run):
    done = run("-m", "tasks", "compile", "pocket")
    assert done.returncode == EXIT_REFUSED
    assert "unknown name `pocket`; params.yaml has under compile: pocket-gguf, pocket-onnx" in done.stderr


@pytest.mark.parametrize(
    ("record", "peak"),
    [
        (
            '{"seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 850000000}',
            "; it took 811 MiB at its peak the last time (costs/base.json)",
        ),
        ('{"seconds"', "; this machine has "),
    ],
)
def test_out_of_memory_is_reported_with_the_last_peak_of_the_stage_if_known(run, tmp_path, record, peak):
    (tmp_path / "costs").mkdir()
    (tmp_path / "costs" / "base.json").write_text(record)
    done = run("-c", OUT_OF_MEMORY)
    assert done.returncode == EXIT_REFUSED
    assert f"error: compress@base: out of memory{peak}" in done.stderr
    assert "Traceback" not in done.stderr + (tmp_path / "logs" / "compress-base.log").read_text()


@pytest.mark.slow
def test_failed_allocations_of_torch_and_numpy_are_recognised(run):
    done = run("-c", ALLOCATIONS)
    assert done.stdout.split() == ["True", "True", "True", "False"], done.stderr


def test_a_terminated_stage_ends_its_children(tmp_path):
    shutil.copyfile(PROJECT / "examples" / "tiny.yaml", tmp_path / "params.yaml")
    stage = subprocess.Popen(
        [sys.executable, "-c", WITH_A_CHILD],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < deadline and stage.poll() is None
        time.sleep(0.05)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    stage.terminate()
    assert stage.wait(60) == EXIT_TERMINATED
    assert not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE
    assert (tmp_path / "closed").exists()  # its `finally` block has run


def test_a_hanging_stage_is_ended_at_its_deadline(run):
    done = run("-c", HANGING, LILLIPUT_STAGE_HOURS="0.0003")
    assert done.returncode == EXIT_REFUSED
    assert "error: source: not done after 0.0003 h (LILLIPUT_STAGE_HOURS) and stopped" in done.stderr


@pytest.mark.parametrize("hours", ["soon", "0", "nan", "inf"])
def test_invalid_hours_are_rejected(monkeypatch, hours):
    monkeypatch.setenv("LILLIPUT_STAGE_HOURS", hours)
    with pytest.raises(ConfigError, match="LILLIPUT_STAGE_HOURS"), deadline(print):
        pass


def test_a_clock_that_is_set_back_does_not_change_the_cost(monkeypatch, tmp_path):
    jumps = itertools.cycle([0.0, 4e9, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    with measured_cost(tmp_path / "cost.json"):
        time.sleep(0.05)
    assert 0.05 <= json.loads((tmp_path / "cost.json").read_text())["seconds"] < 60


@pytest.mark.parametrize("command", ["compress", "source"])
def test_an_unwritable_cache_is_one_message_on_the_terminal(run, tmp_path, command):
    """A heavy stage locks the machine before its work begins; an error there used to go only to the log."""
    (tmp_path / "file").touch()
    candidate = ["base"] if command == "compress" else []
    done = run("-m", "tasks", command, *candidate, XDG_CACHE_HOME=str(tmp_path / "file" / "cache"))
    assert done.returncode == EXIT_REFUSED, done.stderr
    assert f"error: {command}" in done.stderr
    assert "cannot write there" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unwritable_log_is_one_message(run, tmp_path):
    (tmp_path / "logs" / "source.log").mkdir(parents=True)
    done = run("-m", "tasks", "source")
    assert done.returncode == EXIT_REFUSED
    assert "error: source: logs/source.log: the log cannot be written (Is a directory)" in done.stderr


def test_missing_certificates_are_reported_before_any_work(run, tmp_path):
    done = run("-m", "tasks", "source", SSL_CERT_FILE=str(tmp_path / "none.pem"))
    assert done.returncode == EXIT_REFUSED
    assert "error: source: SSL_CERT_FILE: no such file: " in done.stderr
