"""Generalization accuracy: right answers about entities never trained on, by choice and by free generation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from lilliput.data.chat import encode_answer, encode_prompt
from lilliput.data.questions import Question, normalise
from lilliput.runtime.protocol import Runtime

# Two small letters or digits, a bracket, or a word in capitals before the stop: "St. Lucia" and "U.S. dollar" go on.
_SENTENCE_END = re.compile(r"(?:(?<=[^\W_A-Z]{2})|(?<=\))|(?<=[A-Z]{4}))[.!?](?:\s|$)")


def choose(
    runtime: Runtime, tokenizer: PreTrainedTokenizerBase, system_prompt: str, questions: Sequence[Question]
) -> list[list[float]]:
    """Mean log-likelihood per token, in nats, of each option of each question; the highest is the model's choice.

    The end-of-turn token is not counted, as in lm-evaluation-harness: a model that was never tuned to stop after a bare
    answer would be punished for its manners, not for what it knows.
    """
    prompts = [encode_prompt(tokenizer, system_prompt, question.question) for question in questions]
    options = [[encode_answer(tokenizer, choice, end=False) for choice in question.choices] for question in questions]
    scores = runtime.score(prompts, options)
    return [
        [score / len(ids) for score, ids in zip(row, ids_of, strict=True)]
        for row, ids_of in zip(scores, options, strict=True)
    ]


def is_right(text: str, question: Question) -> bool:
    """Whether the first sentence of `text` names the answer or an alias of it, and no other option.

    Wordings are compared without case, accents, punctuation and articles, and as whole words.
    """
    said = normalise(first_sentence(text))
    wordings = {normalise(right) for right in (question.answer or "", *question.aliases)} - {""}
    if not any(_holds(said, right) for right in wordings):
        return False
    others = [normalise(choice) for choice in question.choices if choice != question.answer]
    return not any(_names_apart(said, other, wordings) for other in others)


def first_sentence(text: str) -> str:
    """The first line of `text` up to the end of its first sentence."""
    line = text.strip().split("\n", 1)[0]
    return _SENTENCE_END.split(line, maxsplit=1)[0]


def _names_apart(said: str, other: str, wordings: Iterable[str]) -> bool:
    """Whether `said` names `other` outside a right wording: "Guinea-Bissau" covers "Guinea", "Nigeria" not "Niger"."""
    for right in sorted(wordings, key=len, reverse=True):
        if _holds(right, other):
            said = re.sub(rf"(?<!\S){re.escape(right)}(?!\S)", "|", said)
    return _holds(said, other)


def _holds(text: str, words: str) -> bool:
    return f" {words} " in f" {text} "
