"""The joint with MLflow: runs, versions and aliases of the registered model `lilliput`, all under mlruns/."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from lilliput.artifacts import MANIFEST, PARITY, file_sha256
from lilliput.promote import Decision
from tasks import layout

MODEL = "lilliput"
EXPERIMENT = "lilliput"
SEARCHES = "searches"


def client() -> MlflowClient:
    """A client of the store in MLFLOW_TRACKING_URI, or of the embedded one: mlruns/mlflow.db and files beside it."""
    layout.MLRUNS.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(tracking_uri())
    return MlflowClient()


def tracking_uri() -> str:
    """Where runs and versions are kept."""
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{(layout.MLRUNS / 'mlflow.db').absolute()}")


def experiment_id(mlflow_client: MlflowClient, name: str = EXPERIMENT) -> str:
    """The id of the experiment, made if it is not there."""
    found = mlflow_client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    place = None if "MLFLOW_TRACKING_URI" in os.environ else (layout.MLRUNS / "artifacts").absolute().as_uri()
    kind = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens on chat traces: there are none
    return mlflow_client.create_experiment(name, artifact_location=place, tags=kind)


def ensure_model(mlflow_client: MlflowClient) -> None:
    """Makes the registered model if it is not there."""
    try:
        mlflow_client.get_registered_model(MODEL)
    except MlflowException:
        mlflow_client.create_registered_model(
            MODEL, description="Candidates of the compression graph, each with its four-metric evaluation."
        )


def find_version(mlflow_client: MlflowClient, evaluation_sha256: str) -> str | None:
    """The version registered for exactly this evaluation, if there is one."""
    found = mlflow_client.search_model_versions(
        f"name = '{MODEL}' and tags.`lilliput.evaluation_sha256` = '{evaluation_sha256}'"
    )
    return str(found[0].version) if found else None


def log_run(
    mlflow_client: MlflowClient,
    run_id: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    tags: Mapping[str, str],
) -> None:
    """Logs everything about one run in as few calls as MLflow allows (1,000 metrics, 100 params each)."""
    points = [Metric(name, value, 0, 0) for name, value in metrics.items()]
    points += [Metric(name, value, 0, step) for name, curve in curves.items() for step, value in curve]
    for start in range(0, max(1, len(points)), 1000):
        mlflow_client.log_batch(run_id, metrics=points[start : start + 1000])
    mlflow_client.log_batch(
        run_id,
        params=[Param(name, str(value)) for name, value in params.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )


def add_metrics(mlflow_client: MlflowClient, version: str, record: Path, metrics: Mapping[str, float]) -> None:
    """Adds what was measured later to the run of `version`, with the file it stands in; once for the same file."""
    tag, digest = f"lilliput.{record.parent.name}.{record.stem}_sha256", file_sha256(record)
    found = mlflow_client.get_model_version(MODEL, version)
    if found.tags.get(tag) == digest:
        return
    assert found.run_id is not None
    mlflow_client.log_batch(found.run_id, metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()])
    mlflow_client.log_artifact(found.run_id, str(record), record.parent.name)
    mlflow_client.set_model_version_tag(MODEL, version, tag, digest)


def add_compiled(
    mlflow_client: MlflowClient, version: str, folder: Path, record: Path, metrics: Mapping[str, float]
) -> None:
    """Adds a compiled form of `version`: what the devices made of it, its parity record, and where it lies."""
    tag, digest = f"lilliput.compiled.{folder.name}_sha256", file_sha256(folder / MANIFEST)
    add_metrics(mlflow_client, version, record, metrics)
    found = mlflow_client.get_model_version(MODEL, version)
    if found.tags.get(tag) == digest:
        return
    assert found.run_id is not None
    mlflow_client.log_artifact(found.run_id, str(folder / PARITY), f"compiled/{folder.name}")
    mlflow_client.set_model_version_tag(MODEL, version, f"lilliput.compiled.{folder.name}", folder.absolute().as_uri())
    mlflow_client.set_model_version_tag(MODEL, version, tag, digest)


def point_champions(registered: Mapping[str, Mapping[str, Any]], decisions: Sequence[Decision]) -> None:
    """Moves `champion-<device>` to the winner of each decision, or takes it away where there is none."""
    mlflow_client = client()
    devices = {decision.device for decision in decisions}
    for alias in mlflow_client.get_registered_model(MODEL).aliases:
        if alias.startswith("champion-") and alias.removeprefix("champion-") not in devices:
            mlflow_client.delete_registered_model_alias(MODEL, alias)  # of a device params.yaml no longer has
    for decision in decisions:
        alias = f"champion-{decision.device}"
        if decision.champion is None:
            mlflow_client.delete_registered_model_alias(MODEL, alias)
            continue
        version = str(registered[decision.champion]["version"])
        mlflow_client.set_registered_model_alias(MODEL, alias, version)
        mlflow_client.set_model_version_tag(MODEL, version, f"lilliput.promoted.{decision.device}", decision.reason)
