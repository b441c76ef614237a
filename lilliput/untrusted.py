"""What a model folder may hold before a library opens it: nothing that runs, and nothing that leads out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lilliput.errors import ArtifactError

# What torch, numpy and joblib unpickle, by its name; what is inside is not looked at.
PICKLES = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
# transformers reads these and does as they say.
_DESCRIPTIONS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
# Keys whose value names code: a module beside the weights, or a kernel on the hub (`org/name`).
_CODE = ("auto_map", "custom_pipelines", "custom_generate")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_ADAPTER = "adapter_config.json"
_INDEX = ".index.json"


def require_harmless(directory: Path) -> None:
    """Refuses a model folder that would run code or read outside itself, before anything in it is opened.

    Raises:
        ArtifactError: a link or a special file, a pickle, code of its own in a description, an index that names files
            elsewhere, an adapter that names another model, or a description that is no JSON map.
    """
    require_no_links(directory)
    require_no_pickles(directory)
    if (directory / _ADAPTER).exists():
        raise ArtifactError(
            f"{directory / _ADAPTER}: an adapter names the model it belongs to, which would be opened in its place; "
            "merge it into a checkpoint first"
        )
    for name in _DESCRIPTIONS:
        if (directory / name).is_file():
            _require_no_code(_map_in(directory / name), directory / name)
    for path in directory.glob(f"*{_INDEX}"):
        _require_local_shards(_map_in(path), path)


def require_no_links(directory: Path) -> None:
    """Raises ArtifactError if anything below `directory` is neither a file nor a folder of its own."""
    for path in directory.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(
                f"{path}: a link or special file, which may lead out of {directory}; put the file itself there"
            )


def require_no_pickles(directory: Path) -> None:
    """Raises ArtifactError if a file below `directory` is, by its name, one that is opened by unpickling it."""
    pickles = sorted(path for path in directory.rglob("*") if path.suffix.lower() in PICKLES and not path.is_dir())
    if pickles:
        raise ArtifactError(
            f"{', '.join(map(str, pickles))}: pickles run code when they are opened, so none may lie beside a model; "
            "remove them, and convert weights to safetensors"
        )


def _map_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not readable as JSON ({type(error).__name__}: {error}); fetch or make it again"
        ) from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: holds no map of settings; fetch or make it again")
    return found


def _require_no_code(settings: dict[str, Any], path: Path) -> None:
    for key, value in _items(settings):
        names_kernel = key in _KERNELS and any("/" in text for text in _texts(value))
        if key in _CODE or names_kernel:
            raise ArtifactError(f"{path}: names code of its own ({key}), which is never run; take it out")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and its value, however deep; the deepest JSON that Python reads is walked."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            yield from current.items()
            waiting += current.values()
        elif isinstance(current, list):
            waiting += current


def _texts(value: Any) -> list[str]:
    """`value` where it is a text, or the texts in it where it is a map."""
    return [text for text in (value.values() if isinstance(value, dict) else [value]) if isinstance(text, str)]


def _require_local_shards(index: dict[str, Any], path: Path) -> None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        raise ArtifactError(f"{path}: has no weight_map; fetch or make it again")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix != ".safetensors":
            raise ArtifactError(
                f"{path}: weight_map names {shard!r:.80}, which is no safetensors file in this folder; correct it"
            )
