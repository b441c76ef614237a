"""Two candidates compared on the questions that both answered: whether there is a difference, and how large it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.statistics.differences import Comparison, compare_means, compare_shares

# What each answer row holds of a metric: a yes-or-no that it is the share of, or a figure that it is the mean of.
YES_OR_NO = {"accuracy_choice": "choice_right", "accuracy_free": "right", "hallucination_rate": "hallucinated"}
FIGURES = {"energy_per_query_j": "energy_j", "ttft_ms": "ttft_ms"}


def compare(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Comparison]:
    """Differences of the second candidate from the first on the questions both answered, by metric.

    Energies of different sources are not compared, nor are figures of a single question.
    """
    others = {row["id"]: row for row in second}
    pairs = [(row, others[row["id"]]) for row in first if row["id"] in others]
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
