"""Numbers as they are shown, in the report and in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def figure(value: Mapping[str, Any] | float | None, metric: str) -> str:
    """`value` as it fits `metric`: an estimate with its interval, bytes as MiB, any other number as it is."""
    if isinstance(value, Mapping) and "low" in value:
        return estimate(value)
    number = value["value"] if isinstance(value, Mapping) else value
    if number is None:
        return "unavailable"
    return f"{number / 2**20:.1f} MiB" if metric.endswith("_bytes") else f"{number:.3g}"


def estimate(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`value [low, high]`, marked `~` where it is an estimate; `unavailable` where there is none.

    The space within the brackets does not break: in a narrow column the interval stands whole below its value.
    """
    if not value or value.get("value") is None:
        return "unavailable"
    numbers = [f"{value[key]:.{digits}f}" for key in ("value", "low", "high")]
    return f"{'' if value.get('measured', True) else '~'}{numbers[0]} [{numbers[1]},\N{NO-BREAK SPACE}{numbers[2]}]"
