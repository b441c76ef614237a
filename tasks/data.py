"""Build the training text, the calibration set and the question set."""

from __future__ import annotations

from pathlib import Path

from lilliput.config import Params
from lilliput.data.corpus import write_corpus
from lilliput.recipes.build import build_corpus
from lilliput.wheels import default_cache
from tasks import layout


def build(params: Params) -> str | None:
    """Writes data/; returns what became of the source's rows, for the terminal."""
    corpus = build_corpus(params.data, Path(), default_cache())
    write_corpus(corpus, layout.DATA)
    return corpus.report
