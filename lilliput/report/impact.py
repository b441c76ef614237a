"""The effect of each strategy on each metric as arrows: the paper's Fig. 1C, computed from paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lilliput.records import CachingRecord, Difference, EvaluationRecord, Figure
from lilliput.report.rows import CandidateRow, DifferenceRow

# Columns: metric, title, and whether larger is better. See `metrics_for`.
METRICS = {
    "accuracy_choice": ("Generalization accuracy", True),
    "hallucination_rate": ("Hallucination rate", False),
    "energy_per_query_j": ("Energy per query", False),
    "ttft_ms": ("Accessibility: time to first token", False),
    "size_bytes": ("Accessibility: bytes", False),
}

Metrics = Mapping[str, tuple[str, bool]]


def metrics_for(records: Iterable[EvaluationRecord]) -> Metrics:
    """Returns METRICS; accuracy is that of free answers if no record has one by choice."""
    if any(record.accuracy_metric == "accuracy_choice" for record in records):
        return METRICS
    return {"accuracy_free" if name == "accuracy_choice" else name: column for name, column in METRICS.items()}


@dataclass(frozen=True)
class Impact:
    """One arrow: ↑ more, ↓ less, ≈ no difference shown, ? too few to tell, – not compared.

    Attributes:
        good: whether the change is an improvement; None without a change.
        details: difference, interval and n.
        figure: the difference, unrounded; None if not compared.
    """

    arrow: str
    good: bool | None
    details: str
    figure: Figure | None = None


@dataclass(frozen=True)
class ImpactRow:
    """The effect of a strategy, or of several in sequence, on each metric."""

    title: str
    against: str
    cells: Mapping[str, Impact]


def impacts(
    candidates: Sequence[CandidateRow], differences: Iterable[DifferenceRow], metrics: Metrics = METRICS
) -> list[ImpactRow]:
    """Returns a row per candidate and reference."""
    pairs = {(row.candidate, row.reference, row.metric): row.difference for row in differences}
    sizes = {row.name: row.record.size_bytes for row in candidates}
    rows = []
    for row in candidates:
        for reference, strategy in row.steps.items():
            cells = {
                metric: _of_difference(pairs.get((row.name, reference, metric)), larger_is_better)
                for metric, (_, larger_is_better) in metrics.items()
            }
            cells["size_bytes"] = _of_sizes(sizes[reference], sizes[row.name])
            rows.append(ImpactRow(strategy, f"{row.name} against {reference}", cells))
    return rows


def caching_impacts(records: Mapping[str, CachingRecord], metrics: Metrics = METRICS) -> list[ImpactRow]:
    """Returns rows for prefix reuse, and for the answer cache in addition, by candidate."""
    rows = []
    for name, record in records.items():
        steps = {"prefix": "prefix reuse", "cache": "answer cache, added to prefix reuse"}
        for step, title in steps.items():
            differences = record.differences[step]
            cells = {
                metric: _of_difference(differences.get(metric), larger_is_better)
                for metric, (_, larger_is_better) in metrics.items()
            }
            cache_bytes = record.cache_bytes if step == "cache" else 0
            cells["size_bytes"] = _of_sizes(record.size_bytes, record.size_bytes + cache_bytes)
            rows.append(ImpactRow(title, f"{name}, {record.queries} queries", cells))
    return rows


def _of_difference(difference: Difference | None, larger_is_better: bool) -> Impact:
    if difference is None or difference.value is None:
        return Impact("–", None, "not compared")
    details = (
        "{value:+.3g} [{low:+.3g},\N{NO-BREAK SPACE}{high:+.3g}], n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{n}".format(
            **dict(difference)
        )
    )
    if difference.verdict != "yes":
        return Impact("?" if difference.verdict == "cannot tell" else "≈", None, details, difference)
    rises = difference.value > 0
    return Impact("↑" if rises else "↓", rises == larger_is_better, details, difference)


def _of_sizes(before: int, after: int) -> Impact:
    """Compares exact byte counts: any difference of at least 1 % after rounding is real."""
    change = round(after / before - 1, 2)
    details, exact = f"{change:+.0%}, counted", Figure(value=after / before - 1)
    arrow = ("↑" if change > 0 else "↓") if change else "≈"
    return Impact(arrow, change < 0 if change else None, details, exact)
