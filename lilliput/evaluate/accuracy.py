"""Generalization accuracy on held-out entities, by choice and by free generation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lilliput.chat.template import encode_answer, encode_prompt
from lilliput.data.questions import Question
from lilliput.evaluate.answer_text import prepare
from lilliput.evaluate.assertion import is_bound, is_denied, one_of_several
from lilliput.evaluate.mentions import Mention, find_mentions
from lilliput.runtime.protocol import AnsweringRuntime

LONGEST_TEXT = 1000  # characters that are judged; bounds the time of matching
# Two small letters or digits, a bracket, or a word in capitals before the stop: "St. Lucia" and "U.S. dollar" go on.
_SENTENCE_END = re.compile(
    r"(?:(?<=[^\W_A-Z]{2})(?<!\bapprox)(?<!\bca)(?<!\bvs)|(?<=\))|(?<=[A-Z]{4}))[.!?](?:\s|$)|[。！？।။។؟۔]"
)

# An introduction that asserts nothing: "Sure!", "**Answer:**" on a line of its own, a code fence.
_OPENING = re.compile(
    r"(?:[\s*_#>]*(?:(?:sure|certainly|of course|absolutely|okay|(?:good|great) question)[!.]+[\s*_]+(?=\S)"
    r"|(?:the |my )?(?:correct |final |short )?answer(?: is)?[*_]*:[*_]*[^\S\n]*\n\s*(?=\S)|`{3}\w*\n\s*(?=\S)))+",
    re.IGNORECASE,
)
_QUESTION_REPEATED = re.compile(
    r"\s*(?:(?:in|of|to|by|from) )?(?:what|which|who|where|when|how)\b[^?\n]*\?\s+(?=\S)", re.I
)
_ASKS = re.compile(r"\W*(?:what|which|who|where|when|how)\b", re.IGNORECASE)
_NUMERO = re.compile(r"\bNo $")  # "No 5"
_REPLY_TO_ITSELF = re.compile(r"[?？]\s+(?=(?:no|nope)\b)", re.I)  # "Paris? No, Lyon."


def score_choices(
    runtime: AnsweringRuntime, tokenizer: PreTrainedTokenizerBase, system_prompt: str, questions: Sequence[Question]
) -> list[list[float]]:
    """Returns the mean log-likelihood per token, in nats, of each option of each question; the highest is the choice.

    The end-of-turn token is not counted, as in lm-evaluation-harness: it would penalise a model that was not tuned to
    stop after a short answer.
    """
    prompts = [encode_prompt(tokenizer, system_prompt, question) for question in questions]
    options = [[encode_answer(tokenizer, choice, end=False) for choice in question.choices] for question in questions]
    scores = runtime.score(prompts, options)
    return [
        [score / len(ids) for score, ids in zip(row, ids_of, strict=True)]
        for row, ids_of in zip(scores, options, strict=True)
    ]


def is_right(text: str, question: Question) -> bool:
    """Returns whether the first sentence of `text` asserts the answer or an alias of it, and no other option.

    docs/metrics.md has the rules for equality, whole words, denials and lists of candidates.
    """
    wordings = [wording for wording in (question.answer, *question.aliases) if wording]
    statement = prepare(_statement(text, wordings)[:LONGEST_TEXT])
    right = [mention for wording in wordings for mention in find_mentions(statement, wording)]
    if not any(_is_the_answer(statement, mention, wordings) for mention in right):
        return False
    others = [choice for choice in question.choices if choice != question.answer]
    named = (mention for other in others for mention in find_mentions(statement, other))
    return not any(_named_apart(statement, mention, right) for mention in named)


def first_sentence(text: str) -> str:
    """Returns the first sentence of the first line of `text`, without an introduction that asserts nothing."""
    line = _after(_OPENING, text.strip()).split("\n", 1)[0]
    return _SENTENCE_END.split(line, maxsplit=1)[0]


def _statement(text: str, wordings: Sequence[str]) -> str:
    """Returns the first sentence that does not repeat the question; "Paris? No, Lyon." is one sentence."""
    rest = _after(_OPENING, text.strip())
    if not any(map(_ASKS.match, wordings)):  # an answer may be a question: "Where Is My Mind?"
        rest = _after(_QUESTION_REPEATED, rest)
    return first_sentence(_REPLY_TO_ITSELF.sub("?, ", rest.split("\n", 1)[0], count=1))


def _after(opening: re.Pattern[str], text: str) -> str:
    match = opening.match(text)
    return text[match.end() :] if match else text


def _is_the_answer(statement: str, mention: Mention, wordings: Sequence[str]) -> bool:
    before, after = statement[: mention.start], statement[mention.end :]
    if mention.is_number:
        before = _NUMERO.sub("", before)
    if is_denied(before, after) or (mention.is_number and is_bound(before)):
        return False
    return not one_of_several(before, after, lambda other: any(find_mentions(other, right) for right in wordings))


def _named_apart(statement: str, other: Mention, right: Sequence[Mention]) -> bool:
    """Returns whether `other` is asserted outside the right answer: "Guinea-Bissau" includes "Guinea"."""
    inside = any(mention.start <= other.start and other.end <= mention.end for mention in right)
    return not inside and not is_denied(statement[: other.start], statement[other.end :])
