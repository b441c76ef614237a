"""Places names beside the points of a chart, where they cover neither a point nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

_POINT_RADIUS = 5.0  # in points (1/72 inch), as all lengths here
# Offset of a name from its point, and the corner of the name that is put there.
_PLACES = (
    (8, 4, "left", "bottom"),
    (-8, 4, "right", "bottom"),
    (8, -4, "left", "top"),
    (-8, -4, "right", "top"),
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
)
_OUTSIDE_COST = 10.0  # of a unit of area outside the axes, which would be cut off, relative to a covered one
_ALIGNED = {"left": 0.0, "center": -0.5, "right": -1.0, "bottom": 0.0, "top": -1.0}


@dataclass(frozen=True)
class NamedPoint:
    """A point in the units of the data, the distances to the ends of its intervals, and its name (empty: none)."""

    x: float
    y: float
    name: str
    color: str
    x_error: tuple[float, float] = (0.0, 0.0)
    y_error: tuple[float, float] = (0.0, 0.0)


def place_names(axes: Axes, points: Sequence[NamedPoint]) -> None:
    """Writes the names beside their points. The figure must have 72 dots per inch, and its limits must be final."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout, and thereby the scale
    covered = [box for point in points for box in _obstacles(axes, point)]
    for point in points:
        if not point.name:
            continue
        text = axes.annotate(
            point.name, (point.x, point.y), xytext=(0, 0), textcoords="offset points", color=point.color
        )
        text.set_in_layout(False)
        size = text.get_window_extent()
        boxes = {place: _box(axes, point, place, size) for place in _PLACES}
        (dx, dy, side, corner) = best = min(_PLACES, key=lambda place: _cost(boxes[place], covered, axes.bbox))
        text.set(position=(dx, dy), ha=side, va=corner)
        covered.append(boxes[best])


def _obstacles(axes: Axes, point: NamedPoint) -> list[Bbox]:
    (left, low), (right, high) = axes.transData.transform(
        [
            (point.x - point.x_error[0], point.y - point.y_error[0]),
            (point.x + point.x_error[1], point.y + point.y_error[1]),
        ]
    )
    x, y = axes.transData.transform((point.x, point.y))
    reach = _POINT_RADIUS
    return [
        Bbox([[x - reach, y - reach], [x + reach, y + reach]]),
        Bbox([[x - reach, low], [x + reach, high]]),
        Bbox([[left, y - reach], [right, y + reach]]),
    ]


def _box(axes: Axes, point: NamedPoint, place: tuple[float, float, str, str], size: Bbox) -> Bbox:
    x, y = axes.transData.transform((point.x, point.y))
    dx, dy, side, corner = place
    left, bottom = x + dx + _ALIGNED[side] * size.width, y + dy + _ALIGNED[corner] * size.height
    return Bbox.from_bounds(left, bottom, size.width, size.height)


def _cost(box: Bbox, covered: Sequence[Bbox], area: Bbox) -> float:
    inside = Bbox.intersection(box, area)
    outside = _area(box) - (_area(inside) if inside else 0.0)
    return _OUTSIDE_COST * outside + sum(_area(both) for other in covered if (both := Bbox.intersection(box, other)))


def _area(box: Bbox) -> float:
    return box.width * box.height
