"""Contamination: finds evaluation questions whose text overlaps with the training text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lilliput.data.questions import normalise
from lilliput.data.rows import Row, request_text

# The overlap length of GPT-3 (Brown et al., arXiv 2005.14165, appendix C).
WORDS = 13


def find_contaminated(train: Iterable[Row], questions: Sequence[Row]) -> list[str]:
    """Returns the ids of `questions` that share 13 successive words with a training row.

    Shorter questions are compared whole when the corpus is built, and no entity occurs in both splits.
    """
    grams = {question.id: _grams(question) for question in questions}
    # Held in memory instead of the training text, which may have a million rows.
    evaluated = set().union(*grams.values())
    if not evaluated:
        return []
    overlap: set[tuple[str, ...]] = set()
    for question in train:
        overlap |= evaluated & _grams(question)
    return [question.id for question in questions if not overlap.isdisjoint(grams[question.id])]


def _grams(row: Row) -> set[tuple[str, ...]]:
    words = normalise(f"{request_text(row)} {row.answer_text}").split()
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}
