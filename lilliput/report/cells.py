"""Cells of the report's tables. `<data>` holds the unrounded value, by which a table sorts and exports."""

from __future__ import annotations

from markupsafe import Markup, escape

from lilliput.records import Figure, Result, number_of
from lilliput.report import figures

_NOTHING = "unavailable"


def estimate_cell(value: Figure | None, digits: int = 3) -> Markup:
    """Returns `value [low, high]`, or `unavailable`; see `figures.estimate`."""
    return interval_cell(value, figures.estimate(value, digits))


def figure_cell(value: Result, metric: str) -> Markup:
    """Returns `value` of `metric` with its unit; see `figures.figure`."""
    shown = figures.figure(value, metric)
    if isinstance(value, Figure) or (number := number_of(value)) is None:
        return interval_cell(value if isinstance(value, Figure) else None, shown)
    return _data(number / 2**20 if metric.endswith("_bytes") else number, shown)


def interval_cell(value: Figure | None, shown: str) -> Markup:
    """Returns the text `shown` with the value and the interval of `value`."""
    if value is None or value.value is None:
        return escape(shown)
    return _data(value.value, shown, value.low, value.high)


def number_cell(value: float | None, form: str = "%.0f", divisor: float = 1) -> Markup:
    """Returns `value` divided by `divisor` in the printf format `form`, or `unavailable`."""
    return escape(_NOTHING) if value is None else _data(value / divisor, form % (value / divisor))


def _data(value: float, shown: str, low: float | None = None, high: float | None = None) -> Markup:
    ends = Markup("").join(
        Markup(' data-{}="{}"').format(name, float(end))
        for name, end in (("low", low), ("high", high))
        if end is not None
    )
    return Markup('<data value="{}"{}>{}</data>').format(float(value), ends, shown)
