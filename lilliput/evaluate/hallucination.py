"""Hallucination rate: how often the model asserts what is not so, with how often it abstains beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lilliput.statistics.intervals import Estimate, rate


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


def hallucination_rate(verdicts: Sequence[Verdict]) -> Estimate | None:
    """(wrong and not abstained, on answerable + not abstained, on unanswerable) / N."""
    return rate([verdict.hallucinated for verdict in verdicts])


def abstention_rate(verdicts: Sequence[Verdict]) -> Estimate | None:
    """Share of all questions on which the model abstained."""
    return rate([verdict.abstained for verdict in verdicts])


def selective_accuracy(verdicts: Sequence[Verdict]) -> Estimate | None:
    """Right answers among the answerable questions it did answer; None where it answered none."""
    return rate([verdict.right for verdict in verdicts if verdict.answerable and not verdict.abstained])
