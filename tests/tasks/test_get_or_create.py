"""Experiments, models, runs and versions are created once by several processes, and restored after a deletion."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import mlflow
import pytest
from mlflow import MlflowClient

from lilliput.chat.template import encode_prompt
from lilliput.errors import RegistryError
from lilliput.runtime.torch import TorchRuntime
from tasks import layout
from tasks.promote import promote
from tasks.registry import get_or_create, model_versions
from tests.tasks.test_promotion import EVEN, Project

# MLflow, SQLAlchemy and pandas emit warnings about their own code.
pytestmark = pytest.mark.filterwarnings("default")
PROJECT = Path(__file__).parent.parent.parent
AT_ONCE = 3
START_S = 120
REGISTER = """
import json, sys, time
from pathlib import Path
from tasks.registry import get_or_create
from tasks.registry import model_folder
from tasks.registry import model_versions
Path(f"ready-{sys.argv[1]}").touch()
while not Path("go").exists():
    time.sleep(0.01)
client = model_versions.client()
get_or_create.ensure_model(client)
experiment = get_or_create.experiment_id(client)
run_id = get_or_create.find_or_create_run(client, experiment, "base", {get_or_create.EVALUATION_TAG: "e"}).info.run_id
source = model_folder.model_uri(client, run_id)
version = get_or_create.create_version(client, "e", source=source, run_id=run_id, tags={}, description="")
print(json.dumps([experiment, version, get_or_create.active_run_id(client, version)]))
"""


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return model_versions.client()


@pytest.fixture(scope="module")
def project(tiny_params, checkpoint, tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("project")), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Project(tiny_params, checkpoint)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Yields the address of a tracking server that proxies artefacts, as in scripts/services.py."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/stored"]
    settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    settings = {name: value for name, value in settings.items() if name != "MLFLOW_TRACKING_URI"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=settings, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while not _is_healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _is_healthy(address):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(address).is_success
    return False


def _register_at_once(folder: Path, address: str) -> tuple[MlflowClient, str, str]:
    """Registers one evaluation in several processes, and checks that they get the same experiment, version and run."""
    settings = os.environ | {"MLFLOW_TRACKING_URI": address, "PYTHONPATH": str(PROJECT)}
    commands = [[sys.executable, "-W", "ignore", "-c", REGISTER, str(number)] for number in range(AT_ONCE)]
    running = [
        subprocess.Popen(command, cwd=folder, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for command in commands
    ]
    deadline = time.monotonic() + START_S
    while len([*folder.glob("ready-*")]) < AT_ONCE and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder / "go").touch()
    ended = [(process.communicate(timeout=START_S), process.returncode) for process in running]
    assert [code for _, code in ended] == [0] * AT_ONCE, ended
    results = {output.splitlines()[-1] for (output, _), _ in ended}
    assert len(results) == 1
    experiment, version, run_id = json.loads(results.pop())
    client = MlflowClient(address, address)
    assert [str(found.version) for found in client.search_model_versions("name = 'lilliput'")] == [version]
    return client, experiment, run_id


def test_simultaneous_first_registrations_agree_in_a_database(tmp_path):
    client, experiment, run_id = _register_at_once(tmp_path, f"sqlite:///{tmp_path}/shared/mlflow.db")
    assert [run.info.run_id for run in client.search_runs([experiment])] == [run_id]


@pytest.mark.night
def test_simultaneous_first_registrations_agree_on_a_server(tmp_path, server):
    client, experiment, run_id = _register_at_once(tmp_path, server)
    assert [run.info.run_id for run in client.search_runs([experiment])] == [run_id]
    client.delete_experiment(experiment)
    for path in [tmp_path / "go", *tmp_path.glob("ready-*")]:
        path.unlink()
    assert _register_at_once(tmp_path, server)[1:] == (experiment, run_id)  # restored, not created again


class RacingClient:
    """A client whose `create_…` calls come second, as if another process had just made the same call."""

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        method = getattr(self._client, name)
        if not name.startswith("create_"):
            return method

        def twice(*arguments, **options):
            method(*arguments, **options)
            return method(*arguments, **options)

        return twice


def test_objects_created_by_another_process_meanwhile_are_used(client):
    racing = RacingClient(client)
    get_or_create.ensure_model(racing)
    experiment = get_or_create.experiment_id(racing)
    run_id = get_or_create.find_or_create_run(
        racing, experiment, "base", {get_or_create.EVALUATION_TAG: "e"}
    ).info.run_id
    settings = {"source": "file:///nowhere", "run_id": run_id, "tags": {}, "description": ""}
    assert get_or_create.create_version(racing, "e", **settings) == "1"
    assert [run.info.run_id for run in client.search_runs([experiment])] == [run_id]
    assert [int(version.version) for version in client.search_model_versions("name = 'lilliput'")] == [1]


def test_a_prompt_with_the_models_name_is_one_clear_error(client):
    client.register_prompt("lilliput", "a template")
    with pytest.raises(RegistryError, match="has a prompt with the name lilliput"):
        get_or_create.ensure_model(client)


def test_a_deleted_experiment_is_restored_with_a_note(client, capsys):
    experiment = get_or_create.experiment_id(client)
    run_id = get_or_create.find_or_create_run(client, experiment, "base", {"key": "value"}).info.run_id
    client.delete_experiment(experiment)
    assert get_or_create.experiment_id(client) == experiment
    assert get_or_create.find_or_create_run(client, experiment, "base", {"key": "value"}).info.run_id == run_id
    assert "experiment lilliput was deleted, and is restored" in capsys.readouterr().err


def test_registration_works_after_any_deletion(project, capsys):
    client, versions = model_versions.client(), project.evaluate(EVEN)
    (experiment,) = client.search_experiments(filter_string="name = 'lilliput'")
    run_of = {name: get_or_create.active_run_id(client, version) for name, version in versions.items()}
    client.delete_experiment(experiment.experiment_id)
    assert project.evaluate(EVEN) == versions
    client.delete_run(run_of["a"])
    client.delete_model_version("lilliput", versions["b"])
    again = project.evaluate(EVEN)
    assert (again["base"], again["a"]) == (versions["base"], versions["a"])
    assert get_or_create.active_run_id(client, again["b"]) == run_of["b"] and again["b"] != versions["b"]
    assert f"the run of version {versions['a']} of lilliput was deleted, and is restored" in capsys.readouterr().err
    client.delete_registered_model("lilliput")
    assert {
        name: get_or_create.active_run_id(client, version) for name, version in project.evaluate(EVEN).items()
    } == run_of


def test_a_permanently_removed_run_is_logged_again(project):
    client, versions = model_versions.client(), project.evaluate(EVEN)
    run_id = get_or_create.active_run_id(client, versions["a"])
    client.delete_run(run_id)
    client._tracking_client.store._hard_delete_run(run_id)  # as `mlflow gc` does
    with pytest.raises(RegistryError, match=r"removed permanently\. `dvc repro -f -s register promote`"):
        get_or_create.active_run_id(client, versions["a"])
    again = project.evaluate(EVEN)
    assert again["a"] != versions["a"] and again["b"] == versions["b"]
    assert client.get_run(get_or_create.active_run_id(client, again["a"])).data.metrics["accuracy_choice"] == 0.6


def test_a_promotion_of_deleted_versions_names_the_remedy(project):
    client = model_versions.client()
    project.evaluate(EVEN)
    client.delete_registered_model("lilliput")
    with pytest.raises(RegistryError, match=r"was deleted there after it was registered\. `dvc repro -f -s register"):
        promote(project.params("laptop"))
    project.evaluate(EVEN)
    promote(project.params("laptop"))


def test_long_and_many_values_respect_the_limits_of_mlflow(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    get_or_create.ensure_model(client)
    run_id = client.create_run(get_or_create.experiment_id(client)).info.run_id
    params = {f"key-{number}": "v" * 7000 for number in range(130)}
    model_versions.log_run(client, run_id, params, {"loss": 0.5}, {"loss": [(1, 0.5)] * 1500}, {})
    logged = client.get_run(run_id).data
    assert len(logged.params) == 130
    assert {len(value) for value in logged.params.values()} == {6000}
    settings = {"source": "file:///nowhere", "run_id": run_id, "tags": {}}
    version = get_or_create.create_version(client, "e", description="d" * 6000, **settings)
    assert len(client.get_model_version("lilliput", version).description) == 5000


@pytest.mark.night
def test_another_machine_opens_the_champion_from_the_server_only(project, server, opened, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    home = Path.cwd()
    project.evaluate(EVEN | {"base": 150})
    promote(project.params("laptop"))
    prompt = encode_prompt(opened[1], project._params.data.system_prompt, "What is the capital of Peru?")
    expected = TorchRuntime(*opened, batch_size=1).generate([prompt], project._params.evaluation.max_new_tokens)
    shutil.move(home / layout.model("base"), tmp_path / "base")
    try:
        monkeypatch.chdir(tmp_path)
        model = mlflow.pyfunc.load_model("models:/lilliput@champion-laptop")
    finally:
        shutil.move(tmp_path / "base", home / layout.model("base"))
    assert model.predict(["What is the capital of Peru?"]) == expected
