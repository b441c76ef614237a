"""Addresses of MLflow's store: unusable ones are rejected with a remedy before any work."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest

from lilliput.errors import ConfigError, RegistryError
from tasks.registry import get_or_create, model_versions, store

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
def test_an_unusable_address_is_rejected_with_a_remedy(monkeypatch, address, message):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConfigError, match=f"(?s)MLFLOW_TRACKING_URI: .*{message}"):
        model_versions.client()


@pytest.mark.parametrize("address", ["http://127.0.0.1:5000", "https://mlflow.example", "sqlite:////srv/mlflow.db"])
def test_addresses_of_servers_and_databases_are_unchanged(monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert store.tracking_uri() == address


def test_a_relative_database_is_the_same_store_from_every_folder(monkeypatch, folder):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/mlflow.db")
    assert store.tracking_uri() == store.embedded_uri() == f"sqlite:///{folder}/mlruns/mlflow.db"


def test_files_that_are_not_databases_are_rejected_before_mlflow_retries_for_minutes(monkeypatch, folder):
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
def test_a_store_without_write_permission_is_rejected(kept):
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


def test_a_database_of_another_mlflow_version_is_rejected_with_a_remedy_and_not_retried(folder):
    model_versions.client()
    with contextlib.closing(sqlite3.connect("mlruns/mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    (folder / "mlruns/mlflow.db").rename(folder / "mlruns/newer.db")  # MLflow remembers the stores that it has opened
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RegistryError) as raised,
        model_versions.translate_errors(),
    ):
        patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/newer.db")
        get_or_create.ensure_model(model_versions.client())
    assert "refuses (INTERNAL_ERROR)" in str(raised.value)
    assert "If a newer one, use that version" in str(raised.value)
    assert not raised.value.temporary


def test_artefacts_are_stored_beside_the_database_of_the_address(monkeypatch, folder):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///shared/mlflow.db")
    client = model_versions.client()
    location = client.get_experiment(get_or_create.experiment_id(client)).artifact_location
    assert location == f"{(folder / 'shared').as_uri()}/artifacts"
    assert not (folder / "mlruns/mlflow.db").exists()


def test_models_are_in_the_store_of_the_runs_despite_the_environment(monkeypatch, folder):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{folder}/other.db")
    get_or_create.ensure_model(model_versions.client())
    assert not (folder / "other.db").exists()
