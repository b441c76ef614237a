"""Hallucination rate (the share of false assertions), abstention rate and selective accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from lilliput.evaluate.judges.judgement import Judgement
from lilliput.records import Estimate
from lilliput.statistics.intervals import rate


def hallucination_rate(judgements: Sequence[Judgement]) -> Estimate | None:
    """Returns (wrong and not abstained, on answerable + not abstained, on unanswerable) / N.

    Rows with only a reference are not counted: what is false about them is unknown.
    """
    return rate([judgement.hallucinated for judgement in judgements if judgement.hallucinated is not None])


def abstention_rate(judgements: Sequence[Judgement]) -> Estimate | None:
    """Returns the share of rows on which the model abstained."""
    return rate([judgement.abstained for judgement in judgements])


def selective_accuracy(judgements: Sequence[Judgement]) -> Estimate | None:
    """Returns the share of right answers among answered answerable rows; None if there are none."""
    answered = (judgement for judgement in judgements if judgement.answerable and not judgement.abstained)
    return rate([judgement.right for judgement in answered if judgement.right is not None])
