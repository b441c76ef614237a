"""Reads params.yaml and checks it as a whole: keys and types first, then the graph of candidates."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from lilliput.config import Params, read_section
from lilliput.graph import check_graph


def load_params(path: Path) -> Params:
    """Params read from `path`, complete and checked, the candidate graph included.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds unknown keys, wrong types or an impossible graph; all
            problems at once.
    """
    try:
        return _load(path, path.read_bytes())
    except OSError:
        return _load(path, b"")  # which says what is wrong with it


@lru_cache(maxsize=8)
def _load(path: Path, content: bytes) -> Params:
    """What `path` says as long as it holds `content`: YAML is read in Python, and a summary asks six times."""
    del content
    params = read_section(Params, path)
    check_graph(params, str(path))
    return params
