"""Log each evaluated candidate to MLflow and make it a model version."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from lilliput.artifacts import Manifest, read_history, read_manifest, write_json
from lilliput.config import Params
from lilliput.errors import ArtifactError
from lilliput.graph import topological_order
from lilliput.report.card import model_card
from tasks import layout, registry
from tasks.caching import caching_record
from tasks.compile import device_record
from tasks.lineage_tags import dvc_hashes, git_commit
from tasks.reign import MEASURED_TAG, measured_how

FLOW_RUN = "LILLIPUT_FLOW_RUN"
CHECKPOINT = "checkpoint"
CONTEXT_TOKENS = 2048  # of prompt and answer, where a registered model is opened in its compiled form
METRIC_NAMES = (
    "accuracy_choice",
    "accuracy_free",
    "hallucination_rate",
    "abstention_rate",
    "selective_accuracy",
    "energy_per_query_j",
    "energy_per_token_j",
    "energy_per_right_answer_j",
    "accessibility",
)
PLAIN_METRICS = ("size_bytes", "parameters", "rate_tokens_per_s", "peak_rss_bytes", "load_s")
EVALUATIONS_TAG = "lilliput.evaluations_sha256"


@registry.in_reach()
def register(params: Params) -> None:
    """Writes registry.json: the version and run of each candidate whose evaluation matches its artefact.

    An evaluation that is registered already keeps its version, so running this again adds nothing; one whose logging
    was cut off goes on in the run it had.

    Raises:
        RegistryError: MLflow does not answer, or refuses.
    """
    client = registry.client()
    registry.ensure_model(client)
    experiment = registry.experiment_id(client)
    ready = {name: record for name in topological_order(params) if (record := _evaluated(name))}
    evaluations = {name: _sha256(layout.metrics(name)) for name in ready}
    known = {name: registry.find_version(client, digest) for name, digest in evaluations.items()}
    parent_run = None if all(known.values()) else _start_parent(client, experiment, list(evaluations.values()))
    versions = {}
    for name, record in ready.items():
        version = known[name] or _register_one(client, experiment, parent_run or "", params, name, record)
        versions[name] = {"version": version, "run_id": client.get_model_version(registry.MODEL, version).run_id}
        registry.add_mlmodel(client, version, _answering(params, name))
        registry.tell(version, {f"dvc.{path}": digest for path, digest in dvc_hashes(name).items()})
        if caching := caching_record(params, name):
            registry.add_metrics(client, version, layout.caching(name), _leaves(caching, "caching"))
        for compiled, config in params.compile.items():
            if config.candidate == name and (record := device_record(params, compiled)):
                registry.add_compiled(
                    client,
                    version,
                    layout.compiled(name, config.target),
                    layout.devices(compiled),
                    _leaves(record["devices"], config.target),
                )
    write_json(layout.REGISTRY, versions)


def _evaluated(candidate: str) -> dict[str, Any] | None:
    """The record of `candidate`, if it was measured on the artefact that lies there now."""
    try:
        manifest = read_manifest(layout.model(candidate))
        record = json.loads(layout.metrics(candidate).read_text(encoding="utf-8"))
    except (ArtifactError, FileNotFoundError):
        return None
    return record if record["sha256"] == manifest.artifact_sha256 else None


def _start_parent(client: MlflowClient, experiment: str, evaluations: list[str]) -> str:
    flow_run = os.environ.get(FLOW_RUN, "")
    name = f"{'democratize' if flow_run else 'dvc repro'} {datetime.now().astimezone():%Y-%m-%d %H:%M}"
    same = {EVALUATIONS_TAG: hashlib.sha256("".join(evaluations).encode()).hexdigest()}
    tags = {"mlflow.source.git.commit": git_commit() or ""} | ({"prefect.flow_run": flow_run} if flow_run else {})
    run_id = registry.find_or_create_run(client, experiment, name, same, tags).info.run_id
    client.log_artifact(run_id, str(layout.PARAMS))
    client.set_terminated(run_id)  # before what comes under it: once that is there, nobody comes back for this
    return run_id


def _register_one(
    client: MlflowClient, experiment: str, parent_run: str, params: Params, name: str, record: dict[str, Any]
) -> str:
    manifest = read_manifest(layout.model(name))
    tags = _lineage(name, manifest)
    same = {MLFLOW_PARENT_RUN_ID: parent_run, registry.EVALUATION_TAG: _sha256(layout.metrics(name))}
    run_id = registry.find_or_create_run(client, experiment, name, same).info.run_id
    config = {f"{manifest.strategy}.{key}": value for key, value in manifest.config.items()}
    curves = read_history(layout.model(name))
    registry.log_run(client, run_id, config, _numbers(record, name, manifest), curves, tags)
    card = model_card(manifest, record, params.data.system_prompt)
    client.log_text(run_id, card, "model_card.md")
    client.log_artifact(run_id, str(layout.metrics(name)))
    client.log_artifact(run_id, str(layout.answers(name)))
    client.set_terminated(run_id)
    evaluated = {
        registry.EVALUATION_TAG: same[registry.EVALUATION_TAG],
        MEASURED_TAG: json.dumps(measured_how(params)),
    }
    version = client.create_model_version(
        registry.MODEL,
        source=registry.mlmodel_uri(client, run_id),
        run_id=run_id,
        tags=tags | _four_metrics(record) | evaluated,
        description=card,
    )
    return str(version.version)


def _answering(params: Params, name: str) -> dict[str, Any]:
    """What tasks/answering.py has to know: where the forms of `name` lie, and how it is asked."""
    compiled = {
        config.target: layout.compiled(name, config.target)
        for key, config in params.compile.items()
        if config.candidate == name and device_record(params, key)
    }
    forms = {
        form: {"folder": str(folder.absolute()), "sha256": read_manifest(folder).artifact_sha256}
        for form, folder in {CHECKPOINT: layout.model(name), **compiled}.items()
    }
    return {
        "form": next((form for form in ("gguf", "onnx") if form in forms), CHECKPOINT),
        "forms": forms,
        "system_prompt": params.data.system_prompt,
        "max_new_tokens": params.evaluation.max_new_tokens,
        "threads": params.evaluation.timed_threads,
        "context_tokens": CONTEXT_TOKENS,
    }


def _numbers(record: dict[str, Any], name: str, manifest: Manifest) -> dict[str, float]:
    numbers: dict[str, float] = {key: record[key] for key in PLAIN_METRICS if record.get(key) is not None}
    for key in METRIC_NAMES:
        estimate = record.get(key) or {}
        suffixes = {"": "value", "_low": "low", "_high": "high"}
        numbers |= {key + s: estimate[field] for s, field in suffixes.items() if estimate.get(field) is not None}
    for key in ("ttft_ms", "tpot_ms"):
        for part in ("p50", "p90"):
            if (record.get(key) or {}).get(part) is not None:
                numbers[f"{key}_{part}"] = record[key][part]
    for task, metrics in record.get("benchmarks", {}).items():
        numbers |= {f"{task}.{name}": value["value"] for name, value in metrics.items() if isinstance(value, dict)}
    numbers |= {f"fits_{device}": float(fits) for device, fits in record["fits"].items()}
    facts = manifest.facts.items()
    numbers |= {key: float(value) for key, value in facts if isinstance(value, float | int)}
    cost = json.loads(layout.cost(name).read_text(encoding="utf-8"))
    return numbers | {f"cost_{key}": cost[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes")}


def _leaves(tree: Any, name: str) -> dict[str, float]:
    """The numbers in a record by their dotted path."""
    if isinstance(tree, dict):
        return {path: value for key, part in tree.items() for path, value in _leaves(part, f"{name}.{key}").items()}
    return {name: float(tree)} if isinstance(tree, int | float) else {}


def _four_metrics(record: dict[str, Any]) -> dict[str, str]:
    names = ("accuracy_choice", "hallucination_rate", "energy_per_query_j", "accessibility")
    tags = {}
    for name in names:
        estimate = record.get(name) or {}
        value = estimate.get("value")
        tags[name] = "unavailable" if value is None else f"{value:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}]"
    return tags | {"energy_source": str((record.get("energy_per_query_j") or {}).get("source", "unavailable"))}


def _lineage(name: str, manifest: Manifest) -> dict[str, str]:
    tags = {
        "lilliput.candidate": name,
        "lilliput.strategy": manifest.strategy,
        "lilliput.parent": str(manifest.parent),
        "lilliput.parent_sha256": str(manifest.parent_sha256),
        "lilliput.artifact": layout.model(name).absolute().as_uri(),
        registry.ARTIFACT_TAG: manifest.artifact_sha256,
    }
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    return tags | {f"dvc.{path}": digest for path, digest in dvc_hashes(name).items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
