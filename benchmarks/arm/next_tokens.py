"""Writes the logits of a GGUF file after each prompt; runs on this machine and on the emulated one.

`python next_tokens.py JOB.json`: `file` is the model, `texts` are pairs of prompt and answer (token ids), and `out` is
a file in numpy's format, float32 of shape (tokens of all answers, vocabulary). It needs only numpy and xllamacpp.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from lilliput.runtime.llama_library import LlamaModel, Token


def write_logits(file: Path, texts: list[tuple[list[int], list[int]]], out: Path) -> None:
    """Computes the texts one after another; tokens that a text shares with the one before are not computed again."""
    model = LlamaModel(file)
    context = model.context(max(len(prompt) + len(answer) for prompt, answer in texts), 1, 1)
    rows, before = [], []
    for prompt, answer in texts:
        ids = [*prompt, *answer[:-1]]
        start = min(_shared(before, ids), len(prompt) - 1)
        context.forget(start)
        tokens = [Token(ids[place], place, [0], place >= len(prompt) - 1) for place in range(start, len(ids))]
        rows += context.compute(tokens)
        before = ids
    np.save(out, np.stack(rows))


def _shared(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    write_logits(Path(job["file"]), job["texts"], Path(job["out"]))
