"""A short answer as tokens that can be compared: words, numbers, dates and symbols of any script."""

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

# Scripts that write no space between words. Katakana is apart: a run of it is one (foreign) word.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_KATAKANA = r"[\p{Katakana}ー]+"
_LETTER = r"[[\p{L}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]"
# C++, C#, O+, Na+, A*; a final hyphen belongs to a formula or a blood group (Cl-, AB-), not to a word.
_SIGNED = r"(?:\+\+|[+#](?!\w)|(?<=\b[A-Z])\*(?!\*)|(?<=\b(?:[A-Z][a-z]?\d*)+)-(?![\w-]))?"
_WORD = rf"(?<!\w)\.[A-Z]{_LETTER}+|{_LETTER}(?:{_LETTER}|\d|'(?={_LETTER}))*{_SIGNED}"
# A vowel of Thai or Lao that is written before its consonant, and consonants stacked in Burmese and Khmer, stay whole.
_CHARACTER = rf"(?={UNSPACED})[เแโใไເແໂໃໄ]?\X(?:(?<=[\u1039\u17d2])\X)*"
_TOKEN = regex.compile(
    rf"(?P<date>(?i:{DATE}))|(?P<opaque>{OPAQUE})|(?P<range>{RANGE})|(?P<number>(?i:{NUMBER}))"
    rf"|(?P<word>{_WORD}|{_KATAKANA})|(?P<character>{_CHARACTER})|(?P<symbol>[%°$€£¥₹/^=<>≤≥+*×÷])|(?P<mark>\S)",
    regex.V1,
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ı": "i", "ħ": "h"})
# Accents of Latin, Greek and Cyrillic, and the vowel points of Hebrew and Arabic, which texts leave out as they like.
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
# Words that a symbol or name may be mistaken for: In, As, I, May, WHO.
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
    """A token and where it is in the prepared text.

    Attributes:
        written: as in the prepared text, case included.
        forms: of a word, without case and accents: whole, and without a possessive or a Korean particle.
        values: of a number: what it may mean. Of a range: of its lower bound.
        upper: of a range: the values of its upper bound.
    """

    kind: Kind
    written: str
    start: int
    end: int
    forms: frozenset[str] = frozenset()
    values: frozenset[Fraction] = frozenset()
    upper: frozenset[Fraction] = frozenset()
    date: Date | None = field(default=None)


def prepared(text: str) -> str:
    """`text` in one form: NFKC, ASCII digits, hyphens and apostrophes, no format characters, single spaces."""
    kept = "".join(character for character in text if unicodedata.category(character) != "Cf")
    kept = regex.sub(  # before NFKC, which makes 102 of 10²; in a formula (SO4²⁻) it is right
        r"(?<![^\W_])(\d[\d.,]*)(⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: f"{m[1]}^{m[2].translate(_SUPERSCRIPTS)}", kept
    )
    kept = regex.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", kept)
    kept = "".join(_digit(character) for character in unicodedata.normalize("NFKC", kept))
    for pattern, replacement in _REWRITTEN:
        kept = pattern.sub(replacement, kept)
    return kept.strip()


@lru_cache(maxsize=4096)
def tokens(text: str) -> tuple[Token, ...]:
    """The tokens of `text`, which is prepared."""
    return tuple(_token(match) for match in _TOKEN.finditer(text))


def matches(wanted: Token, found: Token, *, alone: bool, symbolic: bool) -> bool:
    """Whether `found` is the token `wanted` of a right answer.

    Args:
        wanted: of the right answer.
        found: of the text.
        alone: whether the text says nothing else, so that careless case is no other word.
        symbolic: whether the answer is a symbol, or a figure with its unit, in which case may matter.
    """
    if found.kind == "date":
        return _is_in_date(wanted, found)
    if wanted.kind != found.kind:
        return False
    match wanted.kind:
        case "number":
            return not wanted.values.isdisjoint(found.values)
        case "range":
            return not wanted.values.isdisjoint(found.values) and not wanted.upper.isdisjoint(found.upper)
        case "word":
            return _same_word(wanted, found, alone, symbolic)
        case _:
            return wanted.written == found.written


def fold(word: str) -> str:
    """`word` without case, accents and apostrophes; marks that are no accents (が, ि) stay."""
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


def _is_in_date(wanted: Token, found: Token) -> bool:
    assert found.date, "a date without a date"
    match wanted.kind:
        case "date":
            return wanted.date is not None and found.date.includes(wanted.date)
        case "number":
            return found.date.year in wanted.values
        case _:
            return month_number(fold(wanted.written)) == found.date.month


def _same_word(wanted: Token, found: Token, alone: bool, symbolic: bool) -> bool:
    if fold(wanted.written) not in found.forms:
        return False
    if wanted.written in {found.written, regex.sub("'s$", "", found.written)}:
        return True
    if not symbolic or not _case_matters(wanted.written):
        return True
    # Careless lower case ("fe", "h2o", "c++") is accepted where it is no other word: "in", "as", "us".
    careless = alone or fold(found.written) not in FUNCTION_WORDS
    return careless and found.written.islower() and regex.sub(r"[^\p{L}]", "", wanted.written)[0].isupper()


def _case_matters(word: str) -> bool:
    """Whether a symbol's case matters: up to two letters (Pa), a digit or sign (H2O, C++), a unit (kWh), or WHO."""
    letters = regex.sub(r"[^\p{L}]", "", word)
    if letters.islower() or not letters.isascii():
        return False
    symbol = len(letters) <= 2 or regex.search(r"\d|[+#*-]$", word) is not None
    unit = len(letters) <= 4 and not letters[1:].islower() and not letters.isupper()
    return symbol or unit or letters.casefold() in FUNCTION_WORDS
