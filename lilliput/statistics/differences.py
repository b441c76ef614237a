"""Paired differences: one test per kind of metric, and a matching interval.

Shares use McNemar's exact test with Tango's score interval; means use Student's t for both. An interval contains zero
exactly if the test's p is at least 1 − CONFIDENCE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy import optimize, stats

from lilliput.records import Difference, Estimate, Verdict
from lilliput.statistics.intervals import CONFIDENCE, POWER

SIGNIFICANCE = 1.0 - CONFIDENCE


@dataclass(frozen=True)
class Comparison:
    """The mean paired difference, second minus first.

    Attributes:
        difference: with its interval.
        p_value: of the two-sided test of no difference.
        detectable: true difference that this number of questions would show with 80 % power.
        least_p: smallest p that any outcome of this number of pairs could give.
    """

    difference: Estimate
    p_value: float
    detectable: float
    least_p: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Whether there is a difference, by p-value; the interval agrees."""
        if self.least_p >= SIGNIFICANCE:
            return "cannot tell"
        return "yes" if self.p_value < SIGNIFICANCE else "not shown"

    @property
    def record(self) -> Difference:
        """The form used in a record."""
        others = {"p": self.p_value, "detectable": self.detectable, "verdict": self.verdict}
        return Difference.of(self.difference, **others)

    @property
    def real(self) -> bool:
        """Whether the difference is significant."""
        return self.verdict == "yes"


def compare_shares(before: Sequence[bool], after: Sequence[bool]) -> Comparison:
    """Returns the paired difference of two shares: McNemar's exact test and Tango's interval (Stat. Med. 17, 1998).

    Tango's interval is approximate: if it excludes zero while the test shows no difference, it is extended to zero.
    """
    n = len(before)
    gained = sum(a > b for b, a in zip(before, after, strict=True))
    lost = sum(a < b for b, a in zip(before, after, strict=True))
    p_value = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    interval = _agreeing(*_tango(gained, lost, n), p_value)
    differences = np.array(after, dtype=float) - np.array(before, dtype=float)
    least_p = min(1.0, 2.0 ** (1 - n))
    return Comparison(Estimate((gained - lost) / n, *interval, n), p_value, detectable_difference(differences), least_p)


def compare_means(before: Sequence[float], after: Sequence[float]) -> Comparison | None:
    """Returns the mean paired difference with Student's t test and interval; None for fewer than two pairs."""
    differences = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    n = len(differences)
    if n < 2:  # the variance is unknown
        return None
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n)
    margin = float(stats.t.ppf(0.5 + CONFIDENCE / 2.0, n - 1)) * error
    p_value = float(2.0 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(not mean)
    estimate = Estimate(mean, *_agreeing(mean - margin, mean + margin, p_value), n)
    return Comparison(estimate, p_value, detectable_difference(differences))


def detectable_difference(differences: np.ndarray) -> float:
    """Returns the mean paired difference that this number of pairs shows at 95 % confidence with 80 % power.

    (z₀.₉₇₅ + z₀.₈) · s / √n, where s is the standard deviation of the pairs' differences. With fewer than two changed
    pairs, or equal changes in all, s is computed as if two had changed: no observed change does not prove s = 0.
    """
    n = len(differences)
    least = np.sqrt(2.0 / n) * (np.abs(differences).max() or 1.0)
    alike = np.count_nonzero(differences) < 2 or not np.ptp(differences)
    deviation = max(float(np.std(differences)), least if alike else 0.0)
    return float((stats.norm.ppf(0.5 + CONFIDENCE / 2.0) + stats.norm.ppf(POWER)) * deviation / np.sqrt(n))


def _tango(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Returns the interval of differences of two paired shares that the score test does not reject."""
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2.0))
    observed = (gained - lost) / n

    def excess(delta: float) -> float:
        """Negative if the score test accepts `delta`."""
        linear = (2 * n - gained + lost) * delta - gained - lost
        constant = -lost * delta * (1.0 - delta)
        lost_share = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
        variance = n * (2.0 * lost_share + delta * (1.0 - delta))
        return (gained - lost - n * delta) ** 2 - z**2 * max(variance, 0.0)

    # Not at `observed` itself, where the variance may be zero.
    low = -1.0 if observed == -1.0 else cast("float", optimize.brentq(excess, -1.0, observed - 1e-9))
    high = 1.0 if observed == 1.0 else cast("float", optimize.brentq(excess, observed + 1e-9, 1.0))
    return low, high


def _agreeing(low: float, high: float, p_value: float) -> tuple[float, float]:
    """Returns the interval, adjusted to contain zero exactly if `p_value` shows no difference."""
    if p_value >= SIGNIFICANCE:
        return min(low, 0.0), max(high, 0.0)
    if low <= 0.0 <= high:  # a rounding error: the nearer bound is zero up to the last digits
        return (math.nextafter(0.0, 1.0), high) if high > -low else (low, math.nextafter(0.0, -1.0))
    return low, high
