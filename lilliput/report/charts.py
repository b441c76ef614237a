"""Charts of the report as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
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


def trade_offs(
    found: Mapping[str, Mapping[str, Any]],
    front: Collection[str],
    objectives: Sequence[str],
    reference: Collection[str],
) -> str:
    """The first objective against each other one: the front named and with its intervals, what it beats in grey.

    Args:
        found: figures by candidate: an estimate (value, low, high) or a plain number for each objective.
        front: the candidates that none dominates.
        objectives: metrics, two at least.
        reference: what the search started from, drawn hollow.
    """
    first, *others = objectives
    figure = Figure(figsize=(7, 4 * len(others)))
    for axes, other in zip(figure.subplots(len(others), squeeze=False)[:, 0], others, strict=True):
        for name, figures in found.items():
            (x, x_reach), (y, y_reach) = _point(figures[other], other), _point(figures[first], first)
            if name not in front and name not in reference:
                axes.plot(x, y, "o", color="0.7", markersize=4)
                continue
            axes.errorbar(
                x, y, xerr=x_reach, yerr=y_reach, fmt="o", capsize=3, mfc="none" if name in reference else None
            )
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(7, 5))
        axes.set_xlabel(_label(other))
        axes.set_ylabel(_label(first))
        axes.margins(x=0.15)
    return _svg(figure)


def _point(figure: Mapping[str, Any] | float, metric: str) -> tuple[float, list[list[float]] | None]:
    """The value and how far its interval reaches below and above; sizes in MiB."""
    if not isinstance(figure, Mapping):
        return figure / 2**20 if metric.endswith("_bytes") else figure, None
    value = figure["value"]
    return value, [[value - figure["low"]], [figure["high"] - value]] if "low" in figure else None


def _label(metric: str) -> str:
    return f"{metric.removesuffix('_bytes')} (MiB)" if metric.endswith("_bytes") else metric


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


def offloading(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy, hallucination rate, latency and energy of each policy, with intervals; of latencies, p50 to p90.

    Args:
        policies: figures by policy, as lilliput/evaluate/routing.py gives them for one link.
    """
    panels = {
        "accuracy": ("accuracy", "value", "low", "high"),
        "hallucination rate": ("hallucination_rate", "value", "low", "high"),
        "~ latency (ms), p50 to p90": ("latency_ms", "p50", "p50", "p90"),
        "~ device energy per query (J)": ("energy_per_query_j", "value", "low", "high"),
    }
    figure = Figure(figsize=(9, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharey=True)
    for axes, (title, (metric, middle, low, high)) in zip(grid.flat, panels.items(), strict=True):
        for row, figures in enumerate(policies.values()):
            found = figures[metric]
            if found[middle] is not None:
                reach = [[found[middle] - found[low]], [found[high] - found[middle]]]
                axes.errorbar(found[middle], row, xerr=reach, fmt="o", capsize=3)
        axes.set_yticks(range(len(policies)), [name.replace("_", ", ") for name in policies])
        axes.set_xlabel(title)
        axes.set_xlim(left=0.0)
    grid[0, 0].invert_yaxis()
    return _svg(figure)


def offloaded_shares(
    curves: Mapping[str, Sequence[Mapping[str, float]]], policies: Mapping[str, Mapping[str, Any]]
) -> str:
    """Accuracy and hallucination rate over the share that is offloaded: each ranking's curve, chance, and each policy.

    Args:
        curves: points of offloaded, accuracy and hallucination_rate by ranking.
        policies: figures by policy; drawn where its threshold puts it.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "hallucination_rate"), strict=True):
        for name, points in curves.items():
            (line,) = axes.plot([p["offloaded"] for p in points], [p[metric] for p in points], label=name)
            if name in policies:
                axes.plot(policies[name]["offloaded"], policies[name][metric]["value"], "o", color=line.get_color())
        ends = [next(iter(curves.values()))[place] for place in (0, -1)]
        axes.plot([0.0, 1.0], [end[metric] for end in ends], color="0.5", linestyle="--", label="random")
        axes.set_xlabel("share offloaded")
        axes.set_ylabel(metric.replace("_", " "))
    figure.axes[0].legend(frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed salt and no date: the same data give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "lilliput", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
