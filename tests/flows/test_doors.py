"""The pipeline by `dvc repro`, the command line, and a Prefect deployment with a process worker.

The tests run in order on one clone after `dvc repro`: each way to run finds the results of the previous one cached.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress

import httpx
import psutil
import pytest

from tests.flows.conftest import ask_prefect

STAGES = {
    "source",
    "data",
    "compress@base",
    "compress@small",
    "evaluate@base",
    "evaluate@small",
    "compile@small-gguf",
    "devices@small-gguf",
    "register",
    "promote",
    "bundle",
    "report",
}
ONLY_SMALL = ("python", "-m", "flows.democratize", "--only", "small")
AFTER_BITS = STAGES - {"source", "data", "compress@base", "evaluate@base"}


def status(clone) -> str:
    return clone.run("dvc", "status").stdout.strip()


def states(text: str) -> dict[str, set[str]]:
    """Parses the lines `Made now:`, `Restored:` and `Cached:` of `--verbose`."""
    return {
        key: set(re.split(r",\s+", " ".join(match.group(1).split()))) - {"nothing"}
        for key in ("Made now", "Restored", "Cached")
        if (match := re.search(rf"^{key}: ((?:.|\n)*?)(?=^\S+.*?:|^- )", text, re.MULTILINE))
    }


def test_dvc_repro_makes_everything_in_a_clean_clone(clone):
    folder = clone.folder
    assert status(clone) == "Data and pipelines are up to date."
    for candidate in ("base", "small"):
        record = json.loads((folder / "metrics" / f"{candidate}.json").read_text())
        manifest = (folder / "models" / candidate / "lilliput.json").read_text()
        assert record["sha256"] and json.loads(manifest)["candidate"] == candidate
        assert json.loads((folder / "costs" / f"{candidate}.json").read_text())["peak_rss_bytes"] > 10**8
    assert json.loads((folder / "promotion.json").read_text()).keys() == {"phone-4gb", "laptop"}
    assert ">Four metrics</h2>" in (folder / "report" / "index.html").read_text()


def test_dvc_repro_again_skips_every_stage(clone):
    done = clone.run("dvc", "repro")
    assert done.returncode == 0
    assert set(re.findall(r"Stage '([^']+)' didn't change, skipping", done.stdout + done.stderr)) == STAGES


def test_the_flow_finds_the_results_of_dvc_cached(clone):
    done = clone.run("python", "-m", "flows.democratize", "--verbose")
    assert done.returncode == 0, done.stderr
    assert f"{len(STAGES)} stages: {len(STAGES)} up to date" in done.stdout
    assert states(done.stdout) == {"Made now": set(), "Restored": set(), "Cached": STAGES}
    assert "Flow run" not in done.stderr  # the fast path, without Prefect


def test_dvc_shows_metrics_and_plots(clone):
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json").stdout)
    files = shown[""]["data"]
    assert files.keys() == {"summary/base.json", "summary/small.json"}
    assert {"accuracy", "halluc", "mib", "champion"} <= files["summary/small.json"]["data"].keys()
    assert max(map(len, clone.run("dvc", "metrics", "show").stdout.splitlines())) < 120
    plots = clone.run("dvc", "plots", "show")
    assert plots.returncode == 0, plots.stderr
    page = (clone.folder / "dvc_plots" / "index.html").read_text()
    assert "report_charts_01-choice-accuracy-over-the-size-that-ships" in page and "http" not in page


@pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy emit warnings about each other
def test_the_registry_has_a_version_of_each_candidate_and_the_champions(clone):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone.folder}/mlruns/mlflow.db")
    versions = {v.tags["lilliput.candidate"]: v for v in client.search_model_versions("name = 'lilliput'")}
    assert versions.keys() == {"base", "small"}
    small = versions["small"].tags
    assert len(small) <= 6
    artifacts = clone.folder / "mlruns" / "artifacts" / versions["small"].run_id / "artifacts"
    record = json.loads((artifacts / "version.json").read_text())
    assert record["parent_sha256"] == versions["base"].tags["lilliput.artifact_sha256"]
    assert {"models/base", "models/small", "compiled/small/gguf"} <= record["dvc"].keys()
    assert record["compiled"].keys() == {"gguf"}
    run = client.get_run(versions["small"].run_id)
    assert run.data.tags["lilliput.run"] == client.get_run(versions["base"].run_id).data.tags["lilliput.run"]
    assert run.data.params["gptq.bits"] == "4" and run.data.params["energy_source"] != "unavailable"
    assert {"accuracy_choice", "hallucination_rate", "energy_per_query_j", "accessibility"} <= run.data.metrics.keys()
    assert len(client.get_metric_history(versions["small"].run_id, "gptq/layer_error")) == 4
    promotion = json.loads((clone.folder / "promotion.json").read_text())
    assert promotion["laptop"]["champion"]
    for device, decision in promotion.items():
        if decision["champion"] is None:
            continue  # a random model may be rejected for the phone
        champion = client.get_model_version_by_alias("lilliput", f"champion-{device}")
        assert champion.tags["lilliput.candidate"] == decision["champion"]


@pytest.fixture(scope="module")
def other_bits(clone):
    clone.set_param("strategies.gptq.bits", 8)
    return clone


def test_the_plan_lists_the_stages_that_one_changed_setting_affects_and_runs_nothing(other_bits):
    before = (other_bits.folder / "dvc.lock").read_bytes()
    done = other_bits.run("python", "-m", "flows.democratize", "--plan", "--json")
    assert done.returncode == 0, done.stderr
    planned = {stage["stage"]: stage["reason"] for stage in json.loads(done.stdout)["stages"]}
    assert {name for name, reason in planned.items() if reason} == AFTER_BITS
    assert planned.keys() == STAGES
    done = other_bits.run("python", "-m", "flows.democratize", "--plan")
    assert re.search(r"8 stages would run: about .+, [\d,]+ MiB at the peak", done.stdout)
    assert (other_bits.folder / "dvc.lock").read_bytes() == before


@pytest.fixture(scope="module")
def server(other_bits, tmp_path_factory):
    """Starts a Prefect server and a process worker on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/api"
    logs = tmp_path_factory.mktemp("logs")
    # A separate home: two servers on one SQLite file block each other.
    home = {"PREFECT_API_URL": address, "PREFECT_HOME": str(tmp_path_factory.mktemp("server"))}
    environment = other_bits.environment | home
    processes = []

    def start(name: str, *command: str) -> None:
        with (logs / name).open("w") as log:
            processes.append(
                subprocess.Popen(
                    command, cwd=other_bits.folder, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    start("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    try:
        _wait_for(f"{address}/health")
        for command in (["work-pool", "create", "lilliput", "--type", "process"], ["--no-prompt", "deploy", "--all"]):
            done = other_bits.run("prefect", *command, **home)
            assert done.returncode == 0, done.stdout + done.stderr
        start("worker", "prefect", "worker", "start", "--pool", "lilliput")
        # From here on flows use this server.
        other_bits.environment["PREFECT_API_URL"] = address
        yield address
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:  # a worker waits for its runs
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_for(url: str) -> None:
    for _ in range(360):
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"{url} did not answer within three minutes")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # includes the start of clone, server and worker
def test_a_deployment_makes_only_what_changed(other_bits, server):
    untouched = (other_bits.folder / "metrics" / "base.json").read_bytes()
    done = other_bits.run("prefect", "deployment", "run", "democratize/pipeline", "--watch", PREFECT_API_URL=server)
    assert done.returncode == 0, done.stdout + done.stderr
    tasks = ask_prefect(server, "/task_runs/filter")
    assert {task["name"]: task["state_name"] for task in tasks}["base: load on source"] == "Cached"
    assert {task["name"] for task in tasks if task["state_name"] == "Completed"} == {
        "small: gptq on base",
        "small: four metrics of small",
        "small-gguf: small for gguf",
        "small-gguf: answers of small as compiled, and its runs on the devices that run gguf",
        "register: log to MLflow, make model versions",
        "promote: the champion of each device",
        "bundle: what each device is given",
        "report: report and plots",
    }
    artifacts = {artifact["key"]: artifact for artifact in ask_prefect(server, "/artifacts/latest/filter")}
    rows = json.loads(artifacts["candidates"]["data"])
    assert [row["candidate"] for row in rows] == ["base", "small"]
    assert "report/index.html" in artifacts["next"]["data"]
    assert (other_bits.folder / "metrics" / "base.json").read_bytes() == untouched
    manifest = json.loads((other_bits.folder / "models" / "small" / "lilliput.json").read_text())
    assert manifest["config"]["bits"] == 8
    assert status(other_bits) == "Data and pipelines are up to date."


@pytest.mark.slow
def test_the_prefect_server_of_the_folder_refuses_other_origins(server):
    page = {"Origin": "http://evil.example"}
    assert "access-control-allow-origin" not in httpx.get(f"{server}/health", headers=page, trust_env=False).headers
    assert httpx.post(f"{server}/flow_runs/count", json={}, headers=page, trust_env=False).status_code == 403


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "maker"), [(4, "dvc repro"), (8, "the deployment")])
def test_old_settings_restore_the_results_of_dvc_and_of_the_deployment(other_bits, bits, maker):
    del maker
    other_bits.set_param("strategies.gptq.bits", bits)
    done = other_bits.run("python", "-m", "flows.democratize", "--only", "small", "--verbose")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((other_bits.folder / "models" / "small" / "lilliput.json").read_text())
    assert manifest["config"]["bits"] == bits
    assert {"compress@small", "evaluate@small"} <= states(done.stdout)["Restored"], done.stdout


