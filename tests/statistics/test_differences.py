"""Paired differences: the published example, coverage, and that verdict, p and interval never contradict each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lilliput.statistics.compare import compare
from lilliput.statistics.differences import SIGNIFICANCE, compare_means, compare_shares, detectable_difference


def shares(gained, lost, same):
    """The comparison of pairs of which so many changed to yes, to no, and not."""
    return compare_shares([False] * gained + [True] * (lost + same), [True] * gained + [False] * lost + [True] * same)


def assert_agreement(found):
    estimate = found.difference
    holds_zero = estimate.low <= 0.0 <= estimate.high
    assert estimate.low <= estimate.value <= estimate.high
    assert holds_zero == (found.p_value >= SIGNIFICANCE)
    match found.verdict:
        case "yes":
            assert not holds_zero
        case "not shown":
            assert holds_zero and found.least_p < SIGNIFICANCE
        case "cannot tell":
            assert holds_zero and found.least_p >= SIGNIFICANCE


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400))
def test_verdict_p_and_interval_of_shares_agree(gained, lost, same):
    if gained + lost + same:
        found = shares(gained, lost, same)
        assert_agreement(found)
        assert found.difference.low >= -1.0 and found.difference.high <= 1.0
        mirrored = shares(lost, gained, same)
        assert mirrored.difference.low == pytest.approx(-found.difference.high, abs=1e-6)
        assert mirrored.verdict == found.verdict


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40), st.floats(-1e3, 1e3))
def test_verdict_p_and_interval_of_means_agree(values, shift):
    assert_agreement(compare_means([0.0] * len(values), values))
    assert_agreement(compare_means(values, [value + shift for value in values]))


@given(st.integers(1, 5), st.data())
def test_fewer_than_six_questions_cannot_tell_and_six_can(n, data):
    gained = data.draw(st.integers(0, n))
    assert shares(gained, n - gained, 0).verdict == "cannot tell"
    assert shares(6, 0, 0).verdict == "yes" and shares(5, 0, 1).verdict == "not shown"


def test_four_changes_of_four_show_no_difference():
    found = shares(4, 0, 0)
    assert (found.p_value, found.verdict) == (0.125, "cannot tell")
    assert (found.difference.low, found.difference.high) == (0.0, 1.0)


def test_tangos_interval_of_the_published_example():
    # Airway hyper-responsiveness before and after transplantation (Bentur et al. 2009). Fagerland, Lydersen and Laake
    # (2014) give Tango's interval, -0.517 to -0.026, and the exact p, 0.070. Zero is added, as that p asks for.
    found = compare_shares([True] * 8 + [False] * 13, [True] * 1 + [False] * 7 + [True] * 1 + [False] * 12)
    assert (found.difference.value, found.p_value) == (pytest.approx(-6 / 21), pytest.approx(0.0703, abs=1e-4))
    assert (found.difference.low, found.difference.high) == (pytest.approx(-0.517, abs=1e-3), 0.0)


def test_no_change_at_all_leaves_room_for_one():
    found = shares(0, 0, 100)
    z = stats.norm.ppf(0.975)
    assert found.difference.high == pytest.approx(z**2 / (100 + z**2), abs=1e-6)
    assert (found.difference.low, found.p_value) == (pytest.approx(-found.difference.high), 1.0)


@pytest.mark.parametrize(("gain", "loss", "n"), [(0.1, 0.04, 100), (0.3, 0.0, 60), (0.02, 0.02, 400)])
def test_the_interval_of_shares_covers_the_true_difference(gain, loss, n):
    drawn = np.random.default_rng(0).multinomial(n, [gain, loss, 1 - gain - loss], size=600)
    found = [shares(*map(int, row)).difference for row in drawn]
    assert np.mean([one.low <= gain - loss <= one.high for one in found]) > 0.92  # nominally 0.95


def test_means_have_students_interval_and_test():
    before, after = np.random.default_rng(3).normal([[0.0], [0.4]], 1.0, (2, 12))
    found, reference = compare_means(before, after), stats.ttest_rel(after, before)
    interval = reference.confidence_interval(0.95)
    assert found
    assert found.p_value == pytest.approx(reference.pvalue)
    assert (found.difference.low, found.difference.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_one_pair_of_figures_is_no_comparison_and_no_answer_either():
    assert compare_means([1.0], [2.0]) is None
    rows = [{"id": "a", "energy_j": 1.0, "energy_source": "rapl"}]
    assert compare(rows, rows) == {} == compare([], [])


def test_figures_that_change_alike_are_a_difference_that_rounding_does_not_hide():
    found = compare_means([0.1 * n for n in range(12)], [0.1 * n + 0.5 for n in range(12)])
    assert found and found.verdict == "yes" and found.difference.value == pytest.approx(0.5)
    assert 0.0 < found.detectable < math.inf


def test_comparison_pairs_by_question_and_ignores_unpaired_answers():
    first = [{"id": str(n), "choice_right": n < 50, "right": None} for n in range(100)]
    second = [{"id": str(n), "choice_right": n < 60, "right": True} for n in range(99, -1, -1)] + [
        {"id": "x", "choice_right": True}
    ]
    found = compare(first, second)
    assert found.keys() == {"accuracy_choice"}
    difference = found["accuracy_choice"].difference
    assert (difference.value, difference.n) == (pytest.approx(0.1), 100)
    assert 0.03 < difference.low < 0.1 < difference.high < 0.18
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


def test_figures_are_compared_by_students_t_and_energies_of_different_sources_not_at_all():
    def rows(energy, source):
        return [{"id": str(n), "energy_j": energy + n / 10, "energy_source": source, "ttft_ms": 5.0} for n in range(12)]

    found = compare(rows(2.0, "rapl"), rows(1.5, "rapl"))
    assert found["energy_per_query_j"].difference.value == pytest.approx(-0.5)
    assert found["energy_per_query_j"].real and found["energy_per_query_j"].p_value < 0.01
    assert not found["ttft_ms"].real and found["ttft_ms"].p_value == 1.0
    assert "energy_per_query_j" not in compare(rows(2.0, "rapl"), rows(1.5, "estimate_tdp"))
    # A candidate that rambled was timed on fewer queries: the others have neither joules nor a source.
    fewer = [row if n < 9 else {"id": row["id"]} for n, row in enumerate(rows(1.5, "rapl"))]
    assert compare(rows(2.0, "rapl"), fewer)["energy_per_query_j"].difference.n == 9
    unread = [row | {"energy_j": None} for row in rows(0.0, "rapl")]
    assert "energy_per_query_j" not in compare(rows(2.0, "rapl"), unread)
