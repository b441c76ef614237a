"""Judges a free answer to any row: right, an abstention, or a hallucination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lilliput.data.conversations import (
    Conversation,
    ExpectedAbstention,
    ExpectedCall,
    ExpectedCalls,
    ExpectedJson,
    ExpectedNumber,
    ExpectedParts,
    ExpectedReference,
    ExpectedText,
    ToolCall,
)
from lilliput.data.questions import Question
from lilliput.data.rows import Row
from lilliput.evaluate.abstention import abstained
from lilliput.evaluate.accuracy import is_right
from lilliput.evaluate.judges.calls import Tools, function_names, is_listed, match_calls
from lilliput.evaluate.judges.declining import declines_or_asks
from lilliput.evaluate.judges.json_answer import NotJson, is_expected_json, read_json
from lilliput.evaluate.judges.judgement import CallDetails, Judgement, decided
from lilliput.evaluate.judges.number import is_number
from lilliput.evaluate.judges.overlap import rouge_l, token_f1
from lilliput.tool_calls import Answer, invalid_call, read_answer


def judge_answer(text: str, row: Row) -> Judgement:
    """Returns whether `text` is right, an abstention, or a hallucination, by what `row` expects (docs/metrics.md)."""
    if isinstance(row, Question):
        return _judge_question(text, row)
    # Only answers of a model that was given functions are read for calls: {"name": …} may be an ordinary answer.
    reads_calls = bool(row.tools) or row.expectation.kind == "tool_calls"
    answer = read_answer(text) if reads_calls else Answer(text.strip())
    details = _details(answer, row) if reads_calls else None
    match row.expectation:
        case ExpectedCalls() as expected:
            return _judge_calls(answer, expected, row.tools, details)
        case ExpectedAbstention():
            right = not _acts(answer) and declines_or_asks(answer.text)
            return decided("abstain", answerable=False, right=right, abstained=right, calls=details)
        case ExpectedJson() as expected:
            return _judge_json(text, expected, details)
        case ExpectedReference() as expected:
            f1, rouge = (of(answer.text, expected.reference) for of in (token_f1, rouge_l))
            declined = not _acts(answer) and declines_or_asks(answer.text)
            return Judgement("reference", True, None, declined, None, f1, details, rouge)
        case ExpectedText() | ExpectedParts() | ExpectedNumber() as expected:
            return _judge_text(answer, expected, row, details)


def verdict_row(text: str, row: Row, judgement: Judgement) -> dict[str, Any]:
    """Returns the keys of an answer row for a free answer and its judgement; a question's have no kind and score."""
    keys = {
        "text": text,
        "right": judgement.right,
        "abstained": judgement.abstained,
        "hallucinated": judgement.hallucinated,
    }
    if isinstance(row, Question):
        return keys
    keys |= {"kind": judgement.kind, "score": judgement.score}
    if judgement.rouge_l is not None:
        keys["rouge_l"] = judgement.rouge_l
    return keys | (_call_keys(judgement.calls) if judgement.calls else {})


def _call_keys(calls: CallDetails) -> dict[str, Any]:
    keys = {"malformed": calls.malformed, "invalid": calls.invalid, "needless": calls.needless}
    if calls.slots:
        slots = {"right": calls.slots.right, "given": calls.slots.given, "expected": calls.slots.expected}
        keys |= {"function_right": calls.function_right, "slots": slots}
    return keys


def _judge_question(text: str, question: Question) -> Judgement:
    declined = abstained(text)
    right = question.answerable and not declined and is_right(text, question)
    hallucinated = not declined and not right
    if not question.answerable:
        return Judgement("question", False, None, declined, hallucinated, None)
    return Judgement("question", True, right, declined, hallucinated, float(right))


def _judge_calls(answer: Answer, expected: ExpectedCalls, tools: Tools, details: CallDetails | None) -> Judgement:
    declined = not _acts(answer) and declines_or_asks(answer.text)
    if not expected.tool_calls:  # any answer without a call is right
        return decided("tool_calls", right=not _acts(answer), abstained=declined, calls=details)
    assert details
    right = bool(details.complete)
    # A malformed call does and asserts nothing; a text without a call asserts something instead of calling.
    asserts = not _acts(answer) and not declined
    hallucinated = not right and (asserts or _invents(answer.calls, expected.tool_calls, tools))
    return decided("tool_calls", right=right, abstained=declined, hallucinated=hallucinated, calls=details)


def _invents(calls: Sequence[ToolCall], expected: Sequence[ExpectedCall], tools: Tools) -> bool:
    """Returns whether a call has an unknown function, or an argument that neither schema nor accepted calls have."""
    known, accepted = function_names(tools), dict[str, set[str]]()
    for want in expected:
        accepted.setdefault(want.name, set()).update(want.arguments)
    return any(
        (tools and call.name not in known)
        or any(not is_listed(name, call.name, tools) for name in call.arguments)
        or (call.name in accepted and call.arguments.keys() - accepted[call.name])
        for call in calls
    )


def _judge_json(text: str, expected: ExpectedJson, details: CallDetails | None) -> Judgement:
    try:
        value = read_json(text)
    except NotJson:
        acts = details is not None and bool(details.needless)
        return decided("json", right=False, abstained=not acts and declines_or_asks(text), calls=details)
    right = is_expected_json(value, expected.json_schema, expected.fields)
    if right and details:  # it may look like a call
        details = replace(details, needless=False, malformed=False, invalid=None)
    return decided("json", right=right, abstained=False, calls=details)


def _judge_text(
    answer: Answer,
    expected: ExpectedText | ExpectedParts | ExpectedNumber,
    row: Conversation,
    details: CallDetails | None,
) -> Judgement:
    if _acts(answer):  # no call applies
        return decided(expected.kind, right=False, abstained=False, calls=details)
    right = _is_expected_text(answer.text, expected, row)
    return decided(expected.kind, right=right, abstained=not right and declines_or_asks(answer.text), calls=details)


def _is_expected_text(text: str, expected: ExpectedText | ExpectedParts | ExpectedNumber, row: Conversation) -> bool:
    match expected:
        case ExpectedNumber():
            return is_number(text, expected.number, expected.tolerance)
        case ExpectedParts():
            spaced = _without_case_and_spacing(text)
            return all(_without_case_and_spacing(part) in spaced for part in expected.contains)
        case ExpectedText():
            question = Question(
                id=row.id,
                question=row.user_text.strip() or row.id,
                answer=expected.text,
                aliases=expected.aliases,
                group=row.group,
            )
            return bool(_judge_question(text, question).right)


def _details(answer: Answer, row: Conversation) -> CallDetails:
    reasons = (invalid_call(call, row.tools) for call in answer.calls) if row.tools else ()
    invalid = next((reason for reason in reasons if reason), None)
    expected = row.expectation
    if isinstance(expected, ExpectedCalls) and expected.tool_calls:
        match = match_calls(answer.calls, expected.tool_calls, row.tools, ordered=expected.ordered)
        return CallDetails(match.functions, match.complete, match.slots, None, answer.malformed, invalid)
    needless = None if isinstance(expected, ExpectedReference) else _acts(answer)
    return CallDetails(None, None, None, needless, answer.malformed, invalid)


def _acts(answer: Answer) -> bool:
    """Returns whether the answer calls a function, or begins to and fails."""
    return bool(answer.calls) or answer.malformed


def _without_case_and_spacing(text: str) -> str:
    return " ".join(text.casefold().split())
