"""Compares two candidates on the rows that both answered: all together, by kind of row, and by benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lilliput.statistics.differences import SIGNIFICANCE, Comparison, compare_means, compare_shares

Row = Mapping[str, Any]


def _score(row: Row) -> Any:
    """Returns the score of a free answer; a question's is whether it is right."""
    return row.get("score", row.get("right")) if row.get("kind") != "abstain" else None


Value = Callable[[Row], Any]
# Value of each metric in an answer row; a metric is the mean of the values that are not None.
QUALITY: dict[str, Value] = {
    "accuracy_choice": lambda row: row.get("choice_right"),
    "accuracy_free": _score,
    "hallucination_rate": lambda row: row.get("hallucinated"),
}
FIGURES: dict[str, Value] = {
    "energy_per_query_j": lambda row: row.get("energy_j"),
    "ttft_ms": lambda row: row.get("ttft_ms"),
}
# Of the rows of one kind; the right answer to a row of the kind `abstain` is an abstention.
OF_KIND: dict[str, Value] = {
    "accuracy": lambda row: row.get("score", row.get("right")),
    "hallucination_rate": QUALITY["hallucination_rate"],
}
OF_BENCHMARK: dict[str, Value] = {"acc": lambda row: row.get("acc")}
FALLING = {"hallucination_rate"}  # metrics of which less is better

Pairs = list[tuple[Row, Row]]


@dataclass(frozen=True)
class Loss:
    """A significant loss, after Holm's correction for all comparisons of the two candidates.

    Attributes:
        part: the kind of rows, or `benchmark/<task>`.
        comparison: uncorrected.
        corrected_p: by Holm's method.
    """

    part: str
    metric: str
    comparison: Comparison
    corrected_p: float


def compare(first: Sequence[Row], second: Sequence[Row]) -> dict[str, Comparison]:
    """Returns, by metric, the paired difference of the second candidate from the first.

    Omits energies of different sources, and figures of a single row.
    """
    pairs = _pairs(first, second)
    compared = {metric: _compare_quality(pairs, value) for metric, value in QUALITY.items()}
    compared |= {metric: _compare_figures(pairs, value) for metric, value in FIGURES.items()}
    measured = [(a, b) for a, b in pairs if a.get("energy_j") is not None and b.get("energy_j") is not None]
    if any(a.get("energy_source") != b.get("energy_source") for a, b in measured):
        compared["energy_per_query_j"] = None
    return {metric: comparison for metric, comparison in compared.items() if comparison}


def compare_by_part(first: Sequence[Row], second: Sequence[Row]) -> dict[str, dict[str, Comparison]]:
    """Returns the paired differences of free answers by kind of row, and of each benchmark's `acc`, by metric."""
    parts: dict[str, Pairs] = {}
    for pair in _pairs(first, second):
        if part := _part(pair[0]):
            parts.setdefault(part, []).append(pair)
    compared = {
        part: {metric: _compare_quality(parts[part], value) for metric, value in _metrics(part).items()}
        for part in sorted(parts)
    }
    return {part: {name: found for name, found in of.items() if found} for part, of in compared.items()}


def losses(first: Sequence[Row], second: Sequence[Row]) -> list[Loss]:
    """Returns where the second candidate is significantly worse than the first, by kind of row and benchmark.

    p-values are corrected together by Holm's method (Scand. J. Stat. 6, 1979): the chance of any false loss is 5 %.
    """
    compared = [
        (part, metric, comparison)
        for part, of_metric in compare_by_part(first, second).items()
        for metric, comparison in of_metric.items()
    ]
    corrected = holm([comparison.p_value for *_, comparison in compared])
    return [
        Loss(part, metric, comparison, p)
        for (part, metric, comparison), p in zip(compared, corrected, strict=True)
        if p < SIGNIFICANCE and (comparison.difference.value > 0) == (metric in FALLING)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values adjusted by Holm's step-down method, in the given order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _pairs(first: Sequence[Row], second: Sequence[Row]) -> Pairs:
    by_id = {row["id"]: row for row in second}
    return [(row, by_id[row["id"]]) for row in first if row["id"] in by_id]


def _part(row: Row) -> str | None:
    """Returns the kind of a row with a free answer, or the name of the benchmark of an item."""
    identity = str(row["id"])
    if identity.startswith("benchmark/") and "acc" in row:
        return identity.rpartition("/")[0]
    return row.get("kind", "question") if "text" in row else None


def _metrics(part: str) -> Mapping[str, Value]:
    return OF_BENCHMARK if part.startswith("benchmark/") else OF_KIND


def _compare_quality(pairs: Pairs, value: Value) -> Comparison | None:
    """Compares shares if all values are 0 or 1, otherwise means."""
    before, after = _values(pairs, value)
    if not set(before) | set(after) <= {0, 1}:
        return compare_means(before, after)
    return compare_shares([number == 1 for number in before], [number == 1 for number in after]) if before else None


def _compare_figures(pairs: Pairs, value: Value) -> Comparison | None:
    return compare_means(*_values(pairs, value))


def _values(pairs: Pairs, value: Value) -> tuple[list[Any], list[Any]]:
    """Returns the values of the pairs that have both."""
    values = [(value(a), value(b)) for a, b in pairs]
    both = [(a, b) for a, b in values if a is not None and b is not None]
    return [a for a, _ in both], [b for _, b in both]
