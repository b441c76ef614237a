"""Values with their intervals: Wilson for rates, seeded bootstrap for the rest; differences.py has those of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
_DRAWN_AT_ONCE = 2**20


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


def as_dict(estimate: Estimate | None) -> dict[str, Any]:
    """For a record; one that says so where there was nothing to observe."""
    return estimate.as_dict() if estimate else {"value": None, "low": None, "high": None, "n": 0}


def rate(outcomes: Sequence[bool]) -> Estimate | None:
    """The share of true `outcomes` with its Wilson interval (Wilson 1927); None without observations."""
    if not outcomes:
        return None
    found = stats.binomtest(sum(outcomes), len(outcomes)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(sum(outcomes) / len(outcomes), float(found.low), float(found.high), len(outcomes))


def mean(values: Sequence[float] | np.ndarray, seed: int, resamples: int) -> Estimate | None:
    """The mean with its bootstrap percentile interval; None without observations."""
    return statistic(lambda draw: draw.mean(axis=-1), np.asarray(values, dtype=float), seed, resamples)


def statistic(of: Callable[[np.ndarray], np.ndarray], values: np.ndarray, seed: int, resamples: int) -> Estimate | None:
    """`of(values)` with its bootstrap percentile interval over the first axis; None without observations.

    Args:
        of: takes an array of shape (…, n) or, for rows of several figures, (…, n, figures), to one of shape (…,).
        values: the observations, of shape (n,) or (n, figures).
        seed: of the resampling.
        resamples: how many.
    """
    if len(values) == 0:
        return None
    rng, at_once = np.random.default_rng(seed), max(1, _DRAWN_AT_ONCE // len(values))
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    # The same stream of draws as in one go, without an array of resamples × n.
    found = [of(values[rng.integers(0, len(values), size=(size, len(values)))]) for size in sizes]
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(np.concatenate(found), [tail, 1.0 - tail])
    return Estimate(float(of(values)), float(low), float(high), len(values))
