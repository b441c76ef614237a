import tracemalloc

import numpy as np
import pytest

from lilliput.evaluate.compare import compare
from lilliput.evaluate.intervals import detectable_difference, mcnemar_p, mean, rate, statistic


def test_wilson_interval_of_81_in_263():
    found = rate([True] * 81 + [False] * 182)  # Newcombe 1998, table I
    assert (found.value, found.n) == (pytest.approx(81 / 263), 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


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


def test_mcnemar_is_the_sign_test_of_the_changes():
    before, after = [True] * 2 + [False] * 8 + [True] * 5, [False] * 2 + [True] * 8 + [True] * 5
    assert mcnemar_p(before, after) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar_p([True], [True]) == 1.0


def test_comparison_pairs_by_question_and_ignores_what_only_one_answered():
    first = [{"id": str(n), "choice_right": n < 50, "right": None} for n in range(100)]
    second = [{"id": str(n), "choice_right": n < 60, "right": True} for n in range(99, -1, -1)] + [
        {"id": "x", "choice_right": True}
    ]
    found = compare(first, second, seed=0, resamples=500)
    assert found.keys() == {"accuracy_choice"}
    difference = found["accuracy_choice"].difference
    assert (difference.value, difference.n) == (pytest.approx(0.1), 100)
    assert 0.03 < difference.low < 0.1 < difference.high < 0.17
    assert found["accuracy_choice"].p_value == pytest.approx(2 / 2**10)


def test_a_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    n, worse, better = 400, 0.10, 0.04
    draw = rng.choice([-1.0, 0.0, 1.0], p=[worse, 1 - worse - better, better], size=(2000, n))
    visible = np.array([detectable_difference(row) for row in draw])
    assert visible.std() < 0.1 * visible.mean()
    # Shifted to a true difference as large as said, how often does the interval exclude zero?
    error = draw.std(axis=1) / np.sqrt(n)
    shifted = draw.mean(axis=1) - (better - worse) + visible.mean()
    assert np.mean(np.abs(shifted) > 1.96 * error) == pytest.approx(0.8, abs=0.03)


def test_no_change_at_all_is_no_proof_of_equality():
    assert 0.0 < detectable_difference(np.zeros(400)) < 0.02
    assert detectable_difference(np.zeros(40)) > detectable_difference(np.zeros(400))


def test_figures_are_compared_by_wilcoxon_and_energies_of_different_sources_not_at_all():
    def rows(energy, source):
        return [{"id": str(n), "energy_j": energy + n / 10, "energy_source": source, "ttft_ms": 5.0} for n in range(12)]

    found = compare(rows(2.0, "rapl"), rows(1.5, "rapl"), 0, 200)
    assert found["energy_per_query_j"].difference.value == pytest.approx(-0.5)
    assert found["energy_per_query_j"].real and found["energy_per_query_j"].p_value < 0.01
    assert not found["ttft_ms"].real and found["ttft_ms"].p_value == 1.0
    assert "energy_per_query_j" not in compare(rows(2.0, "rapl"), rows(1.5, "estimate_tdp"), 0, 200)
    # A candidate that rambled was timed on fewer queries: the others have neither joules nor a source.
    fewer = [row if n < 9 else {"id": row["id"]} for n, row in enumerate(rows(1.5, "rapl"))]
    assert compare(rows(2.0, "rapl"), fewer, 0, 200)["energy_per_query_j"].difference.n == 9
    unread = [row | {"energy_j": None} for row in rows(0.0, "rapl")]
    assert "energy_per_query_j" not in compare(rows(2.0, "rapl"), unread, 0, 200)
