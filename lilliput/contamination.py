"""Contamination: asked questions whose text stands, in part, in what was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lilliput.data.questions import Question, normalise

# The length of overlap that GPT-3's authors looked for (Brown et al., arXiv 2005.14165, appendix C).
WORDS = 13


def contaminated(train: Iterable[Question], asked: Sequence[Question]) -> list[str]:
    """The ids of `asked` questions that share 13 successive words with a training row.

    Questions of fewer words are compared whole when the corpus is built, and entities never stand on both sides.
    """
    grams = {question.id: _grams(question) for question in asked}
    wanted = set().union(*grams.values())  # those of the few, not of the many: the training text may be a million rows
    if not wanted:
        return []
    known: set[tuple[str, ...]] = set()
    for question in train:
        known |= wanted & _grams(question)
    return [question.id for question in asked if not known.isdisjoint(grams[question.id])]


def _grams(question: Question) -> set[tuple[str, ...]]:
    words = normalise(f"{question.question} {question.answer or ''}").split()
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}
