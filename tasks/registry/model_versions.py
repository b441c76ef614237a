"""Access to MLflow: runs, versions, tags and aliases of the registered model `lilliput`."""

from __future__ import annotations

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
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from lilliput.artifacts import MANIFEST, PARITY, disk_is_full, file_sha256
from lilliput.errors import ArtifactError, ConfigError, RegistryError
from lilliput.redaction import redacted
from tasks import layout
from tasks.registry.get_or_create import MODEL, active_run_id, registered_model, truncate
from tasks.registry.moved import update_paths
from tasks.registry.store import embedded_uri, prepare, sqlite_file, tracking_uri

CHAMPION, CHALLENGER, PREVIOUS = "champion-", "challenger-", "previous-"
ARTIFACT_TAG = "lilliput.artifact_sha256"
_LOCK_TIMEOUT_S = 120.0
# MLflow's limits per call, and of the value of a param.
_METRICS_PER_CALL, _PARAMS_PER_CALL, _PARAM_CHARS = 1000, 100, 6000
# Error codes for a missing alias; they differ between stores.
_MISSING_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# By default MLflow retries for 4 minutes, and for 16 if a server accepts calls without an answer.
_HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
_QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}  # otherwise a bar for each file of a few bytes
# Packages whose exceptions mean that the store failed.
_STORE_PACKAGES = ("mlflow", "sqlalchemy", "requests", "urllib3", "boto3", "botocore")
_TEMPORARY_CODES = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
    "DEADLINE_EXCEEDED",
    "IO_ERROR",
)
# Remedies by the error code or a part of the message.
_REMEDIES = {
    "RESOURCE_DOES_NOT_EXIST": "Something was deleted there after it was registered. "
    "`dvc repro -f -s register promote` registers the candidates again",
    "ENDPOINT_NOT_FOUND": "Another program answers at this address, or an older MLflow; correct MLFLOW_TRACKING_URI",
    "failed with error code 4": "Another program than MLflow answers at this address; correct MLFLOW_TRACKING_URI",
    "not in a valid JSON format": "Another program than MLflow answers at this address; correct MLFLOW_TRACKING_URI",
    "database schema": "Another version of MLflow has written this database. If a newer one, use that version; if an "
    "older one, make a copy of the database and run `mlflow db upgrade` with its address",
}
_BUG_CODES = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")  # bugs, which keep their traceback


def client() -> MlflowClient:
    """Returns a client of the store in MLFLOW_TRACKING_URI, or of the embedded one in mlruns/.

    A workspace always uses its embedded store, so a rehearsal or a search never moves the project's champions.
    """
    layout.MLRUNS.mkdir(exist_ok=True)
    for variable, value in (_HTTP_LIMITS | _QUIET).items():
        os.environ.setdefault(variable, value)
    address = tracking_uri()
    prepare(address)
    if database := sqlite_file(address):
        update_paths(database)
    os.environ.pop("MLFLOW_REGISTRY_URI", None)  # the registry is in the store of the runs
    mlflow.set_tracking_uri(address)
    return MlflowClient(address, address)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translates exceptions of MLflow's store into one RegistryError; also usable as a decorator.

    Raises:
        RegistryError: the store does not answer (`temporary`), or it refuses.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _STORE_PACKAGES or _embedded_disk_is_full(error):
            raise
        code = error.error_code if isinstance(error, MlflowException) else "TEMPORARILY_UNAVAILABLE"
        if code in _BUG_CODES:
            raise
        message = " ".join(redacted(str(error)).split())[:300]
        remedy = next((remedy for words, remedy in _REMEDIES.items() if words in str(error) or words == code), None)
        if code not in _TEMPORARY_CODES or (remedy and code == "INTERNAL_ERROR"):
            advice = f"\n{remedy}" if remedy else ""
            raise RegistryError(f"MLflow at {tracking_uri()} refuses ({code}): {message}{advice}") from error
        raise RegistryError(
            f"MLflow at {tracking_uri()} does not answer: {message}\nNothing is lost: results are kept, and the same "
            "command logs them when MLflow is back",
            temporary=True,
        ) from error


def _embedded_disk_is_full(error: Exception) -> bool:
    return tracking_uri() == embedded_uri() and disk_is_full(error)


def log_run(
    mlflow_client: MlflowClient,
    run_id: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    tags: Mapping[str, str],
) -> None:
    """Logs params, metrics, curves and tags of a run in as few calls as MLflow allows."""
    points = [Metric(name, value, 0, 0) for name, value in metrics.items()]
    points += [Metric(name, value, 0, step) for name, curve in curves.items() for step, value in curve]
    for start in range(0, len(points), _METRICS_PER_CALL):
        mlflow_client.log_batch(run_id, metrics=points[start : start + _METRICS_PER_CALL])
    logged = [Param(name, truncate(str(value), _PARAM_CHARS)) for name, value in params.items()]
    for start in range(0, len(logged), _PARAMS_PER_CALL):
        mlflow_client.log_batch(run_id, params=logged[start : start + _PARAMS_PER_CALL])
    run_tags = [RunTag(name, value) for name, value in tags.items()]
    for start in range(0, len(run_tags), _PARAMS_PER_CALL):
        mlflow_client.log_batch(run_id, tags=run_tags[start : start + _PARAMS_PER_CALL])


