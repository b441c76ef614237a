"""Charts of the report as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from lilliput.records import Curves, Figure, Policies, Result, number_of
from lilliput.report.first_screen import Shipped
from lilliput.report.rows import Chart, DifferenceRow

Curve = Sequence[tuple[int, float]]
_LABELS = {
    "accuracy_choice": "choice accuracy",
    "accuracy_free": "free accuracy",
    "acc": "accuracy",
    "ttft_ms": "time to first token (ms)",
    "tpot_ms": "time per further token (ms)",
}
_WIDTH, _HEIGHT = 5.2, 3.4  # inches; legible at the width of a phone


def trade_offs(
    results: Mapping[str, Mapping[str, Result]],
    front: Collection[str],
    objectives: Sequence[str],
    reference: Collection[str],
    name_all: bool = False,
) -> str:
    """Draws the first objective against each other one: the front with names and intervals, the rest in grey.

    Args:
        results: the result of each objective by candidate.
        front: the candidates on the Pareto front.
        objectives: at least two metrics.
        reference: the candidates that the others were made from, drawn hollow.
        name_all: whether dominated candidates are named too; a search has too many.
    """
    first, *others = objectives
    figure = Drawing(figsize=(_WIDTH, _HEIGHT * len(others)), layout="constrained")
    for axes, other in zip(figure.subplots(len(others), squeeze=False)[:, 0], others, strict=True):
        for name, figures in results.items():
            (x, x_error), (y, y_error) = _point(figures[other], other), _point(figures[first], first)
            if name not in front and name not in reference:
                axes.plot(x, y, "o", color="0.6", markersize=4)
                if name_all:
                    _name(axes, name, x, y, color="0.35")
                continue
            axes.errorbar(
                x, y, xerr=x_error, yerr=y_error, fmt="o", capsize=3, mfc="none" if name in reference else None
            )
            _name(axes, name, x, y)
        axes.set_xlabel(label(other))
        axes.set_ylabel(label(first))
        axes.margins(x=0.15)
    return _svg(figure)


def shipped(candidates: Sequence[Shipped], metric: str) -> Chart:
    """Draws `metric` with intervals over the size that ships; champions are filled and named with their devices.

    The line is the Pareto front of the two: no candidate below it is both smaller and better.
    """
    figure = Drawing(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    points = {
        each.row.name: (each.size_bytes / 2**20, *_point(getattr(each.quality, metric), metric)) for each in candidates
    }
    front = [
        name
        for name, (size, value, _) in points.items()
        if not any(s <= size and v >= value and (s, v) != (size, value) for s, v, _ in points.values())
    ]
    steps = sorted((points[name][0], points[name][1]) for name in front)
    axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color="0.6", linewidth=1, zorder=0)
    for each in candidates:
        x, y, error = points[each.row.name]
        color = "C2" if each.row.champion_of else "C0"
        axes.errorbar(x, y, yerr=error, fmt="o", capsize=3, color=color, mfc=color if each.row.champion_of else "none")
        name = "\n".join([each.row.name, *each.row.champion_of])
        side = {"xytext": (8, 3), "ha": "left"} if each.row.champion_of else {"xytext": (-8, 3), "ha": "right"}
        axes.annotate(name, (x, y), textcoords="offset points", va="bottom", **side)
    axes.set_xlabel("MiB that ship: the compiled file, or the checkpoint")
    axes.set_ylabel(label(metric))
    axes.set_xlim(0.0, 1.35 * max(x for x, _, _ in points.values()))  # room for the names
    axes.spines[["top", "right"]].set_visible(False)
    words = f"On the front: {', '.join(sorted(front, key=lambda name: points[name][0]))}."
    return Chart(f"{label(metric).capitalize()} over the size that ships, with 95 % intervals", _svg(figure), words)


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


def _name(axes: Axes, name: str, x: float, y: float, color: str = "black") -> None:
    axes.annotate(name, (x, y), textcoords="offset points", xytext=(7, 5), color=color)


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
    figure = Drawing(figsize=(_WIDTH, 0.8 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.0, color="0.6", linewidth=1)
    for place, row in enumerate(rows):
        x, error = _point(row.difference, metric)
        axes.errorbar(
            x,
            place,
            xerr=error,
            fmt="o",
            capsize=3,
            color="C0",
            mfc=None if row.difference.verdict == "yes" else "none",
        )
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"difference in {label(metric)}")
    return Chart(title, _svg(figure), _effects_in_words(rows))


def _effects_in_words(rows: Sequence[DifferenceRow]) -> str:
    kinds: dict[str, list[str]] = {"More": [], "Less": [], "No difference shown": [], "Too few to tell": []}
    for row in rows:
        direction = "More" if (row.difference.value or 0.0) > 0 else "Less"
        kind = {"yes": direction, "cannot tell": "Too few to tell"}.get(row.difference.verdict, "No difference shown")
        kinds[kind].append(row.title)
    return " ".join(f"{kind}: {', '.join(pairs)}." for kind, pairs in kinds.items() if pairs)


def curves(series: Mapping[str, Curve], title: str, x_label: str, y_label: str) -> Chart:
    """Draws one line per candidate; a single value as a point."""
    figure = Drawing(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    for name, curve in series.items():
        axes.plot([x for x, _ in curve], [y for _, y in curve], "-" if len(curve) > 1 else "o", label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    return Chart(title, _svg(figure), " ".join(_curve_in_words(name, curve, x_label) for name, curve in series.items()))


def _curve_in_words(name: str, curve: Curve, x_label: str) -> str:
    (first, start), (last, end) = curve[0], curve[-1]
    peak_x, peak = max(curve, key=lambda point: point[1])
    return (
        f"{name}: {start:.3g} at {x_label} {first}, {end:.3g} at {x_label} {last}, "
        f"at most {peak:.3g} at {x_label} {peak_x}."
    )


def offloading(policies: Policies) -> Chart:
    """Draws accuracy, hallucination rate, latency (p50 to p90) and energy of each policy, with intervals."""
    panels = {
        "accuracy": ("accuracy", "value", "low", "high"),
        "hallucination rate": ("hallucination_rate", "value", "low", "high"),
        "~ latency (ms), p50 to p90": ("latency_ms", "p50", "p50", "p90"),
        "~ device energy per query (J)": ("energy_per_query_j", "value", "low", "high"),
    }
    figure = Drawing(figsize=(9, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True)
    for axes, (title, (metric, middle, low, high)) in zip(grid.flat, panels.items(), strict=True):
        for row, figures in enumerate(policies.values()):
            value, *ends = (getattr(getattr(figures, metric), name) for name in (middle, low, high))
            if value is not None:
                axes.errorbar(value, row, xerr=[[value - ends[0]], [ends[1] - value]], fmt="o", capsize=3)
        axes.set_yticks(range(len(policies)), [name.replace("_", ", ") for name in policies])
        axes.set_xlabel(title)
        axes.set_xlim(left=0.0)
    grid[0, 0].invert_yaxis()
    return Chart("Quality and cost of each policy", _svg(figure), "The table above has its numbers.")


def offloaded_shares(curves: Curves, policies: Policies) -> Chart:
    """Draws accuracy and hallucination rate over the offloaded share: a curve per ranking, chance, and the policies."""
    figure = Drawing(figsize=(9, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "hallucination_rate"), strict=True):
        for name, points in curves.items():
            (line,) = axes.plot([p.offloaded for p in points], [getattr(p, metric) for p in points], label=name)
            if (policy := policies.get(name)) and (value := getattr(policy, metric).value) is not None:
                axes.plot(policy.offloaded, value, "o", color=line.get_color())
        ends = [next(iter(curves.values()))[place] for place in (0, -1)]
        axes.plot([0.0, 1.0], [getattr(end, metric) for end in ends], color="0.5", linestyle="--", label="random")
        axes.set_xlabel("share offloaded")
        axes.set_ylabel(metric.replace("_", " "))
    figure.axes[0].legend(frameon=False)
    best = {name: max(points, key=lambda point: point.accuracy) for name, points in curves.items()}
    words = (f"{n}: accuracy at most {p.accuracy:.3f}, at {p.offloaded:.0%} offloaded." for n, p in best.items())
    return Chart("Accuracy and hallucination rate over the share offloaded", _svg(figure), " ".join(words))


def _svg(figure: Drawing) -> str:
    buffer = io.StringIO()
    # A fixed salt and no date: the same data give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "lilliput", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
