"""Charts of the report as inline SVG. Text is 12 pixels high where the page is 360 wide, and never smaller."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lilliput.records import Curves, Figure, Policies, Result, number_of
from lilliput.report.figures import figure as formatted
from lilliput.report.first_screen import Shipped
from lilliput.report.placement import NamedPoint, place_names
from lilliput.report.rows import Chart, DifferenceRow
from lilliput.report.svg import Labels, as_svg

Curve = Sequence[tuple[int, float]]
Direction = Literal["max", "min"]
_LABELS = {
    "accuracy_choice": "choice accuracy",
    "accuracy_free": "free accuracy",
    "acc": "accuracy",
    "ttft_ms": "time to first token (ms)",
    "tpot_ms": "time per further token (ms)",
    "rate_tokens_per_s": "tokens per second",
}
_NARROW, _WIDE = 4.5, 8.5  # inches; a page of 360 pixels has 324 of them for a chart, which is 4.5 times 72
_HEIGHT = 3.6
_FONT_SIZE = 12.0


def _drawing(width: float, height: float) -> Drawing:
    # 72 dots per inch, so that a dot is a point of the SVG.
    room = ConstrainedLayoutEngine(w_pad=0.12)  # inches; half of the last number of an axis
    return Drawing(figsize=(width, height), layout=room, dpi=72)


def trade_offs(
    results: Mapping[str, Mapping[str, Result]],
    front: Collection[str],
    objectives: Mapping[str, Direction],
    reference: Collection[str],
    name_all: bool = False,
) -> str:
    """Draws the first objective against each other one: the front with names and intervals, the rest in grey.

    Args:
        results: the result of each objective by candidate.
        front: the candidates on the Pareto front.
        objectives: at least two metrics, and whether more or less is better.
        reference: the candidates that the others were made from, drawn hollow.
        name_all: whether dominated candidates are named too; a search has too many.
    """
    first, *others = objectives
    with rc_context({"font.size": _FONT_SIZE}):
        figure, labels = _drawing(_NARROW, _HEIGHT * len(others)), Labels()
        for axes, other in zip(figure.subplots(len(others), squeeze=False)[:, 0], others, strict=True):
            named = [
                _trade_off(axes, labels, name, figures, (first, other), name in front, name in reference, name_all)
                for name, figures in results.items()
            ]
            axes.set_xlabel(label(other))
            axes.set_ylabel(label(first))
            axes.margins(x=0.2, y=0.1)
            _point_to_better(axes, objectives[other], objectives[first])
            place_names(axes, named)
        return as_svg(figure, labels.texts)


def _trade_off(
    axes: Axes,
    labels: Labels,
    name: str,
    figures: Mapping[str, Result],
    metrics: tuple[str, str],
    on_front: bool,
    hollow: bool,
    name_all: bool,
) -> NamedPoint:
    """Draws the point of a candidate, and returns where its name belongs."""
    first, other = metrics
    (x, x_error), (y, y_error) = _point(figures[other], other), _point(figures[first], first)
    color = "C0" if on_front else "0.35"
    if on_front or hollow:
        axes.errorbar(
            x, y, xerr=x_error, yerr=y_error, fmt="o", capsize=3, color=color, mfc="none" if hollow else color
        )
    else:
        axes.plot(x, y, "o", color="0.6", markersize=4)
        x_error, y_error = None, None
    figures_in_words = "; ".join(f"{_name(metric)} {_in_words(figures[metric], metric)}" for metric in metrics)
    labels.add(axes, x, y, f"{name}: {figures_in_words}{'; on the front' if on_front else ''}")
    shown_name = name if on_front or hollow or name_all else ""
    return NamedPoint(x, y, shown_name, color, _distances(x_error), _distances(y_error))


def _point_to_better(axes: Axes, x: Direction, y: Direction) -> None:
    """Writes `better` above the axes, with an arrow to the corner where the best points are."""
    arrow = {("min", "max"): "↖", ("max", "max"): "↗", ("max", "min"): "↘", ("min", "min"): "↙"}[x, y]
    place, side = (0.0, "left") if x == "min" else (1.0, "right")
    text = f"{arrow} better" if x == "min" else f"better {arrow}"
    axes.text(place, 1.02, text, transform=axes.transAxes, ha=side, va="bottom", color="C2", weight="bold")


def shipped(candidates: Sequence[Shipped], metric: str) -> Chart:
    """Draws `metric` with intervals over the size that ships. Champions are filled; a wide page names their devices.

    The line is the Pareto front of the two: no candidate below it is both smaller and better.
    """
    points = {
        each.row.name: (each.size_bytes / 2**20, _point(getattr(each.quality, metric), metric)[0])
        for each in candidates
    }
    front = [
        name
        for name, (size, value) in points.items()
        if not any(s <= size and v >= value and (s, v) != (size, value) for s, v in points.values())
    ]
    front.sort(key=points.__getitem__)
    return Chart(
        f"{label(metric).capitalize()} over the size that ships, with 95 % intervals",
        _draw_shipped(candidates, metric, [points[name] for name in front], _WIDE),
        f"On the front: {', '.join(front)}. Better: smaller and more accurate, to the upper left.",
        narrow_svg=_draw_shipped(candidates, metric, [points[name] for name in front], _NARROW),
    )


def _draw_shipped(
    candidates: Sequence[Shipped], metric: str, front: Sequence[tuple[float, float]], width: float
) -> str:
    with rc_context({"font.size": _FONT_SIZE}):
        figure, labels = _drawing(width, 4.0), Labels()
        axes = figure.subplots()
        axes.step([x for x, _ in front], [y for _, y in front], where="post", color="0.6", linewidth=1, zorder=0)
        named = [_draw_candidate(axes, labels, each, metric, with_devices=width == _WIDE) for each in candidates]
        axes.set_xlabel("MiB that ship: compiled file or checkpoint")
        axes.set_ylabel(label(metric))
        axes.set_xlim(0.0, (1.35 if width == _WIDE else 1.15) * max(point.x for point in named))  # room for names
        axes.margins(y=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        _point_to_better(axes, "min", "max")
        place_names(axes, named)
        return as_svg(figure, labels.texts)


def _draw_candidate(axes: Axes, labels: Labels, candidate: Shipped, metric: str, *, with_devices: bool) -> NamedPoint:
    x, champion_of = candidate.size_bytes / 2**20, candidate.row.champion_of
    result = getattr(candidate.quality, metric)
    y, error = _point(result, metric)
    color = "C2" if champion_of else "C0"
    axes.errorbar(x, y, yerr=error, fmt="o", capsize=3, color=color, mfc=color if champion_of else "none")
    role = f"; champion of {', '.join(champion_of)}" if champion_of else ""
    labels.add(axes, x, y, f"{candidate.row.name}: {label(metric)} {_in_words(result, metric)}; {x:.1f} MiB{role}")
    name = "\n".join([candidate.row.name, *(champion_of if with_devices else [])])
    return NamedPoint(x, y, name, "black", y_error=_distances(error))


def _distances(error: list[list[float]] | None) -> tuple[float, float]:
    return (error[0][0], error[1][0]) if error else (0.0, 0.0)


def _name(metric: str) -> str:
    """Returns the label of `metric`, without the unit of bytes, which the figure has."""
    return label(metric).removesuffix(" (MiB)")


def _in_words(result: Result, metric: str) -> str:
    """Returns `result` with its interval, and what it was measured on."""
    n = f" (n = {result.n})" if isinstance(result, Figure) and result.n else ""
    return formatted(result, metric) + n


def on_white(svg: str) -> str:
    """Returns a chart as a file of its own, which must be legible on a page of any colour."""
    tag, end, rest = svg.partition(">")
    return f'{tag}{end}\n <rect width="100%" height="100%" fill="white"/>{rest}'


def _point(result: Result, metric: str) -> tuple[float, list[list[float]] | None]:
    """Returns the value and the distances to its interval's bounds; sizes in MiB. Rejects unavailable results."""
    value = number_of(result)
    assert value is not None, f"{metric} is unavailable"
    if isinstance(result, Figure) and result.low is not None and result.high is not None:
        return value, [[value - result.low], [result.high - value]]
    return value / 2**20 if metric.endswith("_bytes") else value, None


