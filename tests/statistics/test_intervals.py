import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lilliput.statistics.intervals import mean, rate, statistic


def test_wilson_interval_of_81_in_263():
    found = rate([True] * 81 + [False] * 182)  # Newcombe 1998, table I
    assert (found.value, found.n) == (pytest.approx(81 / 263), 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_rates_have_the_wilson_interval_of_scipy(counts):
    right, n = counts
    estimate = rate([True] * right + [False] * (n - right))
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_rates_at_the_border_keep_an_interval():
    assert rate([True] * 10).low == pytest.approx(0.7225, abs=1e-4)
    assert rate([False] * 10).high == pytest.approx(0.2775, abs=1e-4)


def test_no_observation_is_no_value():
    assert rate([]) is None
    assert mean([], 0, 100) is None


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    values = np.random.default_rng(0).normal(5.0, 1.0, 400).tolist()
    first, second, third = mean(values, 1, 2000), mean(values, 1, 2000), mean(values, 2, 2000)
    assert first == second != third
    assert first.high - first.low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.1)
    assert first.low < first.value < first.high


def test_bootstrap_of_many_observations_draws_as_in_one_go_and_holds_a_part_of_it():
    values, resamples = np.random.default_rng(0).normal(5.0, 1.0, 20_000), 300
    in_one_go = values[np.random.default_rng(7).integers(0, len(values), size=(resamples, len(values)))].mean(axis=-1)
    tracemalloc.start()
    found = mean(values, 7, resamples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [found.low, found.high] == np.quantile(in_one_go, [0.025, 0.975]).tolist()
    assert peak < resamples * values.nbytes


def test_bootstrap_of_a_ratio_resamples_rows_together():
    rows = np.array([[2.0, 1.0], [4.0, 2.0], [6.0, 3.0]])
    found = statistic(lambda draw: draw[..., 0].sum(-1) / draw[..., 1].sum(-1), rows, 0, 200)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
