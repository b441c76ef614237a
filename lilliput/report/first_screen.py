"""What a reader sees first: the result in one sentence, the promotion of each candidate on each device, and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lilliput.data.rows import Row
from lilliput.promote import objective
from lilliput.records import Decision, Quality
from lilliput.report.rows import CandidateRow, CompiledRow

State = Literal["champion", "runner-up", "refused", "not considered"]
_SHOWN = 10  # questions


@dataclass(frozen=True)
class Shipped:
    """A candidate as devices get it: the smallest compiled file that was evaluated, or the checkpoint without one.

    Attributes:
        quality: of the answers of that file or checkpoint.
        tpot_ms: median time per further token, by device that runs the file.
    """

    row: CandidateRow
    size_bytes: int
    quality: Quality
    tpot_ms: Mapping[str, float]


@dataclass(frozen=True)
class Headline:
    """The smallest champion beside the base of its graph."""

    champion: Shipped
    base: CandidateRow

    @property
    def saved(self) -> float:
        """The share of the base's bytes that the champion does without."""
        return 1.0 - self.champion.size_bytes / self.base.record.size_bytes


@dataclass(frozen=True)
class Cell:
    """A candidate on a device; `note` is the number of the reason why it was not promoted."""

    state: State
    note: int | None = None


@dataclass(frozen=True)
class PromotionMatrix:
    """Candidates and devices; each different reason has one note."""

    cells: Mapping[str, Mapping[str, Cell]]
    notes: Sequence[str]


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer and its judgement.

    Attributes:
        judgement: `right`, `wrong`, `abstains`, or `score 0.43` where the row has only a reference. An abstention is
            right where nothing can be known.
        good: None for an abstention where an answer was expected, and for a score.
    """

    text: str
    judgement: str
    good: bool | None


@dataclass(frozen=True)
class AnsweredRow:
    """A request with the answers of several candidates, by name."""

    request: str
    expected: str
    answers: Mapping[str, JudgedAnswer]


def shipped(row: CandidateRow, compiled: Sequence[CompiledRow]) -> Shipped:
    """Returns `row` with the size and the quality that ship, and the times of the devices that run it."""
    own = [other.record for other in compiled if other.record.candidate == row.name and other.record.quality]
    if not own:
        return Shipped(row, row.record.size_bytes, row.record, tpot_ms={})
    record = min(own, key=lambda other: other.size_bytes)
    assert record.quality is not None
    times = {
        name: run.tpot_ms.p50
        for name, run in record.devices.items()
        if run.fits and run.tpot_ms and run.tpot_ms.p50 is not None
    }
    return Shipped(row, record.size_bytes, record.quality, times)


def headline(candidates: Sequence[CandidateRow], compiled: Sequence[CompiledRow]) -> Headline | None:
    """Returns the smallest champion beside its base; None without a champion that was made from a base."""
    champions = [shipped(row, compiled) for row in candidates if row.champion_of and row.steps]
    if not champions:
        return None
    smallest = min(champions, key=lambda champion: champion.size_bytes)
    base = list(smallest.row.steps)[-1]
    return next((Headline(smallest, row) for row in candidates if row.name == base), None)


def promotion_matrix(names: Sequence[str], promotion: Mapping[str, Decision]) -> PromotionMatrix:
    """Returns the state of each candidate on each device."""
    reasons = {device: decision.refused_by_reason() for device, decision in promotion.items()}
    notes = list(dict.fromkeys(reason for grouped in reasons.values() for reason in grouped))
    numbers = {
        (device, name): notes.index(reason) + 1
        for device, grouped in reasons.items()
        for reason, refused in grouped.items()
        for name in refused
    }
    return PromotionMatrix(
        {
            name: {
                device: Cell(_state(name, decision), numbers.get((device, name)))
                for device, decision in promotion.items()
            }
            for name in names
        },
        notes,
    )


def _state(name: str, decision: Decision) -> State:
    if name == decision.champion:
        return "champion"
    if name == decision.challenger:
        return "runner-up"
    return "refused" if name in decision.refused else "not considered"


def answered_side_by_side(
    candidates: Sequence[CandidateRow], answers: Mapping[str, Sequence[Mapping[str, Any]]], rows: Sequence[Row]
) -> list[AnsweredRow]:
    """Returns ten requests with the answers of the base and of two champions at most.

    The requests are spread evenly over all that these candidates answered, in the order of their ids: none is chosen
    by its answers.
    """
    shown = _shown(candidates)
    free = {name: {row["id"]: row for row in answers[name] if "text" in row} for name in shown}
    common = [row for row in sorted(rows, key=lambda row: row.id) if shown and all(row.id in free[n] for n in shown)]
    step = max(1.0, len(common) / _SHOWN)
    drawn = [common[int((number + 0.5) * step)] for number in range(min(_SHOWN, len(common)))]
    return [
        AnsweredRow(row.user_text, row.answer_text, {name: _judged(row, free[name][row.id]) for name in shown})
        for row in drawn
    ]


def _judged(row: Row, answer: Mapping[str, Any]) -> JudgedAnswer:
    text, right = answer["text"], answer["right"]
    if right is None and row.answerable:  # right and wrong are undefined
        return JudgedAnswer(text, f"score {answer['score']:.2f}", good=None)
    if right or (answer["abstained"] and not row.answerable):
        return JudgedAnswer(text, "right", good=True)
    if answer["abstained"]:
        return JudgedAnswer(text, "abstains", good=None)
    return JudgedAnswer(text, "wrong", good=False)


def _shown(candidates: Sequence[CandidateRow]) -> list[str]:
    champions = [row for row in candidates if row.champion_of and row.steps]
    champions.sort(key=lambda row: objective("accuracy", row.record) or 0.0, reverse=True)
    bases = [row.name for row in candidates if not row.steps]
    return [*bases[:1], *(row.name for row in champions[:2])] if champions else []
