"""Experiments, runs and versions in MLflow, each found or created, also if another process creates it meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Run
from mlflow.entities.model_registry import RegisteredModel
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
RUN_TAG_CHARS = 8000  # of the value of a run's tag, which MLflow cuts or refuses beyond
_NOTES = {
    EXPERIMENT: "One run a candidate of the compression graph: its evaluation, what making it cost, what devices made "
    "of it. *Views > Four metrics* compares them; the tag `lilliput.run` says what was registered together. Energy is "
    "an estimate unless `energy_source` names a counter. Champions: the registered model `lilliput`.",
    SEARCHES: "One run a search of sequences of strategies, with a run a trial beneath it.",
}
_EXISTS, _MISSING = "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"
_SAME_RUNS = 100  # as many processes may create the same run at the same time


def experiment_id(client: MlflowClient, name: str = EXPERIMENT) -> str:
    """The id of the experiment, which is created if there is none, and restored if it was deleted."""
    found = client.get_experiment_by_name(name) or _create_experiment(client, name)
    if found.lifecycle_stage == LifecycleStage.DELETED:
        _restore_experiment(client, found)
    return found.experiment_id


def _create_experiment(client: MlflowClient, name: str) -> Experiment:
    tags = {
        "mlflow.experimentKind": "custom_model_development",  # else the UI opens on chat traces: there are none
        "mlflow.note.content": _NOTES[name],
        **({VIEW_TAG: four_metrics_view()} if name == EXPERIMENT else {}),
    }
    # Beside a SQLite file, so that they move together. A server knows where its artefacts go.
    database = sqlite_file(tracking_uri())
    place = (database.parent / ARTIFACTS).as_uri() if database else None
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=place, tags=tags))
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
    _say(
        f"experiment {experiment.name} was deleted, and is restored with all of its runs (`mlflow gc` would remove it)"
    )


def ensure_model(client: MlflowClient) -> None:
    """Creates the registered model if there is none.

    Raises:
        RegistryError: something else in the registry has its name.
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
    """The registered model, if any. By a search: to get it by name, MLflow reads all versions to find the latest."""
    found = client.search_registered_models(f"name = '{MODEL}'", max_results=1)
    return found[0] if found else None


def find_or_create_run(
    client: MlflowClient,
    experiment: str,
    name: str,
    identity: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
) -> Run:
    """The run whose tags hold `identity`, created with these and `tags` if there is none.

    MLflow allows a second one at the same time: then all take the oldest and delete their own. If clocks or the order
    of requests leave two, `create_version` deletes the second one.
    """
    if known := _runs(client, experiment, identity):
        return known[0]
    created = client.create_run(experiment, run_name=name, tags={**identity, **(tags or {})})
    first = next(iter(_runs(client, experiment, identity)), created)
    if first.info.run_id != created.info.run_id:
        client.delete_run(created.info.run_id)
    return first


def _runs(client: MlflowClient, experiment: str, identity: Mapping[str, str]) -> list[Run]:
    """The runs with `identity`, the oldest first."""
    wanted = " and ".join(f"tags.`{key}` = '{text}'" for key, text in identity.items())
    found = client.search_runs([experiment], wanted, max_results=_SAME_RUNS)
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


def find_version(client: MlflowClient, evaluation_sha256: str) -> str | None:
    """The first version registered for exactly this evaluation whose run exists; None if there is none."""
    found = client.search_model_versions(f"name = '{MODEL}' and tags.`{EVALUATION_TAG}` = '{evaluation_sha256}'")
    numbers = sorted((int(version.version), version.run_id) for version in found)
    return next((str(number) for number, run_id in numbers if run_id and _run(client, run_id)), None)


def create_version(client: MlflowClient, evaluation_sha256: str, **settings: Any) -> str:
    """Creates a version for an evaluation; where another process did so at the same time, the first one is returned.

    Args:
        client: of the store.
        evaluation_sha256: of the evaluation's record; becomes a tag.
        settings: `source`, `run_id`, `tags` and `description` of `MlflowClient.create_model_version`.
    """
    tags = {**settings.pop("tags"), EVALUATION_TAG: evaluation_sha256}
    description = shortened(settings.pop("description"))
    created = client.create_model_version(MODEL, tags=tags, description=description, **settings)
    first = find_version(client, evaluation_sha256) or str(created.version)
    if first != str(created.version):
        client.delete_model_version(MODEL, str(created.version))
        if client.get_model_version(MODEL, first).run_id != created.run_id:
            client.delete_run(str(created.run_id))
    return first


def shortened(text: str, most: int = DESCRIPTION_CHARS) -> str:
    """`text`, cut to `most` characters, with an ellipsis where it was cut."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def run_of(client: MlflowClient, version: str) -> str:
    """The id of the run of `version`, which is restored if it was deleted.

    Raises:
        RegistryError: the run was removed for good.
    """
    run_id = client.get_model_version(MODEL, version).run_id
    run = _run(client, run_id) if run_id else None
    if run is None:
        raise RegistryError(
            f"MLflow at {tracking_uri()} has no run for version {version} of {MODEL}: it was removed for good. "
            "`dvc repro -f -s register promote` registers the candidate again"
        )
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        client.restore_run(run.info.run_id)
        _say(f"the run of version {version} of {MODEL} was deleted, and is restored")
    return run.info.run_id


def _run(client: MlflowClient, run_id: str) -> Run | None:
    """The run, deleted or not; None if it was removed for good."""
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != _MISSING:
            raise
        return None


def _say(message: str) -> None:
    print(f"MLflow at {tracking_uri()}: {message}", file=sys.stderr)