def add_metrics(
    mlflow_client: MlflowClient, version: str, record: Path, metrics: Mapping[str, float], *others: Path
) -> None:
    """Adds later measurements, their `record` file and `others` beside it to the run of `version`.

    Idempotent for the same record.
    """
    tag, digest = f"lilliput.{record.parent.name}.{record.stem}_sha256", file_sha256(record)
    run_id = active_run_id(mlflow_client, version)
    if mlflow_client.get_run(run_id).data.tags.get(tag) == digest:
        return
    mlflow_client.log_batch(run_id, metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()])
    for file in (record, *others):
        mlflow_client.log_artifact(run_id, str(file), record.parent.name)
    mlflow_client.set_tag(run_id, tag, digest)


def add_compiled(
    mlflow_client: MlflowClient, version: str, folder: Path, record: Path, answers: Path, metrics: Mapping[str, float]
) -> None:
    """Adds to the run of `version` a compiled model: its answers, metrics on devices and parity record."""
    tag, digest = f"lilliput.compiled.{folder.name}_sha256", file_sha256(folder / MANIFEST)
    add_metrics(mlflow_client, version, record, metrics, answers)
    run_id = active_run_id(mlflow_client, version)
    if mlflow_client.get_run(run_id).data.tags.get(tag) == digest:
        return
    mlflow_client.log_artifact(run_id, str(folder / PARITY), f"compiled/{folder.name}")
    mlflow_client.set_tag(run_id, tag, digest)


@contextmanager
def promotion_lock() -> Iterator[None]:
    """Locks the champions of this folder's store, so that each promotion sees the result of the one before.

    Raises:
        ConfigError: another promotion holds the lock for too long.
    """
    layout.MLRUNS.mkdir(exist_ok=True)
    try:
        with FileLock(layout.MLRUNS / ".promotion.lock", timeout=_LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise ConfigError(
            f"{layout.MLRUNS}: another promotion has been running for {_LOCK_TIMEOUT_S:g} s; wait for it and try again"
        ) from None


def version_of(alias: str) -> ModelVersion | None:
    """Returns the version that `alias` (for example `champion-phone-4gb`) points to; None if there is none."""
    try:
        return client().get_model_version_by_alias(MODEL, alias)
    except MlflowException as error:
        if error.error_code in _MISSING_CODES:
            return None
        raise


def set_alias(alias: str, version: str | None) -> None:
    """Points `alias` at `version`; removes it for None."""
    current = version_of(alias)
    if version is not None and (current is None or str(current.version) != version):
        client().set_registered_model_alias(MODEL, alias, version)
    elif version is None and current is not None:
        client().delete_registered_model_alias(MODEL, alias)


def move_champion(device: str, version: str | None) -> bool:
    """Points `champion-<device>` at `version`, or removes it for None; the old champion becomes `previous-<device>`.

    If the new version is the same model, measured again, `previous-<device>` stays unchanged.

    Returns:
        Whether the champion is now another model, or none.
    """
    before = version_of(f"{CHAMPION}{device}")
    after = None if version is None else client().get_model_version(MODEL, version)
    old_artifact, new_artifact = (entry and entry.tags.get(ARTIFACT_TAG) for entry in (before, after))
    changed = old_artifact != new_artifact
    if before is not None and changed:
        set_alias(f"{PREVIOUS}{device}", str(before.version))
    set_alias(f"{CHAMPION}{device}", version)
    return changed


def forget_devices(devices: Collection[str]) -> None:
    """Removes the aliases of all devices that are not in `devices`."""
    mlflow_client = client()
    model = registered_model(mlflow_client)
    for alias in model.aliases if model else ():
        prefix = next((prefix for prefix in (CHAMPION, CHALLENGER, PREVIOUS) if alias.startswith(prefix)), None)
        if prefix and alias.removeprefix(prefix) not in devices:
            mlflow_client.delete_registered_model_alias(MODEL, alias)


def read_artifact(run_id: str, path: str) -> str:
    """Returns the text of an artifact of a run.

    Raises:
        ArtifactError: the artifact does not exist. Other errors of the store pass through.
    """
    if (text := find_artifact(run_id, path)) is None:
        raise ArtifactError(f"{path} of MLflow's run {run_id} does not exist")
    return text


def find_artifact(run_id: str | None, path: str) -> str | None:
    """Returns the text of an artifact of a run; None if it or the run does not exist."""
    if path not in list_artifacts(run_id, path.rpartition("/")[0]):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        return Path(client().download_artifacts(str(run_id), path, scratch)).read_text(encoding="utf-8")


def list_artifacts(run_id: str | None, folder: str) -> list[str]:
    """Returns the paths of the artifacts in `folder` of a run; empty if it or the run does not exist."""
    try:
        found = client().list_artifacts(run_id, folder or None) if run_id else []
    except MlflowException as error:
        if error.error_code not in _MISSING_CODES:
            raise
        return []
    return [artifact.path for artifact in found]
