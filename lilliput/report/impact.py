"""The effect of each strategy on each metric as arrows: the paper's Fig. 1C, computed from paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Columns: metric, title, and whether larger is better.
METRICS = {
    "accuracy_choice": ("Generalization accuracy", True),
    "hallucination_rate": ("Hallucination rate", False),
    "energy_per_query_j": ("Energy per query", False),
    "ttft_ms": ("Accessibility: time to first token", False),
    "size_bytes": ("Accessibility: bytes", False),
}


@dataclass(frozen=True)
class Impact:
    """One arrow: ↑ more, ↓ less, ≈ no difference shown, ? too few to tell, – not compared.

    Attributes:
        good: whether the change is an improvement; None without a change.
        details: difference, interval and n.
    """

    arrow: str
    good: bool | None
    details: str


def impacts(candidates: Sequence[Mapping[str, Any]], differences: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per candidate and reference: candidate, title and an Impact for each of METRICS.

    Args:
        candidates: rows of name, record and `steps`: by reference, the strategies between it and the candidate.
        differences: rows of candidate, reference, metric, difference (value, low, high, n) and verdict.
    """
    pairs = {(row["candidate"], row["reference"], row["metric"]): row for row in differences}
    sizes = {row["name"]: row["record"]["size_bytes"] for row in candidates}
    rows = []
    for row in candidates:
        for reference, strategy in row["steps"].items():
            cells = {metric: _of_difference(pairs.get((row["name"], reference, metric)), metric) for metric in METRICS}
            cells["size_bytes"] = _of_sizes(sizes[reference], sizes[row["name"]])
            against = f"{row['name']} against {reference}"
            rows.append({"candidate": row["name"], "title": strategy, "against": against, "cells": cells})
    return rows


def caching_impacts(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the same kind of rows for prefix reuse, and for the answer cache in addition.

    Args:
        records: caching records by candidate.
    """
    rows = []
    for name, record in records.items():
        steps = {"prefix": "prefix reuse", "cache": "answer cache, added to prefix reuse"}
        for step, title in steps.items():
            differences = record["differences"][step]
            cells = {metric: _of_difference(_as_row(differences.get(metric)), metric) for metric in METRICS}
            cache_bytes = record["cache_bytes"] if step == "cache" else 0
            cells["size_bytes"] = _of_sizes(record["size_bytes"], record["size_bytes"] + cache_bytes)
            against = f"{name}, {record['queries']} queries"
            rows.append({"candidate": name, "title": title, "against": against, "cells": cells})
    return rows


def _as_row(difference: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return difference and {"difference": difference, "verdict": difference["verdict"]}


def _of_difference(row: Mapping[str, Any] | None, metric: str) -> Impact:
    if row is None:
        return Impact("–", None, "not compared")
    difference = row["difference"]
    details = (
        "{value:+.3g} [{low:+.3g},\N{NO-BREAK SPACE}{high:+.3g}], n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{n}".format(
            **difference
        )
    )
    if row["verdict"] != "yes":
        return Impact("?" if row["verdict"] == "cannot tell" else "≈", None, details)
    rises = difference["value"] > 0
    return Impact("↑" if rises else "↓", rises == METRICS[metric][1], details)


def _of_sizes(before: int, after: int) -> Impact:
    """Compares exact byte counts: any difference of at least 1 % after rounding is real."""
    change = round(after / before - 1, 2)
    details = f"{change:+.0%}, counted"
    return Impact("↑" if change > 0 else "↓", change < 0, details) if change else Impact("≈", None, details)
