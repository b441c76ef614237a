"""A model directory: written aside and renamed, so that it is whole or absent; sealed by a manifest of sha256 sums."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lilliput.errors import ArtifactError
from lilliput.untrusted import require_harmless

MANIFEST = "lilliput.json"
HISTORY = "history.json"
ADAPTER = "adapter"
PARITY = "parity.json"
# What a runtime does not need is not counted as the model's size.
_NOT_THE_MODEL = (MANIFEST, HISTORY, PARITY, f"{ADAPTER}/")
_LIBRARIES = ("torch", "transformers", "peft", "gptqmodel", "safetensors")


class Manifest(BaseModel):
    """What an artefact is and what it was made from.

    Attributes:
        config: the resolved settings of the strategy.
        parent_sha256: the parent's identity (`artifact_sha256`); None for the source.
        facts: what the strategy found out on the way (removed layers, perplexities, …).
        size_bytes: of the files a runtime needs.
        files: sha256 of each file, by path relative to the artefact.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidate: str
    strategy: str
    config: dict[str, Any]
    parent: str | None
    parent_sha256: str | None
    facts: dict[str, Any]
    parameters: int
    size_bytes: int
    versions: dict[str, str]
    files: dict[str, str]

    @property
    def artifact_sha256(self) -> str:
        """The identity of the artefact: the hash of its whole manifest, and so of every file in it."""
        return hashlib.sha256(_canonical(self.model_dump()).encode()).hexdigest()

    @property
    def text(self) -> str:
        """As it stands in lilliput.json."""
        return _canonical(self.model_dump(), indent=2) + "\n"


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends well, and vanishes when it does not."""
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)  # what a killed run left
    partial.mkdir(parents=True)
    try:
        yield partial
        remove(target)
        partial.rename(target)
    finally:
        remove(partial)


def remove(directory: Path) -> None:
    """Removes `directory` if it is there; renamed first, so that a half-removed one never looks whole."""
    if not directory.exists():
        return
    doomed = directory.with_name(f".{directory.name.lstrip('.')}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def seal(
    directory: Path,
    *,
    candidate: str,
    strategy: str,
    config: dict[str, Any],
    parent: Manifest | None,
    parameters: int,
    facts: dict[str, Any],
) -> Manifest:
    """The manifest of the finished files in `directory`, written beside them."""
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    manifest = Manifest(
        candidate=candidate,
        strategy=strategy,
        config=config,
        parent=parent.candidate if parent else None,
        parent_sha256=parent.artifact_sha256 if parent else None,
        facts=facts,
        parameters=parameters,
        size_bytes=sum(path.stat().st_size for name, path in files.items() if not name.startswith(_NOT_THE_MODEL)),
        versions=library_versions(),
        files={name: file_sha256(path) for name, path in files.items()},
    )
    (directory / MANIFEST).write_text(manifest.text, encoding="utf-8")
    return manifest


def library_versions() -> dict[str, str]:
    """The versions of the libraries that decide what is computed."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the artefact in `directory`, unverified.

    Raises:
        ArtifactError: there is no artefact, or its manifest is not readable.
    """
    path = directory / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(
            f"{directory}: no {MANIFEST} here, so this is no finished artefact; run the stage that makes it"
        )
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not a manifest ({type(error).__name__}); make this artefact again") from None


def verify(directory: Path) -> Manifest:
    """The manifest of the artefact in `directory`, once every file in it has the sha256 it should.

    Raises:
        ArtifactError: a file is missing, altered or not listed, or the folder is not harmless (lilliput/untrusted.py).
    """
    manifest = read_manifest(directory)
    require_harmless(directory)
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} - {MANIFEST}
    if strays := found ^ manifest.files.keys():
        raise ArtifactError(f"{directory}: missing or unlisted: {', '.join(sorted(strays))}; make this artefact again")
    for name, expected in manifest.files.items():
        if (actual := file_sha256(directory / name)) != expected:
            raise ArtifactError(
                f"{directory / name}: altered or truncated (sha256 {actual}, should be {expected}); "
                "make this artefact again or fetch it with `dvc pull`"
            )
    return manifest


def write_history(directory: Path, series: dict[str, list[tuple[int, float]]]) -> None:
    """Writes curves (`series[name]` = (step, value) pairs) as history.json."""
    (directory / HISTORY).write_text(json.dumps(series, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_history(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves written by `write_history`; empty where the strategy has none."""
    path = directory / HISTORY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path`, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _canonical(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, sort_keys=True, indent=indent, ensure_ascii=False)
