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
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from lilliput.artifacts import MANIFEST, PARITY, disk_is_full, file_sha256, written_aside
from lilliput.errors import ArtifactError, ConfigError, RegistryError
from lilliput.redaction import has_credentials, redacted
from tasks import layout
from tasks.mlflow_view import VIEW_TAG, four_metrics_view

MODEL = "lilliput"
EXPERIMENT = "lilliput"
SEARCHES = "searches"
CHAMPION, CHALLENGER, PREVIOUS = "champion-", "challenger-", "previous-"
ARTIFACT_TAG = "lilliput.artifact_sha256"
DVC_TAG = "lilliput.dvc"  # DVC's hash of each folder the version comes from or is
EVALUATION_TAG = "lilliput.evaluation_sha256"
MLMODEL = "model"
MLMODEL_TAG = "lilliput.mlmodel_sha256"
ANSWERING = Path(__file__).with_name("answering.py")
PATIENCE_S = 120.0
_NOTES = {
    EXPERIMENT: "One run a candidate of the compression graph: its evaluation, what making it cost, what devices made "
    "of it. *Views > Four metrics* compares them; the tag `lilliput.run` says what was registered together. Energy is "
    "an estimate unless `energy_source` names a counter. Champions: the registered model `lilliput`.",
    SEARCHES: "One run a search of sequences of strategies, with a run a trial beneath it.",
}
_DATABASE = layout.MLRUNS / "mlflow.db"
_NEEDED = ("mlflow", "torch", "transformers", "xllamacpp", "onnxruntime-genai")
# An alias that is not there is told as either, depending on the store.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# MLflow would try for four minutes, and for sixteen where a server takes calls and gives no answer.
_HTTP_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
# Whose exceptions say that the store failed: MLflow's own, and those it lets through.
_OF_STORE = ("mlflow", "sqlalchemy", "requests", "urllib3", "boto3", "botocore")
_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "IO_ERROR")
_OURS = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")  # a bug, which keeps its traceback


def client() -> MlflowClient:
    """A client of the store in MLFLOW_TRACKING_URI, or of the embedded one: mlruns/mlflow.db and files beside it.

    A workspace always has the embedded one: a rehearsal or a search moves nobody's champions but its own.
    """
    layout.MLRUNS.mkdir(exist_ok=True)
    for variable, value in _HTTP_PATIENCE.items():
        os.environ.setdefault(variable, value)
    address = tracking_uri()
    if address == _embedded() and not _DATABASE.exists():
        _make_store()
    mlflow.set_tracking_uri(address)
    return MlflowClient()


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
        said = " ".join(redacted(str(error)).split())[:300]
        if code not in _AWAY:
            raise RegistryError(f"MLflow at {tracking_uri()} refuses ({code}): {said}") from error
        raise RegistryError(
            f"MLflow at {tracking_uri()} does not answer: {said}\nNothing is lost: results are kept, and the same "
            "command logs them when MLflow is back",
            temporary=True,
        ) from error


def _own_disk_is_full(error: Exception) -> bool:
    return tracking_uri() == _embedded() and disk_is_full(error)


def tracking_uri() -> str:
    """Where runs and versions are kept.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI holds a user or a password, which MLflow would repeat in errors and records.
    """
    if layout.is_workspace(Path.cwd()):
        return _embedded()
    address = os.environ.get("MLFLOW_TRACKING_URI", _embedded())
    if has_credentials(address):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: {redacted(address)} holds a user or a password; take them out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a database: its own password file)"
        )
    return address


def _embedded(database: Path = _DATABASE) -> str:
    return f"sqlite:///{database.absolute()}"


def _make_store() -> None:
    """Makes the embedded store, whole or not at all: one whose making was killed half-way, MLflow never opens again."""
    for left in layout.MLRUNS.glob(f".{_DATABASE.name}.partial*"):  # what a killed run left, its journal too
        left.unlink()
    with written_aside(_DATABASE) as partial:
        MlflowClient(_embedded(partial)).search_experiments(max_results=1)


def experiment_id(mlflow_client: MlflowClient, name: str = EXPERIMENT) -> str:
    """The id of the experiment, made if it is not there."""
    found = mlflow_client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    # A server knows where its artifacts go. The variable alone tells nothing: MLflow sets it to whatever it opened.
    place = (layout.MLRUNS / "artifacts").absolute().as_uri() if tracking_uri() == _embedded() else None
    tags = {
        "mlflow.experimentKind": "custom_model_development",  # else the UI opens on chat traces: there are none
        "mlflow.note.content": _NOTES[name],
        **({VIEW_TAG: four_metrics_view()} if name == EXPERIMENT else {}),
    }
    return mlflow_client.create_experiment(name, artifact_location=place, tags=tags)


def ensure_model(mlflow_client: MlflowClient) -> None:
    """Makes the registered model if it is not there."""
    if _registered(mlflow_client) is None:
        mlflow_client.create_registered_model(
            MODEL, description="Candidates of the compression graph, each with its four-metric evaluation."
        )


def find_or_create_run(
    mlflow_client: MlflowClient,
    experiment: str,
    name: str,
    identity: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
) -> Run:
    """The run whose tags hold `identity`, made with these and `tags` if it is not there."""
    wanted = " and ".join(f"tags.`{key}` = '{text}'" for key, text in identity.items())
    known = mlflow_client.search_runs([experiment], wanted, max_results=1)
    return known[0] if known else mlflow_client.create_run(experiment, run_name=name, tags={**identity, **(tags or {})})


def _registered(mlflow_client: MlflowClient) -> RegisteredModel | None:
    """The registered model. Not by its name: MLflow's store then reads all of its versions to tell the latest."""
    found = mlflow_client.search_registered_models(f"name = '{MODEL}'", max_results=1)
    return found[0] if found else None


def find_version(mlflow_client: MlflowClient, evaluation_sha256: str) -> str | None:
    """The version registered for exactly this evaluation, if there is one."""
    found = mlflow_client.search_model_versions(f"name = '{MODEL}' and tags.`{EVALUATION_TAG}` = '{evaluation_sha256}'")
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
    run_id = _run_of(mlflow_client, version)
    if mlflow_client.get_run(run_id).data.tags.get(tag) == digest:
        return
    mlflow_client.log_batch(run_id, metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()])
    mlflow_client.log_artifact(run_id, str(record), record.parent.name)
    mlflow_client.set_tag(run_id, tag, digest)


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
    run_id = _run_of(mlflow_client, version)
    if mlflow_client.get_run(run_id).data.tags.get(MLMODEL_TAG) == digest:
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_mlmodel(Path(scratch, MLMODEL), config)
        mlflow_client.log_artifacts(run_id, str(Path(scratch, MLMODEL)), MLMODEL)
    mlflow_client.set_tag(run_id, MLMODEL_TAG, digest)


def write_mlmodel(folder: Path, config: Mapping[str, Any]) -> None:
    """Makes `folder` one that MLflow opens as Python code: an MLmodel, tasks/answering.py and its `config`."""
    from mlflow import pyfunc  # brings pandas and scikit-learn

    needed = [f"{name}=={importlib.metadata.version(name)}" for name in _NEEDED]
    pyfunc.save_model(str(folder), python_model=str(ANSWERING), model_config=dict(config), pip_requirements=needed)


def _run_of(mlflow_client: MlflowClient, version: str) -> str:
    run_id = mlflow_client.get_model_version(MODEL, version).run_id
    assert run_id is not None
    return run_id


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
    found = _registered(mlflow_client)
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
