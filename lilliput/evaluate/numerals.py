"""Parses numbers, ranges and dates of any format in a short answer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import regex

_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august")
_MONTHS += ("september", "october", "november", "december")
_MONTH = "|".join(f"{name}|{name[:3]}" for name in _MONTHS) + "|sept"
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
# Beyond the range of a float64. Both limits keep `9e999999` from exhausting memory or time.
_LARGEST_EXPONENT = 400
_LONGEST_NUMBER = 100

# Digits are `[0-9]` after `prepare`: `\d` also matches those of newer scripts, which Python cannot read.
_DIGITS = r"(?:[0-9]{1,3}(?:[ '][0-9]{3})+(?![0-9])(?:[.,][0-9]+)?|[0-9]+(?:[.,_][0-9]+)*|(?<![0-9])\.[0-9]+)"
_SIGN = r"(?:(?<![A-Za-z0-9)\]%])[-+](?:[$€£¥])?|\b(?:minus|negative) )?"
NUMBER = (
    rf"{_SIGN}(?:(?:[0-9]+ )?[0-9]+/[0-9]+(?![0-9/])|{_DIGITS}\s?[x×*·]\s?10\^-?[0-9]+|{_DIGITS}\^-?[0-9]+"
    rf"|{_DIGITS}(?:[eE][-+]?[0-9]+(?!\w))?)"
    rf"(?:\s?(?:{'|'.join(_SCALES)})(?![a-z]))?"
)
# Digits that are not a number: an ordinal, a decade, a version, a time or a ratio. Compared as written.
OPAQUE = (
    r"[0-9]+(?:st|nd|rd|th)\b|[0-9]{1,3}0'?s\b|[0-9]+(?::[0-9]+)+|[0-9]+/[0-9]+/[0-9]+"
    r"|(?![0-9]{1,3}(?:\.[0-9]{3})+(?![.0-9]))[0-9]+(?:\.[0-9]+){2,}"
)
RANGE = rf"(?:\bbetween (?P<low>{_DIGITS}) and |(?P<low>{_DIGITS})(?:\s?-\s?| to ))(?P<high>{_DIGITS})(?!-?[0-9])"
_DAY = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th)?"
DATE = (
    r"\b(?P<iso>[0-9]{4}-[0-9]{2}-[0-9]{2})(?![0-9])"
    rf"|\b{_DAY}(?: of)? (?P<month>{_MONTH})\b\.?(?:,? (?P<year>[0-9]{{4}})(?![0-9]))?"
    rf"|\b(?P<month>{_MONTH})\b\.? {_DAY}(?![0-9])(?:,? (?P<year>[0-9]{{4}})(?![0-9]))?"
    rf"|\b(?P<month>{_MONTH})\b\.?,? (?P<year>[0-9]{{4}})(?![0-9])"
)
_WHOLE_RANGE = regex.compile(RANGE)
_WHOLE_DATE = regex.compile(DATE, regex.IGNORECASE)


@dataclass(frozen=True)
class Date:
    """A date; parts that are not stated are None."""

    year: int | None
    month: int
    day: int | None

    def includes(self, other: Date) -> bool:
        """Returns whether this date states all parts of `other`: 4 July 1776 includes July 1776."""
        return all(part == wanted for part, wanted in zip(self._parts, other._parts, strict=True) if wanted is not None)

    @property
    def _parts(self) -> tuple[int | None, int, int | None]:
        return self.year, self.month, self.day


def month_number(name: str) -> int | None:
    """Returns 1 to 12 for a month's English name in lower case, in full or its first three letters."""
    return next((number for number, month in enumerate(_MONTHS, 1) if name in {month, month[:3]}), None)


def number_values(written: str) -> frozenset[Fraction]:
    """Returns the possible values of `written`, a match of NUMBER; empty if it is not a number.

    `1.200` has two: 1.2 in English, 1200 in German. `1,200` has one, 1200; `1,2` is 1.2.
    """
    text = written.lower().strip()
    if len(text) > _LONGEST_NUMBER:
        return frozenset()
    sign = -1 if regex.match(r"-|minus |negative ", text) else 1
    text = regex.sub(r"^(?:minus |negative |[-+])[$€£¥]?", "", text)
    scale = 1
    for name, factor in _SCALES.items():
        if text.endswith(name):
            text, scale = text.removesuffix(name).strip(), factor
    return frozenset(sign * scale * value for value in _unscaled(text))


def range_bounds(written: str) -> tuple[frozenset[Fraction], frozenset[Fraction]]:
    """Returns the possible values of both bounds of `written`, a match of RANGE."""
    match = _WHOLE_RANGE.search(written)
    assert match, f"{written!r} is not a range"
    return number_values(match["low"]), number_values(match["high"])


def date_of(written: str) -> Date:
    """Returns the date in `written`, a match of DATE."""
    match = _WHOLE_DATE.search(written)
    assert match, f"{written!r} is not a date"
    if match["iso"]:
        year, month, day = map(int, match["iso"].split("-"))
        return Date(year, month, day)
    number = month_number(match["month"].lower()[:3])
    assert number, f"{match['month']!r} is not a month"
    return Date(_int(match["year"]), number, _int(match["day"]))


def _int(text: str | None) -> int | None:
    return int(text) if text else None


def _unscaled(text: str) -> set[Fraction]:
    if fraction := regex.fullmatch(r"(?:([0-9]+) )?([0-9]+)/([0-9]+)", text):
        whole, above, below = (int(part or 0) for part in fraction.groups())
        return {Fraction(whole) + Fraction(above, below)} if below else set()
    if power := regex.fullmatch(r"(.+?)\s?[x×*·]\s?10\^(-?[0-9]+)|(.+)e([-+]?[0-9]+)", text):
        mantissa, exponent = power[1] or power[3], int(power[2] or power[4])
        return _times_power(_decimals(mantissa), Fraction(10), exponent)
    if power := regex.fullmatch(r"(.+)\^(-?[0-9]+)", text):
        powers = (_times_power({Fraction(1)}, base, int(power[2])) for base in _decimals(power[1]))
        return {value for values in powers for value in values}
    return _decimals(text)


def _times_power(values: set[Fraction], base: Fraction, exponent: int) -> set[Fraction]:
    if abs(exponent) > _LARGEST_EXPONENT or not base:
        return set()
    return {value * base**exponent for value in values}


def _decimals(text: str) -> set[Fraction]:
    """Returns the possible values; of two different separators the last is the decimal one."""
    grouped = regex.sub(r"[ '_]", "", text)
    separators = regex.sub(r"[0-9]", "", grouped)
    if not separators or separators == ".":
        readings = {grouped}
        if regex.fullmatch(r"[1-9][0-9]{0,2}\.[0-9]{3}", grouped):
            readings.add(grouped.replace(".", ""))
    elif regex.fullmatch(
        r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?", grouped
    ):
        readings = {grouped.replace(",", "")}
    elif regex.fullmatch(r"[0-9]{1,3}(?:\.[0-9]{3})+(?:,[0-9]+)?", grouped):
        readings = {grouped.replace(".", "").replace(",", ".")}
    else:
        readings = {grouped.replace(",", ".")} if separators == "," else set()
    return {Fraction(f"0{reading}" if reading.startswith(".") else reading) for reading in readings}
