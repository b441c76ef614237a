"""Questions that two candidates were asked: what it takes to compare them."""

from __future__ import annotations

import random

from benchmarks.scaling.measuring import Counts, Row, tell, timed


def questions(count: Counts = None) -> None:
    """What it takes to compare two candidates, by the number of questions both were asked."""
    for number in count or [100, 1_000, 10_000, 100_000]:
        tell("questions", {"questions": number}, _compare, number)


def _compare(count: int) -> Row:
    """The paired differences of two made-up candidates, with the default 2,000 resamples."""
    from lilliput.statistics.compare import compare

    drawn = random.Random(count)
    first, second = (
        [
            {"id": n, "choice_right": drawn.random() < share, "hallucinated": drawn.random() > share}
            for n in range(count)
        ]
        for share in (0.6, 0.7)
    )
    with timed() as cost:
        compare(first, second)
    return cost
