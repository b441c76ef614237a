"""What a candidate's answers are worth, and what they cost."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lilliput.records.figures import Energy, Figure, Perplexity, Quantiles, Record, number_of


class KindFigures(Record):
    """Free answers to rows of one kind; `rouge_l` only of rows with a reference."""

    accuracy: Figure
    hallucination_rate: Figure
    abstention_rate: Figure
    n: int
    rouge_l: Figure | None = None


class ToolCallFigures(Record):
    """Answers of a model that may call functions.

    Attributes:
        function_right: exactly the expected functions are called.
        slot_f1: of the arguments as (name, value) pairs, over all rows together.
        complete: all calls are right.
        malformed: the answer begins like a call but cannot be read as one.
        invalid: a call has an unknown function, or arguments that its schema forbids.
        needless: a function is called although none applies.
    """

    function_right: Figure
    slot_f1: Figure
    complete: Figure
    malformed: Figure
    invalid: Figure
    needless: Figure


class _Measured(Record):
    candidate: str
    sha256: str
    size_bytes: int
    parameters: int


class Quality(Record):
    """What a model's answers are worth.

    Attributes:
        contaminated_questions: None in a record of an older version; `empty_answers` likewise.
        by_kind: figures by kind of row; empty in a record of an older version.
        tool_calls: None without rows that have functions.
    """

    accuracy_choice: Figure
    accuracy_free: Figure
    hallucination_rate: Figure
    abstention_rate: Figure
    selective_accuracy: Figure
    contaminated_questions: int | None = None
    empty_answers: int | None = None
    perplexity: Perplexity | None = None
    by_kind: dict[str, KindFigures] = Field(default_factory=dict)
    tool_calls: ToolCallFigures | None = None


class EvaluationRecord(Quality, _Measured):
    """metrics/<candidate>.json: the four metrics of a candidate.

    Attributes:
        sha256: of the measured artefact.
        parameters: number before packing.
        benchmarks: by task, a figure per metric, `seconds` and `items_per_s`.
        fits: by device; `devices_served` is the share of devices that it fits.
        runtime_details: engine, dtype and threads.
        does_not_fit: why a compiled model does not fit its device; not on disk.
    """

    benchmarks: dict[str, dict[str, Figure | float]] = Field(default_factory=dict)
    energy_per_query_j: Energy
    energy_per_token_j: Energy
    energy_per_right_answer_j: Energy
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    rate_tokens_per_s: float
    fits: dict[str, bool]
    devices_served: float
    accessibility: Figure
    peak_rss_bytes: int
    load_s: float
    runtime: str
    runtime_details: dict[str, str]
    seconds: float
    cpu_seconds: float
    does_not_fit: str | None = None

    @property
    def accuracy_metric(self) -> Literal["accuracy_choice", "accuracy_free"]:
        """The field that states the accuracy: by choice, or of free answers if no question has choices."""
        return "accuracy_free" if self.accuracy_choice.value is None else "accuracy_choice"

    def number(self, metric: str) -> float | None:
        """Returns the value of the field `metric`; None if unavailable."""
        return number_of(getattr(self, metric))
