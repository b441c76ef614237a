"""The champion so far, as it was measured: what candidates are held against besides the base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from lilliput.artifacts import file_sha256
from lilliput.config import Params
from lilliput.errors import ArtifactError
from tasks import layout
from tasks.registry import model_versions

MEASURED_TAG = "lilliput.measured"
MIB = 2**20


@dataclass(frozen=True)
class Past:
    """A version that no candidate stands for any more: made again since, or gone from params.yaml.

    Attributes:
        record: its evaluation.
        on_device: the same as the device knows it, see `as_device_knows`.
        answers: to the questions of the evaluation.
    """

    record: dict[str, Any]
    on_device: dict[str, Any]
    answers: list[dict[str, Any]]


def measured_how(params: Params) -> dict[str, Any]:
    """What has to be alike for two evaluations to be compared: the questions, the settings, each device's profile."""
    evaluation = params.evaluation.model_dump(mode="json", exclude={"benchmarks"})
    profiles = {
        name: [device.threads, device.context_tokens, device.watts_per_core] for name, device in params.devices.items()
    }
    return {
        "questions": file_sha256(layout.QUESTIONS),
        "evaluation": hashlib.sha256(json.dumps(evaluation, sort_keys=True).encode()).hexdigest(),
        "profiles": profiles,
    }


def read_past(params: Params, device: str, version: ModelVersion) -> Past:
    """What MLflow keeps of the evaluation of `version`.

    Raises:
        ArtifactError: it cannot be read, or was made in a way that allows no comparison; the message says why.
    """
    then, now = json.loads(version.tags.get(MEASURED_TAG, "{}")), measured_how(params)
    for key, title in {"questions": "other questions", "evaluation": "other settings under `evaluation`"}.items():
        if then.get(key) != now[key]:
            raise ArtifactError(f"it was measured with {title}")
    if then["profiles"].get(device) != now["profiles"][device]:
        raise ArtifactError(f"it was measured with another profile of {device}")
    name, target = version.tags["lilliput.candidate"], params.target_of(device)
    assert version.run_id is not None
    record = json.loads(model_versions.read_artifact(version.run_id, f"{name}.json"))
    answers = read_rows(model_versions.read_artifact(version.run_id, f"{name}.jsonl"))
    if target is None:
        return Past(record, record, answers)
    measured = json.loads(model_versions.read_artifact(version.run_id, f"devices/{name}-{target}.json"))
    return Past(record, as_device_knows(params, device, record, measured), answers)


def as_device_knows(
    params: Params, device: str, record: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """`record` with size, energy and whether it fits as they are in the form that `device` runs."""
    profile, own = params.devices[device], measured["devices"][device]
    # What a past champion needs is as it was, what it may take is as params.yaml says now.
    allowed = (
        measured["size_bytes"] <= profile.storage_budget_mib * MIB
        and own["peak_rss_bytes"] <= profile.ram_budget_mib * MIB
    )
    nothing = {"value": None, "source": "unavailable", "measured": False}
    return {
        **record,
        "fits": {device: own["fits"] and allowed},
        "does_not_fit": own["does_not_fit"],
        "size_bytes": measured["size_bytes"],
        "energy_per_query_j": own.get("energy_per_query_j", nothing),
    }


def read_rows(text: str) -> list[dict[str, Any]]:
    """JSON Lines as a list."""
    return [json.loads(line) for line in text.splitlines()]
