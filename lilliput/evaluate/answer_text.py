"""Splits a short answer into comparable tokens: words, numbers, dates and symbols of any script."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import regex

from lilliput.evaluate.numerals import DATE, NUMBER, OPAQUE, RANGE, Date, date_of, month_number, number_values
from lilliput.evaluate.numerals import range_bounds as bounds_of

Kind = Literal["word", "character", "number", "range", "date", "symbol", "mark"]

# Scripts without spaces between words. Not Katakana: a run of it is one (foreign) word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_KATAKANA = r"[\p{Katakana}ー]+"
_LETTER = r"[[\p{L}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]"
# C++, C#, O+, Na+, A*; a final hyphen belongs to a formula or a blood group (Cl-, AB-), not to a word.
_SIGNED = r"(?:\+\+|[+#](?!\w)|(?<=\b[A-Z])\*(?!\*)|(?<=\b(?:[A-Z][a-z]?\d*)+)-(?![\w-]))?"
_WORD = rf"(?<!\w)\.[A-Z]{_LETTER}+|{_LETTER}(?:{_LETTER}|\d|'(?={_LETTER}))*{_SIGNED}"
# Keeps together: Thai and Lao vowels written before their consonant, stacked consonants in Burmese and Khmer.
_CHARACTER = rf"(?={UNSPACED})[เแโใไເແໂໃໄ]?\X(?:(?<=[\u1039\u17d2])\X)*"
_TOKEN = regex.compile(
    rf"(?P<date>(?i:{DATE}))|(?P<opaque>{OPAQUE})|(?P<range>{RANGE})|(?P<number>(?i:{NUMBER}))"
    rf"|(?P<word>{_WORD}|{_KATAKANA})|(?P<character>{_CHARACTER})|(?P<symbol>[%°$€£¥₹/^=<>≤≥+*×÷])|(?P<mark>\S)",
    regex.V1,
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ı": "i", "ħ": "h"})
# Accents of Latin, Greek and Cyrillic, and vowel points of Hebrew and Arabic: texts often omit them.
_POINTS = regex.compile(r"[\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670]")
_REWRITTEN = [
    (regex.compile(r"[\u2010-\u2013\u2212\ufe63]"), "-"),
    (regex.compile(r"[’‘ʼʻ`´′]"), "'"),
    (regex.compile(r"\\[dt]?frac ?\{(\d+)\} ?\{(\d+)\}"), r"\1/\2"),
    (regex.compile("\u2044"), "/"),
    (regex.compile("♯"), "#"),
    (regex.compile("٫"), "."),
    (regex.compile("٬"), ","),
    (regex.compile(r"\s+"), " "),
    (regex.compile("&"), " and "),
    (regex.compile(r"(?i)\bdegrees? (?:celsius|centigrade)\b|° (?=c\b)"), "°C"),
    (regex.compile(r"(?i)\bdegrees? fahrenheit\b|° (?=f\b)"), "°F"),
    (regex.compile("°CC"), "°C"),
    (regex.compile("°FF"), "°F"),
    (regex.compile(r"(?i)\b(?:per ?cent|pct)\b"), "%"),
    (regex.compile(r"(?i)(?<=\b(?:A|B|AB|O))(?: Rh)?[ -]positive\b"), "+"),
    (regex.compile(r"(?i)(?<=\b(?:A|B|AB|O))(?: Rh)?[ -]negative\b"), "-"),
    (regex.compile(r"(?<=\b\p{L})\.(?=\p{L}\b)|(?<=\b\p{L}\.\p{L})\."), ""),  # U.S., D.C.
]
_PARTICLES = regex.compile(
    r"(?<=\p{Hangul})(?:입니다|이에요|예요|이라고|라고|이다|이며|에서|으로|은|는|이|가|을|를|의|에|로|와|과|도|다|야)$"
)
# Words that look like a symbol or name: In, As, I, May, WHO.
FUNCTION_WORDS = frozenset(
    {
        "a",
        "i",
        "am",
        "an",
        "as",
        "at",
        "be",
        "by",
        "can",
        "do",
        "go",
        "had",
        "has",
        "he",
        "her",
        "his",
        "if",
        "in",
        "is",
    }
    | {"it", "its", "la", "le", "may", "me", "my", "no", "of", "on", "or", "our", "so", "that", "them", "they", "this"}
    | {"to", "up", "us", "was", "we", "who", "will", "you"}
)


@dataclass(frozen=True)
class Token:
    """A token and its place in the prepared text.

    Attributes:
        written: as in the prepared text, with case.
        forms: of a word, without case and accents: the whole word, and without a possessive or a Korean particle.
        values: possible values of a number, or of a range's lower bound.
        upper: possible values of a range's upper bound.
    """

    kind: Kind
    written: str
    start: int
    end: int
    forms: frozenset[str] = frozenset()
    values: frozenset[Fraction] = frozenset()
    upper: frozenset[Fraction] = frozenset()
    date: Date | None = field(default=None)


def prepare(text: str) -> str:
    """Normalises `text`: NFKC, ASCII digits, hyphens and apostrophes, no format characters, single spaces."""
    kept = "".join(character for character in text if unicodedata.category(character) != "Cf")
    kept = regex.sub(  # before NFKC, which turns 10² into 102; in a formula (SO4²⁻) that is right
        r"(?<![^\W_])(\d[\d.,]*)(⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: f"{m[1]}^{m[2].translate(_SUPERSCRIPTS)}", kept
    )
    kept = regex.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", kept)
    kept = "".join(_digit(character) for character in unicodedata.normalize("NFKC", kept))
    for pattern, replacement in _REWRITTEN:
        kept = pattern.sub(replacement, kept)
    return kept.strip()


@lru_cache(maxsize=4096)
def tokenize(text: str) -> tuple[Token, ...]:
    """Returns the tokens of a prepared `text`."""
    return tuple(_token(match) for match in _TOKEN.finditer(text))


def matches(expected: Token, actual: Token, *, alone: bool, symbolic: bool) -> bool:
    """Returns whether the token `actual` of a text equals the token `expected` of a right answer.

    Args:
        expected: from the right answer.
        actual: from the text.
        alone: the text contains nothing else, so wrong case cannot make it another word.
        symbolic: the answer is a symbol or a figure with a unit, so case may matter.
    """
    if actual.kind == "date":
        return _is_in_date(expected, actual)
    if expected.kind != actual.kind:
        return False
    match expected.kind:
        case "number":
            return not expected.values.isdisjoint(actual.values)
        case "range":
            return not expected.values.isdisjoint(actual.values) and not expected.upper.isdisjoint(actual.upper)
        case "word":
            return _same_word(expected, actual, alone, symbolic)
        case _:
            return expected.written == actual.written


def fold(word: str) -> str:
    """Returns `word` without case, accents and apostrophes; other marks (が, ि) stay."""
    plain = _POINTS.sub("", unicodedata.normalize("NFD", word.casefold().translate(_LETTERS)))
    return unicodedata.normalize("NFC", plain).replace("'", "")


def _digit(character: str) -> str:
    return str(unicodedata.decimal(character)) if unicodedata.category(character) == "Nd" else character


def _token(match: regex.Match[str]) -> Token:
    kind, written, (start, end) = match.lastgroup, match[0], match.span()
    if match["date"]:
        return Token("date", written, start, end, date=date_of(written))
    if match["range"]:
        low, high = bounds_of(match["range"])
        return Token("range", written, start, end, values=low, upper=high)
    if match["number"] and (values := number_values(written)):
        return Token("number", written, start, end, values=values)
    if match["word"] or match["opaque"] or match["number"]:
        return Token("word", written, start, end, forms=_forms(written))
    kind = "character" if match["character"] else "symbol" if match["symbol"] else "mark"
    return Token(kind, written, start, end)


def _forms(written: str) -> frozenset[str]:
    whole = fold(written)
    return frozenset({whole, fold(regex.sub(r"'s?$", "", written)), _PARTICLES.sub("", whole)})


def _is_in_date(expected: Token, actual: Token) -> bool:
    assert actual.date, "a date token has a date"
    match expected.kind:
        case "date":
            return expected.date is not None and actual.date.includes(expected.date)
        case "number":
            return actual.date.year in expected.values
        case _:
            return month_number(fold(expected.written)) == actual.date.month


def _same_word(expected: Token, actual: Token, alone: bool, symbolic: bool) -> bool:
    if fold(expected.written) not in actual.forms:
        return False
    if expected.written in {actual.written, regex.sub("'s$", "", actual.written)}:
        return True
    if not symbolic or not _case_matters(expected.written):
        return True
    # Accepts lower case ("fe", "h2o", "c++") unless it is another word: "in", "as", "us".
    unambiguous = alone or fold(actual.written) not in FUNCTION_WORDS
    return unambiguous and actual.written.islower() and regex.sub(r"[^\p{L}]", "", expected.written)[0].isupper()


def _case_matters(word: str) -> bool:
    """Returns whether case matters: up to two letters (Pa), a digit or sign (H2O, C++), a unit (kWh), or WHO."""
    letters = regex.sub(r"[^\p{L}]", "", word)
    if letters.islower() or not letters.isascii():
        return False
    symbol = len(letters) <= 2 or regex.search(r"\d|[+#*-]$", word) is not None
    unit = len(letters) <= 4 and not letters[1:].islower() and not letters.isupper()
    return symbol or unit or letters.casefold() in FUNCTION_WORDS
