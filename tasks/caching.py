"""Measure prefix reuse and the answer cache of one candidate on a stream of queries."""

from __future__ import annotations

from lilliput.artifacts import verify, write_json
from lilliput.config import Params
from lilliput.data.corpus import read_corpus
from lilliput.data.jsonl import write_rows
from lilliput.recipes.recipe import recipe_of
from lilliput.wheels import default_cache
from tasks import layout


def caching(params: Params, candidate: str) -> None:
    """Writes answers/caching/<candidate>.jsonl and metrics/caching/<candidate>.json."""
    # These import torch.
    from lilliput.cache.evaluation import measure_caching
    from lilliput.embedding.sentence_embedder import open_embedder

    manifest = verify(layout.model(candidate))
    record, answers = measure_caching(
        layout.model(candidate),
        candidate,
        read_corpus(layout.DATA),
        recipe_of(params.data.source),
        params,
        open_embedder(params.caching.embedder, default_cache()),
        artifact_sha256=manifest.artifact_sha256,
        size_bytes=manifest.size_bytes,
    )
    write_rows(layout.caching_answers(candidate), answers)
    write_json(layout.caching(candidate), record)
