"""Values with intervals: Wilson for rates, seeded bootstrap otherwise. For paired differences see differences.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from lilliput.records import Estimate

CONFIDENCE = 0.95
POWER = 0.8
_DRAWN_AT_ONCE = 2**20


def rate(outcomes: Sequence[bool]) -> Estimate | None:
    """Returns the share of true `outcomes` with its Wilson interval (Wilson 1927); None without observations."""
    if not outcomes:
        return None
    interval = stats.binomtest(sum(outcomes), len(outcomes)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(sum(outcomes) / len(outcomes), float(interval.low), float(interval.high), len(outcomes))


def mean(values: Sequence[float] | np.ndarray, seed: int, resamples: int) -> Estimate | None:
    """Returns the mean with its bootstrap percentile interval; None without observations."""
    return statistic(lambda draw: draw.mean(axis=-1), np.asarray(values, dtype=float), seed, resamples)


def statistic(of: Callable[[np.ndarray], np.ndarray], values: np.ndarray, seed: int, resamples: int) -> Estimate | None:
    """Returns `of(values)` with its bootstrap percentile interval over the first axis; None without observations.

    Args:
        of: maps an array of shape (…, n), or (…, n, figures) for rows of several figures, to one of shape (…,).
        values: observations, shape (n,) or (n, figures).
        seed: of the resampling.
        resamples: their number.
    """
    if len(values) == 0:
        return None
    rng, batch = np.random.default_rng(seed), max(1, _DRAWN_AT_ONCE // len(values))
    sizes = [min(batch, resamples - start) for start in range(0, resamples, batch)]
    # Batches give the same random draws as one array of resamples × n, in less memory.
    resampled = [of(values[rng.integers(0, len(values), size=(size, len(values)))]) for size in sizes]
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(np.concatenate(resampled), [tail, 1.0 - tail])
    return Estimate(float(of(values)), float(low), float(high), len(values))
