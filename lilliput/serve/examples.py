"""Questions that the page offers: recorded answers of this pair of models, for which the router decides alike now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lilliput.data.questions import Question
from lilliput.data.rows import Row
from lilliput.offload.policy import Conditions, Router

Kind = Literal["device", "abstains", "server"]
KINDS: tuple[Kind, ...] = ("device", "abstains", "server")
_KEPT = 16  # of each kind, in case the router sends the first ones elsewhere


class RecordedAnswer(BaseModel):
    """A held-out question with the answer that the stage `offload` recorded and judged.

    Attributes:
        kind: `device`: its answer is right; `abstains`: nothing can be known, and the device says so; `server`: the
            edge server's answer is right and the device's is not.
        answer: of that place.
        logprobs: log-likelihoods (nats) of the tokens of the device's answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Kind
    question: str
    answer: str
    logprobs: tuple[float, ...]


def recorded_answers(rows: Iterable[Mapping[str, Any]], corpus: Sequence[Row]) -> tuple[RecordedAnswer, ...]:
    """Returns up to 16 answers of each kind, in their order.

    Args:
        rows: of the stage `offload`.
        corpus: the question set. Conversations are left out: the page would send their last turn alone.
    """
    single = {row.id: row.question for row in corpus if isinstance(row, Question)}
    asked = [row for row in rows if single.get(row["id"]) == row["question"]]
    kept: list[tuple[Kind, Mapping[str, Any]]] = []
    for kind in KINDS:
        for row in islice((row for row in asked if _kind(row) == kind), _KEPT):
            kept.append((kind, row))  # a comprehension would widen `kind` to `str`
    return tuple(
        RecordedAnswer(
            kind=kind,
            question=row["question"],
            answer=row["server" if kind == "server" else "device"]["text"],
            logprobs=tuple(row["device"]["logprobs"]),
        )
        for kind, row in kept
    )


def _kind(row: Mapping[str, Any]) -> Kind | None:
    device, server = row["device"], row["server"]
    if not row["answerable"]:
        return "abstains" if device["abstained"] else None
    if device["right"]:
        return "device"
    return "server" if server["right"] else None


def choose_examples(
    recorded: Sequence[RecordedAnswer], router: Router, conditions: Conditions, each: int = 2
) -> list[RecordedAnswer]:
    """Returns up to `each` answers of each kind, of those that `router` sends to the place that gave them."""
    chosen: list[RecordedAnswer] = []
    for kind in KINDS:
        fitting = (one for one in recorded if one.kind == kind and _is_sent_there(one, router, conditions))
        chosen += islice(fitting, each)
    return chosen


def _is_sent_there(one: RecordedAnswer, router: Router, conditions: Conditions) -> bool:
    decision = router.route_question(one.question, conditions)
    decision = decision or router.route_answer(one.question, one.logprobs, conditions)
    return decision.place == ("server" if one.kind == "server" else "device")
