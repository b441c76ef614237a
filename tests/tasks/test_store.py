"""Addresses of MLflow's store: which are refused, and with which words, before anything is done."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest

from lilliput.errors import ConfigError, RegistryError
from tasks.registry import creating, model_versions, store

pytestmark = pytest.mark.filterwarnings("default")  # MLflow emits warnings about its own code


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file:mlruns", "a folder of files, which MLflow 3.17 no longer accepts.*sqlite:///.*migrate-filestore"),
        ("file:///srv/mlruns", "a folder of files"),
        ("./mlruns", "a folder of files"),
        ("databricks", "not a store that Lilliput can use"),
        ("databricks://profile", "not a store that Lilliput can use"),
        ("databricks-uc", "not a store that Lilliput can use"),
        ("uc:catalog", "not a store that Lilliput can use"),
        ("s3://bucket/mlflow", "not a store that Lilliput can use"),
        ("mssql+nothing://host/mlflow", "driver that is not installed.*requirements-team"),
    ],
)
def test_an_address_that_mlflow_cannot_use_is_refused_with_a_remedy(monkeypatch, address, message):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigError, match=f"(?s)MLFLOW_TRACKING_URI: .*{message}"):
        model_versions.client()


@pytest.mark.parametrize("address", ["http://127.0.0.1:5000", "https://mlflow.example", "sqlite:////srv/mlflow.db"])
def test_servers_and_databases_are_taken_as_they_are(monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert store.tracking_uri() == address


def test_a_relative_database_is_the_same_store_from_every_folder(monkeypatch, folder):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/mlflow.db")
    assert store.tracking_uri() == store.embedded_uri() == f"sqlite:///{folder}/mlruns/mlflow.db"


def test_files_that_are_no_database_are_refused_before_mlflow_tries_for_minutes(monkeypatch, folder):
    (folder / "text.db").write_text("no database, but a text that is longer than a header")
    (folder / "folder.db").mkdir()
    started = time.monotonic()
    for name, message in {
        "text.db": "text.db: not an SQLite database",
        "folder.db": "folder.db: a folder, where",
        "text.db/deeper/mlflow.db": "text.db/deeper: cannot be created",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/{name}")
        with pytest.raises(ConfigError, match=message):
            model_versions.client()
    assert time.monotonic() - started < 10


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("kept", ["folder", "file"])
def test_a_store_that_this_user_may_not_write_is_refused(kept):
    with tempfile.TemporaryDirectory() as place:
        database = Path(place, "mlflow.db")
        database.touch()
        Path(place).chmod(0o755 if kept == "folder" else 0o777)
        database.chmod(0o644)
        what = "the folder of MLflow's store" if kept == "folder" else "MLflow's store"
        os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match=f": {what} cannot be written"):
                store.prepare(f"sqlite:///{database}")
        finally:
            os.seteuid(0)


def test_a_database_of_another_mlflow_is_refused_with_a_remedy_and_not_tried_again(folder):
    model_versions.client()
    with contextlib.closing(sqlite3.connect("mlruns/mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    (folder / "mlruns/mlflow.db").rename(folder / "mlruns/newer.db")  # MLflow remembers the stores that it has opened
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RegistryError) as raised, model_versions.in_reach():
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/newer.db")
        creating.ensure_model(model_versions.client())
    assert "refuses (INTERNAL_ERROR)" in str(raised.value)
    assert "If a newer one, use that version" in str(raised.value)
    assert not raised.value.temporary


def test_artefacts_lie_beside_the_database_that_the_address_names(monkeypatch, folder):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///shared/mlflow.db")
    client = model_versions.client()
    location = client.get_experiment(creating.experiment_id(client)).artifact_location
    assert location == f"{(folder / 'shared').as_uri()}/artifacts"
    assert not (folder / "mlruns/mlflow.db").exists()


def test_models_go_to_the_store_of_the_runs_whatever_the_environment_names(monkeypatch, folder):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{folder}/other.db")
    creating.ensure_model(model_versions.client())
    assert not (folder / "other.db").exists()
