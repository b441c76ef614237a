"""Tags that earlier versions of Lilliput gave a model version, as the content of `version_records`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_FIGURES = ("accuracy_choice", "accuracy_free", "hallucination_rate", "energy_per_query_j", "accessibility")
_FOLDER, _MEASURED, _COMMIT = "lilliput.artifact", "lilliput.measured", "mlflow.source.git.commit"
_PARENT, _DVC, _COMPILED = "lilliput.parent_sha256", "lilliput.dvc", "lilliput.compiled."
_ALONE = (*_FIGURES, "energy_source", _FOLDER, _MEASURED, _COMMIT, _PARENT, _DVC)
_SHA256 = "_sha256"
_OF_ROLES = ("promoted", "refused", "vetoed", "held", "settled", "published")
_NOTES = ("vetoed", "held")


def version_record(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the fields of a `VersionRecord`; None if the tags do not have them."""
    if _PARENT not in tags:
        return None
    return {
        "parent_sha256": tags[_PARENT],
        "folder": tags.get(_FOLDER, ""),
        "git_commit": tags.get(_COMMIT),
        "dvc": json.loads(tags.get(_DVC, "{}")),
        "compiled": {
            target: {"folder": tags.get(f"{_COMPILED}{target}", ""), "manifest_sha256": digest}
            for target, digest in _compiled(tags).items()
        },
        "measured": json.loads(tags.get(_MEASURED, "null")),
    }


def roles(tags: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the fields of each `Role` by device."""
    found: dict[str, dict[str, Any]] = {}
    for kind in _OF_ROLES:
        prefix = f"lilliput.{kind}."
        for name, value in tags.items():
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), {})[kind] = _note(value) if kind in _NOTES else value
    return found


def names_of_version_record(tags: Mapping[str, str]) -> list[str]:
    """Returns the names of the tags whose content is in a `VersionRecord`, in the run's metrics or in its params."""
    return [name for name in tags if name in _ALONE or name.startswith(_COMPILED)]


def names_of_role(tags: Mapping[str, str], device: str) -> list[str]:
    """Returns the names of the tags whose content is in the `Role` on `device`."""
    return [name for kind in _OF_ROLES if (name := f"lilliput.{kind}.{device}") in tags]


def _compiled(tags: Mapping[str, str]) -> dict[str, str]:
    digests = {name: value for name, value in tags.items() if name.startswith(_COMPILED) and name.endswith(_SHA256)}
    return {name.removeprefix(_COMPILED).removesuffix(_SHA256): value for name, value in digests.items()}


def _note(value: str) -> dict[str, str]:
    content = json.loads(value)
    return {"because": content["because"], "fingerprint": content["of"]}
