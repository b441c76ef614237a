"""Finds a name in a short answer as whole words: not "Guinea" in "Guinea-Bissau", not "5" in "5-6"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lilliput.evaluate.answer_text import FUNCTION_WORDS, Token, fold, matches, prepare, tokenize

# A hyphen joins words: "Guinea-Bissau" is not "Guinea". After a number it may join a unit: "a 5-year term".
_JOINED_BEFORE, _JOINED_AFTER = re.compile(r"\w-$"), re.compile(r"-\w")
_OPERATOR_BEFORE = re.compile(r"[\d)] ?[-+*/×÷^] ?$|[A-Za-z]-$")
_ANOTHER_QUANTITY = re.compile(r" ?[-+*/×÷^] ?\d|[DKGMBTkx]\b|/\w")
# After "He", "In" or "A": the word is a pronoun, preposition or article, not a symbol.
_SENTENCE_GOES_ON = re.compile(r" (?!(?:is|was|stands|for|represents|and|or|but)\b)[a-z]")
# In a script without spaces, one character is a word only beside a character that ends or begins a word.
_BESIDE_CHARACTER = re.compile(r"(?:^|[^\w]|[A-Za-z0-9是为為叫做の乃即於在は])$")
_AFTER_CHARACTER = re.compile(r"$|[^\w]|[A-Za-z0-9的是。、でです元だ]")
_LONGEST_SYMBOL = 4  # letters: in "El Salvador" case does not matter; in "5 MW" it may
# Must not follow a number without its expected unit: "50" is accepted for "50%", "50 km" is not.
_UNIT_AFTER = re.compile(r"\s?[\w%°/]")


@dataclass(frozen=True)
class Mention:
    """Start and end of a name in a prepared text, and whether the name is a number."""

    start: int
    end: int
    is_number: bool


def find_mentions(text: str, name: str) -> list[Mention]:
    """Returns every mention of `name` in the prepared `text`."""
    expected = _significant_tokens(name := prepare(name))
    if not expected:  # only punctuation, such as "-"
        return [Mention(0, len(text), is_number=False)] if text == name else []
    is_number = any(token.kind == "number" for token in expected)
    return [Mention(run[0].start, run[-1].end, is_number) for run in _matching_runs(text, expected)]


def _matching_runs(text: str, expected: Sequence[Token]) -> Iterator[Sequence[Token]]:
    words = [token for token in tokenize(text) if token.kind != "mark"]
    alone = len(_significant_tokens(text)) == len(expected)
    numbers = [token for token in expected if token.kind != "symbol"]
    for place in range(len(words)):
        run = words[place : place + len(expected)]
        if _matches_run(text, expected, run, alone):
            yield run
        elif len(numbers) == 1 < len(expected) and numbers[0].kind == "number":
            run = words[place : place + 1]
            if _matches_run(text, numbers, run, alone) and not _UNIT_AFTER.match(text[run[0].end :]):
                yield run


def _matches_run(text: str, expected: Sequence[Token], run: Sequence[Token], alone: bool) -> bool:
    symbolic = (
        all(len(token.written) <= _LONGEST_SYMBOL for token in expected if token.kind == "word") or len(expected) == 1
    )
    if len(expected) != len(run):
        return False
    if not all(matches(e, a, alone=alone, symbolic=symbolic) for e, a in zip(expected, run, strict=True)):
        return False
    return _is_whole(text, run)


def _is_whole(text: str, run: Sequence[Token]) -> bool:
    """Returns whether `run` is not part of a longer word, formula or number."""
    first, last = run[0], run[-1]
    before, after = text[: first.start], text[last.end :]
    if "character" in {first.kind, last.kind}:
        return len(run) > 1 or bool(_BESIDE_CHARACTER.search(before) and _AFTER_CHARACTER.match(after))
    if len(run) == 1 and fold(first.written) in FUNCTION_WORDS and _SENTENCE_GOES_ON.match(after):
        return False
    if last.kind == "number" and _ANOTHER_QUANTITY.match(after):
        return False
    if first.kind == "number" and _OPERATOR_BEFORE.search(before):
        return False
    return not (_JOINED_BEFORE.search(before) or (_JOINED_AFTER.match(after) and last.kind != "number"))


def _significant_tokens(text: str) -> list[Token]:
    """Returns the tokens without punctuation and a leading article; the "A" in "A-ha" is not an article."""
    tokens = tokenize(text)
    article = len(tokens) > 1 and tokens[0].written.lower() in {"the", "a", "an"} and tokens[0].end < tokens[1].start
    return [token for token in tokens[article:] if token.kind != "mark"]
