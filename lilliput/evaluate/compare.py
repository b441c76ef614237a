"""Is the difference between two candidates real? Paired on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lilliput.evaluate.intervals import Estimate, detectable_difference, mcnemar_p, mean, wilcoxon_p

# What each answer row holds of a metric: a yes-or-no that it is the share of, or a figure that it is the mean of.
YES_OR_NO = {"accuracy_choice": "choice_right", "accuracy_free": "right", "hallucination_rate": "hallucinated"}
FIGURES = {"energy_per_query_j": "energy_j", "ttft_ms": "ttft_ms"}


@dataclass(frozen=True)
class Comparison:
    """The mean paired difference, second minus first.

    Attributes:
        difference: with its interval.
        p_value: how likely so lopsided changes are by chance: McNemar's test, for figures Wilcoxon's.
        detectable: a true difference this large would be found four times in five with as many questions.
    """

    difference: Estimate
    p_value: float
    detectable: float

    @property
    def real(self) -> bool:
        """Whether the interval excludes zero."""
        return self.difference.low > 0.0 or self.difference.high < 0.0


def compare(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], seed: int, resamples: int
) -> dict[str, Comparison]:
    """Differences of the second candidate from the first on the questions both answered, by metric.

    Energies of different sources are not compared.
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
        both = [(a[key], b[key]) for a, b in answered]
        differences = np.array([float(b) - float(a) for a, b in both])
        estimate = mean(differences, seed, resamples)
        if estimate:
            test = mcnemar_p if metric in YES_OR_NO else wilcoxon_p
            p_value = test([a for a, _ in both], [b for _, b in both])
            comparisons[metric] = Comparison(estimate, p_value, detectable_difference(differences))
    return comparisons
