"""Kills and restarts Prefect's server during runs that a worker started from a deployment."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest
from prefect import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.engine.champions import LIMIT
from tests.flows.conftest import Clone, copy_project

DOWN_S = 60
RENEWAL_S = 240  # Prefect renews the lease of a deployment's concurrency limit after 225 s, which would fail
# A flow looks at `source` and `data`; `first` and `second` wait.
GRAPH = """\
stages:
  source:
    cmd: python -c "open('source.txt', 'w').write('source')"
    outs: [source.txt]
  data:
    cmd: python -c "open('data.txt', 'w').write('data')"
    outs: [data.txt]
  first:
    cmd: python stage.py first
    outs: [first.txt]
  second:
    cmd: python stage.py second
    deps: [first.txt]
    outs: [second.txt]
"""
STAGE = """\
import sys, time
from pathlib import Path
from lilliput.child import end_with_stdin

end_with_stdin()
Path(f"{sys.argv[1]}.began").touch()
while Path("hold").exists():
    time.sleep(0.2)
Path(f"{sys.argv[1]}.txt").write_text(sys.argv[1])
"""

pytestmark = [pytest.mark.night, pytest.mark.timeout(1800)]


@pytest.fixture
def project(tmp_path) -> Clone:
    """A checkout with a graph of two stages, which wait while the file `hold` exists."""
    clone = copy_project(tmp_path / "project")
    (clone.folder / "dvc.yaml").write_text(GRAPH)
    (clone.folder / "stage.py").write_text(STAGE)
    (clone.folder / "hold").touch()
    return clone


@contextlib.contextmanager
def running(clone: Clone, log: str, *command: str):
    """Starts a process of `clone`; kills it with its children at the end."""
    with (clone.folder / log).open("ab") as stream:
        process = subprocess.Popen(command, cwd=clone.folder, env=clone.environment, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for part in [*psutil.Process(process.pid).children(recursive=True), process]:
                part.kill()
        process.wait()


@contextlib.contextmanager
def serving(clone: Clone, port: int):
    clone.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    with running(clone, "server.log", "prefect", "server", "start", "--port", str(port)) as server:
        wait_until(lambda: server.poll() is not None or responds(clone), 300)
        assert server.poll() is None, (clone.folder / "server.log").read_text()
        yield


def responds(clone: Clone) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{clone.environment['PREFECT_API_URL']}/health", timeout=5, trust_env=False).is_success
    return False


@contextlib.contextmanager
def client_of(clone: Clone):
    server = temporary_settings({PREFECT_API_URL: clone.environment["PREFECT_API_URL"]})
    with server, get_client(sync_client=True) as client:
        yield client


def flow_runs(clone: Clone) -> list[tuple[str, str]]:
    """Returns the state name and message of each flow run, in order of time."""
    with client_of(clone) as client:
        runs = sorted(client.read_flow_runs(), key=lambda run: str(run.created))
    return [(run.state.name, run.state.message or "") for run in runs if run.state]


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(1)


def test_runs_of_a_deployment_survive_the_server_and_wait_for_each_other(project, free_port):
    log = project.folder / "worker.log"
    with contextlib.ExitStack() as worker:
        with serving(project, free_port):
            deploy(project)
            worker.enter_context(running(project, log.name, "prefect", "worker", "start", "--pool", "lilliput"))
            start(project)
            wait_until((project.folder / "first.began").exists, 300)
            started = time.monotonic()
            start(project)
            wait_until(lambda: [name for name, _ in flow_runs(project)] == ["Running", "Waiting"], 300)
            assert "another run is active here since" in flow_runs(project)[1][1]
        time.sleep(DOWN_S)
        with serving(project, free_port):
            time.sleep(max(0.0, RENEWAL_S - (time.monotonic() - started)))
            (project.folder / "hold").unlink()
            wait_until(lambda: all(name in ("Completed", "Crashed", "Failed") for name, _ in flow_runs(project)), 600)
            assert [name for name, _ in flow_runs(project)] == ["Completed", "Completed"], log.read_text()
    assert Path(project.folder, "second.txt").read_text() == "second"
    assert "up to date" in project.run("dvc", "status").stdout


def test_the_slot_of_a_dead_holder_is_free_after_a_restart_of_the_server(project, free_port):
    with serving(project, free_port), client_of(project) as client:
        client.upsert_global_concurrency_limit_by_name(LIMIT, 1)
        client.increment_concurrency_slots_with_lease([LIMIT], 1, "concurrency", lease_duration=60)
        assert client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 1
    with serving(project, free_port), client_of(project) as client:
        wait_until(lambda: client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0, 180)


def deploy(clone: Clone) -> None:
    for command in (
        ["prefect", "work-pool", "create", "lilliput", "--type", "process"],
        ["prefect", "--no-prompt", "deploy", "--all"],
    ):
        done = clone.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr


def start(clone: Clone) -> None:
    done = clone.run("prefect", "deployment", "run", "democratize/pipeline")
    assert done.returncode == 0, done.stdout + done.stderr
