"""Log a search to MLflow: a run with the front as a table, and under it a run for each trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from lilliput.config import Params
from lilliput.search import value
from tasks import layout
from tasks.registry import creating, model_versions

TABLE = "front.json"


@model_versions.in_reach()
def log(params: Params) -> None:
    """Brings the runs of search.json up to date; a trial that is logged already keeps its run."""
    del params
    found = json.loads(layout.SEARCH.read_text(encoding="utf-8"))
    client = model_versions.client()
    experiment = creating.experiment_id(client, creating.SEARCHES)
    parent = creating.find_or_create_run(client, experiment, found["study"], {"lilliput.search": found["study"]})
    for trial in found["trials"]:
        _log_trial(client, experiment, parent.info.run_id, found, trial)
    _log_front(client, parent.info.run_id, found)
    client.set_tag(parent.info.run_id, "lilliput.ended", found["stopped"])
    client.set_terminated(parent.info.run_id)


def _log_trial(
    client: MlflowClient, experiment: str, parent: str, found: Mapping[str, Any], trial: Mapping[str, Any]
) -> None:
    identity = {MLFLOW_PARENT_RUN_ID: parent, "lilliput.candidate": trial["candidate"]}
    run_id = creating.find_or_create_run(client, experiment, trial["candidate"], identity).info.run_id
    params = {"chain": trial["chain"], "base": found["base"], **trial["settings"]}
    numbers = {metric: value(trial["figures"], metric) for metric in trial["figures"]}
    metrics = {metric: float(number) for metric, number in numbers.items() if number is not None}
    tags = {"pareto": str(trial["pareto"]).lower(), "reason": trial["reason"] or ""}
    model_versions.log_run(client, run_id, params, metrics | {"trial_seconds": trial["seconds"]}, {}, tags)
    client.set_terminated(run_id, "FAILED" if trial["reason"] else "FINISHED")


def _log_front(client: MlflowClient, run_id: str, found: Mapping[str, Any]) -> None:
    rows = [trial for trial in found["trials"] if trial["pareto"]]
    columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in ("candidate", "chain")}
    columns |= {metric: [value(row["figures"], metric) for row in rows] for metric in found["objectives"]}
    if not any(artifact.path == TABLE for artifact in client.list_artifacts(run_id)):
        client.log_table(run_id, columns, TABLE)
    # Again as a whole: log_table itself would add its rows to those of an earlier run.
    client.log_dict(run_id, {"columns": list(columns), "data": list(zip(*columns.values(), strict=True))}, TABLE)
    client.log_artifact(run_id, str(layout.SEARCH))
