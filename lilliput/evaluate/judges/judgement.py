"""The judgement of one free answer, whatever kind of row it answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slots:
    """Counts of arguments as (name, value) pairs, for slot F1.

    Attributes:
        right: arguments that were given and are accepted.
        given: arguments of all calls.
        expected: arguments that must be given, and right optional ones.
    """

    right: int
    given: int
    expected: int


@dataclass(frozen=True)
class CallDetails:
    """What the calls of one answer are like; a field is None where it does not apply.

    Attributes:
        function_right: whether exactly the expected functions are called; None if no call is expected.
        complete: whether all calls are right; None if no call is expected.
        slots: counts of the arguments; None if no call is expected.
        needless: whether the answer calls a function although none applies; None if a call may apply.
        malformed: whether the answer begins like a call but cannot be read as one.
        invalid: why the first invalid call is invalid for the tools; None if all calls are valid.
    """

    function_right: bool | None
    complete: bool | None
    slots: Slots | None
    needless: bool | None
    malformed: bool
    invalid: str | None


@dataclass(frozen=True)
class Judgement:
    """The judgement of one free answer (docs/metrics.md defines each field by kind of row).

    Attributes:
        kind: `question`, or the kind of the expectation.
        answerable: whether something other than an abstention is right.
        right: None where right and wrong are undefined: unanswerable questions and rows with only a reference.
        abstained: whether the answer declines or asks for what is missing.
        hallucinated: whether it asserts or does something false; None for rows with only a reference.
        score: quality between 0 and 1; None for unanswerable questions.
        calls: of rows with tools; None for others.
        rouge_l: of rows with only a reference.
    """

    kind: str
    answerable: bool
    right: bool | None
    abstained: bool
    hallucinated: bool | None
    score: float | None
    calls: CallDetails | None = None
    rouge_l: float | None = None


def decided(
    kind: str,
    *,
    right: bool,
    abstained: bool,
    answerable: bool = True,
    hallucinated: bool | None = None,
    calls: CallDetails | None = None,
) -> Judgement:
    """Returns a judgement of right or wrong; what is neither right nor an abstention is a hallucination by default."""
    false = not right and not abstained if hallucinated is None else hallucinated
    return Judgement(kind, answerable, right, abstained, false, float(right), calls)
