"""A bootstrap that draws whole groups: for questions about one entity, whose results are not independent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

from lilliput.records import Estimate
from lilliput.statistics.differences import SIGNIFICANCE, Comparison
from lilliput.statistics.intervals import CONFIDENCE, POWER


def resample_totals(values: np.ndarray, groups: Sequence[str], seed: int, resamples: int) -> np.ndarray:
    """Returns the column totals of each resample, shape (resamples, columns).

    A resample draws as many groups as there are, with replacement, and takes all rows of each (the cluster bootstrap,
    Davison & Hinkley 1997, section 3.8). All columns of a resample come from the same draw, so they are paired.

    Args:
        values: shape (rows, columns).
        groups: the group of each row.
        seed: of the resampling.
        resamples: their number.
    """
    names, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    of_group = np.zeros((len(names), values.shape[1]))
    np.add.at(of_group, group_of_row, values)
    return np.stack([counts @ of_group for counts in resample_counts(groups, seed, resamples)])


def resample_counts(groups: Sequence[str], seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Yields, for each resample, how often each group was drawn, shape (groups,), in the order of their names."""
    rng, count = np.random.default_rng(seed), len(set(groups))
    for _ in range(resamples):
        yield np.bincount(rng.integers(0, count, size=count), minlength=count).astype(float)


def chance_totals(first: np.ndarray, second: np.ndarray, groups: Sequence[str], seed: int, draws: int) -> np.ndarray:
    """Returns the totals of `first` × `second` if the two were unrelated, shape (draws,).

    Each draw lines up the groups of the first in one random order and those of the second in another, and multiplies
    row by row. So neighbouring rows stay as alike as they are within their group.

    Args:
        first: of each row, shape (rows,).
        second: likewise.
        groups: the group of each row.
        seed: of the draws.
        draws: their number.
    """
    rng, (names, group_of_row) = np.random.default_rng(seed), np.unique(np.asarray(groups), return_inverse=True)

    def shuffled() -> np.ndarray:
        return np.argsort(rng.permutation(len(names))[group_of_row], kind="stable")

    return np.array([first[shuffled()] @ second[shuffled()] for _ in range(draws)])


def compare_resampled(
    observed: float, resampled: np.ndarray, rows: int, groups: int, chance: np.ndarray | None = None
) -> Comparison:
    """Returns a difference with its percentile interval and a two-sided p; the interval contains zero if p shows none.

    p counts resamples on the other side of zero. It is never below 2 ÷ (resamples + 1), nor below 2 ^ (1 − groups), the
    least that a sign test on so few groups could give, nor below the p of `chance`: where a difference depends on a few
    rows, no resample may be on the other side although chance often gives as much.

    Args:
        observed: the difference in the data.
        resampled: the differences in the resamples, shape (resamples,).
        rows: number of rows.
        groups: number of groups.
        chance: differences without any effect, shape (draws,); None if unknown.
    """
    least_p = max(2.0 / (len(resampled) + 1), min(1.0, 2.0 ** (1 - groups)))
    p_value = max(least_p, _two_sided(resampled, 0.0))
    if chance is not None:
        p_value = max(p_value, _two_sided(chance, observed))
    low, high = map(float, np.quantile(resampled, [SIGNIFICANCE / 2.0, 1.0 - SIGNIFICANCE / 2.0]))
    if p_value >= SIGNIFICANCE:
        low, high = min(low, 0.0), max(high, 0.0)
    detectable = float((stats.norm.ppf(0.5 + CONFIDENCE / 2.0) + stats.norm.ppf(POWER)) * resampled.std())
    return Comparison(Estimate(observed, low, high, rows), p_value, detectable, least_p)


def _two_sided(draws: np.ndarray, value: float) -> float:
    """Returns twice the share of draws beyond `value`, on the side with fewer, each counted with one more draw."""
    beyond = min(np.count_nonzero(draws <= value), np.count_nonzero(draws >= value))
    return min(1.0, 2.0 * (1 + beyond) / (len(draws) + 1))
