"""Artefacts: folders that are written atomically and sealed by a manifest of sha256 sums."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lilliput.errors import ArtifactError, message_of
from lilliput.records import Record
from lilliput.untrusted import require_harmless

MANIFEST = "lilliput.json"
HISTORY = "history.json"
ADAPTER = "adapter"
PARITY = "parity.json"
LICENCE = "licence"  # folder with the texts of the source's licence
GGUF = "model.gguf"  # the model for llama.cpp
# Files that no runtime needs; they do not count towards the model's size.
_NOT_THE_MODEL = (MANIFEST, HISTORY, PARITY, f"{ADAPTER}/", f"{LICENCE}/")
_READ = 0o444
Content = TypeVar("Content")
REMEDY = "; delete this file and run `dvc repro`, which writes it again"
_LIBRARIES = ("torch", "transformers", "peft", "gptqmodel", "safetensors")


class Manifest(BaseModel):
    """Describes an artefact and what it was made from.

    Attributes:
        config: the resolved settings of the strategy.
        parent_sha256: `artifact_sha256` of the parent; None for the source.
        facts: results of the strategy (removed layers, perplexities, …).
        size_bytes: size of the files that a runtime needs.
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
        """The identity of the artefact: the hash of its manifest, which covers every file."""
        return hashlib.sha256(_canonical(self.model_dump()).encode()).hexdigest()

    @property
    def text(self) -> str:
        """The text of lilliput.json."""
        return _canonical(self.model_dump(), indent=2) + "\n"


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yields an empty folder that is renamed to `target` if the block succeeds, and removed if it fails.

    The files are flushed to disk before the rename, so a power failure cannot leave a complete-looking folder of empty
    files. Permissions follow the umask, because safetensors and temporary folders would make files private.
    """
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)  # left by a killed run
    partial.mkdir(parents=True)
    default_mode = _mode(partial)  # set by the umask
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            mode = _mode(path) | (default_mode if path.is_dir() else default_mode & _READ)
            if mode != _mode(path):
                path.chmod(mode)
            _flush(path)
        remove(target)
        partial.rename(target)
        _flush(target.parent)
    finally:
        remove(partial)


@contextmanager
def writing_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` if the block succeeds, and removed if it fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Creates `target` as a hard link to `source`, or as a copy if the file system does not support links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_licence(source: Path, target: Path) -> None:
    """Copies the licence texts of the artefact in `source`, if it has any, into the folder `target`."""
    if (source / LICENCE).is_dir():
        shutil.copytree(source / LICENCE, target / LICENCE, dirs_exist_ok=True)


def remove(directory: Path) -> None:
    """Removes `directory` if it exists; renames it first, so that a partly removed folder never looks complete."""
    renamed = directory.with_name(f".{directory.name.lstrip('.')}.removed")
    shutil.rmtree(renamed, ignore_errors=True)  # left by a killed run
    if directory.exists():
        directory.rename(renamed)
        shutil.rmtree(renamed)


def require_room(folder: Path, needed_bytes: int = 0) -> None:
    """Checks, before anything expensive starts, that `folder` is writable and has enough disk space.

    Args:
        folder: where files will be written.
        needed_bytes: expected size of these files.

    Raises:
        ArtifactError: the folder is read-only, or its disk has too little space.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise ArtifactError(
            f"{folder}: nothing can be written here ({error.strerror}; {free_mib(folder)} MiB free); "
            "make it writable, or free some space"
        ) from None
    if shutil.disk_usage(folder).free < needed_bytes:
        raise ArtifactError(
            f"{folder}: {free_mib(folder)} MiB free, and about {needed_bytes / 2**20:.0f} MiB will be written; "
            "free some space and run this again"
        )


