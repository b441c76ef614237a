"""The same stages by threads, by Ray and by Dask: side by side, recorded by the flow, ended with it."""

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

from flows.engine.lineage import Stage
from flows.engine.process import Site, run_process, sign_of_life
from flows.engine.runners import environment_of_stages, require_runner, run_stage
from lilliput.errors import ConfigError, StageError
from tests.flows.conftest import PROJECT, Clone, environment_in

PATIENCE_S = 900  # a machine under load takes its time to start a cluster

# `one` and `two` end only if both are at work at the same time; `last` needs them.
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

own, other = sys.argv[1:]
end_with_stdin()
Path(f"{own}.began").write_text(f"{os.getpid()} {os.getppid()} {os.environ.get('OMP_NUM_THREADS')}")
deadline = time.monotonic() + 800
while not Path(f"{other}.began").exists():
    assert time.monotonic() < deadline, "alone"
    time.sleep(0.1)
while Path("hold").exists():
    time.sleep(0.1)
Path(f"{own}.txt").write_text(own)
"""
NIGHT = """\
import json, os, sys
from pathlib import Path
from prefect import flow
from flows.engine.runners import open_crew
from flows.engine.lineage import Lineage
from flows.engine.scheduler import run_stages

@flow
def night(runner: str):
    lineage = Lineage(Path.cwd())
    with open_crew(runner, 2, Path.cwd(), True) as crew:
        print(json.dumps({"pid": os.getpid(), "outcome": run_stages(lineage.stages(), lineage, crew)}), flush=True)

if __name__ == "__main__":
    night(sys.argv[1])
"""


def needs(runner: str) -> str:
    if runner != "local" and find_spec(f"prefect_{runner}") is None:
        pytest.skip(f"the extra `{runner}` is not installed")
    return runner


def spend(paper: Clone, runner: str) -> dict:
    """A night with `runner`: Ray gives its own processes 15 s to start, which a busy machine may not have."""
    for _ in range(3):
        done = paper.run("python", "night.py", runner, timeout_s=PATIENCE_S)
        if "timed out during startup" not in done.stderr:
            break
    return outcome(done)


@pytest.fixture
def paper(tmp_path) -> Clone:
    """A DVC repository of stages that wait for each other."""
    folder = tmp_path / "paper"
    folder.mkdir()
    for name, text in (("dvc.yaml", GRAPH), ("stage.py", STAGE), ("night.py", NIGHT)):
        (folder / name).write_text(text)
    environment = environment_in(folder, tmp_path / "prefect") | {
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "3",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(PATIENCE_S),
    }
    clone = Clone(folder, environment)
    assert clone.run("dvc", "init", "--no-scm", "-q").returncode == 0
    return clone


def outcome(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"pid"')))


@pytest.mark.night
@pytest.mark.timeout(3 * PATIENCE_S)
@pytest.mark.parametrize("runner", ["local", "ray", "dask"])
def test_independent_stages_are_at_work_together_and_dvc_has_them_all(paper, runner):
    told = spend(paper, needs(runner))
    assert told["outcome"] == [dict.fromkeys(["first", "pair@one", "pair@two", "last"], "Completed"), {}]
    parents = set()
    for name in ("one", "two"):
        _, parent, threads = (paper.folder / f"{name}.began").read_text().split()
        assert threads == "3"  # the flow's, not the one that a cluster would set
        parents.add(int(parent))
    assert (told["pid"] in parents) == (runner == "local")
    assert "up to date" in paper.run("dvc", "status").stdout
    again = spend(paper, runner)
    assert set(again["outcome"][0].values()) == {"Cached"}
    needs_of_runs = {"first": set(), "one": {"first"}, "two": {"first"}, "last": {"one", "two"}}
    assert drawn(paper) == [needs_of_runs, needs_of_runs]


def drawn(paper: Clone) -> list[dict[str, set[str]]]:
    """What needs what in Prefect's graph of each flow run, the oldest first."""
    with contextlib.closing(sqlite3.connect(Path(paper.environment["PREFECT_HOME"], "prefect.db"))) as database:
        rows = database.execute("SELECT flow_run_id, id, name, task_inputs FROM task_run ORDER BY expected_start_time")
        runs: dict[str, dict[str, set[str]]] = {}
        names = {}
        for flow_run, task_run, name, inputs in rows:
            names[task_run] = title = name.partition(":")[0]
            needed = {part["id"] for part in json.loads(inputs).get("wait_for", [])}
            runs.setdefault(flow_run, {})[title] = {names[part] for part in needed}
    return list(runs.values())


