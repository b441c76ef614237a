"""Values with intervals: Wilson for rates, seeded bootstrap otherwise. For paired differences see differences.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from lilliput.records import Estimate

CONFIDENCE = 0.95
POWER = 0.8
_DRAWN_AT_ONCE = 2**20


def rate(outcomes: Sequence[bool]) -> Estimate | None:
    """Returns the share of true `outcomes` with its Wilson interval (Wilson 1927); None without observations."""
    if not outcomes:
        return None
    return Estimate(sum(outcomes) / len(outcomes), *_wilson(sum(outcomes), len(outcomes)), len(outcomes))


def _wilson(right: int, n: int) -> tuple[float, float]:
    """Returns Wilson's interval, as scipy.stats does, whose import takes longer than all other statistics."""
    z2 = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2.0) ** 2
    centre, margin = right + z2 / 2.0, math.sqrt(z2 * (right * (n - right) / n + z2 / 4.0))
    low = (centre - margin) / (n + z2) if right else 0.0
    high = (centre + margin) / (n + z2) if right < n else 1.0
    return low, high


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
