"""The shape of the source model before it is fetched, where the settings or a local file tell it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lilliput.config import BUILT_IN, LoadConfig, Params, SourceConfig
from lilliput.errors import SourceError
from lilliput.memory import Shape
from tasks import layout

_BUILT_IN = Shape(
    layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49152, tied=True
)


def source_shape(params: Params, folder: Path) -> Shape | None:
    """Returns the shape of the source; None for a model that is not here yet, or of an unknown kind.

    Args:
        params: all settings.
        folder: with the results of earlier stages.
    """
    for name in ("source", *_loaded(params)):
        if shape := _of_checkpoint(folder / layout.model(name)):
            return shape
    return shape_of_source(params.source)


def shape_of_source(source: SourceConfig, fetch: bool = False) -> Shape | None:
    """Returns the shape of `source`; None for a model that is not here, or of an unknown kind.

    Args:
        source: the settings; a hub model with its commit.
        fetch: download the configuration of a model on the hub.

    Raises:
        SourceError: the configuration cannot be fetched, or its family is not supported.
    """
    if source.model == BUILT_IN.model:
        return _BUILT_IN
    scheme, _, place = source.model.partition(":")
    if scheme == "path":
        folder = Path(place).expanduser()
        return _of_gguf(folder / source.file) if source.file else _of_checkpoint(folder)
    if scheme == "hub" and fetch:
        from lilliput.hub import download_snapshot
        from lilliput.supported_sources import require_supported

        snapshot = download_snapshot(source.model, ("config.json",))
        require_supported(snapshot)
        return _of_checkpoint(snapshot)
    return None


def require_source(source: SourceConfig) -> None:
    """Checks a model in a local folder before anything runs.

    Raises:
        SourceError: there is no such folder, no weights in it, or a model that is not supported.
    """
    scheme, _, place = source.model.partition(":")
    if scheme != "path":
        return
    from lilliput.supported_sources import require_supported

    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise SourceError(f"source.model: {source.model}: no such folder ({folder.absolute()}); correct the path")
    if source.file and not (folder / source.file).is_file():
        raise SourceError(f"source.file: {source.file} is not in {folder.absolute()}; correct the name or remove it")
    if not source.file and not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.glob("*.gguf")))
        remedy = f"name one with source.file: {found}" if found else "convert the weights to safetensors first"
        raise SourceError(f"source.model: {folder.absolute()} has no .safetensors file; {remedy}")
    if not source.file:
        require_supported(folder)


def _loaded(params: Params) -> list[str]:
    """Returns the candidates with the source's own shape."""
    configs = {name: params.strategy_config(name) for name in params.candidates}
    return [name for name, config in configs.items() if isinstance(config, LoadConfig) and not config.rehearsal]


def _of_checkpoint(folder: Path) -> Shape | None:
    settings = folder / "config.json"
    return Shape.of(json.loads(settings.read_text(encoding="utf-8"))) if settings.is_file() else None


def _of_gguf(file: Path) -> Shape | None:
    from lilliput.gguf_source.header import read_header

    if not file.is_file():
        return None
    header = read_header(file)
    shape = Shape.of(_as_config(header.settings, header.tensors))
    return shape and replace(shape, tied="output.weight" not in header.tensors)


def _as_config(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sizes in a GGUF header by the names of a config.json."""
    names = {
        "num_attention_heads": "attention.head_count",
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "num_local_experts": "expert_count",
    }
    config = {name: settings[key] for name, key in names.items() if isinstance(settings.get(key), int)}
    if "token_embd.weight" in tensors:  # GGUF's order of dimensions: inputs first
        config["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    return config
