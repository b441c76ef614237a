"""MLflow is down, hangs, refuses or fails midway: the message, its delay, and the state that the next run finds."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import socket
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from lilliput.artifacts import write_json
from lilliput.errors import ConfigError, RegistryError
from tasks import layout
from tasks.log import log
from tasks.promote import promote
from tasks.registry import model_folder, model_versions
from tests import results
from tests.tasks.test_promotion import EVEN, QUESTIONS, Project

# MLflow, SQLAlchemy and pandas emit warnings about their own code.
pytestmark = pytest.mark.filterwarnings("default")
_COUNTS = itertools.count()


@pytest.fixture(scope="module")
def project(tiny_params, checkpoint, tmp_path_factory):
    """A project with complete candidates and its own store."""
    with contextlib.chdir(tmp_path_factory.mktemp("project")), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(model_folder, "add_model", lambda *_: None)  # takes a second each and is not tested here
        yield Project(tiny_params, checkpoint)


def _new_counts():
    """Returns new numbers of correct answers by candidate, so that every call needs a new registration."""
    more = next(_COUNTS)
    return {name: count + more for name, count in (EVEN | {"b": 20}).items()}


@pytest.fixture
def right():
    return _new_counts()


@contextlib.contextmanager
def server(status: int):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>a page</html>")

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_port
        listening.shutdown()


@contextlib.contextmanager
def down():
    with socket.socket() as bound:  # bound, but not listening
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextlib.contextmanager
def hanging():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)  # accepts connections, but never answers
        yield listening.getsockname()[1]


@pytest.mark.parametrize("away", [down, hanging, lambda: server(503)], ids=["down", "hanging", "503"])
def test_an_unavailable_server_is_one_message_and_results_are_logged_when_it_is_back(project, right, monkeypatch, away):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with away() as port, monkeypatch.context() as during:
        during.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with pytest.raises(RegistryError, match=rf"MLflow at http://127.0.0.1:{port} does not answer") as raised:
            project.evaluate(right)
    assert raised.value.temporary
    assert "the same command logs them when MLflow is back" in str(raised.value)
    store, versions = model_versions.client(), project.register()
    for name, count in right.items():
        version = store.get_model_version("lilliput", versions[name])
        assert store.get_run(version.run_id).data.metrics["accuracy_choice"] == count / QUESTIONS


def test_retries_end_after_two_minutes_by_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for variable in model_versions._HTTP_LIMITS:
        monkeypatch.delenv(variable, raising=False)
    model_versions.client()
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert (1 + MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()) * MLFLOW_HTTP_REQUEST_TIMEOUT.get() <= 120


@pytest.mark.parametrize("status", [200, 401, 404, 405])
def test_a_refusal_or_another_program_is_not_retried(project, right, monkeypatch, status):
    with server(status) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        with pytest.raises(RegistryError, match="refuses") as raised:
            project.evaluate(right)
    assert not raised.value.temporary


@pytest.mark.night
def test_a_locked_database_is_waited_for_and_then_reported(project, right):
    model_versions.client()  # creates the store if no other test has
    with contextlib.closing(sqlite3.connect(layout.MLRUNS / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RegistryError, match="database is locked") as raised:
            project.evaluate(right)
    assert raised.value.temporary
    assert len(set(project.register().values())) == 3


class FailingStore:
    """A store that fails at call number `at`, before the call or after it, so that only the response is lost."""

    def __init__(self, at: int, done: bool) -> None:
        self.at, self.done, self.calls = at, done, 0

    def client(self):
        failing, store = self, MlflowClient(model_versions.tracking_uri())

        class Client:
            def __getattr__(self, name):
                def call(*arguments, **options):
                    failing.calls += 1
                    if failing.calls != failing.at:
                        return getattr(store, name)(*arguments, **options)
                    if failing.done:
                        getattr(store, name)(*arguments, **options)
                    raise MlflowException("connection lost")

                return call

        return Client()


def _runs(store):
    (experiment,) = store.search_experiments(filter_string="name = 'lilliput'")
    return store.search_runs([experiment.experiment_id])


def _versions(store):
    return store.search_model_versions("name = 'lilliput'")


@pytest.mark.parametrize(
    "places", [[7, 16], pytest.param(range(1, 99, 3), marks=pytest.mark.night)], ids=["two", "every third"]
)
@pytest.mark.parametrize("done", [False, True], ids=["call lost", "answer lost"])
def test_an_interrupted_registration_continues_without_duplicates(project, monkeypatch, places, done):
    store = MlflowClient(model_versions.tracking_uri())
    project.evaluate(_new_counts())
    for place in places:
        runs, versions, failing = len(_runs(store)), _versions(store), FailingStore(place, done)
        with monkeypatch.context() as during:
            during.setattr(model_versions, "client", failing.client)
            with contextlib.suppress(RegistryError):
                project.evaluate(_new_counts())
        if failing.calls < place:
            return  # there are fewer calls
        assert project.register().keys() == EVEN.keys()
        assert len(_runs(store)) == runs + 3, place  # one for each candidate
        assert len(_versions(store)) == len(versions) + 3, place
        assert {run.info.status for run in _runs(store)} == {"FINISHED"}


def _state():
    store = model_versions.client()
    aliases = store.get_registered_model("lilliput").aliases
    tags = {v.version: v.tags for v in _versions(store)}
    return {alias: str(version) for alias, version in aliases.items()}, tags, layout.PROMOTION.read_text()


def _copy_of(folder, other):
    """Links the project into `other` and copies its store."""
    other.mkdir()
    for path in folder.iterdir():
        if path.name not in ("mlruns", "promotion.json"):
            (other / path.name).symlink_to(path)
    shutil.copytree(folder / "mlruns", other / "mlruns")
    return other


def _go_to(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow itself sets it


@pytest.mark.night
@pytest.mark.parametrize("done", [False, True], ids=["call lost", "answer lost"])
def test_an_interrupted_promotion_ends_with_the_same_result(project, tmp_path, monkeypatch, done):
    rules, home = project.params("laptop"), Path.cwd()
    project.evaluate(_new_counts())
    promote(rules)
    project.evaluate(_new_counts() | {"b": 190 if done else 189})
    _go_to(_copy_of(home, tmp_path / "undisturbed"), monkeypatch)
    promote(rules)
    wanted = _state()
    assert wanted[0]["champion-laptop"] != wanted[0]["previous-laptop"]
    for place in range(1, 99, 3):
        _go_to(_copy_of(home, tmp_path / f"cut-{place}"), monkeypatch)
        failing = FailingStore(place, done)
        with monkeypatch.context() as during:
            during.setattr(model_versions, "client", failing.client)
            with contextlib.suppress(RegistryError):
                promote(rules)
        if failing.calls < place:
            return  # there are fewer calls
        promote(rules)
        assert _state() == wanted, place


def test_offloading_results_are_logged_once_and_only_of_a_registered_champion(project, right):
    version = project.evaluate(right)["a"]
    policies = {"device": results.policy(0.8, None, 4.0, p50=90.0, p90=95.0)}
    record = results.offload_record("a", {"wifi": policies, "3g": {}})
    write_json(layout.offload_record("laptop"), record)
    log(project.params("laptop"), "laptop")
    log(project.params("laptop"), "laptop")
    store = model_versions.client()
    champion = store.get_run(store.get_model_version("lilliput", version).run_id).info
    (run,) = store.search_runs([champion.experiment_id], f"tags.`mlflow.parentRunId` = '{champion.run_id}'")
    logged = {key: value for key, value in run.data.metrics.items() if key.startswith("offload/")}
    assert logged == {
        "offload/laptop/device/accuracy": 0.8,
        "offload/laptop/device/latency_ms_p50": 90.0,
        "offload/laptop/device/latency_ms_p90": 95.0,
        "offload/laptop/device/energy_per_query_j": 4.0,
    }
    assert len(store.get_metric_history(run.info.run_id, "offload/laptop/device/accuracy")) == 1
    write_json(layout.offload_record("laptop"), record.model_copy(update={"candidate": "nobody"}))
    with pytest.raises(ConfigError, match="was measured with nobody, which is not registered"):
        log(project.params("laptop"), "laptop")
