"""Evaluate one compiled model on all questions, and measure it on each device that runs its target."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import verify, write_json
from lilliput.config import Params
from lilliput.contamination import find_contaminated
from lilliput.data.corpus import read_corpus
from lilliput.data.jsonl import write_rows
from lilliput.devices.measure import measure_on_devices
from tasks import layout


def devices(params: Params, name: str) -> None:
    """Writes answers/compiled/<name>.jsonl and metrics/devices/<name>.json."""
    config = params.compile[name]
    folder = layout.compiled(config.candidate, config.target)
    manifest = verify(folder)
    corpus = read_corpus(layout.DATA)
    measured = measure_on_devices(
        config.candidate,
        config.target,
        folder,
        layout.model(config.candidate),
        corpus.questions,
        params,
        manifest,
        contaminated=find_contaminated(corpus.train, corpus.questions),
        root=Path(),
    )
    write_rows(layout.compiled_answers(name), measured.answers)
    write_json(layout.devices(name), measured.record)
