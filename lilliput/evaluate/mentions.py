"""Where a short answer names something, as words of its own: not "Guinea" in "Guinea-Bissau", not "5" in "5-6"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lilliput.evaluate.answer_text import FUNCTION_WORDS, Token, fold, matches, prepared, tokens

# A hyphen makes one word of two: "Guinea-Bissau" is not "Guinea". After a number it may join a unit: "a 5-year term".
_JOINED_BEFORE, _JOINED_AFTER = re.compile(r"\w-$"), re.compile(r"-\w")
_OPERATOR_BEFORE = re.compile(r"[\d)] ?[-+*/×÷^] ?$|[A-Za-z]-$")
_ANOTHER_QUANTITY = re.compile(r" ?[-+*/×÷^] ?\d|[DKGMBTkx]\b|/\w")
# After "He", "In" or "A": the word is a pronoun, preposition or article, and no symbol.
_SENTENCE_GOES_ON = re.compile(r" (?!(?:is|was|stands|for|represents|and|or|but)\b)[a-z]")
# One character of a script without spaces is a word only beside others that begin or end one.
_BESIDE_CHARACTER = re.compile(r"(?:^|[^\w]|[A-Za-z0-9是为為叫做の乃即於在は])$")
_AFTER_CHARACTER = re.compile(r"$|[^\w]|[A-Za-z0-9的是。、でです元だ]")
_LONGEST_SYMBOL = 4  # letters: "El Salvador" is a name, and no case of its words counts; "5 MW" is none
# What a number without the unit that was asked for may not be followed by: "50" for "50%", but not "50 km".
_UNIT_AFTER = re.compile(r"\s?[\w%°/]")


@dataclass(frozen=True)
class Mention:
    """Start and end of a name in a prepared text, and whether it is a number."""

    start: int
    end: int
    is_number: bool


def mentions(text: str, name: str) -> list[Mention]:
    """Each place where `text`, which is prepared, names `name`."""
    wanted = _compared(name := prepared(name))
    if not wanted:  # nothing but punctuation, "-" say
        return [Mention(0, len(text), is_number=False)] if text == name else []
    is_number = any(token.kind == "number" for token in wanted)
    return [Mention(found[0].start, found[-1].end, is_number) for found in _runs(text, wanted)]


def _runs(text: str, wanted: Sequence[Token]) -> Iterator[Sequence[Token]]:
    words = [token for token in tokens(text) if token.kind != "mark"]
    alone = len(_compared(text)) == len(wanted)
    numbers = [token for token in wanted if token.kind != "symbol"]
    for place in range(len(words)):
        if _is_run(text, wanted, words[place : place + len(wanted)], alone):
            yield words[place : place + len(wanted)]
        elif len(numbers) == 1 < len(wanted) and numbers[0].kind == "number":
            found = words[place : place + 1]
            if _is_run(text, numbers, found, alone) and not _UNIT_AFTER.match(text[found[0].end :]):
                yield found


def _is_run(text: str, wanted: Sequence[Token], found: Sequence[Token], alone: bool) -> bool:
    symbolic = (
        all(len(token.written) <= _LONGEST_SYMBOL for token in wanted if token.kind == "word") or len(wanted) == 1
    )
    if len(wanted) != len(found):
        return False
    if not all(matches(w, f, alone=alone, symbolic=symbolic) for w, f in zip(wanted, found, strict=True)):
        return False
    return _is_whole(text, found)


def _is_whole(text: str, found: Sequence[Token]) -> bool:
    """Whether `found` is not part of a longer word, formula or number."""
    first, last = found[0], found[-1]
    before, after = text[: first.start], text[last.end :]
    if "character" in {first.kind, last.kind}:
        return len(found) > 1 or bool(_BESIDE_CHARACTER.search(before) and _AFTER_CHARACTER.match(after))
    if len(found) == 1 and fold(first.written) in FUNCTION_WORDS and _SENTENCE_GOES_ON.match(after):
        return False
    if last.kind == "number" and _ANOTHER_QUANTITY.match(after):
        return False
    if first.kind == "number" and _OPERATOR_BEFORE.search(before):
        return False
    return not (_JOINED_BEFORE.search(before) or (_JOINED_AFTER.match(after) and last.kind != "number"))


def _compared(text: str) -> list[Token]:
    """The tokens of `text` without punctuation and a leading article; the letter in "A-ha" is not an article."""
    found = tokens(text)
    article = len(found) > 1 and found[0].written.lower() in {"the", "a", "an"} and found[0].end < found[1].start
    return [token for token in found[article:] if token.kind != "mark"]
