"""The same stages by threads, Ray and Dask: they run concurrently, the flow records them, and they end with it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from flows.engine.process import Site, heartbeat, run_process, run_stage
from flows.engine.runners import require_runner, stage_environment
from flows.engine.stage import Stage
from lilliput.errors import ConfigError, StageError
from tests.flows.conftest import PROJECT, Clone, environment_in

TIMEOUT_S = 900  # a busy machine starts a cluster slowly

# `one` and `two` end only if both run at the same time; `last` needs them.
GRAPH = """\
stages:
  first:
    cmd: python -c "open('first.txt', 'w').write('first')"
    outs: [first.txt]
  pair:
    foreach: {one: two, two: one}
    do:
      cmd: python stage.py ${key} ${item}
      deps: [first.txt]
      outs: ["${key}.txt"]
  last:
    cmd: python -c "open('last.txt', 'w').write('last')"
    deps: [one.txt, two.txt]
    outs: [last.txt]
"""
STAGE = """\
import os, sys, time
from pathlib import Path
from lilliput.child import end_with_stdin

name, other = sys.argv[1:]
end_with_stdin()
Path(f"{name}.began").write_text(f"{os.getpid()} {os.getppid()} {os.environ.get('OMP_NUM_THREADS')}")
deadline = time.monotonic() + 800
while not Path(f"{other}.began").exists():
    assert time.monotonic() < deadline, "the other stage does not run"
    time.sleep(0.1)
while Path("hold").exists():
    time.sleep(0.1)
Path(f"{name}.txt").write_text(name)
"""
FLOW = """\
import json, os, sys
from pathlib import Path
from prefect import flow
from flows.engine.runners import open_runner
from flows.engine.lineage import Lineage
from flows.engine.scheduler import run_stages

@flow
def run(runner: str):
    lineage = Lineage(Path.cwd())
    with open_runner(runner, 2, Path.cwd(), True) as stage_runner:
        outcome = run_stages(lineage.stages(), lineage, stage_runner)
        print(json.dumps({"pid": os.getpid(), "outcome": outcome}), flush=True)

if __name__ == "__main__":
    run(sys.argv[1])
"""


def require(runner: str) -> str:
    if runner != "local" and find_spec(f"prefect_{runner}") is None:
        pytest.skip(f"the extra `{runner}` is not installed")
    return runner


def run_flow(project: Clone, runner: str) -> dict:
    """Runs the flow with `runner`; up to three times, because Ray allows its processes only 15 s to start."""
    for _ in range(3):
        done = project.run("python", "run_flow.py", runner, timeout_s=TIMEOUT_S)
        if "timed out during startup" not in done.stderr:
            break
    return outcome(done)


@pytest.fixture
def project(tmp_path) -> Clone:
    """A DVC repository of stages that wait for each other."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name, text in (("params.yaml", "{}"), ("dvc.yaml", GRAPH), ("stage.py", STAGE), ("run_flow.py", FLOW)):
        (folder / name).write_text(text)
    environment = environment_in(folder, tmp_path / "prefect") | {
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "3",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(TIMEOUT_S),
    }
    clone = Clone(folder, environment)
    assert clone.run("dvc", "init", "--no-scm", "-q").returncode == 0
    return clone


