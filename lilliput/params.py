"""Reads params.yaml and checks keys and types, then the candidate graph."""

from __future__ import annotations

from pathlib import Path

from lilliput.config import Params, read_section
from lilliput.graph import check_graph

# By content: parsing YAML in Python is slow, and a flow reads the file a dozen times, by several paths.
_loaded: dict[bytes, Params] = {}
_MAX_LOADED = 8


def load_params(path: Path) -> Params:
    """Reads and validates the settings at `path`, including the candidate graph.

    Raises:
        ConfigError: the file is missing or not YAML, or has unknown keys, wrong types or an impossible graph. Lists all
            problems of keys and types or, if there are none, those of the graph.
    """
    try:
        content = path.read_bytes()
    except OSError:
        content = b""  # reading again raises ConfigError with the reason
    if content not in _loaded:
        params = read_section(Params, path)
        check_graph(params, str(path))
        if len(_loaded) >= _MAX_LOADED:
            _loaded.clear()
        _loaded[content] = params
    return _loaded[content]
