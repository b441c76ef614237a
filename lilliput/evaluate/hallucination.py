"""Hallucination rate (the share of false assertions), abstention rate and selective accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lilliput.records import Estimate
from lilliput.statistics.intervals import rate


@dataclass(frozen=True)
class Verdict:
    """The judgement of one free answer. `right` is false if the question is unanswerable."""

    answerable: bool
    right: bool
    abstained: bool

    @property
    def hallucinated(self) -> bool:
        """Whether the answer asserts something false."""
        return not self.abstained and not (self.answerable and self.right)


def hallucination_rate(verdicts: Sequence[Verdict]) -> Estimate | None:
    """Returns (wrong and not abstained, on answerable + not abstained, on unanswerable) / N."""
    return rate([verdict.hallucinated for verdict in verdicts])


def abstention_rate(verdicts: Sequence[Verdict]) -> Estimate | None:
    """Returns the share of questions on which the model abstained."""
    return rate([verdict.abstained for verdict in verdicts])


def selective_accuracy(verdicts: Sequence[Verdict]) -> Estimate | None:
    """Returns the share of right answers among answered answerable questions; None if there are none."""
    return rate([verdict.right for verdict in verdicts if verdict.answerable and not verdict.abstained])
