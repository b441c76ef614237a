"""Typed records of a model version, as artifacts of its run. Its tags are only for searching.

The stage `register` writes `version.json`, and a decision about a device `roles/<device>.json`: decisions about
different devices never write the same file. A version of an earlier Lilliput has this content in its tags
(`former_tags`). It is read from there until it is written, which removes those tags.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from lilliput.artifacts import parse_record, write_text
from lilliput.errors import ArtifactError
from lilliput.records import Record
from tasks.registry import former_tags, model_versions
from tasks.registry.get_or_create import MODEL, active_run_id, find_active_run
from tasks.registry.moved import local_path

VERSION = "version.json"
ROLES = "roles"


class MeasurementConditions(Record):
    """What must be equal for two evaluations to be comparable.

    Attributes:
        questions: sha256 of the questions.
        evaluation: digest of the settings under `evaluation`.
        profiles: threads, context in tokens and watts per core of each device.
    """

    questions: str
    evaluation: str
    profiles: dict[str, list[float]]


class CompiledModel(Record):
    """The folder of a compiled model in the project, and the sha256 of its manifest."""

    folder: str
    manifest_sha256: str


class VersionRecord(Record):
    """The origin of a version.

    Attributes:
        parent_sha256: of the parent's artifact.
        folder: of the checkpoint in the project.
        git_commit: with `-dirty` if the code differed from it.
        dvc: DVC's md5 of the version's folders and of each input folder, by path.
        compiled: by target.
        measured: None if the conditions are not known.
    """

    parent_sha256: str
    folder: str
    git_commit: str | None
    dvc: dict[str, str]
    compiled: dict[str, CompiledModel]
    measured: MeasurementConditions | None


class Note(Record):
    """A person's decision. It is in force as long as evaluations and rules have this `fingerprint`."""

    because: str
    fingerprint: str


class Role(Record):
    """What was decided about a version on a device.

    Attributes:
        promoted: why it is the champion.
        refused: why it is not.
        vetoed: keeps it from becoming the champion.
        held: keeps it the champion.
        settled: fingerprint of the evaluations and rules that made it the champion.
        published: address of its commit on the hub.
    """

    promoted: str | None = None
    refused: str | None = None
    vetoed: Note | None = None
    held: Note | None = None
    settled: str | None = None
    published: str | None = None


def read_version_record(version: ModelVersion) -> VersionRecord:
    """Returns the record of `version`.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    if (record := find_version_record(version)) is None:
        raise ArtifactError(
            f"version {version.version} of {MODEL} has no {VERSION} among the artifacts of its run; `dvc repro -f -s "
            "register promote` writes it, or registers the candidate again"
        )
    return record


def find_version_record(version: ModelVersion) -> VersionRecord | None:
    """Returns the record of `version`; None if there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    artifacts = _artifacts_of(version)
    if artifacts and (text := artifacts.find(VERSION)) is not None:
        return parse_record(VersionRecord, text, *_place_and_remedy(version, VERSION))
    former = former_tags.version_record(version.tags)
    return VersionRecord.model_validate(former, strict=False) if former else None


def write_version_record(run_id: str, record: VersionRecord) -> None:
    """Writes the record of the version of a run."""
    _artifacts(model_versions.client().get_run(run_id)).write(VERSION, record)


def update_version_record(number: str, record: VersionRecord) -> None:
    """Writes `record` if it differs, and moves the tags of an earlier Lilliput into records."""
    version = model_versions.client().get_model_version(MODEL, number)
    former = former_tags.names_of_version_record(version.tags)
    if former or find_version_record(version) != record:
        write_version_record(active_run_id(model_versions.client(), number), record)
        _remove_tags(version, former)
    for device in former_tags.roles(version.tags):
        update_role(number, device)


def read_roles(version: ModelVersion) -> dict[str, Role]:
    """Returns the role of `version` by device; empty if nothing was decided, or if its run was removed.

    Raises:
        ArtifactError: a record is damaged.
    """
    former = {
        device: Role.model_validate(role, strict=False) for device, role in former_tags.roles(version.tags).items()
    }
    artifacts = _artifacts_of(version)
    files = artifacts.list(ROLES) if artifacts else []
    return former | {Path(file).stem: _read_role(version, artifacts, file) for file in files if artifacts}


def update_role(number: str, device: str, **changes: Any) -> None:
    """Changes fields of the role of version `number` on `device`; writes only differences.

    Prints a note instead if the run of the version was removed permanently, which happens to a past champion: as no
    candidate has this version, no decision reads its role.
    """
    version = model_versions.client().get_model_version(MODEL, number)
    if (run := find_active_run(model_versions.client(), version)) is None:
        print(f"version {number} of {MODEL} has lost its run; its role on {device} is not recorded", file=sys.stderr)
        return
    artifacts, file = _artifacts(run), f"{ROLES}/{device}.json"
    former = former_tags.names_of_role(version.tags, device)
    before = _read_role(version, artifacts, file)
    after = before.model_copy(update=changes)
    if former or after != before:
        artifacts.write(file, after)
        _remove_tags(version, former)


def _read_role(version: ModelVersion, artifacts: _Artifacts, file: str) -> Role:
    if (text := artifacts.find(file)) is not None:
        return parse_record(Role, text, *_place_and_remedy(version, file))
    former = former_tags.roles(version.tags).get(Path(file).stem, {})
    return Role.model_validate(former, strict=False)


@dataclass(frozen=True)
class _Artifacts:
    """The artifacts of a run. `folder` is None if the store is not on this file system."""

    run_id: str
    folder: Path | None

    def list(self, place: str) -> list[str]:
        if self.folder is None:
            return model_versions.list_artifacts(self.run_id, place)
        return [f"{place}/{path.name}" for path in sorted((self.folder / place).glob("*.json"))]

    def find(self, file: str) -> str | None:
        if self.folder is None:
            return model_versions.find_artifact(self.run_id, file)
        path = self.folder / file
        return path.read_text(encoding="utf-8") if path.exists() else None

    def write(self, file: str, record: Record) -> None:
        """Replaces the file as a whole, as a server does too."""
        text = json.dumps(record.as_json(), indent=2, ensure_ascii=False) + "\n"
        if self.folder is None:
            model_versions.client().log_text(self.run_id, text, file)
        else:
            write_text(self.folder / file, text)


def _artifacts(run: Run) -> _Artifacts:
    return _Artifacts(run.info.run_id, local_path(run.info.artifact_uri))


def _artifacts_of(version: ModelVersion) -> _Artifacts | None:
    """Returns the artifacts of `version`; None if its run was removed permanently."""
    run = find_active_run(model_versions.client(), version)
    return _artifacts(run) if run else None


def _remove_tags(version: ModelVersion, names: list[str]) -> None:
    for name in names:
        model_versions.client().delete_model_version_tag(MODEL, str(version.version), name)


def _place_and_remedy(version: ModelVersion, file: str) -> tuple[str, str]:
    """Returns what is damaged, and what to do, for `parse_record`."""
    place = f"{file} of MLflow's run {version.run_id} (version {version.version} of {MODEL})"
    return place, "; remove this artifact, then run `dvc repro -f -s register promote`"