@pytest.mark.slow
def test_a_setting_that_changes_during_its_stage_fails_it_and_the_next_run_makes_it(other_bits):
    other_bits.set_param("strategies.gptq.bits", 3)
    output = _change_during(other_bits, "strategies.gptq.bits", 2)  # like `git checkout` of another branch
    assert "params.yaml (strategies.gptq) changed during the stage" in output
    done = other_bits.run(*ONLY_SMALL)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((other_bits.folder / "models" / "small" / "lilliput.json").read_text())
    assert manifest["config"]["bits"] == 2


@pytest.mark.slow
def test_a_run_names_the_stages_that_a_changed_setting_left_stale(other_bits):
    other_bits.set_param("strategies.gptq.bits", 3)
    output = _change_during(other_bits, "strategies.load.seed", 99)  # of a stage that was cached before
    assert "changed during the run; made with the old settings: compress@base" in output


def _change_during(clone, setting: str, value: int) -> str:
    """Changes `setting` while `small` is compressed; returns the output of the run, which fails."""
    flow = subprocess.Popen(
        ONLY_SMALL, cwd=clone.folder, env=clone.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    _wait_for_stage(flow, "compress small")
    clone.set_param(setting, value)
    output = flow.communicate(timeout=500)[0].decode()
    assert flow.returncode == 2, output
    return " ".join(output.split())


def _wait_for_stage(flow: subprocess.Popen, stage: str) -> None:
    """Waits for the process of `stage`, a child of `flow`."""
    for _ in range(2000):
        assert flow.poll() is None
        for child in psutil.Process(flow.pid).children(recursive=True):
            with suppress(psutil.Error):
                if stage in " ".join(child.cmdline()):
                    return
        time.sleep(0.05)
    pytest.fail(f"{stage} did not start")
