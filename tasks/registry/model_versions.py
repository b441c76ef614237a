"""The joint with MLflow: runs, versions and aliases of the registered model `lilliput`, all under mlruns/."""

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
from tasks.registry.creating import MODEL, registered_model, run_of, shortened
from tasks.registry.moved import follow
from tasks.registry.store import embedded_uri, prepare, sqlite_file, tracking_uri

CHAMPION, CHALLENGER, PREVIOUS = "champion-", "challenger-", "previous-"
ARTIFACT_TAG = "lilliput.artifact_sha256"
DVC_TAG = "lilliput.dvc"  # DVC's hash of each folder the version comes from or is
PATIENCE_S = 120.0
# MLflow's limits of one call, and of the value of a param.
_METRICS_PER_CALL, _PARAMS_PER_CALL, _PARAM_CHARS = 1000, 100, 6000
# An alias that is not there is told as either, depending on the store.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# MLflow would try for four minutes, and for sixteen where a server takes calls and gives no answer.
_HTTP_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
# Whose exceptions say that the store failed: MLflow's own, and those it lets through.
_OF_STORE = ("mlflow", "sqlalchemy", "requests", "urllib3", "boto3", "botocore")
_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "IO_ERROR")
# What to do about a refusal, by its error code or a part of its text.
_REMEDIES = {
    "RESOURCE_DOES_NOT_EXIST": "Something was deleted there after it was registered. "
    "`dvc repro -f -s register promote` registers the candidates again",
    "ENDPOINT_NOT_FOUND": "Another program answers at this address, or an older MLflow; correct MLFLOW_TRACKING_URI",
    "failed with error code 4": "Another program than MLflow answers at this address; correct MLFLOW_TRACKING_URI",
    "not in a valid JSON format": "Another program than MLflow answers at this address; correct MLFLOW_TRACKING_URI",
    "database schema": "Another version of MLflow has written this database. If a newer one, use that version; if an "
    "older one, make a copy of the database and run `mlflow db upgrade` with its address",
}
_OURS = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")  # a bug, which keeps its traceback


def client() -> MlflowClient:
    """A client of the store in MLFLOW_TRACKING_URI, or of the embedded one: mlruns/mlflow.db and files beside it.

    A workspace always has the embedded one: a rehearsal or a search moves nobody's champions but its own.
    """
    layout.MLRUNS.mkdir(exist_ok=True)
    for variable, value in _HTTP_PATIENCE.items():
        os.environ.setdefault(variable, value)
    address = tracking_uri()
    prepare(address)
    if database := sqlite_file(address):
        follow(database)
    os.environ.pop("MLFLOW_REGISTRY_URI", None)  # models go where the runs go, also for `mlflow.pyfunc.load_model`
    mlflow.set_tracking_uri(address)
    return MlflowClient(address, address)


