"""A run that is stopped, or loses Prefect's server: how it ends, what it leaves, and that the next one goes on."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = [
    pytest.mark.night,
    pytest.mark.timeout(1500),
]  # a flow, or Prefect's server, takes minutes to start beside others
GOES_ON = "the same command goes on from here"


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


def stage_of(run, name, limit_s=600):
    """Waits for the process of stage `name`; all processes of the run."""
    for _ in range(int(10 * limit_s)):
        processes = run.children(recursive=True)
        if any(name in command_of(process) for process in processes):
            return [run, *processes]
        assert run.is_running() and run.status() != psutil.STATUS_ZOMBIE, "it ended before"
        time.sleep(0.1)
    raise AssertionError(f"{name} never began")


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def states(clone, table):
    with sqlite3.connect(Path(clone.environment["PREFECT_HOME"]) / "prefect.db") as database:
        return {state for (state,) in database.execute(f"select state_type from {table}")}


@pytest.mark.parametrize(
    ("number", "everybody", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)],
    ids=["Ctrl-C at a terminal", "SIGTERM"],
)
def test_a_stopped_run_says_how_to_go_on_and_leaves_nothing_behind(clone, number, everybody, code):
    clone.set_param("strategies.gptq.bits", 2 if everybody else 3)
    process = start(clone)
    whole = stage_of(psutil.Process(process.pid), "tasks compress small")
    time.sleep(1)
    if everybody:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said = (process.wait(300), (clone.folder / "run.log").read_text())
    assert said[0] == code, said[1]
    assert f"error: stopped; nothing is half-written, and {GOES_ON}" in said[1]
    _, alive = psutil.wait_procs(whole[1:], timeout=30)
    assert not alive
    assert "RUNNING" not in states(clone, "flow_run") | states(clone, "task_run")


def test_work_goes_on_without_prefects_server_and_the_end_is_one_message(clone, tmp_path, free_port):
    clone.set_param("strategies.gptq.bits", 8)  # what was not made yet
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
        stage_of(psutil.Process(process.pid), "tasks ")
    finally:
        for part in [*psutil.Process(server.pid).children(recursive=True), server]:
            part.kill()
        server.wait()
    assert process.wait(1200) == 2
    assert f"error: Prefect's server {address} is gone" in (clone.folder / "run.log").read_text()
    assert clone.run("dvc", "status").stdout.strip() == "Data and pipelines are up to date."


def test_a_server_that_is_not_there_is_told_before_anything_starts(clone, free_port):
    done = clone.run("python", "-m", "flows.democratize", PREFECT_API_URL=f"http://127.0.0.1:{free_port}/api")
    assert done.returncode == 2
    assert f"error: PREFECT_API_URL: http://127.0.0.1:{free_port}/api does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_that_is_none_is_told_before_a_server_is_waited_for(clone):
    clone.set_param("strategies.gptq.bits", 3)  # with nothing to do no server is wanted
    (clone.folder / "file").touch()
    done = clone.run("python", "-m", "flows.democratize", PREFECT_HOME=str(clone.folder / "file" / "home"))
    assert done.returncode == 2
    assert "error: PREFECT_HOME: " in done.stderr
    assert "Traceback" not in done.stderr
