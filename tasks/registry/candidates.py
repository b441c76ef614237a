"""The registered and evaluated candidates, among which a promotion chooses."""

from __future__ import annotations

from collections.abc import Mapping
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
from lilliput.statistics.differences import Comparison
from tasks import layout
from tasks.records import find_registry, read_evaluation
from tasks.registry import model_versions
from tasks.registry.past_champion import PastChampion


@dataclass(frozen=True)
class CandidatePool:
    """Candidates by name, and the base to which the rules are relative.

    Attributes:
        versions: version in the registry.
        tags: tags of that version.
        records: evaluation; also that of a past champion, if one was added, which has no entry in `versions`.
        answers: answers to the questions of the evaluation.
        against_base: paired differences from the base.
        base: name of the base.
    """

    params: Params
    versions: dict[str, str]
    tags: dict[str, Mapping[str, str]]
    records: dict[str, EvaluationRecord]
    answers: dict[str, list[dict[str, Any]]]
    against_base: dict[str, dict[str, Comparison]]
    base: str

    def base_reference(self) -> Reference:
        """Returns the base, and how all others differ from it."""
        return Reference(self.base, "the base", self.records[self.base], self.against_base)

    def champion_reference(self, name: str) -> Reference:
        """Returns the current champion `name`, and how all others differ from it."""
        differences = {
            other: compare(self.answers[name], rows) for other, rows in self.answers.items() if other != name
        }
        return Reference(name, f"the champion so far ({name})", self.records[name], differences)

    def with_past_champion(self, name: str, past: PastChampion) -> CandidatePool:
        """Returns the pool with a champion that no candidate represents any more."""
        compared = compare(self.answers[self.base], past.answers)
        return replace(
            self,
            records=self.records | {name: past.record},
            answers=self.answers | {name: past.answers},
            against_base=self.against_base | {name: compared},
        )

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
        tags={name: client.get_model_version(model_versions.MODEL, version).tags for name, version in versions.items()},
        records={name: read_evaluation(name) for name in names},
        answers=answers,
        against_base={name: compare(answers[base], answers[name]) for name in names if name != base},
        base=base,
    )
