"""Finds or creates experiments, runs and versions in MLflow, also if another process creates them at the same time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from lilliput.errors import RegistryError
from tasks.registry.mlflow_view import VIEW_TAG, four_metrics_view
from tasks.registry.moved import ARTIFACTS
from tasks.registry.store import sqlite_file, tracking_uri

MODEL = "lilliput"
EXPERIMENT = "lilliput"
SEARCHES = "searches"
EVALUATION_TAG = "lilliput.evaluation_sha256"
DESCRIPTION_CHARS = 5000  # of a version: MLflow's column in a database other than SQLite
RUN_TAG_CHARS = 8000  # MLflow cuts or refuses a longer value of a run's tag
_NOTES = {
    EXPERIMENT: "One run per candidate of the compression graph: its evaluation, cost, and measurements on devices. "
    "*Views > Four metrics* compares them; runs registered together share the tag `lilliput.run`. Energy is "
    "an estimate unless the parameter `energy_source` names a counter. Champions: the registered model `lilliput`.",
    SEARCHES: "One run per search of sequences of strategies, with a nested run per trial.",
}
_EXISTS, _MISSING = "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"
_MAX_DUPLICATES = 100  # processes that may create the same run at the same time


def experiment_id(client: MlflowClient, name: str = EXPERIMENT) -> str:
    """Returns the id of the experiment; creates it if it is missing and restores it if it was deleted."""
    experiment = client.get_experiment_by_name(name) or _create_experiment(client, name)
    if experiment.lifecycle_stage == LifecycleStage.DELETED:
        _restore_experiment(client, experiment)
    if name == EXPERIMENT and experiment.tags.get(VIEW_TAG) != (view := four_metrics_view()):
        client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view)  # an earlier version made it
    return experiment.experiment_id


def _create_experiment(client: MlflowClient, name: str) -> Experiment:
    tags = {
        "mlflow.experimentKind": "custom_model_development",  # otherwise the UI opens an empty page of chat traces
        "mlflow.note.content": _NOTES[name],
        **({VIEW_TAG: four_metrics_view()} if name == EXPERIMENT else {}),
    }
    # Beside a SQLite file, so that they can be moved together. A server chooses its own location.
    database = sqlite_file(tracking_uri())
    location = (database.parent / ARTIFACTS).as_uri() if database else None
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=location, tags=tags))
    except MlflowException as error:
        created = client.get_experiment_by_name(name) if error.error_code == _EXISTS else None
        if created is None:
            raise
        return created


def _restore_experiment(client: MlflowClient, experiment: Experiment) -> None:
    try:
        client.restore_experiment(experiment.experiment_id)
    except MlflowException:
        if client.get_experiment(experiment.experiment_id).lifecycle_stage == LifecycleStage.DELETED:
            raise
    _print_note(
        f"experiment {experiment.name} was deleted, and is restored with all of its runs (`mlflow gc` would remove it)"
    )


def ensure_model(client: MlflowClient) -> None:
    """Creates the registered model if it is missing.

    Raises:
        RegistryError: a prompt in the registry has its name.
    """
    if registered_model(client) is not None:
        return
    note = "Candidates of the compression graph, each with its four-metric evaluation."
    try:
        client.create_registered_model(MODEL, description=note)
    except MlflowException as error:
        if error.error_code != _EXISTS:
            raise
        if registered_model(client) is None:
            raise RegistryError(
                f"MLflow at {tracking_uri()} has a prompt with the name {MODEL}, which the registered model needs; "
                "rename or delete that prompt, or use another store"
            ) from None


def registered_model(client: MlflowClient) -> RegisteredModel | None:
    """Returns the registered model, or None. Searches for it: MLflow's `get` reads all versions to find the latest."""
    models = client.search_registered_models(f"name = '{MODEL}'", max_results=1)
    return models[0] if models else None


def find_or_create_run(
    client: MlflowClient,
    experiment: str,
    name: str,
    identity: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
    start_ms: int | None = None,
) -> Run:
    """Returns the run whose tags contain `identity`; creates it with these and `tags` if it is missing.

    If several processes create it at the same time, each returns the oldest run and deletes its own. If clocks or the
    order of requests leave two, `create_version` deletes the second. `start_ms` is the start time; None means now.
    """
    if existing := _find_runs(client, experiment, identity):
        return existing[0]
    created = client.create_run(experiment, start_ms, {**identity, **(tags or {})}, name)
    first = next(iter(_find_runs(client, experiment, identity)), created)
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)
    return first


def _find_runs(client: MlflowClient, experiment: str, identity: Mapping[str, str]) -> list[Run]:
    """Returns the runs whose tags contain `identity`, the oldest first."""
    query = " and ".join(f"tags.`{key}` = '{text}'" for key, text in identity.items())
    runs = client.search_runs([experiment], query, max_results=_MAX_DUPLICATES)
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def find_version(client: MlflowClient, evaluation_sha256: str) -> str | None:
    """Returns the first version of exactly this evaluation whose run exists; None if there is none."""
    versions = client.search_model_versions(f"name = '{MODEL}' and tags.`{EVALUATION_TAG}` = '{evaluation_sha256}'")
    numbers = sorted((int(version.version), version.run_id) for version in versions)
    return next((str(number) for number, run_id in numbers if run_id and _find_run(client, run_id)), None)


def create_version(client: MlflowClient, evaluation_sha256: str, **settings: Any) -> str:
    """Creates a version for an evaluation; returns the first one if another process created it at the same time.

    Args:
        client: of the store.
        evaluation_sha256: digest of the evaluation's record; becomes a tag.
        settings: `source`, `run_id`, `tags` and `description` of `MlflowClient.create_model_version`.
    """
    tags = {**settings.pop("tags"), EVALUATION_TAG: evaluation_sha256}
    description = truncate(settings.pop("description"))
    created = client.create_model_version(MODEL, tags=tags, description=description, **settings)
    first = find_version(client, evaluation_sha256) or str(created.version)
    if first != str(created.version):
        client.delete_model_version(MODEL, str(created.version))
        if client.get_model_version(MODEL, first).run_id != created.run_id:
            client.delete_run(str(created.run_id))
    return first


def truncate(text: str, max_chars: int = DESCRIPTION_CHARS) -> str:
    """Returns `text`, cut to `max_chars` characters with an ellipsis if it is longer."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def active_run_id(client: MlflowClient, version: str) -> str:
    """Returns the id of the run of `version`; restores the run if it was deleted.

    Raises:
        RegistryError: the run was removed permanently.
    """
    run = find_active_run(client, client.get_model_version(MODEL, version))
    if run is None:
        raise RegistryError(
            f"MLflow at {tracking_uri()} has no run for version {version} of {MODEL}: it was removed permanently. "
            "`dvc repro -f -s register promote` registers the candidate again"
        )
    return run.info.run_id


def find_active_run(client: MlflowClient, version: ModelVersion) -> Run | None:
    """Returns the run of `version`; restores the run if it was deleted. None if it was removed permanently."""
    run = _find_run(client, version.run_id) if version.run_id else None
    if run and run.info.lifecycle_stage == LifecycleStage.DELETED:
        client.restore_run(run.info.run_id)
        _print_note(f"the run of version {version.version} of {MODEL} was deleted, and is restored")
    return run


def _find_run(client: MlflowClient, run_id: str) -> Run | None:
    """Returns the run, deleted or not; None if it was removed permanently."""
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != _MISSING:
            raise
        return None


def _print_note(message: str) -> None:
    print(f"MLflow at {tracking_uri()}: {message}", file=sys.stderr)
