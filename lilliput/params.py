"""Reads params.yaml and checks keys and types, then the candidate graph."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from lilliput.config import Params, read_section
from lilliput.graph import check_graph


def load_params(path: Path) -> Params:
    """Reads and validates the settings at `path`, including the candidate graph.

    Raises:
        ConfigError: the file is missing or not YAML, or has unknown keys, wrong types or an impossible graph. Lists all
            problems of keys and types or, if there are none, those of the graph.
    """
    try:
        return _load(path, path.read_bytes())
    except OSError:
        return _load(path, b"")  # raises ConfigError with the reason


@lru_cache(maxsize=8)
def _load(path: Path, content: bytes) -> Params:
    """Caches by `content`: parsing YAML in Python is slow, and a flow's summary reads the file six times."""
    del content
    params = read_section(Params, path)
    check_graph(params, str(path))
    return params
