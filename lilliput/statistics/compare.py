"""Compares two candidates on the questions that both answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.statistics.differences import Comparison, compare_means, compare_shares

# Key of each metric in answer rows: the metric is the share of true values, or the mean of figures.
YES_OR_NO = {"accuracy_choice": "choice_right", "accuracy_free": "right", "hallucination_rate": "hallucinated"}
FIGURES = {"energy_per_query_j": "energy_j", "ttft_ms": "ttft_ms"}


def compare(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Comparison]:
    """Returns, by metric, the paired difference of the second candidate from the first.

    Omits energies of different sources, and figures of a single question.
    """
    second_by_id = {row["id"]: row for row in second}
    pairs = [(row, second_by_id[row["id"]]) for row in first if row["id"] in second_by_id]
    comparisons = {}
    for metric, key in (YES_OR_NO | FIGURES).items():
        answered = [(a, b) for a, b in pairs if a.get(key) is not None and b.get(key) is not None]
        if metric == "energy_per_query_j" and any(
            a.get("energy_source") != b.get("energy_source") for a, b in answered
        ):
            continue
        test = compare_shares if metric in YES_OR_NO else compare_means
        if answered and (comparison := test([a[key] for a, _ in answered], [b[key] for _, b in answered])):
            comparisons[metric] = comparison
    return comparisons
