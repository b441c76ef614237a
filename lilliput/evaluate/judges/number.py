"""Finds the number that an answer ends with."""

from __future__ import annotations

from fractions import Fraction

from lilliput.evaluate.answer_text import prepare, tokenize

LONGEST_TEXT = 1000  # characters from the end that are read; bounds the time


def is_number(text: str, number: float, tolerance: float) -> bool:
    """Returns whether the last number of `text` is `number`, within the absolute `tolerance`.

    Numbers are read as in answers to questions: `1,200`, `1.2e3` and `1.2 thousand` are the same. An exponent of a
    unit (`m/s^2`) is no number; dates, times and ranges are none either.
    """
    wanted, allowed = Fraction(repr(number)), Fraction(repr(tolerance))
    return any(abs(value - wanted) <= allowed for value in last_number(text))


def last_number(text: str) -> frozenset[Fraction]:
    """Returns the possible values of the last number in `text`; none if there is no number."""
    end = text.strip()
    if len(end) > LONGEST_TEXT:
        end = end[-LONGEST_TEXT:].partition(" ")[2]
    tokens = tokenize(prepare(end))
    for place in reversed(range(len(tokens))):
        is_exponent = place > 0 and tokens[place - 1].written == "^"
        if tokens[place].kind == "number" and not is_exponent:
            return tokens[place].values
    return frozenset()
