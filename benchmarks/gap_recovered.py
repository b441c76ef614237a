"""RouteLLM's measures of a router between a weak and a strong model (arXiv 2406.18665, section 4.2).

PGR, the performance gap recovered, is the router's gain over the weak model, divided by that of the strong model alone.
APGR is the area under PGR over the share of strong calls: 0.5 for random routing. CPT(x) is the least share of strong
calls that recovers the share x of the gap: x itself for random routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lilliput.records import Figure
from lilliput.statistics.grouped import resample_counts
from lilliput.statistics.intervals import CONFIDENCE

RECOVERED = (0.5, 0.8)


def measures(
    score: np.ndarray, gain: np.ndarray, groups: Sequence[str], seed: int, resamples: int
) -> dict[str, Figure]:
    """Returns APGR, CPT(50 %) and CPT(80 %), with bootstrap intervals that draw whole groups of questions.

    Questions of equal score are sent in random order.

    Args:
        score: of each question; the largest goes to the strong model first.
        gain: right answers of the strong model minus those of the weak one, for each question.
        groups: of the questions.
        seed: of the order and of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        ValueError: the strong model is not better, so there is no gap.
    """
    if gain.sum() <= 0.0:
        raise ValueError("the strong model has no more right answers than the weak one, so there is no gap to recover")
    order = np.lexsort((np.random.default_rng(seed).random(len(score)), -score))
    names = ("apgr", *(f"cpt_{100 * share:.0f}" for share in RECOVERED))
    observed = _measures(np.ones(len(gain)), gain[order])
    _, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    drawn = np.stack(
        [_measures(counts[group_of_row[order]], gain[order]) for counts in resample_counts(groups, seed, resamples)]
    )
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail], axis=0)
    return {
        name: Figure(value=float(observed[at]), low=float(low[at]), high=float(high[at]), n=len(gain))
        for at, name in enumerate(names)
    }


def _measures(weight: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Returns APGR and each CPT of questions in the order in which they are sent, each `weight` times in the data.

    CPT is 1 if the gap is never recovered, as in a resample without a gap.
    """
    share = np.concatenate([[0.0], np.cumsum(weight) / weight.sum()])
    won = np.concatenate([[0.0], np.cumsum(weight * gain)])
    recovered = won / won[-1] if won[-1] > 0.0 else np.zeros(len(won))
    reached = [recovered >= target - 1e-12 for target in RECOVERED]
    first = [float(share[np.argmax(found)]) if found.any() else 1.0 for found in reached]
    return np.array([np.trapezoid(recovered, share), *first])
