"""Charts of the report as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]


def accuracy_against_size(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Choice accuracy with its interval over size in MiB, one point a candidate."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, record in records.items():
        accuracy, size_mib = record["accuracy_choice"], record["size_bytes"] / 2**20
        if not accuracy or accuracy["value"] is None:
            continue
        reach = [[accuracy["value"] - accuracy["low"]], [accuracy["high"] - accuracy["value"]]]
        axes.errorbar(size_mib, accuracy["value"], yerr=reach, fmt="o", capsize=3)
        axes.annotate(name, (size_mib, accuracy["value"]), textcoords="offset points", xytext=(7, 5))
    axes.set_xlabel("size (MiB)")
    axes.set_ylabel("choice accuracy")
    axes.margins(x=0.15)
    return _svg(figure)


def curves(series: Mapping[str, Curve], x_label: str, y_label: str) -> str:
    """One line a candidate."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, curve in series.items():
        axes.plot([x for x, _ in curve], [y for _, y in curve], label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed salt and no date: the same data give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "lilliput", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
