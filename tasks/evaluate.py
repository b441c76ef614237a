"""Measure one candidate on the four metrics."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import verify, write_json
from lilliput.config import Params
from lilliput.contamination import find_contaminated
from lilliput.data.corpus import read_corpus
from lilliput.data.jsonl import write_rows
from lilliput.evaluate_candidate import evaluate_candidate
from tasks import layout


def evaluate(params: Params, candidate: str) -> None:
    """Writes answers/<candidate>.jsonl and metrics/<candidate>.json."""
    manifest = verify(layout.model(candidate))
    corpus = read_corpus(layout.DATA)
    evaluation = evaluate_candidate(
        layout.model(candidate),
        candidate,
        corpus.questions,
        params,
        contaminated=find_contaminated(corpus.train, corpus.questions),
        root=Path(),
        artifact_sha256=manifest.artifact_sha256,
        size_bytes=manifest.size_bytes,
        parameters=manifest.parameters,
    )
    write_rows(layout.answers(candidate), evaluation.answers)
    write_json(layout.metrics(candidate), evaluation.record)
