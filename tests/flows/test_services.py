"""The services of a team, for real: Prefect and MLflow on PostgreSQL, MLflow's artefacts and DVC's remote on S3.

`make services` runs these tests in order: a run by a worker, the content of each service afterwards, and the use of one
machine's results on another.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.flows.conftest import PROJECT, Clone, copy_project

pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("default"),  # MLflow, Prefect and SQLAlchemy emit warnings about each other
]
SCRIPT = [sys.executable, str(PROJECT / "scripts" / "services.py")]
CANARY = "c0ffee-canary-c0ffee"
ANY_PORTS = [f"--{name}=0" for name in ("postgres", "s3", "mlflow", "prefect")]
TREES = ("models", "compiled", "data", "answers", "bundles")
ASK = (
    "import mlflow, os, sys; mlflow.set_tracking_uri(os.environ['MLFLOW_TRACKING_URI']);"
    "print(mlflow.pyfunc.load_model(sys.argv[1]).predict(['What is the capital of Peru?']))"
)


@pytest.fixture(scope="module")
def services():
    """Starts the servers by the documented script; returns the environment of their clients and their folder."""
    if shutil.which("initdb") is None and not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("nanio", reason="pip install --requirement requirements-team.lock")
    folder = Path(tempfile.mkdtemp(prefix="lilliput-services-"))
    folder.chmod(0o711)  # the user of PostgreSQL cannot read pytest's folders
    process = subprocess.Popen([*SCRIPT, "start", str(folder), *ANY_PORTS])
    try:
        _wait_for(lambda: (folder / "client.env").exists() or process.poll() is not None, 600)
        assert process.poll() is None, "the servers did not start; their output is above"
        lines = (folder / "client.env").read_text().splitlines()
        yield dict(line.removeprefix("export ").split("=", 1) for line in lines) | {"FOLDER": str(folder)}
    finally:
        subprocess.run([*SCRIPT, "stop", str(folder)], check=False)
        process.wait(180)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def received():
    """Collects the messages sent to a webhook on loopback."""
    messages: list[str] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], messages
        server.shutdown()


@pytest.fixture(scope="module")
def team(services, received, tokenizer, tmp_path_factory):
    """A checkout with a worker; its environment and `dvc remote add` name the services."""
    del tokenizer  # skips if the wheels are not available
    clone = copy_project(tmp_path_factory.mktemp("team"))
    clone.environment |= {key: value for key, value in services.items() if key != "FOLDER"} | {"HF_TOKEN": CANARY}
    for command in (
        ["dvc", "remote", "add", "--default", "team", "s3://lilliput-dvc/lilliput"],
        ["dvc", "remote", "modify", "team", "verify", "true"],
        ["prefect", "work-pool", "create", "lilliput", "--type", "process"],
        ["prefect", "--no-prompt", "deploy", "--all"],
    ):
        done = clone.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    _automate(clone, received[0])
    with _worker(clone):
        yield clone


def _automate(clone: Clone, port: int) -> None:
    """Creates a notification block and the automations that use it, as in docs/operations.md."""
    block = (
        "from prefect.blocks.notifications import CustomWebhookNotificationBlock as Webhook;"
        f"Webhook(name='team', url='http://127.0.0.1:{port}', json_data={{'text': '{{{{subject}}}}\\n{{{{body}}}}'}})"
        ".save('team')"
    )
    assert clone.run("python", "-c", block).returncode == 0
    stored = json.loads(clone.run("prefect", "block", "inspect", "custom-webhook/team", "--output", "json").stdout)
    path = clone.folder / "automations.yaml"
    named = clone.folder / "logs" / "automations.yaml"
    named.parent.mkdir(exist_ok=True)
    named.write_text(path.read_text().replace("BLOCK_ID", stored["id"]))
    done = clone.run("prefect", "automation", "create", "--from-file", str(named))
    assert done.returncode == 0, done.stdout


@contextlib.contextmanager
def _worker(clone: Clone):
    log = clone.folder / "logs" / "worker.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["prefect", "worker", "start", "--pool", "lilliput"],
            cwd=clone.folder,
            env=clone.environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def elsewhere(team, services, tmp_path_factory):
    """Another machine: a fresh clone of the commit after `dvc pull`."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["dvc", "push", "-q"], [*git, "add", "-A"], [*git, "commit", "-qm", "a night's work"]):
        done = team.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path_factory.mktemp("elsewhere") / "lilliput"
    assert team.run("git", "clone", "-q", str(team.folder), str(folder)).returncode == 0
    clone = Clone(folder, team.environment | {"PWD": str(folder)})
    done = clone.run("dvc", "pull", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    return clone


def _wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


def _query(services: dict[str, str], database: str, sql: str, password: str | None = None) -> list[tuple]:
    import psycopg2

    folder = Path(services["FOLDER"])
    port = (folder / "postgres" / "postmaster.pid").read_text().splitlines()[3]
    password = password or (folder / "pgpass").read_text().strip().rsplit(":", 1)[1]
    with (
        contextlib.closing(
            psycopg2.connect(host="127.0.0.1", port=port, user="lilliput", dbname=database, password=password)
        ) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(sql)
        return cursor.fetchall()


def _bucket(services: dict[str, str], name: str):
    import boto3

    return boto3.resource(
        "s3",
        services["AWS_DEFAULT_REGION"],
        endpoint_url=services["AWS_ENDPOINT_URL"],
        aws_access_key_id=services["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=services["AWS_SECRET_ACCESS_KEY"],
    ).Bucket(name)


def _files(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file that DVC tracks in `folder`."""
    paths = [path for tree in TREES for path in (folder / tree).rglob("*") if path.is_file()]
    paths = [path for path in paths if path.name != ".gitignore"]  # DVC's own
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_worker_runs_the_whole_pipeline_and_prefect_stores_its_state_in_postgresql(team, services):
    done = team.run("prefect", "deployment", "run", "democratize/pipeline", "--watch", timeout_s=1500)
    assert done.returncode == 0, done.stdout + (team.folder / "logs" / "worker.log").read_text()
    assert _query(services, "prefect", "SELECT name, state_type FROM flow_run") == [
        ("democratize-params.yaml", "COMPLETED")
    ]
    states = _query(services, "prefect", "SELECT name, state_name FROM task_run")
    assert {name for name, state in states if state == "Completed"} >= {
        "small: gptq on base",
        "report: report and plots",
    }
    schedules = "SELECT schedule->>'timezone', active FROM deployment_schedule"
    assert _query(services, "prefect", schedules) == [("Europe/Berlin", False)]


def test_postgresql_and_s3_reject_wrong_passwords(services):
    import botocore.exceptions
    import psycopg2

    with pytest.raises(psycopg2.OperationalError, match="authentication failed"):
        _query(services, "prefect", "SELECT 1", password="guess")
    with pytest.raises(botocore.exceptions.ClientError):
        list(_bucket(services | {"AWS_SECRET_ACCESS_KEY": "guess"}, "lilliput-dvc").objects.all())


def test_mlflow_refuses_other_origins_and_other_hosts(services):
    address = services["MLFLOW_TRACKING_URI"]
    search = f"{address}/api/2.0/mlflow/experiments/search"
    evil = {"Origin": "http://evil.example"}
    assert httpx.post(search, json={"max_results": 1}, headers=evil, trust_env=False).status_code == 403
    assert httpx.get(address, headers={"Host": "evil.example"}, trust_env=False).status_code == 403
    assert httpx.post(search, json={"max_results": 1}, trust_env=False).status_code == 200


def test_prefect_refuses_other_origins(services):
    api, page = services["PREFECT_API_URL"], {"Origin": "http://evil.example"}
    assert "access-control-allow-origin" not in httpx.get(f"{api}/health", headers=page, trust_env=False).headers
    assert httpx.post(f"{api}/flow_runs/count", json={}, headers=page, trust_env=False).status_code == 403


def test_runs_and_versions_are_in_postgresql_and_their_artefacts_in_s3(team, services):
    versions = dict(_query(services, "mlflow", "SELECT run_id, source FROM model_versions"))
    assert len(versions) == 2
    assert all(source == f"mlflow-artifacts:/1/{run}/artifacts/model" for run, source in versions.items())
    metrics = _query(services, "mlflow", "SELECT run_uuid FROM metrics WHERE key = 'accuracy_choice'")
    assert {run for (run,) in metrics} == set(versions)
    aliases = dict(_query(services, "mlflow", "SELECT alias, version FROM registered_model_aliases"))
    assert "champion-laptop" in aliases
    keys = {item.key for item in _bucket(services, "lilliput-mlflow").objects.all()}
    for run in versions:
        assert {f"1/{run}/artifacts/model/MLmodel", f"1/{run}/artifacts/model_card.md"} <= keys
    assert not (team.folder / "mlruns" / "mlflow.db").exists()
    assert not [*(team.folder / "mlruns").rglob("MLmodel")]


def test_each_new_champion_is_notified_once(team, received):
    champions = {
        device: decision["champion"]
        for device, decision in json.loads((team.folder / "promotion.json").read_text()).items()
        if decision["champion"]
    }
    expected = [
        f"Lilliput: {device} has a new champion\n{champion} (version " for device, champion in champions.items()
    ]
    _wait_for(lambda: len(received[1]) >= len(champions), 60)
    time.sleep(5)  # for duplicates
    assert sorted(
        message[: len(start)] for message, start in zip(sorted(received[1]), sorted(expected), strict=True)
    ) == (sorted(expected))
    received[1].clear()


def test_a_failed_run_is_notified_once_without_the_secret_in_its_message(team, received):
    done = team.run("prefect", "deployment", "run", "promote/promote", "-p", f"params_file={CANARY}.yaml", "--watch")
    assert done.returncode != 0
    _wait_for(lambda: received[1], 60)
    time.sleep(5)
    (message,) = received[1]
    assert message.startswith("Lilliput: promote/promote failed\n***.yaml: no such file")
    assert CANARY not in message


def test_decisions_on_shared_champions_wait_for_each_other(team, monkeypatch, tmp_path):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.engine.champions import exclusive_promotion

    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.environment["MLFLOW_TRACKING_URI"])
    events: list[tuple[str, int]] = []

    def decide(number: int) -> None:
        server = temporary_settings({PREFECT_API_URL: team.environment["PREFECT_API_URL"]})
        with (
            server,
            exclusive_promotion(tmp_path / str(number)),
        ):  # two checkouts, so that the lock of a folder does not apply
            events.append(("in", number))
            time.sleep(3)
            events.append(("out", number))

    threads = [threading.Thread(target=decide, args=[number]) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event for event, _ in events] == ["in", "out", "in", "out"]
    assert events[0][1] == events[1][1] and {number for _, number in events} == {1, 2}


def test_a_fresh_clone_pulls_the_same_bytes_and_is_up_to_date(team, elsewhere):
    files = _files(team.folder)
    assert "models/small/model.safetensors" in files
    assert _files(elsewhere.folder) == files
    assert elsewhere.run("dvc", "status").stdout.strip() == "Data and pipelines are up to date."


def test_a_champion_opens_on_another_machine_from_the_tracking_server_alone(team, elsewhere):
    hidden = team.folder.with_name(f"{team.folder.name}-away")
    team.folder.rename(hidden)
    try:
        opened = elsewhere.run("python", "-c", ASK, "models:/lilliput@champion-laptop")
        assert opened.returncode == 0, opened.stderr
        empty = elsewhere.folder / "empty"
        empty.mkdir()
        without_models = Clone(empty, elsewhere.environment | {"PYTHONPATH": str(elsewhere.folder)})
        opened = without_models.run("python", "-c", ASK, "models:/lilliput@champion-laptop")
        assert opened.returncode == 0, opened.stderr  # the weights come from the store
    finally:
        hidden.rename(team.folder)


def test_a_corrupted_object_is_found_by_dvc_pull(team, services, elsewhere, tmp_path):
    weights = hashlib.md5((team.folder / "models/small/model.safetensors").read_bytes()).hexdigest()
    damaged = _bucket(services, "lilliput-dvc").Object(f"lilliput/files/md5/{weights[:2]}/{weights[2:]}")
    content = damaged.get()["Body"].read()
    damaged.put(Body=content[:-1] + bytes([content[-1] ^ 1]))
    folder = tmp_path / "third"
    assert team.run("git", "clone", "-q", str(team.folder), str(folder)).returncode == 0
    third = Clone(folder, team.environment | {"PWD": str(folder)})
    pulled = third.run("dvc", "pull", "models/small")
    assert pulled.returncode != 0
    assert not (folder / "models/small/model.safetensors").exists()
    damaged.put(Body=content)
    assert third.run("dvc", "pull", "models/small").returncode == 0
    assert (folder / "models/small/model.safetensors").read_bytes() == content