@pytest.mark.night
@pytest.mark.timeout(6 * PATIENCE_S)
@pytest.mark.parametrize("runner", ["ray", "dask"])
def test_candidates_have_the_bytes_that_they_have_when_made_one_after_another(clone, tmp_path, runner):
    needs(runner)
    names = [f"{runner}4", f"{runner}8"]  # of their own: what the other runner made is not restored
    for name, bits in zip(names, (4, 8), strict=True):
        clone.set_param(f"candidates.{name}", {"from": "base", "apply": "rtn", "with": {"bits": bits}})
    alone = Clone(tmp_path / "alone", clone.environment | {"PWD": str(tmp_path / "alone")})
    subprocess.run(["cp", "-a", str(clone.folder), str(alone.folder)], check=True)
    done = alone.run("dvc", "repro", *(f"compress@{name}" for name in names), timeout_s=2 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    done = clone.run(
        *("python", "-m", "flows.democratize", "--runner", runner, "--workers", "2"),
        *(word for name in names for word in ("--only", name)),
        timeout_s=3 * PATIENCE_S,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=str(PATIENCE_S),
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        made, expected = (
            json.loads((one.folder / "models" / name / "lilliput.json").read_text())["files"] for one in (clone, alone)
        )
        assert made == expected
    assert not {f"compress@{name}" for name in names} & set(clone.run("dvc", "status").stdout.split())


@pytest.mark.night
@pytest.mark.timeout(3 * PATIENCE_S)
@pytest.mark.parametrize("runner", ["local", "ray", "dask"])
def test_a_killed_flow_takes_its_stages_and_its_cluster_along(paper, runner):
    (paper.folder / "hold").touch()
    with (paper.folder / "night.log").open("w") as log:
        flow = subprocess.Popen(
            [sys.executable, "night.py", needs(runner)],
            cwd=paper.folder,
            env=paper.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        begun = [paper.folder / "one.began", paper.folder / "two.began"]
        wait_until(lambda: all(path.exists() and len(path.read_text().split()) == 3 for path in begun))
        stages = [int(path.read_text().split()[0]) for path in begun]
        assert all(psutil.pid_exists(pid) for pid in stages)
        flow.kill()
        flow.wait()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in stages))
        wait_until(lambda: not left_of(paper))
    finally:
        for process in [*left_of(paper), *servers_of(paper)]:
            process.kill()
    assert not (paper.folder / "one.txt").exists()


def wait_until(holds) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def of(paper: Clone) -> list[psutil.Process]:
    """The processes that were started with the environment of `paper`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT_HOME") == paper.environment["PREFECT_HOME"]:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def servers_of(paper: Clone) -> list[psutil.Process]:
    """Prefect's own server, which outlives a killed flow."""
    return [process for process in of(paper) if "uvicorn" in process.cmdline()]


def left_of(paper: Clone) -> list[psutil.Process]:
    servers = servers_of(paper)
    return [process for process in of(paper) if process not in servers]


# What needs no cluster.


def test_a_stage_ends_when_the_flow_on_another_machine_does(tmp_path):
    waits = "import time; from lilliput.child import end_with_stdin; end_with_stdin();"
    waits += " open('began', 'w'); time.sleep(300)"
    stage = Stage("data", f'python -c "{waits}"', "")
    started = time.monotonic()
    with sign_of_life(tmp_path) as sign:
        site = Site(tmp_path, sign, {"PYTHONPATH": str(PROJECT)})
        process = ThreadPoolExecutor(1).submit(run_process, stage, site)
        wait_until((tmp_path / "began").exists)
    with pytest.raises(StageError, match="stopped, because its flow has ended"):
        process.result(PATIENCE_S)
    assert time.monotonic() - started < 250


def test_a_worker_that_does_not_see_the_folder_says_so_and_starts_nothing(tmp_path):
    stage = Stage("data", "python -c \"open('began', 'w')\"", "")
    with pytest.raises(StageError, match=r"data: the worker on .* is not shared with this machine under the same path"):
        run_process(stage, Site(tmp_path, tmp_path / ".flow-0.alive"))
    assert not (tmp_path / "began").exists()


def test_a_stage_whose_output_was_removed_while_it_ran_has_failed(tmp_path):
    writes = "python -c \"open('model', 'w'); open('cost.json', 'w')\""
    removes = "python -c \"import os; open('model', 'w'); open('cost.json', 'w'); os.unlink('model')\""
    outputs = ("model", "cost.json")
    with sign_of_life(tmp_path) as sign:
        whole = run_stage.fn(Stage("data", writes, "", outputs=outputs), Site(tmp_path, sign))
        robbed = run_stage.fn(Stage("data", removes, "", outputs=outputs), Site(tmp_path, sign))
    assert whole.is_completed()
    assert robbed.is_failed()
    assert f"model does not exist in {tmp_path}" in robbed.message


def test_the_log_of_an_earlier_run_does_not_explain_a_failure(tmp_path):
    log = tmp_path / "logs" / "data.log"
    log.parent.mkdir()
    log.write_text("\nerror: data: of last week\n")
    stage = Stage("data", 'python -c "raise SystemExit(2)"', "")
    with sign_of_life(tmp_path) as sign, pytest.raises(StageError, match="exit code 2 before it wrote its log"):
        run_process(stage, Site(tmp_path, sign))


def test_the_sign_of_a_dead_flow_is_removed_by_the_next(tmp_path):
    (tmp_path / ".flow-0123.alive").touch()
    with sign_of_life(tmp_path) as sign:
        assert list(tmp_path.glob(".flow-*.alive")) == [sign]
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
def test_a_runner_that_cannot_run_is_refused_with_a_remedy(monkeypatch, runner, workers, message):
    monkeypatch.setattr("flows.engine.runners.find_spec", lambda _name: "there")
    with pytest.raises(ConfigError, match=message):
        require_runner(runner, workers)


ALONE = """\
import httpx, psutil
from flows.engine.runners import _dask

if __name__ == "__main__":
    with _dask("dask", 1) as runner:
        from distributed import Client  # reads its settings when it is imported

        address = runner.client.scheduler.address
        for other in (address, address.replace("tls://", "tcp://")):
            try:
                Client(other, timeout=5)
                print("a stranger is in")
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
def test_nobody_else_gets_into_the_dask_cluster_of_a_run(paper):
    needs("dask")
    (paper.folder / "alone.py").write_text(ALONE)
    done = paper.run("python", "alone.py", timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said[:2] == ["refused", "refused"]
    assert len(said) >= 2 + 4 * 2 and set(said) <= {"refused", "404"}


RAY = """\
import os, subprocess, sys, time
from flows.engine.runners import _ray

def attempt(address, timeout_s, **environment):
    code = f"import ray; ray.init('{address}', log_to_driver=False); print('in')"
    try:
        command, told = [sys.executable, "-c", code], os.environ | environment
        done = subprocess.run(command, env=told, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return "refused"
    return "in" if done.returncode == 0 and done.stdout.split()[-1:] == ["in"] else "refused"

if __name__ == "__main__":
    with _ray("ray", 1):
        import ray

        address, begun = ray.get_runtime_context().gcs_address, time.monotonic()
        print(attempt(address, 300))
        # Ray tries again and again with a token that is not the cluster's.
        print(attempt(address, 2 * (time.monotonic() - begun) + 10, RAY_AUTH_TOKEN="0" * 64))
"""


@pytest.mark.slow
def test_nobody_without_its_token_gets_into_the_ray_cluster_of_a_run(paper):
    needs("ray")
    (paper.folder / "alone.py").write_text(RAY)
    done = paper.run("python", "alone.py", timeout_s=PATIENCE_S)
    assert done.stdout.split() == ["in", "refused"], done.stderr


def test_a_runner_whose_packages_are_missing_names_them(monkeypatch):
    monkeypatch.setattr("flows.engine.runners.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"not installed: distributed, prefect_dask; .*requirements-team.lock"):
        require_runner("dask", 2)


@pytest.mark.parametrize(
    ("flag", "variable", "workers", "told"),
    [(False, None, 1, None), (False, None, 4, "trainings"), (True, None, 4, "1"), (False, "1", 4, "1")],
)
def test_trainings_of_several_workers_share_the_machine(monkeypatch, flag, variable, workers, told):
    monkeypatch.delenv("LILLIPUT_SHARE_MACHINE", raising=False)
    if variable:
        monkeypatch.setenv("LILLIPUT_SHARE_MACHINE", variable)
    assert environment_of_stages(flag, workers).get("LILLIPUT_SHARE_MACHINE") == told
