"""The bootstrap by groups: paired totals, agreement of interval and p, and its rate of false positives."""

import numpy as np
import pytest

from lilliput.statistics.grouped import chance_totals, compare_resampled, resample_totals


def test_totals_of_a_resample_are_sums_of_whole_groups():
    values = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]])
    totals = resample_totals(values, ["a", "a", "b", "b"], 0, 200)
    assert totals.shape == (200, 2)
    assert set(totals[:, 0]) == {6.0, 15.0, 24.0}  # aa, ab, bb; never a part of a group
    assert (totals[:, 1] == 10.0 * totals[:, 0]).all()  # columns are paired
    again = resample_totals(values, ["a", "a", "b", "b"], 0, 200)
    assert (totals == again).all()


def test_draws_in_batches_have_the_means_of_the_data():
    values = np.arange(3000.0)[:, None]
    totals = resample_totals(values, [str(n) for n in range(3000)], 1, 500)  # more than one batch
    assert totals.mean() == pytest.approx(values.sum(), rel=0.01)
    assert totals.std() == pytest.approx(values.std() * np.sqrt(3000), rel=0.15)


def mean_difference(differences, groups, resamples=400):
    values = np.stack([differences, np.ones(len(differences))], axis=1)
    totals = resample_totals(values, groups, 0, resamples)
    return compare_resampled(
        float(np.mean(differences)), totals[:, 0] / totals[:, 1], len(differences), len(set(groups))
    )


def test_interval_and_p_agree():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.2, 0.5):
        found = mean_difference(rng.normal(shift, 1.0, 100), [str(n) for n in range(100)])
        assert (found.p_value >= 0.05) == (found.difference.low <= 0.0 <= found.difference.high)
        assert found.difference.n == 100


def test_no_difference_at_all_is_not_shown():
    found = mean_difference(np.zeros(20), [str(n) for n in range(20)])
    assert (found.p_value, found.verdict) == (1.0, "not shown")


def test_few_groups_cannot_tell():
    found = mean_difference(np.ones(100), [str(n % 4) for n in range(100)])
    assert found.verdict == "cannot tell"


def test_false_positives_of_rows_that_are_alike_within_their_group():
    """Each group of ten rows has one value: resampling rows would find a difference in more than half of the cases."""
    rng = np.random.default_rng(3)
    groups = [str(n // 10) for n in range(400)]
    by_group = by_row = 0
    for _ in range(200):
        differences = np.repeat(rng.choice([-1.0, 1.0], 40), 10)
        by_group += mean_difference(differences, groups, 200).real
        by_row += mean_difference(differences, [str(n) for n in range(400)], 200).real
    assert by_group / 200 < 0.10
    assert by_row / 200 > 0.40


def test_chance_keeps_groups_together_and_has_the_mean_of_unrelated_values():
    rng = np.random.default_rng(4)
    first, second = np.repeat(rng.choice([0.0, 1.0], 40), 10), np.repeat(rng.choice([-1.0, 1.0], 40), 10)
    together = chance_totals(first, second, [str(n // 10) for n in range(400)], 0, 1000)
    alone = chance_totals(first, second, [str(n) for n in range(400)], 0, 1000)
    assert together.mean() == pytest.approx(first.sum() * second.mean(), abs=5.0)
    assert together.std() == pytest.approx(np.sqrt(10) * alone.std(), rel=0.15)  # ten alike rows are one observation


def test_a_difference_that_chance_often_gives_is_not_shown():
    resampled = np.full(999, 0.1)  # never on the other side of zero
    assert compare_resampled(0.1, resampled, 100, 50).real
    assert not compare_resampled(0.1, resampled, 100, 50, np.linspace(-0.2, 0.2, 999)).real
    assert compare_resampled(0.1, resampled, 100, 50, np.linspace(-0.05, 0.05, 999)).real
