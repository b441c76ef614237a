"""The trials of a search."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.records.figures import Record, Result


class TrialRecord(Record):
    """A tried chain with its settings. `reason` says why it failed. A reference has only an empty chain and figures."""

    candidate: str
    chain: str
    settings: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    pareto: bool = False
    reason: str | None = None
    seconds: float = 0.0
    figures: dict[str, Result]


class SearchRecord(Record):
    """search.json: `stopped` says why the study ended, `sequences` is the number of possible ones."""

    study: str
    base: str
    objectives: dict[str, Literal["max", "min"]]
    stopped: str
    sequences: int
    reference: list[TrialRecord]
    trials: list[TrialRecord]
