"""Log each evaluated candidate to MLflow and register it as a model version."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from lilliput.artifacts import MANIFEST, Manifest, file_sha256, read_history, read_manifest, read_record, write_json
from lilliput.config import Params
from lilliput.graph import ancestors, topological_order
from lilliput.model_card import model_card
from lilliput.records import Cost, EvaluationRecord, Registration
from tasks import layout
from tasks.process.stage_times import times_of
from tasks.records import caching_record, current_evaluation, device_record
from tasks.registry import get_or_create, model_folder, model_versions, run_metrics, version_records
from tasks.registry.datasets import dataset_inputs
from tasks.registry.lineage import dvc_hashes, git_commit
from tasks.registry.past_champion import measurement_conditions
from tasks.registry.version_records import CompiledModel, MeasurementConditions, VersionRecord

FLOW_RUN = "LILLIPUT_FLOW_RUN"


@model_versions.translate_errors()
def register(params: Params) -> None:
    """Writes registry.json: the version and run of each candidate whose evaluation matches its artefact.

    Idempotent: a registered evaluation keeps its version, and interrupted logging continues in the same run.

    Raises:
        RegistryError: MLflow does not answer or refuses.
    """
    client = model_versions.client()
    get_or_create.ensure_model(client)
    experiment = get_or_create.experiment_id(client)
    ready = {name: record for name in topological_order(params) if (record := current_evaluation(name))}
    registered = {name: get_or_create.find_version(client, file_sha256(layout.metrics(name))) for name in ready}
    batch = _batch_tags()
    versions: dict[str, Registration] = {}
    for name, record in ready.items():
        parent = versions.get(params.candidates[name].parent)
        nested = batch | ({MLFLOW_PARENT_RUN_ID: parent.run_id} if parent else {})
        version = registered[name] or _register_one(client, experiment, nested, params, name, record)
        versions[name] = Registration(version=version, run_id=get_or_create.active_run_id(client, version))
        model_folder.add_model(client, version, params, name)
        if caching := caching_record(params, name):
            model_versions.add_metrics(client, version, layout.caching(name), run_metrics.caching_metrics(caching))
        _add_compiled(client, version, params, name)
        _update_record(client, version, params, name)
    write_json(layout.REGISTRY, versions)


def _add_compiled(client: MlflowClient, version: str, params: Params, name: str) -> None:
    for compiled, config in params.compile.items():
        if config.candidate == name and (measured := device_record(params, compiled)):
            model_versions.add_compiled(
                client,
                version,
                layout.compiled(name, config.target),
                layout.devices(compiled),
                layout.compiled_answers(compiled),
                run_metrics.device_metrics(config.target, measured),
            )


def _update_record(client: MlflowClient, version: str, params: Params, name: str) -> None:
    """Adds to the record of `version` what was compiled, and the hashes that DVC has recorded since."""
    found = version_records.find_version_record(client.get_model_version(model_versions.MODEL, version))
    record = found or _version_record(name, measured=None)
    compiled = {
        config.target: CompiledModel(
            folder=str(folder := layout.compiled(name, config.target)), manifest_sha256=file_sha256(folder / MANIFEST)
        )
        for key, config in params.compile.items()
        if config.candidate == name and device_record(params, key)
    }
    changes = {"dvc": dvc_hashes(name), "compiled": record.compiled | compiled}
    version_records.update_version_record(version, record.model_copy(update=changes))


def _batch_tags() -> dict[str, str]:
    """Returns the tags that runs of one registration share, by which the UI can group them."""
    flow_run = os.environ.get(FLOW_RUN, "")
    command = "democratize" if flow_run else "dvc repro"
    return {
        "lilliput.run": f"{command} {datetime.now().astimezone():%Y-%m-%d %H:%M}",
        **({"prefect.flow_run": flow_run} if flow_run else {}),
    }


def _register_one(
    client: MlflowClient,
    experiment: str,
    tags_of_run: Mapping[str, str],
    params: Params,
    name: str,
    record: EvaluationRecord,
) -> str:
    manifest = read_manifest(layout.model(name))
    cost = read_record(Cost, layout.cost(name))
    card = model_card(manifest, record, params.data.system_prompt)
    evaluation = file_sha256(layout.metrics(name))
    run_tags = {**tags_of_run, "mlflow.note.content": get_or_create.truncate(card, get_or_create.RUN_TAG_CHARS)}
    begun, ended = times_of(layout.cost(name)), times_of(layout.metrics(name))
    run_id = get_or_create.find_or_create_run(
        client,
        experiment,
        name,
        {get_or_create.EVALUATION_TAG: evaluation},
        run_tags,
        int(1000 * begun.started_s) if begun and ended else None,
    ).info.run_id
    model_versions.log_run(
        client,
        run_id,
        _parameters(params, name, manifest, record),
        run_metrics.candidate_metrics(manifest, record, cost),
        run_metrics.curve_metrics(manifest, read_history(layout.model(name))),
        {"mlflow.source.git.commit": commit} if (commit := git_commit()) else {},
    )
    # Before the version: it says how the evaluation was measured, and another registration may have other settings.
    version_records.write_version_record(run_id, _version_record(name, measurement_conditions(params)))
    client.log_inputs(run_id, dataset_inputs(params.data.source))
    client.log_text(run_id, card, "model_card.md")
    for file in (layout.PARAMS, layout.metrics(name), layout.answers(name)):
        client.log_artifact(run_id, str(file))
    client.set_terminated(run_id, end_time=int(1000 * ended.ended_s) if begun and ended else None)
    return get_or_create.create_version(
        client,
        evaluation,
        source=model_folder.model_uri(client, run_id),
        run_id=run_id,
        tags=_tags(name, manifest),
        description=f"**{name}**: {card.removeprefix(f'# {name}').strip()}",  # lists show only the first line
    )


def _parameters(params: Params, name: str, manifest: Manifest, record: EvaluationRecord) -> dict[str, Any]:
    """Returns the source of its energy, and the settings of its strategy, and of its ancestors behind their names."""
    above = {link: read_manifest(layout.model(link)) for link in reversed(ancestors(params, name))}
    chain = " → ".join([*(made.strategy for made in above.values()), manifest.strategy])
    own = {f"{manifest.strategy}.{key}": value for key, value in manifest.config.items()}
    inherited = {
        f"{link}/{made.strategy}.{key}": value for link, made in above.items() for key, value in made.config.items()
    }
    return {"chain": chain, "energy_source": record.energy_per_query_j.source} | own | inherited


def _tags(name: str, manifest: Manifest) -> dict[str, str]:
    """Returns the tags of a version, by which it is found; `create_version` adds the sha256 of the evaluation."""
    return {
        "lilliput.candidate": name,
        "lilliput.strategy": manifest.strategy,
        "lilliput.parent": str(manifest.parent),
        model_versions.ARTIFACT_TAG: manifest.artifact_sha256,
    }


def _version_record(name: str, measured: MeasurementConditions | None) -> VersionRecord:
    return VersionRecord(
        parent_sha256=str(read_manifest(layout.model(name)).parent_sha256),
        folder=str(layout.model(name)),
        git_commit=git_commit(),
        dvc=dvc_hashes(name),
        compiled={},
        measured=measured,
    )
