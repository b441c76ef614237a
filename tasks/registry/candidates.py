"""All candidates that are registered and evaluated now: among whom a promotion decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from lilliput.config import Params
from lilliput.errors import DataError
from lilliput.graph import topological_order
from lilliput.promote import Reference
from lilliput.statistics.compare import compare
from lilliput.statistics.differences import Comparison
from tasks import layout
from tasks.registry import model_versions
from tasks.registry.past_champion import Past, read_rows


@dataclass(frozen=True)
class Pool:
    """Candidates by name, with the base that rules are relative to.

    Attributes:
        versions: of the registry.
        tags: of the versions.
        records: their evaluations; besides, where it has joined, that of a past champion, which has no version here.
        answers: to the questions of the evaluations.
        against_base: paired differences from the base.
        base: its name.
    """

    params: Params
    versions: dict[str, str]
    tags: dict[str, Mapping[str, str]]
    records: dict[str, dict[str, Any]]
    answers: dict[str, list[dict[str, Any]]]
    against_base: dict[str, dict[str, Comparison]]
    base: str

    def base_reference(self) -> Reference:
        """The base, and how all others differ from it."""
        return Reference(self.base, "the base", self.records[self.base], self.against_base)

    def champion_reference(self, name: str) -> Reference:
        """Who is champion so far, and how all others differ from it."""
        differences = {
            other: compare(self.answers[name], rows) for other, rows in self.answers.items() if other != name
        }
        return Reference(name, f"the champion so far ({name})", self.records[name], differences)

    def joined_by(self, name: str, past: Past) -> Pool:
        """The pool with a champion that no candidate stands for any more."""
        compared = compare(self.answers[self.base], past.answers)
        return replace(
            self,
            records=self.records | {name: past.record},
            answers=self.answers | {name: past.answers},
            against_base=self.against_base | {name: compared},
        )

    def name(self, version: ModelVersion) -> str:
        """The candidate that stands for `version`: the registered one, or the same model measured again.

        `pocket (version 7)` where none does.
        """
        number, artifact = str(version.version), version.tags.get(model_versions.ARTIFACT_TAG)
        same = [name for name, own in self.versions.items() if own == number]
        same += [name for name in self.versions if self.records[name]["sha256"] == artifact]
        return same[0] if same else f"{version.tags['lilliput.candidate']} (version {number})"


def read_pool(params: Params) -> Pool:
    """The pool as it stands in this folder and the registry.

    Raises:
        DataError: the base is not among it.
    """
    registered = json.loads(layout.REGISTRY.read_text(encoding="utf-8")) if layout.REGISTRY.exists() else {}
    names = [name for name in topological_order(params) if name in registered]
    base = names[0] if names else None
    if base is None or params.candidates[base].apply != "load":
        raise DataError("promote: the base has not been evaluated, and the rules are relative to it; run its stages")
    client = model_versions.client()
    versions = {name: str(registered[name]["version"]) for name in names}
    answers = {name: read_rows(layout.answers(name).read_text(encoding="utf-8")) for name in names}
    return Pool(
        params=params,
        versions=versions,
        tags={name: client.get_model_version(model_versions.MODEL, version).tags for name, version in versions.items()},
        records={name: json.loads(layout.metrics(name).read_text(encoding="utf-8")) for name in names},
        answers=answers,
        against_base={name: compare(answers[base], answers[name]) for name in names if name != base},
        base=base,
    )
