"""What each strategy does to each metric, as arrows: the paper's Fig. 1C, computed from paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Column by column: what is compared, what it is called, and whether more of it is better.
METRICS = {
    "accuracy_choice": ("Generalization accuracy", True),
    "hallucination_rate": ("Hallucination rate", False),
    "energy_per_query_j": ("Energy per query", False),
    "ttft_ms": ("Accessibility: time to first token", False),
    "size_bytes": ("Accessibility: bytes", False),
}


@dataclass(frozen=True)
class Impact:
    """One arrow: ↑ more, ↓ less, ≈ no difference shown, ? too few to tell, – not compared; and what stands behind it.

    Attributes:
        good: whether the arrow points to the better side; None where there is none.
        behind: difference, interval and n, for the reader who wants to know.
    """

    arrow: str
    good: bool | None
    behind: str


def impacts(candidates: Sequence[Mapping[str, Any]], differences: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each candidate and what it is compared with: candidate, title and an Impact for each of METRICS.

    Args:
        candidates: rows of name, record and `steps`: by candidate to compare with, the strategies that lead from there.
        differences: rows of candidate, reference, metric, difference (value, low, high, n) and verdict.
    """
    found = {(row["candidate"], row["reference"], row["metric"]): row for row in differences}
    sizes = {row["name"]: row["record"]["size_bytes"] for row in candidates}
    rows = []
    for row in candidates:
        for reference, strategy in row["steps"].items():
            cells = {metric: _of_difference(found.get((row["name"], reference, metric)), metric) for metric in METRICS}
            cells["size_bytes"] = _of_sizes(sizes[reference], sizes[row["name"]])
            against = f"{row['name']} against {reference}"
            rows.append({"candidate": row["name"], "title": strategy, "against": against, "cells": cells})
    return rows


def caching_impacts(measured: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same form for prefix reuse, and for the answer cache on top of it.

    Args:
        measured: the caching record of each candidate that has one.
    """
    rows = []
    for name, record in measured.items():
        steps = {"prefix": "prefix reuse", "cache": "answer cache, added to prefix reuse"}
        for step, title in steps.items():
            found = record["differences"][step]
            cells = {metric: _of_difference(_as_row(found.get(metric)), metric) for metric in METRICS}
            more = record["cache_bytes"] if step == "cache" else 0
            cells["size_bytes"] = _of_sizes(record["size_bytes"], record["size_bytes"] + more)
            against = f"{name}, {record['queries']} queries"
            rows.append({"candidate": name, "title": title, "against": against, "cells": cells})
    return rows


def _as_row(found: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return found and {"difference": found, "verdict": found["verdict"]}


def _of_difference(row: Mapping[str, Any] | None, metric: str) -> Impact:
    if row is None:
        return Impact("–", None, "not compared")
    difference = row["difference"]
    behind = (
        "{value:+.3g} [{low:+.3g},\N{NO-BREAK SPACE}{high:+.3g}], n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{n}".format(
            **difference
        )
    )
    if row["verdict"] != "yes":
        return Impact("?" if row["verdict"] == "cannot tell" else "≈", None, behind)
    rises = difference["value"] > 0
    return Impact("↑" if rises else "↓", rises == METRICS[metric][1], behind)


def _of_sizes(before: int, after: int) -> Impact:
    """Bytes are counted, not estimated: any difference is real, if it is not rounded away."""
    change = round(after / before - 1, 2)
    behind = f"{change:+.0%}, counted"
    return Impact("↑" if change > 0 else "↓", change < 0, behind) if change else Impact("≈", None, behind)