def outcome(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"pid"')))


@pytest.mark.night
@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.parametrize("runner", ["local", "ray", "dask"])
def test_independent_stages_run_concurrently_and_dvc_records_all(project, runner):
    result = run_flow(project, require(runner))
    assert result["outcome"] == [dict.fromkeys(["first", "pair@one", "pair@two", "last"], "Completed"), {}]
    parents = set()
    for name in ("one", "two"):
        _, parent, threads = (project.folder / f"{name}.began").read_text().split()
        assert threads == "3"  # the value of the flow, not that of the cluster
        parents.add(int(parent))
    assert (result["pid"] in parents) == (runner == "local")
    assert "up to date" in project.run("dvc", "status").stdout
    again = run_flow(project, runner)
    assert set(again["outcome"][0].values()) == {"Cached"}
    needs_of_runs = {"first": set(), "one": {"first"}, "two": {"first"}, "last": {"one", "two"}}
    assert dependencies_in_prefect(project) == [needs_of_runs, needs_of_runs]


def dependencies_in_prefect(project: Clone) -> list[dict[str, set[str]]]:
    """Returns the upstream tasks of each task in Prefect's graph, for each flow run in order of time."""
    with contextlib.closing(sqlite3.connect(Path(project.environment["PREFECT_HOME"], "prefect.db"))) as database:
        rows = database.execute("SELECT flow_run_id, id, name, task_inputs FROM task_run ORDER BY expected_start_time")
        runs: dict[str, dict[str, set[str]]] = {}
        names = {}
        for flow_run, task_run, name, inputs in rows:
            names[task_run] = title = name.partition(":")[0]
            needed = {part["id"] for part in json.loads(inputs).get("wait_for", [])}
            runs.setdefault(flow_run, {})[title] = {names[part] for part in needed}
    return list(runs.values())


@pytest.mark.night
@pytest.mark.timeout(6 * TIMEOUT_S)
@pytest.mark.parametrize("runner", ["ray", "dask"])
def test_candidates_made_concurrently_have_the_bytes_of_sequential_ones(clone, tmp_path, runner):
    require(runner)
    names = [f"{runner}4", f"{runner}8"]  # unique: otherwise the other runner's results would be restored
    for name, bits in zip(names, (4, 8), strict=True):
        clone.set_param(f"candidates.{name}", {"from": "base", "apply": "rtn", "with": {"bits": bits}})
    alone = Clone(tmp_path / "alone", clone.environment | {"PWD": str(tmp_path / "alone")})
    subprocess.run(["cp", "-a", str(clone.folder), str(alone.folder)], check=True)
    done = alone.run("dvc", "repro", *(f"compress@{name}" for name in names), timeout_s=2 * TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    done = clone.run(
        *("python", "-m", "flows.democratize", "--runner", runner, "--workers", "2"),
        *(word for name in names for word in ("--only", name)),
        timeout_s=3 * TIMEOUT_S,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=str(TIMEOUT_S),
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        made, expected = (
            json.loads((one.folder / "models" / name / "lilliput.json").read_text())["files"] for one in (clone, alone)
        )
        assert made == expected
    assert not {f"compress@{name}" for name in names} & set(clone.run("dvc", "status").stdout.split())


@pytest.mark.night
@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.parametrize("runner", ["local", "ray", "dask"])
def test_the_stages_and_the_cluster_of_a_killed_flow_end_too(project, runner):
    (project.folder / "hold").touch()
    with (project.folder / "flow.log").open("w") as log:
        flow = subprocess.Popen(
            [sys.executable, "run_flow.py", require(runner)],
            cwd=project.folder,
            env=project.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        started = [project.folder / "one.began", project.folder / "two.began"]
        wait_until(lambda: flow.poll() is not None or all(map(is_written, started)))
        assert flow.poll() is None, (project.folder / "flow.log").read_text()
        stages = [int(path.read_text().split()[0]) for path in started]
        assert all(psutil.pid_exists(pid) for pid in stages)
        flow.kill()
        flow.wait()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in stages))
        wait_until(lambda: not remaining(project))
    finally:
        for process in [*remaining(project), *servers_of(project)]:
            process.kill()
    assert not (project.folder / "one.txt").exists()


def is_written(began: Path) -> bool:
    return began.exists() and len(began.read_text().split()) == 3


def wait_until(condition) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def processes_of(project: Clone) -> list[psutil.Process]:
    """Returns the processes with the environment of `project`."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == project.environment["PREFECT_HOME"]:
                processes.append(process)
        except psutil.Error:
            continue
    return [process for process in processes if process.status() != psutil.STATUS_ZOMBIE]


def servers_of(project: Clone) -> list[psutil.Process]:
    """Returns the servers that Prefect started, which outlive a killed flow."""
    return [process for process in processes_of(project) if "uvicorn" in process.cmdline()]


def remaining(project: Clone) -> list[psutil.Process]:
    servers = servers_of(project)
    return [process for process in processes_of(project) if process not in servers]


def test_a_stage_ends_with_its_flow_on_another_machine(tmp_path):
    waits = "import time; from lilliput.child import end_with_stdin; end_with_stdin();"
    waits += " open('began', 'w'); time.sleep(300)"
    stage = Stage("data", f'python -c "{waits}"', "")
    started = time.monotonic()
    with heartbeat(tmp_path) as alive:
        site = Site(tmp_path, alive, {"PYTHONPATH": str(PROJECT)})
        process = ThreadPoolExecutor(1).submit(run_process, stage, site)
        wait_until((tmp_path / "began").exists)
    with pytest.raises(StageError, match="stopped, because its flow has ended"):
        process.result(TIMEOUT_S)
    assert time.monotonic() - started < 250


def test_a_worker_without_the_folder_fails_with_a_reason_and_starts_nothing(tmp_path):
    stage = Stage("data", "python -c \"open('began', 'w')\"", "")
    with pytest.raises(StageError, match=r"data: the worker on .* is not shared with this machine under the same path"):
        run_process(stage, Site(tmp_path, tmp_path / ".flow-0.alive"))
    assert not (tmp_path / "began").exists()


def test_a_stage_whose_output_was_removed_meanwhile_fails(tmp_path):
    writes = "python -c \"open('model', 'w'); open('cost.json', 'w')\""
    removes = "python -c \"import os; open('model', 'w'); open('cost.json', 'w'); os.unlink('model')\""
    outputs = ("model", "cost.json")
    with heartbeat(tmp_path) as alive:
        run_stage(Stage("data", writes, "", outputs=outputs), Site(tmp_path, alive))
        with pytest.raises(StageError, match=f"model does not exist in {tmp_path}"):
            run_stage(Stage("data", removes, "", outputs=outputs), Site(tmp_path, alive))


def test_a_failure_is_not_explained_by_the_log_of_an_earlier_run(tmp_path):
    log = tmp_path / "logs" / "data.log"
    log.parent.mkdir()
    log.write_text("\nerror: data: of last week\n")
    stage = Stage("data", 'python -c "raise SystemExit(2)"', "")
    with heartbeat(tmp_path) as alive, pytest.raises(StageError, match="exit code 2 before it wrote its log"):
        run_process(stage, Site(tmp_path, alive))


def test_the_heartbeat_file_of_a_dead_flow_is_removed_by_the_next_one(tmp_path):
    (tmp_path / ".flow-0123.alive").touch()
    with heartbeat(tmp_path) as alive:
        assert list(tmp_path.glob(".flow-*.alive")) == [alive]
    assert not list(tmp_path.glob(".flow-*.alive"))


@pytest.mark.parametrize(
    ("runner", "workers", "message"),
    [
        ("local", 0, "at least one"),
        ("spark", 2, "--runner spark: unknown"),
        ("http://head:1", 2, "unknown"),
        ("ray://head:10001", 2, "set PREFECT_API_URL"),
        ("tcp://head:8786", 2, "set PREFECT_API_URL"),
    ],
)
def test_an_invalid_runner_is_rejected_with_a_remedy(monkeypatch, runner, workers, message):
    monkeypatch.setattr("flows.engine.runners.find_spec", lambda _name: "installed")
    with pytest.raises(ConfigError, match=message):
        require_runner(runner, workers)


DASK = """\
import httpx, psutil
from flows.engine.prefect_runner import _dask

if __name__ == "__main__":
    with _dask("dask", 1) as runner:
        from distributed import Client  # reads its settings when it is imported

        address = runner.client.scheduler.address
        for other in (address, address.replace("tls://", "tcp://")):
            try:
                Client(other, timeout=5)
                print("connected")
            except (OSError, TypeError, RuntimeError):
                print("refused")
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            for port in {c.laddr.port for c in process.net_connections() if c.status == "LISTEN"}:
                for page in ("/status", "/json/counts.json", "/metrics", "/health"):
                    try:
                        print(httpx.get(f"http://127.0.0.1:{port}{page}", trust_env=False).status_code)
                    except httpx.TransportError:
                        print("refused")
"""


@pytest.mark.slow
def test_other_clients_cannot_connect_to_the_dask_cluster_of_a_run(project):
    require("dask")
    (project.folder / "cluster.py").write_text(DASK)
    done = project.run("python", "cluster.py", timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    results = done.stdout.split()
    assert results[:2] == ["refused", "refused"]
    assert len(results) >= 2 + 4 * 2 and set(results) <= {"refused", "404"}


RAY = """\
import os, subprocess, sys, time
from flows.engine.prefect_runner import _ray

def attempt(address, timeout_s, **environment):
    code = f"import ray; ray.init('{address}', log_to_driver=False); print('connected')"
    try:
        command, variables = [sys.executable, "-c", code], os.environ | environment
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return "refused"
    return "connected" if done.returncode == 0 and done.stdout.split()[-1:] == ["connected"] else "refused"

if __name__ == "__main__":
    with _ray("ray", 1):
        import ray

        address, started = ray.get_runtime_context().gcs_address, time.monotonic()
        print(attempt(address, 300))
        # Ray retries with a wrong token.
        print(attempt(address, 2 * (time.monotonic() - started) + 10, RAY_AUTH_TOKEN="0" * 64))
"""


@pytest.mark.slow
def test_clients_without_the_token_cannot_connect_to_the_ray_cluster_of_a_run(project):
    require("ray")
    (project.folder / "cluster.py").write_text(RAY)
    done = project.run("python", "cluster.py", timeout_s=TIMEOUT_S)
    assert done.stdout.split() == ["connected", "refused"], done.stderr


def test_missing_packages_of_a_runner_are_named(monkeypatch):
    monkeypatch.setattr("flows.engine.runners.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"not installed: distributed, prefect_dask; .*requirements-team.lock"):
        require_runner("dask", 2)


@pytest.mark.parametrize(
    ("flag", "variable", "workers", "expected"),
    [(False, None, 1, None), (False, None, 4, "trainings"), (True, None, 4, "1"), (False, "1", 4, "1")],
)
def test_several_workers_share_the_machine_for_trainings(monkeypatch, flag, variable, workers, expected):
    monkeypatch.delenv("LILLIPUT_SHARE_MACHINE", raising=False)
    if variable:
        monkeypatch.setenv("LILLIPUT_SHARE_MACHINE", variable)
    assert stage_environment(flag, workers).get("LILLIPUT_SHARE_MACHINE") == expected
