"""A model directory: written aside and renamed, so that it is whole or absent; sealed by a manifest of sha256 sums."""

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
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lilliput.errors import ArtifactError
from lilliput.untrusted import require_harmless

MANIFEST = "lilliput.json"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.jinja")
HISTORY = "history.json"
ADAPTER = "adapter"
PARITY = "parity.json"
# What a runtime does not need is not counted as the model's size.
_NOT_THE_MODEL = (MANIFEST, HISTORY, PARITY, f"{ADAPTER}/")
_READ = 0o444
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
    """Yields an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    It is on the disk before it has its name, so that power that goes leaves no whole-looking folder of empty files.
    Whoever may read what this process writes may read all of it: safetensors and temporary folders keep to themselves.
    """
    partial = target.with_name(f".{target.name}.partial")
    remove(partial)  # what a killed run left
    partial.mkdir(parents=True)
    given = _mode(partial)  # as the umask has it
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            wanted = _mode(path) | (given if path.is_dir() else given & _READ)
            if wanted != _mode(path):
                path.chmod(wanted)
            _flush(path)
        remove(target)
        partial.rename(target)
        _flush(target.parent)
    finally:
        remove(partial)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a place to write a file to that becomes `path` when the block ends well, and vanishes when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` another name of the file `source`, or a copy of it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove(directory: Path) -> None:
    """Removes `directory` if it is there; renamed first, so that a half-removed one never looks whole."""
    doomed = directory.with_name(f".{directory.name.lstrip('.')}.removed")
    shutil.rmtree(doomed, ignore_errors=True)  # what a killed run left
    if directory.exists():
        directory.rename(doomed)
        shutil.rmtree(doomed)


def require_room(folder: Path, needed_bytes: int = 0) -> None:
    """Refuses, before anything expensive starts, a folder that takes no file or not so many bytes.

    Args:
        folder: where something will be written.
        needed_bytes: that are expected to be.

    Raises:
        ArtifactError: it is read-only, or its disk has not that much left.
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
    """Whether `error` or what led to it is that a disk takes no more; safetensors and SQLite say so in words alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in ("No space left on device", "database or disk is full")):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_full_disk(error: BaseException) -> str:
    """What to say of an `error` for which `disk_is_full`: what was written, how much is free here, what to do."""
    what = " ".join(str(error).split())[:300]
    return (
        f"{what}; {Path.cwd()} has {free_mib(Path.cwd())} MiB free, {tempfile.gettempdir()} "
        f"{free_mib(Path(tempfile.gettempdir()))}: free some space and run this again, nothing is half-written"
    )


def free_mib(folder: Path) -> int:
    """What the disk under `folder` has left, in MiB."""
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
                f"delete {directory} and run again: it is restored, if DVC's cache has it whole, or made again"
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
    with written_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON to `path`, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _flush(path: Path) -> None:
    """Has the system put what was written to `path`, a file or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, sort_keys=True, indent=indent, ensure_ascii=False)