def label(metric: str) -> str:
    """Returns the label of `metric` with its unit, such as `energy per query (J)`."""
    if metric in _LABELS:
        return _LABELS[metric]
    for suffix, unit in {"_bytes": "MiB", "_j": "J", "_ms": "ms"}.items():
        if metric.endswith(suffix):
            return f"{metric.removesuffix(suffix)} ({unit})".replace("_", " ")
    return metric.replace("_", " ")


def effects(rows: Sequence[DifferenceRow], metric: str, title: str) -> Chart:
    """Draws each candidate's difference from its reference, with a line at zero. Hollow: no difference shown.

    Args:
        rows: all of one metric.
        metric: key of that metric, for the axis.
        title: of the chart.
    """
    with rc_context({"font.size": _FONT_SIZE}):
        figure, labels = _drawing(_NARROW, 0.9 + 0.3 * len(rows)), Labels()
        axes = figure.subplots()
        axes.axvline(0.0, color="0.6", linewidth=1)
        for place, row in enumerate(rows):
            x, error = _point(row.difference, metric)
            real = row.difference.verdict == "yes"
            axes.errorbar(x, place, xerr=error, fmt="o", capsize=3, color="C0", mfc=None if real else "none")
            difference = _in_words(row.difference, metric)
            labels.add(axes, x, place, f"{row.title}: {difference}; real: {row.difference.verdict}")
        axes.set_yticks(range(len(rows)), [f"{row.candidate} vs {row.reference}" for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"difference in {label(metric)}", loc="right")  # the names take the room on the left
        return Chart(title, as_svg(figure, labels.texts), _effects_in_words(rows))


def _effects_in_words(rows: Sequence[DifferenceRow]) -> str:
    kinds: dict[str, list[str]] = {"More": [], "Less": [], "No difference shown": [], "Too few to tell": []}
    for row in rows:
        direction = "More" if (row.difference.value or 0.0) > 0 else "Less"
        kind = {"yes": direction, "cannot tell": "Too few to tell"}.get(row.difference.verdict, "No difference shown")
        kinds[kind].append(row.title)
    return " ".join(f"{kind}: {', '.join(pairs)}." for kind, pairs in kinds.items() if pairs)


def curves(series: Mapping[str, Curve], title: str, x_label: str, y_label: str) -> Chart:
    """Draws one line per candidate; a single value as a point."""
    with rc_context({"font.size": _FONT_SIZE}):
        figure = _drawing(_NARROW, _HEIGHT)
        axes = figure.subplots()
        for name, curve in series.items():
            axes.plot([x for x, _ in curve], [y for _, y in curve], "-" if len(curve) > 1 else "o", label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(frameon=False)
        svg = as_svg(figure)
    return Chart(title, svg, " ".join(_curve_in_words(name, curve, x_label) for name, curve in series.items()))


def _curve_in_words(name: str, curve: Curve, x_label: str) -> str:
    (first, start), (last, end) = curve[0], curve[-1]
    peak_x, peak = max(curve, key=lambda point: point[1])
    return (
        f"{name}: {start:.3g} at {x_label} {first}, {end:.3g} at {x_label} {last}, "
        f"at most {peak:.3g} at {x_label} {peak_x}."
    )


def offloading(policies: Policies) -> list[Chart]:
    """Draws accuracy, hallucination rate, latency (p50 to p90) and energy of each policy, with intervals."""
    panels = {
        "accuracy": ("accuracy", "value", "low", "high"),
        "hallucination rate": ("hallucination_rate", "value", "low", "high"),
        "~ latency (ms), p50 to p90": ("latency_ms", "p50", "p50", "p90"),
        "~ device energy per query (J)": ("energy_per_query_j", "value", "low", "high"),
    }
    return [_panel(policies, title, *fields) for title, fields in panels.items()]


def _panel(policies: Policies, title: str, metric: str, middle: str, low: str, high: str) -> Chart:
    with rc_context({"font.size": _FONT_SIZE}):
        figure, labels = _drawing(_NARROW, _HEIGHT), Labels()
        axes = figure.subplots()
        for row, (name, figures) in enumerate(policies.items()):
            value, left, right = (getattr(getattr(figures, metric), field) for field in (middle, low, high))
            if value is not None:
                axes.errorbar(value, row, xerr=[[value - left], [right - value]], fmt="o", capsize=3, color="C0")
                words = f"{name.replace('_', ', ')}: {title} {value:.3g} [{left:.3g}, {right:.3g}]"
                labels.add(axes, value, row, words)
        axes.set_yticks(range(len(policies)), [name.replace("_", ", ") for name in policies])
        axes.set_xlabel(title)
        axes.set_xlim(left=0.0)
        axes.invert_yaxis()
        return Chart(
            f"Each policy: {title}", as_svg(figure, labels.texts), "The first table of this section has its numbers."
        )


def offloaded_shares(curves: Curves, policies: Policies) -> list[Chart]:
    """Draws accuracy and hallucination rate over the offloaded share: a curve per ranking, chance, and the policies."""
    return [_shares(curves, policies, metric) for metric in ("accuracy", "hallucination_rate")]


def _shares(curves: Curves, policies: Policies, metric: str) -> Chart:
    with rc_context({"font.size": _FONT_SIZE}):
        figure = _drawing(_NARROW, _HEIGHT)
        axes = figure.subplots()
        for name, points in curves.items():
            values = [getattr(p, metric) for p in points]
            (line,) = axes.plot([p.offloaded for p in points], values, label=name.replace("_", ", "))
            if (policy := policies.get(name)) and (value := getattr(policy, metric).value) is not None:
                axes.plot(policy.offloaded, value, "o", color=line.get_color())
        ends = [next(iter(curves.values()))[place] for place in (0, -1)]
        axes.plot([0.0, 1.0], [getattr(end, metric) for end in ends], color="0.5", linestyle="--", label="random")
        axes.set_xlabel("share offloaded")
        axes.set_ylabel(label(metric))
        axes.legend(frameon=False)
        svg = as_svg(figure)
    best, most = (max, "most") if metric == "accuracy" else (min, "least")
    ends = {name: best(points, key=lambda point: getattr(point, metric)) for name, points in curves.items()}
    words = (
        f"{name.replace('_', ', ')}: at {most} {getattr(p, metric):.3f}, at {p.offloaded:.0%} offloaded."
        for name, p in ends.items()
    )
    return Chart(f"{label(metric).capitalize()} over the share offloaded", svg, " ".join(words))
