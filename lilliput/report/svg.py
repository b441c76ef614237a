"""Writes matplotlib figures as SVG whose points have a label, for the pointer, the keyboard and screen readers."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

_POINT = "point-"
_TARGET = 24.0  # diameter of what the pointer can hit, in points (WCAG 2.2, 2.5.8)


class Labels:
    """The labels of the points of a figure, in the order in which the keyboard visits them."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, axes: Axes, x: float, y: float, text: str) -> None:
        """Labels the point at (`x`, `y`) with `text`."""
        target = axes.plot(x, y, "o", markersize=_TARGET, alpha=0.0, color="C0", zorder=10)[0]
        target.set_gid(f"{_POINT}{len(self.texts)}")
        self.texts.append(text)


def as_svg(figure: Drawing, labels: Sequence[str] = ()) -> str:
    """Returns the figure as SVG. The same data give the same bytes.

    With `labels` everything except the labelled points is hidden from screen readers.
    """
    buffer = io.StringIO()
    # A fixed salt and no date.
    with matplotlib.rc_context({"svg.hashsalt": "lilliput", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    if not labels:
        return text
    text = re.sub(rf'<g id="(?!figure_|axes_|{_POINT})', '<g aria-hidden="true" id="', text)
    return re.sub(rf'<g id="{_POINT}(\d+)">', lambda found: _point(labels[int(found[1])]), text)


def _point(label: str) -> str:
    return f'<g class="point" role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>'
