"""Formats numbers for the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def figure(value: Mapping[str, Any] | float | None, metric: str) -> str:
    """Formats `value` of `metric`: an estimate with its interval, bytes as MiB, other numbers with three digits."""
    if isinstance(value, Mapping) and "low" in value:
        return estimate(value)
    number = value["value"] if isinstance(value, Mapping) else value
    if number is None:
        return "unavailable"
    return f"{number / 2**20:.1f} MiB" if metric.endswith("_bytes") else f"{number:.3g}"


def estimate(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Returns `value [low, high]`, prefixed with `~` if not measured, or `unavailable`.

    The space in the brackets is non-breaking, so that the interval stays on one line in a narrow column.
    """
    if not value or value.get("value") is None:
        return "unavailable"
    numbers = [f"{value[key]:.{digits}f}" for key in ("value", "low", "high")]
    return f"{'' if value.get('measured', True) else '~'}{numbers[0]} [{numbers[1]},\N{NO-BREAK SPACE}{numbers[2]}]"
