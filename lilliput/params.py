"""Reads params.yaml: completes a short file, checks keys and types, then the candidate graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.config import Params, expanded, read_settings, validate
from lilliput.graph import check_graph, compiled_by_default


@dataclass(frozen=True)
class _Loaded:
    """The settings of a file.

    Attributes:
        params: validated.
        complete: as plain values with all keys that DVC may name in a stage.
        is_complete: whether the file itself has all of them.
    """

    params: Params
    complete: dict[str, Any]
    is_complete: bool


# By content: parsing YAML in Python is slow, and a flow reads the file a dozen times, by several paths.
_loaded: dict[bytes, _Loaded] = {}
_MAX_LOADED = 8


def load_params(path: Path) -> Params:
    """Reads and validates the settings at `path`, including the candidate graph. What they leave out has a default.

    Raises:
        ConfigError: the file is missing or not YAML, or has unknown keys, wrong types or an impossible graph. Lists all
            problems of keys and types or, if there are none, those of the graph.
    """
    return _load(path).params


def params_of(settings: Mapping[str, Any], file: str) -> Params:
    """Returns `settings`, which may be short, as `load_params` returns those of the file `file`.

    Raises:
        ConfigError: as for `load_params`.
    """
    return _completed_and_checked(settings, file).params


def complete_settings(path: Path) -> dict[str, Any] | None:
    """Returns the settings at `path` with all defaults that the file leaves out; None if it leaves out none.

    Values of the file stay as they are. DVC compares these values, so a stage is stale if the value of a default
    changes. Keys that are rare (`Section.rare`) are left out, because their defaults never change.

    Raises:
        ConfigError: as for `load_params`.
    """
    loaded = _load(path)
    return None if loaded.is_complete else loaded.complete


def _load(path: Path) -> _Loaded:
    try:
        content = path.read_bytes()
    except OSError:
        content = b""  # reading again raises ConfigError with the reason
    if content not in _loaded:
        loaded = _completed_and_checked(read_settings(path), str(path))
        if len(_loaded) >= _MAX_LOADED:
            _loaded.clear()
        _loaded[content] = loaded
    return _loaded[content]


def _completed_and_checked(raw: object, file: str) -> _Loaded:
    settings = expanded(raw, file) if isinstance(raw, Mapping) else raw
    params = validate(Params, settings, file)
    check_graph(params, file)
    if "compile" not in params.model_fields_set:
        params = params.model_copy(update={"compile": compiled_by_default(params)})
    complete = _completed(settings, params.complete())
    return _Loaded(params, complete, complete == raw)


def _completed(given: Any, complete: Any) -> Any:
    """Returns `given` with the keys of `complete` that it lacks, at all depths."""
    if not isinstance(given, Mapping) or not isinstance(complete, Mapping):
        return given
    present = {key: _completed(value, complete.get(key)) for key, value in given.items()}
    return present | {key: value for key, value in complete.items() if key not in given}
