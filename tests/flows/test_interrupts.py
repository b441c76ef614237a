"""A run that is stopped, or loses Prefect's server: its end, its leftovers, and that the next run continues."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = [
    pytest.mark.night,
    pytest.mark.timeout(1500),
]  # a flow, or Prefect's server, takes minutes to start on a busy machine
CONTINUES = "the same command continues from here"


def start(clone, **environment):
    log = (clone.folder / "run.log").open("wb")
    command = [sys.executable, "-m", "flows.democratize"]
    with log:
        return subprocess.Popen(
            command,
            cwd=clone.folder,
            env=clone.environment | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for_stage(run, name, limit_s=600):
    """Waits for the process of stage `name`; returns all processes of the run."""
    for _ in range(int(10 * limit_s)):
        processes = run.children(recursive=True)
        if any(name in command_of(process) for process in processes):
            return [run, *processes]
        assert run.is_running() and run.status() != psutil.STATUS_ZOMBIE, "the run ended before"
        time.sleep(0.1)
    raise AssertionError(f"{name} did not start")


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def states(clone, table):
    with sqlite3.connect(Path(clone.environment["PREFECT_HOME"]) / "prefect.db") as database:
        return {state for (state,) in database.execute(f"select state_type from {table}")}


@pytest.mark.parametrize(
    ("number", "whole_group", "code", "runner", "bits"),
    [
        (signal.SIGINT, True, 130, "local", 2),
        (signal.SIGTERM, False, 143, "local", 3),
        (signal.SIGINT, True, 130, "dask", 2),
        (signal.SIGTERM, False, 143, "dask", 3),
    ],
    ids=["Ctrl-C at a terminal", "SIGTERM", "Ctrl-C with Prefect", "SIGTERM with Prefect"],
)
def test_a_stopped_run_tells_how_to_continue_and_leaves_no_process(clone, number, whole_group, code, runner, bits):
    if runner == "dask" and find_spec("prefect_dask") is None:
        pytest.skip("the extra `dask` is not installed")
    clone.set_param("strategies.gptq.bits", bits)
    process = start(clone, LILLIPUT_RUNNER=runner)
    processes = wait_for_stage(psutil.Process(process.pid), "tasks compress small")
    time.sleep(1)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    exit_code, output = process.wait(300), (clone.folder / "run.log").read_text()
    assert exit_code == code, output
    assert f"error: stopped; nothing is half-written, and {CONTINUES}" in output
    _, alive = psutil.wait_procs(processes[1:], timeout=30)
    assert not alive
    if runner == "dask":
        assert "RUNNING" not in states(clone, "flow_run") | states(clone, "task_run")


def test_a_run_continues_without_prefects_server_and_ends_with_one_message(clone, tmp_path, free_port):
    clone.set_param("strategies.gptq.bits", 8)  # not made yet
    address = f"http://127.0.0.1:{free_port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(free_port)]
    environment = {"PREFECT_API_URL": address, "PREFECT_HOME": str(tmp_path)}
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=clone.folder, env=clone.environment | environment, stdout=log, stderr=log
        )
    try:
        while True:
            assert server.poll() is None
            try:
                httpx.get(f"{address}/health", timeout=5.0).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        process = start(clone, PREFECT_API_URL=address)
        wait_for_stage(psutil.Process(process.pid), "tasks ")
    finally:
        for part in [*psutil.Process(server.pid).children(recursive=True), server]:
            part.kill()
        server.wait()
    assert process.wait(1200) == 2
    assert f"error: Prefect's server {address} is gone" in (clone.folder / "run.log").read_text()
    assert clone.run("dvc", "status").stdout.strip() == "Data and pipelines are up to date."


def test_a_missing_server_is_reported_before_anything_starts(clone, free_port):
    done = clone.run("python", "-m", "flows.democratize", PREFECT_API_URL=f"http://127.0.0.1:{free_port}/api")
    assert done.returncode == 2
    assert f"error: PREFECT_API_URL: http://127.0.0.1:{free_port}/api does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_invalid_prefect_home_is_reported_before_the_server_starts(clone):
    if find_spec("prefect_dask") is None:
        pytest.skip("the extra `dask` is not installed")  # only its workers and Ray's need the server
    (clone.folder / "file").touch()
    home = str(clone.folder / "file" / "home")
    done = clone.run("python", "-m", "flows.democratize", "--runner", "dask", PREFECT_HOME=home)
    assert done.returncode == 2
    assert "error: PREFECT_HOME: " in done.stderr
    assert "Traceback" not in done.stderr
