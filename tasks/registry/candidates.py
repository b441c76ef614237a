"""The registered and evaluated candidates, among which a promotion chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from lilliput.config import Params
from lilliput.data.jsonl import read_rows
from lilliput.errors import DataError
from lilliput.graph import topological_order
from lilliput.promote import Reference
from lilliput.records import EvaluationRecord
from lilliput.statistics.compare import compare
from tasks import layout
from tasks.records import device_record, find_registry, read_evaluation
from tasks.registry import model_versions
from tasks.registry.approvals import DeviceRecords
from tasks.registry.get_or_create import MODEL
from tasks.registry.past_champion import PastChampion, answers_on_device, record_on_device
from tasks.registry.version_records import Role, read_roles


@dataclass(frozen=True)
class CandidatesOnDevice:
    """The candidates as a device runs them: compiled for its target, or as checkpoints if it has none.

    Attributes:
        records: evaluation by candidate, of the form that the device runs.
        answers: answers of that form to the questions of the evaluation.
        impossible: candidates that the device cannot run, with the reason; their records are of the checkpoint.
    """

    records: Mapping[str, EvaluationRecord]
    answers: Mapping[str, list[dict[str, Any]]]
    impossible: Mapping[str, str]

    @property
    def basis(self) -> DeviceRecords:
        """What a decision about the device is based on, besides its rules."""
        return self.records, self.impossible

    def with_past_champion(self, name: str, past: PastChampion) -> CandidatesOnDevice:
        """Returns the candidates with a champion that none of them represents any more."""
        return replace(
            self,
            records={**self.records, name: past.on_device},
            answers={**self.answers, name: past.answers},
        )


@dataclass(frozen=True)
class CandidatePool:
    """Candidates by name, and the base to which the rules are relative.

    Attributes:
        versions: version in the registry.
        roles: roles of that version, by device.
        records: evaluation; also that of a past champion, if one was added, which has no entry in `versions`.
        answers: answers of the checkpoints to the questions of the evaluation.
        base: name of the base.
    """

    params: Params
    versions: dict[str, str]
    roles: dict[str, Mapping[str, Role]]
    records: dict[str, EvaluationRecord]
    answers: dict[str, list[dict[str, Any]]]
    base: str

    def on_device(self, device: str) -> CandidatesOnDevice:
        """Returns the candidates as `device` runs them."""
        target = self.params.target_of(device)
        if target is None:
            return CandidatesOnDevice(self.records, self.answers, {})
        records, answers, impossible = dict(self.records), dict(self.answers), {}
        for name, record in self.records.items():
            compiled = f"{name}-{target}"
            measured = device_record(self.params, compiled) if compiled in self.params.compile else None
            if measured is None:
                impossible[name] = f"not compiled for {target}; add {compiled} under `compile`"
            elif measured.quality is None:
                impossible[name] = f"{compiled} has no recorded answers; run its stage `devices` again"
            else:
                records[name] = record_on_device(self.params, device, record, measured)
                answers[name] = answers_on_device(read_rows(layout.compiled_answers(compiled)), self.answers[name])
        return CandidatesOnDevice(records, answers, impossible)

    def base_reference(self, on_device: CandidatesOnDevice) -> Reference:
        """Returns the base's checkpoint, and how all others differ from it as the device runs them."""
        return self._reference(self.base, "the base", self.answers[self.base], on_device)

    def champion_reference(self, name: str, on_device: CandidatesOnDevice) -> Reference:
        """Returns the current champion `name`, and how all others differ from it, all as the device runs them."""
        return self._reference(name, f"the champion so far ({name})", on_device.answers[name], on_device)

    def _reference(
        self, name: str, title: str, answers: Sequence[Mapping[str, Any]], on_device: CandidatesOnDevice
    ) -> Reference:
        others = {other: compare(answers, rows) for other, rows in on_device.answers.items() if other != name}
        return Reference(name, title, self.records[name], others)

    def with_past_champion(self, name: str, past: PastChampion) -> CandidatePool:
        """Returns the pool with a champion that no candidate represents any more."""
        return replace(self, records=self.records | {name: past.record})

    def roles_on(self, device: str) -> dict[str, Role]:
        """Returns the role of each candidate on `device`."""
        return {name: roles.get(device, Role()) for name, roles in self.roles.items()}

    def name_of(self, version: ModelVersion) -> str:
        """Returns the candidate with this `version`, or with the same model measured again.

        If there is none, returns a name such as `pocket (version 7)`.
        """
        number, artifact = str(version.version), version.tags.get(model_versions.ARTIFACT_TAG)
        matches = [name for name, registered in self.versions.items() if registered == number]
        matches += [name for name in self.versions if self.records[name].sha256 == artifact]
        return matches[0] if matches else f"{version.tags['lilliput.candidate']} (version {number})"


def read_candidate_pool(params: Params) -> CandidatePool:
    """Reads the candidates from this folder and the registry.

    Raises:
        DataError: the base is not registered.
    """
    registered = find_registry()
    names = [name for name in topological_order(params) if name in registered]
    base = names[0] if names else None
    if base is None or params.candidates[base].apply != "load":
        raise DataError("promote: the base has not been evaluated, and the rules are relative to it; run its stages")
    client = model_versions.client()
    versions = {name: registered[name].version for name in names}
    answers = {name: read_rows(layout.answers(name)) for name in names}
    return CandidatePool(
        params=params,
        versions=versions,
        roles={name: read_roles(client.get_model_version(MODEL, version)) for name, version in versions.items()},
        records={name: read_evaluation(name) for name in names},
        answers=answers,
        base=base,
    )
