"""Formats numbers for the report and the terminal."""

from __future__ import annotations

from lilliput.records import Energy, Figure, Result, Uncertain, number_of


def figure(value: Result, metric: str) -> str:
    """Formats `value` of `metric`: an estimate with its interval, bytes as MiB, other numbers with three digits."""
    if isinstance(value, Figure):
        return estimate(value)
    if (number := number_of(value)) is None:
        return "unavailable"
    return f"{number / 2**20:.1f} MiB" if metric.endswith("_bytes") else f"{number:.3g}"


def estimate(value: Figure | None, digits: int = 3) -> str:
    """Returns `value [low, high]`, prefixed with `~` if not measured, or `unavailable`.

    The space in the brackets is non-breaking, so that the interval stays on one line in a narrow column.
    """
    if value is None or value.value is None:
        return "unavailable"
    numbers = [f"{number:.{digits}f}" for number in (value.value, value.low, value.high)]
    return f"{mark(value)}{numbers[0]} [{numbers[1]},\N{NO-BREAK SPACE}{numbers[2]}]"


def uncertain(value: Uncertain) -> str:
    """Returns `value ± one standard error`, or only the value if there is no error."""
    return f"{value.value:.3g}" if value.error is None else f"{value.value:.3g} ± {value.error:.2g}"


def short(value: float | None) -> str:
    """Returns three digits, or `unavailable`; for sentences, which have no room for intervals."""
    return "unavailable" if value is None else f"{value:.3f}"


def mark(value: Figure) -> str:
    """Returns `~` for an energy that was not measured."""
    return "~" if isinstance(value, Energy) and not value.measured else ""
