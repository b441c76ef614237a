"""Let a teacher behind an OpenAI-compatible API answer prompts, as training rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from lilliput.artifacts import remove, write_json, writing
from lilliput.config import Params, SynthesiseConfig
from lilliput.data.row_file import write_lines
from lilliput.data.rows import Row, normalised_line
from lilliput.ingestion.staging import stage
from lilliput.synthesise import TEACHER_KEY, open_client, synthesise, teacher
from tasks import layout


def ask_teacher(params: Params, name: str) -> str:
    """Writes synthetic/<name>/: the rows and a summary that names the teacher; returns what became of the prompts.

    Answers received so far survive a kill: the same command continues.
    """
    config = params.synthesise[name]
    prompts = stage(config.prompts, Path(), prompts=True).rows
    progress = layout.synthesis_progress(name) / f"{_fingerprint(config, prompts)}.jsonl"
    with open_client(config, os.environ.get(TEACHER_KEY)) as client:
        result = synthesise(prompts, config, teacher(config, client), progress)
    summary = {"teacher": {"url": config.url, "model": config.model}, **result.summary}
    with writing(layout.synthetic(name)) as folder:
        write_lines(folder / "rows.jsonl", map(normalised_line, result.rows))
        write_json(folder / "summary.json", summary)
    remove(progress.parent)
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in result.outcomes.items())
    return f"{config.model}: {outcomes}; {result.not_asked:,} not asked"


def _fingerprint(config: SynthesiseConfig, prompts: Sequence[Row]) -> str:
    """Returns a hash of what is asked: answers to other prompts, or of another teacher, must not be used."""
    digest = hashlib.sha256(
        config.model_dump_json(exclude={"most_prompts", "minutes", "parallel", "timeout_s"}).encode()
    )
    for row in prompts:
        digest.update(normalised_line(row).encode())
    return digest.hexdigest()[:16]
