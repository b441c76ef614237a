"""Is the difference between two candidates real? Paired on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lilliput.evaluate.intervals import Estimate, mcnemar_p, mean

# The yes-or-no of each answer row that a metric is the mean of.
PAIRED = {"accuracy_choice": "choice_right", "accuracy_free": "right", "hallucination_rate": "hallucinated"}


@dataclass(frozen=True)
class Comparison:
    """The mean paired difference (second minus first), and how likely so lopsided changes are by chance."""

    difference: Estimate
    p_value: float


def compare(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], seed: int, resamples: int
) -> dict[str, Comparison]:
    """Differences of the second candidate from the first on the questions both answered, by metric."""
    others = {row["id"]: row for row in second}
    pairs = [(row, others[row["id"]]) for row in first if row["id"] in others]
    comparisons = {}
    for metric, key in PAIRED.items():
        both = [(a[key], b[key]) for a, b in pairs if a.get(key) is not None and b.get(key) is not None]
        difference = mean([float(b) - float(a) for a, b in both], seed, resamples)
        if difference:
            comparisons[metric] = Comparison(difference, mcnemar_p([a for a, _ in both], [b for _, b in both]))
    return comparisons