@contextmanager
def in_reach() -> Iterator[None]:
    """Tells in one message that MLflow's store fails; also a decorator, for whatever talks to it.

    Raises:
        RegistryError: it does not answer, which another try may mend, or it refuses.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _OF_STORE or _own_disk_is_full(error):
            raise
        code = error.error_code if isinstance(error, MlflowException) else "TEMPORARILY_UNAVAILABLE"
        if code in _OURS:
            raise
        message = " ".join(redacted(str(error)).split())[:300]
        remedy = next((remedy for words, remedy in _REMEDIES.items() if words in str(error) or words == code), None)
        if code not in _AWAY or (remedy and code == "INTERNAL_ERROR"):
            advice = f"\n{remedy}" if remedy else ""
            raise RegistryError(f"MLflow at {tracking_uri()} refuses ({code}): {message}{advice}") from error
        raise RegistryError(
            f"MLflow at {tracking_uri()} does not answer: {message}\nNothing is lost: results are kept, and the same "
            "command logs them when MLflow is back",
            temporary=True,
        ) from error


def _own_disk_is_full(error: Exception) -> bool:
    return tracking_uri() == embedded_uri() and disk_is_full(error)


def log_run(
    mlflow_client: MlflowClient,
    run_id: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    tags: Mapping[str, str],
) -> None:
    """Logs everything about one run in as few calls as MLflow allows."""
    points = [Metric(name, value, 0, 0) for name, value in metrics.items()]
    points += [Metric(name, value, 0, step) for name, curve in curves.items() for step, value in curve]
    for start in range(0, len(points), _METRICS_PER_CALL):
        mlflow_client.log_batch(run_id, metrics=points[start : start + _METRICS_PER_CALL])
    logged = [Param(name, shortened(str(value), _PARAM_CHARS)) for name, value in params.items()]
    for start in range(0, len(logged), _PARAMS_PER_CALL):
        mlflow_client.log_batch(run_id, params=logged[start : start + _PARAMS_PER_CALL])
    noted = [RunTag(name, value) for name, value in tags.items()]
    for start in range(0, len(noted), _PARAMS_PER_CALL):
        mlflow_client.log_batch(run_id, tags=noted[start : start + _PARAMS_PER_CALL])


def add_metrics(mlflow_client: MlflowClient, version: str, record: Path, metrics: Mapping[str, float]) -> None:
    """Adds what was measured later to the run of `version`, with the file it stands in; once for the same file."""
    tag, digest = f"lilliput.{record.parent.name}.{record.stem}_sha256", file_sha256(record)
    run_id = run_of(mlflow_client, version)
    if mlflow_client.get_run(run_id).data.tags.get(tag) == digest:
        return
    mlflow_client.log_batch(run_id, metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()])
    mlflow_client.log_artifact(run_id, str(record), record.parent.name)
    mlflow_client.set_tag(run_id, tag, digest)


def add_compiled(
    mlflow_client: MlflowClient, version: str, folder: Path, record: Path, metrics: Mapping[str, float]
) -> None:
    """Adds a compiled form of `version`: what the devices made of it, its parity record, its folder in the project."""
    tag, digest = f"lilliput.compiled.{folder.name}_sha256", file_sha256(folder / MANIFEST)
    add_metrics(mlflow_client, version, record, metrics)
    if mlflow_client.get_model_version(MODEL, version).tags.get(tag) == digest:
        return
    mlflow_client.log_artifact(run_of(mlflow_client, version), str(folder / PARITY), f"compiled/{folder.name}")
    mlflow_client.set_model_version_tag(MODEL, version, f"lilliput.compiled.{folder.name}", str(folder))
    mlflow_client.set_model_version_tag(MODEL, version, tag, digest)


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


def move_champion(device: str, version: str | None) -> bool:
    """Points `champion-<device>` at `version`, or takes it away; who had it before becomes `previous-<device>`.

    The same model, measured again, replaces itself: then `previous-<device>` stays.

    Returns:
        Whether another model reigns now, or none where there was one.
    """
    before = version_of(f"{CHAMPION}{device}")
    after = None if version is None else client().get_model_version(MODEL, version)
    artifacts = [found and found.tags.get(ARTIFACT_TAG) for found in (before, after)]
    changed = artifacts[0] != artifacts[1]
    if before is not None and changed:
        point(f"{PREVIOUS}{device}", str(before.version))
    point(f"{CHAMPION}{device}", version)
    return changed


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
    found = registered_model(mlflow_client)
    for alias in found.aliases if found else ():
        prefix = next((prefix for prefix in (CHAMPION, CHALLENGER, PREVIOUS) if alias.startswith(prefix)), None)
        if prefix and alias.removeprefix(prefix) not in devices:
            mlflow_client.delete_registered_model_alias(MODEL, alias)


def read_artifact(run_id: str, path: str) -> str:
    """The text of an artifact of a run.

    Raises:
        ArtifactError: it is not there. A store that does not answer is another matter, and the caller's.
    """
    mlflow_client, folder = client(), path.rpartition("/")[0]
    try:
        if not any(found.path == path for found in mlflow_client.list_artifacts(run_id, folder or None)):
            raise ArtifactError(f"{path} of MLflow's run {run_id} is not there")
    except MlflowException as error:
        if error.error_code not in _NOT_THERE:
            raise
        raise ArtifactError(f"{path} of MLflow's run {run_id} cannot be read: {error}") from None
    with tempfile.TemporaryDirectory() as scratch:
        return Path(mlflow_client.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8")
