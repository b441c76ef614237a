"""Checks a model folder before a library opens it: no code that would run, and no link out of the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lilliput.errors import ArtifactError

# Extensions of files that torch, numpy and joblib unpickle; their content is not checked.
PICKLES = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
# transformers reads these files and follows their settings.
_DESCRIPTIONS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
# Keys whose value names code: a module in the folder, or a kernel on the hub (`org/name`).
_CODE = ("auto_map", "custom_pipelines", "custom_generate")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_ADAPTER = "adapter_config.json"
_INDEX = ".index.json"


def require_harmless(directory: Path) -> None:
    """Rejects a model folder that contains code or refers to files outside, before anything in it is opened.

    Raises:
        ArtifactError: a link or special file, a pickle, a description that names code or is not a JSON object, an index
            of files elsewhere, or an adapter that names another model.
    """
    require_no_links(directory)
    require_no_pickles(directory)
    if (directory / _ADAPTER).exists():
        raise ArtifactError(
            f"{directory / _ADAPTER}: an adapter names its base model, which would be opened instead; "
            "merge it into a checkpoint first"
        )
    for name in _DESCRIPTIONS:
        if (directory / name).is_file():
            _require_no_code(_read_object(directory / name), directory / name)
    for path in directory.glob(f"*{_INDEX}"):
        _require_local_shards(_read_object(path), path)


def require_no_links(directory: Path) -> None:
    """Raises ArtifactError if anything below `directory` is not a regular file or folder."""
    for path in directory.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(
                f"{path}: a link or special file, which may lead out of {directory}; replace it with the file itself"
            )


def require_no_pickles(directory: Path) -> None:
    """Raises ArtifactError if a file below `directory` has the extension of a pickle."""
    pickles = sorted(path for path in directory.rglob("*") if path.suffix.lower() in PICKLES and not path.is_dir())
    if pickles:
        raise ArtifactError(
            f"{', '.join(map(str, pickles))}: pickles run code when opened, so a model folder must not contain any; "
            "remove them, and convert weights to safetensors"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not readable as JSON ({type(error).__name__}: {error}); download or create it again"
        ) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: not a JSON object; download or create it again")
    return value


def _require_no_code(settings: dict[str, Any], path: Path) -> None:
    for key, value in _items(settings):
        names_kernel = key in _KERNELS and any("/" in text for text in _texts(value))
        if key in _CODE or names_kernel:
            raise ArtifactError(
                f"{path}: names code ({key}), which is never run. Choose a release that transformers opens without "
                "remote code; or, if the model does not need the code, download the folder, remove the key and use "
                "path:<dir>"
            )


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key and its value at all depths, without recursion."""
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            yield from current.items()
            pending += current.values()
        elif isinstance(current, list):
            pending += current


def _texts(value: Any) -> list[str]:
    """Returns `value` if it is a string, or its strings if it is a dictionary."""
    return [text for text in (value.values() if isinstance(value, dict) else [value]) if isinstance(text, str)]


def _require_local_shards(index: dict[str, Any], path: Path) -> None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise ArtifactError(f"{path}: has no weight_map; download or create it again")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != ".safetensors":
            raise ArtifactError(
                f"{path}: weight_map names {shard!r:.80}, which is not a safetensors file in this folder; correct it"
            )
