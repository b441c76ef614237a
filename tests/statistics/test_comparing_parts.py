"""Paired comparisons by kind of row and by benchmark, and the losses that remain after Holm's correction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lilliput.statistics.compare import compare, compare_by_part, holm, losses


def call(identity, right, **others):
    return {
        "id": identity,
        "text": "x",
        "right": right,
        "hallucinated": not right,
        "kind": "tool_calls",
        "score": float(right),
    } | others


def reference(identity, score):
    return {"id": identity, "text": "x", "right": None, "hallucinated": None, "kind": "reference", "score": score}


def question(identity, right):
    return {"id": identity, "text": "x", "right": right, "hallucinated": not right}


def test_old_rows_and_scores_are_compared_alike():
    before = [question(f"q{n}", n < 4) for n in range(10)]
    after = [question(f"q{n}", True) for n in range(10)]
    old = compare(before, after)["accuracy_free"]
    scored = [[row | {"score": float(row["right"]), "kind": "text"} for row in rows] for rows in (before, after)]
    assert compare(*scored)["accuracy_free"] == old
    assert old.difference.value == pytest.approx(0.6) and old.least_p == 2**-9  # McNemar's


def test_scores_between_right_and_wrong_use_the_t_test():
    before = [reference(f"r{n}", 0.1 * n) for n in range(6)]
    after = [reference(f"r{n}", 0.1 * n + 0.05 + 0.01 * (n % 2)) for n in range(6)]
    compared = compare(before, after)
    assert compared.keys() == {"accuracy_free"}
    assert compared["accuracy_free"].difference.value == pytest.approx(0.055)
    assert compared["accuracy_free"].verdict == "yes"


def test_a_right_abstention_is_no_accuracy_but_has_its_own_kind():
    rows = [{"id": "a", "text": "", "right": True, "hallucinated": False, "kind": "abstain", "score": 1.0}]
    assert "accuracy_free" not in compare(rows, rows)
    assert compare_by_part(rows, rows)["abstain"]["accuracy"].difference.n == 1


def test_parts_are_kinds_and_benchmarks():
    rows = [question("q", True), call("c", True), {"id": "benchmark/bfcl_simple/0", "acc": 1.0, "malformed": 0.0}]
    rows += [{"id": "benchmark/own/0", "exact_match": 1.0}, {"id": "z", "choice_right": True}]
    parts = compare_by_part(rows, rows)
    assert parts.keys() == {"question", "tool_calls", "benchmark/bfcl_simple"}
    assert parts["benchmark/bfcl_simple"].keys() == {"acc"}
    assert parts["tool_calls"].keys() == {"accuracy", "hallucination_rate"}


def test_only_significant_losses_are_named():
    before = [call(f"c{n}", True) for n in range(30)] + [question(f"q{n}", n % 2 == 0) for n in range(30)]
    after = [call(f"c{n}", n >= 12) for n in range(30)] + [question(f"q{n}", True) for n in range(30)]
    found = losses(before, after)
    assert [(loss.part, loss.metric) for loss in found] == [
        ("tool_calls", "accuracy"),
        ("tool_calls", "hallucination_rate"),
    ]
    assert found[0].comparison.difference.value == pytest.approx(-0.4)
    assert found[0].corrected_p >= found[0].comparison.p_value
    assert losses(before, before) == [] and len(losses(after, before)) == 2  # the questions


def test_many_comparisons_need_more_evidence():
    def item(part, number, right):
        return {"id": f"benchmark/{part}/{number}", "acc": float(right)}

    def rows(parts, lost):
        return [item(part, n, part != 0 or n >= lost) for part in range(parts) for n in range(20)]

    assert [loss.part for loss in losses(rows(1, 0), rows(1, 7))] == ["benchmark/0"]  # p = 0.016
    assert losses(rows(5, 0), rows(5, 7)) == []


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_between_the_value_and_bonferroni_and_keeps_the_order(values):
    adjusted = holm(values)
    for value, after in zip(values, adjusted, strict=True):
        assert value <= after <= min(1.0, len(values) * value) or after == 1.0
    ordered = sorted(zip(values, adjusted, strict=True))
    assert [after for _, after in ordered] == sorted(adjusted)