def disk_is_full(error: BaseException | None) -> bool:
    """Whether `error` or one of its causes is a full disk; safetensors and SQLite report it only as text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in ("No space left on device", "database or disk is full")):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_full_disk(error: BaseException) -> str:
    """Returns a message for a full disk (see `disk_is_full`): the failed write, the free space and the remedy."""
    cause = " ".join(str(error).split())[:300]
    return (
        f"{cause}; {Path.cwd()} has {free_mib(Path.cwd())} MiB free, {tempfile.gettempdir()} "
        f"{free_mib(Path(tempfile.gettempdir()))}: free some space and run this again, nothing is half-written"
    )


def free_mib(folder: Path) -> int:
    """Returns the free space of the disk of `folder`, in MiB."""
    return shutil.disk_usage(folder).free // 2**20


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
    """Writes the manifest of the finished files in `directory`, and returns it; replaces one that was copied there."""
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    files.pop(MANIFEST, None)
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
    """Returns the versions of the libraries that results depend on."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def read_manifest(directory: Path) -> Manifest:
    """Returns the manifest of the artefact in `directory`, unverified.

    Raises:
        ArtifactError: there is no artefact, or its manifest is not readable.
    """
    path = directory / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(
            f"{directory}: no {MANIFEST} here, so this is not a finished artefact; run the stage that creates it"
        )
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not a manifest ({type(error).__name__}); create this artefact again") from None


def verify(directory: Path) -> Manifest:
    """Verifies the sha256 of every file of the artefact in `directory`, and returns its manifest.

    Raises:
        ArtifactError: a file is missing, altered or not listed, or the folder is unsafe (lilliput/untrusted.py).
    """
    manifest = read_manifest(directory)
    require_harmless(directory)
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} - {MANIFEST}
    if differing := names ^ manifest.files.keys():
        raise ArtifactError(
            f"{directory}: missing or unlisted: {', '.join(sorted(differing))}; create this artefact again"
        )
    for name, expected in manifest.files.items():
        if (actual := file_sha256(directory / name)) != expected:
            raise ArtifactError(
                f"{directory / name}: altered or truncated (sha256 {actual}, should be {expected}); "
                f"delete {directory} and run again: it is restored from DVC's cache or created again"
            )
    return manifest


def write_history(directory: Path, series: dict[str, list[tuple[int, float]]]) -> None:
    """Writes curves (`series[name]` = (step, value) pairs) as history.json."""
    (directory / HISTORY).write_text(json.dumps(series, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_history(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the curves of `write_history`; empty if the strategy has none.

    Raises:
        ArtifactError: the file is damaged.
    """
    return find_record(dict[str, list[tuple[int, float]]], directory / HISTORY) or {}


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path` atomically; rejects NaN with a ValueError. `value` may hold records."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=Record.as_json)
    write_text(path, f"{text}\n")


def read_record(kind: type[Content], path: Path, remedy: str = REMEDY) -> Content:
    """Returns the content of `path`, a record or a map of records.

    Raises:
        ArtifactError: the file is missing, damaged, or lacks a field, as one of an older version may; `remedy` ends the
            message.
    """
    if (record := find_record(kind, path, remedy)) is None:
        raise ArtifactError(f"{path}: no such file; run `dvc repro`, which writes it")
    return record


def find_record(kind: type[Content], path: Path, remedy: str = REMEDY) -> Content | None:
    """Returns the content of `path`; None if there is no such file.

    Raises:
        ArtifactError: as in `read_record`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return parse_record(kind, content, str(path), remedy)


def parse_record(kind: type[Content], content: str | bytes, file: str, remedy: str = "") -> Content:
    """Returns the record in the JSON text `content` of `file`.

    Ignores unknown keys, so that a record of a newer version, or one with a key that is no longer written, can be read.

    Raises:
        ArtifactError: it is not JSON, or a field is missing or has the wrong type; the message names the first one.
    """
    try:
        return TypeAdapter(kind).validate_json(content, extra="ignore")
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        message = message_of(problem)
        raise ArtifactError(": ".join(filter(None, (file, place, message))) + remedy) from None


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _flush(path: Path) -> None:
    """Flushes `path`, a file or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, sort_keys=True, indent=indent, ensure_ascii=False)
