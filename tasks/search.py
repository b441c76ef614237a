"""Log a search to MLflow: a run with the Pareto front as a table, and a nested run for each trial."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from lilliput.artifacts import read_record
from lilliput.config import Params
from lilliput.records import SearchRecord, TrialRecord, number_of
from tasks import layout
from tasks.registry import get_or_create, model_versions

TABLE = "front.json"


@model_versions.translate_errors()
def log(params: Params) -> None:
    """Logs the runs of search.json. Idempotent: a logged trial keeps its run."""
    del params
    search = read_record(SearchRecord, layout.SEARCH)
    client = model_versions.client()
    experiment = get_or_create.experiment_id(client, get_or_create.SEARCHES)
    parent = get_or_create.find_or_create_run(client, experiment, search.study, {"lilliput.search": search.study})
    for trial in search.trials:
        _log_trial(client, experiment, parent.info.run_id, search, trial)
    _log_front(client, parent.info.run_id, search)
    client.set_tag(parent.info.run_id, "lilliput.ended", search.stopped)
    client.set_terminated(parent.info.run_id)


def _log_trial(client: MlflowClient, experiment: str, parent: str, search: SearchRecord, trial: TrialRecord) -> None:
    identity = {MLFLOW_PARENT_RUN_ID: parent, "lilliput.candidate": trial.candidate}
    run_id = get_or_create.find_or_create_run(client, experiment, trial.candidate, identity).info.run_id
    params = {"chain": trial.chain, "base": search.base, **trial.settings}
    numbers = {metric: number_of(figure) for metric, figure in trial.figures.items()}
    metrics = {metric: float(number) for metric, number in numbers.items() if number is not None}
    tags = {"pareto": str(trial.pareto).lower(), "reason": trial.reason or ""}
    model_versions.log_run(client, run_id, params, metrics | {"trial_seconds": trial.seconds}, {}, tags)
    client.set_terminated(run_id, "FAILED" if trial.reason else "FINISHED")


def _log_front(client: MlflowClient, run_id: str, search: SearchRecord) -> None:
    rows = [trial for trial in search.trials if trial.pareto]
    columns: dict[str, list[Any]] = {key: [getattr(row, key) for row in rows] for key in ("candidate", "chain")}
    columns |= {metric: [number_of(row.figures[metric]) for row in rows] for metric in search.objectives}
    if not any(artifact.path == TABLE for artifact in client.list_artifacts(run_id)):
        client.log_table(run_id, columns, TABLE)
    # Overwrites the table, because log_table alone would append to rows of an earlier call.
    client.log_dict(run_id, {"columns": list(columns), "data": list(zip(*columns.values(), strict=True))}, TABLE)
    client.log_artifact(run_id, str(layout.SEARCH))
