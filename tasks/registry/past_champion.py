"""The stored evaluation of a champion that is no longer a candidate, for comparison with the candidates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from lilliput.artifacts import file_sha256, parse_record
from lilliput.config import Params
from lilliput.data.jsonl import parse_rows
from lilliput.errors import ArtifactError, DataError
from lilliput.records import DeviceRecord, Energy, EvaluationRecord
from tasks import layout
from tasks.registry import model_versions
from tasks.registry.version_records import MeasurementConditions, read_version_record

MIB = 2**20
_TIMED = ("energy_j", "energy_source", "ttft_ms")  # of an answer row
_DAMAGED = "its evaluation in MLflow is damaged"


@dataclass(frozen=True)
class PastChampion:
    """The evaluation of a version whose candidate was made again since, or removed from params.yaml.

    Attributes:
        record: the evaluation of the checkpoint.
        on_device: the evaluation for the device, see `record_on_device`.
        answers: answers to the questions of the evaluation, of the form that the device runs.
    """

    record: EvaluationRecord
    on_device: EvaluationRecord
    answers: list[dict[str, Any]]


def measurement_conditions(params: Params) -> MeasurementConditions:
    """Returns the conditions under which this folder's evaluations were measured."""
    evaluation = params.evaluation.model_dump(mode="json", exclude={"benchmarks"})
    profiles = {
        name: [float(device.threads), float(device.context_tokens), device.watts_per_core]
        for name, device in params.devices.items()
    }
    return MeasurementConditions(
        questions=file_sha256(layout.QUESTIONS),
        evaluation=hashlib.sha256(json.dumps(evaluation, sort_keys=True).encode()).hexdigest(),
        profiles=profiles,
    )


def read_past_champion(params: Params, device: str, version: ModelVersion) -> PastChampion:
    """Reads the evaluation of `version` from MLflow.

    Raises:
        ArtifactError: the evaluation cannot be read, or was made under other conditions; the message says which.
    """
    _require_same_conditions(params, device, version)
    name, target = version.tags["lilliput.candidate"], params.target_of(device)
    assert version.run_id is not None
    read = partial(model_versions.read_artifact, version.run_id)
    try:
        record = parse_record(EvaluationRecord, read(f"{name}.json"), f"{_DAMAGED}: {name}.json")
        answers = parse_rows(read(f"{name}.jsonl"), f"{name}.jsonl")
        path = f"devices/{name}-{target}.json"
        measured = parse_record(DeviceRecord, read(path), f"{_DAMAGED}: {path}") if target else None
        if measured is None:
            return PastChampion(record, record, answers)
        if measured.quality is None:
            raise ArtifactError("its compiled model has no recorded answers")
        path = f"devices/{name}-{target}.jsonl"
        compiled = parse_rows(read(path), path)
    except (DataError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{_DAMAGED}: {error}") from None
    return PastChampion(
        record, record_on_device(params, device, record, measured), answers_on_device(compiled, answers)
    )


def _require_same_conditions(params: Params, device: str, version: ModelVersion) -> None:
    then, now = read_version_record(version).measured, measurement_conditions(params)
    if then is None:
        raise ArtifactError("its registry record does not say how it was measured")
    if then.questions != now.questions:
        raise ArtifactError("it was measured with other questions")
    if then.evaluation != now.evaluation:
        raise ArtifactError("it was measured with other settings under `evaluation`")
    if then.profiles.get(device) != now.profiles[device]:
        raise ArtifactError(f"it was measured with another profile of {device}")


def record_on_device(params: Params, device: str, record: EvaluationRecord, measured: DeviceRecord) -> EvaluationRecord:
    """Returns `record` with the quality, size, energy and fit of the compiled model that `device` runs."""
    profile, run = params.devices[device], measured.devices[device]
    # The budgets are those of params.yaml now, which may have changed since a past champion was measured.
    within_budget = (
        measured.size_bytes <= profile.storage_budget_mib * MIB and run.peak_rss_bytes <= profile.ram_budget_mib * MIB
    )
    unavailable = Energy(value=None, source="unavailable", measured=False)
    changes = {
        "fits": {device: run.fits and within_budget},
        "does_not_fit": run.does_not_fit,
        "size_bytes": measured.size_bytes,
        "energy_per_query_j": run.energy_per_query_j or unavailable,
    }
    return record.model_copy(update=changes | dict(measured.quality or {}))


def answers_on_device(
    compiled: Sequence[dict[str, Any]], checkpoint: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the answers of a compiled model, with the energies that its checkpoint had on the reference runtime.

    A device's own energies are sums over its answers, which cannot be paired by question.
    """
    timed = {row["id"]: {key: row[key] for key in _TIMED if key in row} for row in checkpoint}
    return [row | timed.get(row["id"], {}) for row in compiled]
