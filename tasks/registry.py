"""The joint with MLflow: runs, versions and aliases of the registered model `lilliput`, all under mlruns/."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from lilliput.artifacts import MANIFEST, PARITY, file_sha256
from lilliput.errors import ArtifactError, ConfigError
from lilliput.redaction import has_credentials, redacted
from tasks import layout

MODEL = "lilliput"
EXPERIMENT = "lilliput"
SEARCHES = "searches"
CHAMPION, CHALLENGER, PREVIOUS = "champion-", "challenger-", "previous-"
ARTIFACT_TAG = "lilliput.artifact_sha256"
MLMODEL = "model"
MLMODEL_TAG = "lilliput.mlmodel_sha256"
ANSWERING = Path(__file__).with_name("answering.py")
PATIENCE_S = 120.0
_NEEDED = ("mlflow", "torch", "transformers", "xllamacpp", "onnxruntime-genai")
# An alias that is not there is told as either, depending on the store.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def client() -> MlflowClient:
    """A client of the store in MLFLOW_TRACKING_URI, or of the embedded one: mlruns/mlflow.db and files beside it."""
    layout.MLRUNS.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(tracking_uri())
    return MlflowClient()


def tracking_uri() -> str:
    """Where runs and versions are kept.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI holds a user or a password, which MLflow would repeat in errors and records.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{(layout.MLRUNS / 'mlflow.db').absolute()}")
    if has_credentials(address):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {redacted(address)} holds a user or a password; take them out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a database: its own password file)"
        )
    return address


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
    if _registered(mlflow_client) is None:
        mlflow_client.create_registered_model(
            MODEL, description="Candidates of the compression graph, each with its four-metric evaluation."
        )


def _registered(mlflow_client: MlflowClient) -> RegisteredModel | None:
    """The registered model. Not by its name: MLflow's store then reads all of its versions to tell the latest."""
    found = mlflow_client.search_registered_models(f"name = '{MODEL}'", max_results=1)
    return found[0] if found else None


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


def add_mlmodel(mlflow_client: MlflowClient, version: str, config: Mapping[str, Any]) -> None:
    """Writes beside `version` what MLflow needs to open it: tasks/answering.py and `config`, no weights; once for each.

    Args:
        mlflow_client: of the store.
        version: made with `mlmodel_uri` of its run as source.
        config: as tasks/answering.py reads it.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + ANSWERING.read_bytes()).hexdigest()
    found = mlflow_client.get_model_version(MODEL, version)
    if found.tags.get(MLMODEL_TAG) == digest:
        return
    assert found.run_id is not None
    with tempfile.TemporaryDirectory() as scratch:
        write_mlmodel(Path(scratch, MLMODEL), config)
        mlflow_client.log_artifacts(found.run_id, str(Path(scratch, MLMODEL)), MLMODEL)
    mlflow_client.set_model_version_tag(MODEL, version, MLMODEL_TAG, digest)


def write_mlmodel(folder: Path, config: Mapping[str, Any]) -> None:
    """Makes `folder` one that MLflow opens as Python code: an MLmodel, tasks/answering.py and its `config`."""
    from mlflow import pyfunc  # brings pandas and scikit-learn

    needed = [f"{name}=={importlib.metadata.version(name)}" for name in _NEEDED]
    pyfunc.save_model(str(folder), python_model=str(ANSWERING), model_config=dict(config), pip_requirements=needed)


def mlmodel_uri(mlflow_client: MlflowClient, run_id: str) -> str:
    """Where `add_mlmodel` writes to."""
    return f"{mlflow_client.get_run(run_id).info.artifact_uri}/{MLMODEL}"


@contextmanager
def alone() -> Iterator[None]:
    """Holds the champions of this folder's store: promotions wait for each other, so that each sees the last one's.

    Raises:
        ConfigError: another one does not end.
    """
    layout.MLRUNS.mkdir(exist_ok=True)
    try:
        with FileLock(layout.MLRUNS / ".promotion.lock", timeout=PATIENCE_S):
            yield
    except Timeout:
        raise ConfigError(
            f"{layout.MLRUNS}: another promotion has been at work for {PATIENCE_S:g} s; wait for it and try again"
        ) from None


def version_of(alias: str) -> ModelVersion | None:
    """The version that `alias` (`champion-phone-4gb`) points to; None where it points to none."""
    try:
        return client().get_model_version_by_alias(MODEL, alias)
    except MlflowException as error:
        if error.error_code in _NOT_THERE:
            return None
        raise


def point(alias: str, version: str | None) -> None:
    """Points `alias` at `version`, or takes it away."""
    found = version_of(alias)
    if version is not None and (found is None or str(found.version) != version):
        client().set_registered_model_alias(MODEL, alias, version)
    elif version is None and found is not None:
        client().delete_registered_model_alias(MODEL, alias)


def move_champion(device: str, version: str | None) -> None:
    """Points `champion-<device>` at `version`, or takes it away; who had it before becomes `previous-<device>`.

    The same model, measured again, replaces itself: then `previous-<device>` stays.
    """
    before = version_of(f"{CHAMPION}{device}")
    if before is not None and str(before.version) != version:
        after = None if version is None else client().get_model_version(MODEL, version)
        if after is None or after.tags.get(ARTIFACT_TAG) != before.tags.get(ARTIFACT_TAG):
            point(f"{PREVIOUS}{device}", str(before.version))
    point(f"{CHAMPION}{device}", version)


def tell(version: str, tags: Mapping[str, str | None]) -> None:
    """Sets tags of `version`, and removes those that are None; what is so already is not written again."""
    mlflow_client = client()
    known = mlflow_client.get_model_version(MODEL, version).tags
    for key, value in tags.items():
        if value is None and key in known:
            mlflow_client.delete_model_version_tag(MODEL, version, key)
        elif value is not None and known.get(key) != value:
            mlflow_client.set_model_version_tag(MODEL, version, key, value)


def forget_devices(devices: Collection[str]) -> None:
    """Takes away the aliases of devices other than `devices`."""
    mlflow_client = client()
    found = _registered(mlflow_client)
    for alias in found.aliases if found else ():
        prefix = next((prefix for prefix in (CHAMPION, CHALLENGER, PREVIOUS) if alias.startswith(prefix)), None)
        if prefix and alias.removeprefix(prefix) not in devices:
            mlflow_client.delete_registered_model_alias(MODEL, alias)


def read_artifact(run_id: str, path: str) -> str:
    """The text of an artifact of a run.

    Raises:
        ArtifactError: it is not there, or its store does not answer.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return Path(client().download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8")
    except (MlflowException, OSError) as error:
        raise ArtifactError(f"{path} of MLflow's run {run_id} cannot be read: {error}") from None
