"""Measure one candidate on the four metrics."""

from __future__ import annotations

import json
from pathlib import Path

from lilliput.artifacts import verify, write_json, write_text
from lilliput.config import Params
from lilliput.contamination import find_contaminated
from lilliput.data.corpus import read_corpus
from lilliput.evaluate.record import evaluate_candidate
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
    rows = (json.dumps(row, ensure_ascii=False, sort_keys=True) for row in evaluation.answers)
    write_text(layout.answers(candidate), "".join(f"{row}\n" for row in rows))
    write_json(layout.metrics(candidate), evaluation.record)
