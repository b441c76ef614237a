"""Figures of free answers: accuracy, the same by kind of row, and of calls of functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lilliput.evaluate.hallucination import abstention_rate, hallucination_rate
from lilliput.evaluate.judges.judgement import CallDetails, Judgement
from lilliput.records import Estimate, Figure, KindFigures, ToolCallFigures
from lilliput.statistics import intervals


def free_accuracy(judgements: Iterable[Judgement], seed: int, resamples: int) -> Estimate | None:
    """Returns the mean score over answerable rows: a rate if all are right or wrong, otherwise with a bootstrap."""
    return _mean_score((judgement for judgement in judgements if judgement.answerable), seed, resamples)


def by_kind(judgements: Sequence[Judgement], seed: int, resamples: int) -> dict[str, KindFigures]:
    """Returns the figures of each kind of row, in alphabetical order."""
    kinds = sorted({judgement.kind for judgement in judgements})
    return {kind: _of_kind([j for j in judgements if j.kind == kind], seed, resamples) for kind in kinds}


def tool_calls(judgements: Iterable[Judgement], seed: int, resamples: int) -> ToolCallFigures | None:
    """Returns the figures of calls; None if no row has functions."""
    details = [judgement.calls for judgement in judgements if judgement.calls]
    if not details:
        return None
    return ToolCallFigures(
        function_right=_share(calls.function_right for calls in details),
        slot_f1=Figure.of(_slot_f1(details, seed, resamples)),
        complete=_share(calls.complete for calls in details),
        malformed=_share(calls.malformed for calls in details),
        invalid=_share(calls.invalid is not None for calls in details),
        needless=_share(calls.needless for calls in details),
    )


def _of_kind(judgements: Sequence[Judgement], seed: int, resamples: int) -> KindFigures:
    overlaps = [judgement.rouge_l for judgement in judgements if judgement.rouge_l is not None]
    others = {"rouge_l": Figure.of(intervals.mean(overlaps, seed, resamples))} if overlaps else {}
    return KindFigures(
        accuracy=Figure.of(_mean_score(judgements, seed, resamples)),
        hallucination_rate=Figure.of(hallucination_rate(judgements)),
        abstention_rate=Figure.of(abstention_rate(judgements)),
        n=len(judgements),
        **others,
    )


def _mean_score(judgements: Iterable[Judgement], seed: int, resamples: int) -> Estimate | None:
    scores = [judgement.score for judgement in judgements if judgement.score is not None]
    if set(scores) <= {0.0, 1.0}:
        return intervals.rate([score == 1.0 for score in scores])
    return intervals.mean(scores, seed, resamples)


def _share(flags: Iterable[bool | None]) -> Figure:
    return Figure.of(intervals.rate([flag for flag in flags if flag is not None]))


def _slot_f1(details: Iterable[CallDetails], seed: int, resamples: int) -> Estimate | None:
    """Returns 2 · right / (given + expected), summed over all rows (micro), with a bootstrap over the rows."""
    counts = [(calls.slots.right, calls.slots.given, calls.slots.expected) for calls in details if calls.slots]
    rows = np.array(counts, dtype=float).reshape(-1, 3)
    return intervals.statistic(_f1, rows, seed, resamples)


def _f1(draw: np.ndarray) -> np.ndarray:
    """Returns F1 of counts of shape (…, rows, 3); 1 where there are no arguments at all."""
    right, given, expected = np.moveaxis(draw.sum(axis=-2), -1, 0)
    total = given + expected
    return np.where(total > 0, 2.0 * right / np.maximum(total, 1.0), 1.0)
