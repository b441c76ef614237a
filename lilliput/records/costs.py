"""What stages cost."""

from __future__ import annotations

from lilliput.records.compiled import Agreement
from lilliput.records.figures import Record


class Cost(Record):
    """costs/<stage>.json. Every record with these fields can be read as a cost."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    machine: dict[str, str | int] | None = None


class StageTimes(Record):
    """When a stage began and ended, in seconds since 1970."""

    started_s: float
    ended_s: float


class CompressCost(Cost):
    """The cost of a candidate and the checks of its files.

    Attributes:
        resumed_from: name of the checkpoint that training continued from; the cost is that of the rest.
        agreement_with_llama_cpp: of a model that was read from a GGUF file.
        reload_max_logit_difference: between the model in memory and its files, reopened in a fresh process.
    """

    resumed_from: str | None = None
    agreement_with_llama_cpp: Agreement | None = None
    reload_max_logit_difference: float | None = None
