"""Figures by kind of row and of calls, by hand."""

import pytest

from lilliput.evaluate.judges.judgement import CallDetails, Judgement, Slots
from lilliput.evaluate.kinds import by_kind, free_accuracy, tool_calls


def calls(complete=True, slots=(1, 1, 1), needless=None, malformed=False, invalid=None, function=True):
    return CallDetails(function, complete, Slots(*slots), needless, malformed, invalid)


def judged(kind, score, right=None, abstained=False, hallucinated=None, answerable=True, details=None, rouge=None):
    return Judgement(kind, answerable, right, abstained, hallucinated, score, details, rouge)


def test_accuracy_is_a_rate_if_all_scores_are_right_or_wrong_and_a_mean_otherwise():
    right, wrong = judged("text", 1.0, True), judged("text", 0.0, False)
    rate = free_accuracy([right, right, wrong], 1, 200)
    assert (rate.value, rate.n) == (pytest.approx(2 / 3), 3)
    assert (rate.low, rate.high) == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson
    mean = free_accuracy([right, judged("reference", 0.5)], 1, 200)
    assert (mean.value, mean.n) == (0.75, 2) and mean.low == 0.5 and mean.high == 1.0
    declined = judged("abstain", 1.0, True, abstained=True, answerable=False)
    assert free_accuracy([declined], 1, 200) is None


def test_kinds_have_their_own_figures():
    rows = [
        judged("question", 1.0, True, hallucinated=False),
        judged("question", None, None, abstained=True, hallucinated=False, answerable=False),
        judged("abstain", 1.0, True, abstained=True, hallucinated=False, answerable=False),
        judged("abstain", 0.0, False, hallucinated=True, answerable=False),
        judged("reference", 0.25, rouge=0.5),
    ]
    kinds = by_kind(rows, 1, 200)
    assert list(kinds) == ["abstain", "question", "reference"]
    question, abstain, reference = kinds["question"], kinds["abstain"], kinds["reference"]
    assert (question.n, question.accuracy.n, question.abstention_rate.value) == (2, 1, 0.5)
    assert (abstain.accuracy.value, abstain.hallucination_rate.value, abstain.rouge_l) == (0.5, 0.5, None)
    assert (reference.accuracy.value, reference.rouge_l.value) == (0.25, 0.5)
    assert (reference.hallucination_rate.value, reference.hallucination_rate.n) == (None, 0)
    assert "rouge_l" not in question.as_json()


def test_figures_of_calls_by_hand():
    none = CallDetails(None, None, None, True, False, "unknown")
    rows = [
        judged("tool_calls", 1.0, True, details=calls(slots=(3, 3, 3))),
        judged("tool_calls", 0.0, False, details=calls(False, (1, 2, 4), malformed=True, function=False)),
        judged("tool_calls", 0.0, False, details=none),
        judged("text", 1.0, True),
    ]
    found = tool_calls(rows, 1, 200)
    assert (found.function_right.value, found.function_right.n) == (0.5, 2)
    assert (found.complete.value, found.complete.n) == (0.5, 2)
    assert found.slot_f1.value == pytest.approx(2 * 4 / (5 + 7))
    assert found.slot_f1.n == 2 and found.slot_f1.low <= found.slot_f1.value <= found.slot_f1.high == 1.0
    assert (found.malformed.value, found.malformed.n) == (pytest.approx(1 / 3), 3)
    assert (found.invalid.value, found.needless.value, found.needless.n) == (pytest.approx(1 / 3), 1.0, 1)
    assert tool_calls([judged("text", 1.0, True)], 1, 200) is None


def test_calls_without_arguments_have_a_slot_f1_of_one():
    found = tool_calls([judged("tool_calls", 1.0, True, details=calls(slots=(0, 0, 0)))], 1, 200)
    assert (found.slot_f1.value, found.slot_f1.low) == (1.0, 1.0)
