"""Inputs for strategies under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.compress.context import Context
from lilliput.data.corpus import Corpus
from lilliput.data.questions import Question
from lilliput.saving import save_model

SYSTEM = "Answer briefly."


def context(
    parent: Path, questions: Sequence[Question] = (), held_out: Sequence[Question] = (), **fields: Any
) -> Context:
    """Returns a context with `questions` as training text and calibration set, and `held_out` as question set."""
    corpus = Corpus(questions, list(questions), list(held_out))
    return Context(parent, SYSTEM, lambda: corpus, **fields)


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Writes the checkpoint of a changed model to `folder`, as the parent for a context."""
    save_model(model, tokenizer, folder)
    return folder
