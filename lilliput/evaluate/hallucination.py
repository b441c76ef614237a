"""Hallucination rate: how often the model asserts what is not so, with how often it abstains beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lilliput.evaluate.accuracy import first_sentence
from lilliput.evaluate.intervals import Estimate, rate

_ABSTENTIONS = re.compile(
    r"\b(?:i|we)\s+(?:really\s+|just\s+|honestly\s+)?(?:do\s+not|don'?t|cannot|can'?t|could\s+not|couldn'?t)\s+"
    r"(?:know|say|tell|answer|find|provide|recall|confirm|be\s+sure)\b"
    r"|\b(?:i'?m|i\s+am)\s+(?:not\s+(?:sure|certain|aware|able|familiar)|unsure|unaware|unable)\b"
    r"|\b(?:i|we)\s+(?:have\s+no|(?:do\s+not|don'?t)\s+have(?:\s+(?:any|an|the|that|this|enough|access\s+to))*)\s+"
    r"(?:idea|information|knowledge|record|answer|data|details)\b"
    r"|\b(?:i|we)(?:'ve|\s+have)\s+(?:never|not)\s+heard\b|\b(?:i|we)\s+haven'?t\s+heard\b"
    r"|^(?:(?:do\s+not|don'?t)\s+know|dunno|uncertain|impossible\s+to\s+(?:say|tell|know))\b"
    r"|\b(?:cannot|can'?t|could\s+not|couldn'?t)\s+be\s+(?:determined|found|identified|answered|verified)\b"
    r"|\b(?:is|are)\s+not\s+(?:specified|provided|mentioned)\b"
    r"|\bno\s+(?:idea|information\s+(?:is\s+)?available)\b"
    r"|\b(?:is|are)\s+(?:not\s+known|unknown)\b(?!\s+(?:for|as)\b)|^(?:unknown|not\s+known|not\s+sure|n/?a|unsure)\b"
    r"|\b(?:does\s+not|doesn'?t|do\s+not|don'?t)\s+(?:seem\s+to\s+|appear\s+to\s+)?exist\b"
    r"|\bthere(?:'s|\s+is)\s+no\s+(?:country|element|city|place)\s+(?:called|named|known\s+as|by\s+that)\b"
    r"|\b(?:no|(?:not|isn'?t)\s+an?)\s+(?:such|real|known|recogni[sz]ed)\s+(?:country|element|city|place|name|thing)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """One free answer, judged. `right` is false wherever the question has no answer."""

    answerable: bool
    right: bool
    abstained: bool

    @property
    def hallucinated(self) -> bool:
        """Something was asserted, and it is not so."""
        return not self.abstained and not (self.answerable and self.right)


def abstained(text: str) -> bool:
    """Whether `text` declines to answer in its first sentence.

    A guess beside it ("Lyon, but I'm not sure") is not taken. An empty answer asserts nothing and so declines.
    """
    return not text.strip() or _ABSTENTIONS.search(first_sentence(text).replace("’", "'")) is not None


def hallucination_rate(verdicts: Sequence[Verdict]) -> Estimate | None:
    """(wrong and not abstained, on answerable + not abstained, on unanswerable) / N."""
    return rate([verdict.hallucinated for verdict in verdicts])


def abstention_rate(verdicts: Sequence[Verdict]) -> Estimate | None:
    """Share of all questions on which the model abstained."""
    return rate([verdict.abstained for verdict in verdicts])


def selective_accuracy(verdicts: Sequence[Verdict]) -> Estimate | None:
    """Right answers among the answerable questions it did answer; None where it answered none."""
    return rate([verdict.right for verdict in verdicts if verdict.answerable and not verdict.abstained])
