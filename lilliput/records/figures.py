"""Numbers in records: values with intervals and quantiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

Source = Literal["nvml_counter", "rapl", "soc", "battery", "estimate_tdp", "declared", "unavailable"]
Verdict = Literal["yes", "not shown", "cannot tell"]


class Record(BaseModel):
    """A result: frozen, with strict types and finite numbers."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def as_json(self) -> dict[str, Any]:
        """Returns the content of the record's file: the fields in their order, except optional ones not given."""
        return self.model_dump(mode="json", exclude_unset=True)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval and its number of observations."""

    value: float
    low: float
    high: float
    n: int


class Figure(Record):
    """An `Estimate` in a record; the value is None without observations."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0

    @classmethod
    def of(cls, estimate: Estimate | None, **others: Any) -> Self:
        """Returns `estimate` as it appears in a record, with `others` of a subclass."""
        numbers = vars(estimate) if estimate else {"value": None, "low": None, "high": None, "n": 0}
        return cls(**numbers, **others)


class Energy(Figure):
    """Joules, or percent of a battery. `idle_watts` is the power that was subtracted from a counter's reading."""

    source: Source
    measured: bool
    idle_watts: float | None = None


class Difference(Figure):
    """A paired difference, see `lilliput.statistics.differences.Comparison`."""

    p: float
    detectable: float
    verdict: Verdict


class Uncertain(Record):
    """A value ± one standard error, as llama.cpp prints both; the error is None if there are too few observations."""

    value: float
    error: float | None


class Quantiles(Record):
    """Median and 90th percentile of `n` values; None without values."""

    p50: float | None
    p90: float | None
    n: int


class Perplexity(Record):
    """Perplexity of the right answers to `n` questions, or of reference answers, which have `tokens` tokens."""

    value: float
    n: int
    tokens: int


Result = Figure | Energy | Perplexity | Quantiles | int | float | None


def number_of(result: Result) -> float | None:
    """Returns the value of a figure, the median of quantiles, or the number itself; None if unavailable."""
    if isinstance(result, Figure | Perplexity):
        return result.value
    return result.p50 if isinstance(result, Quantiles) else result
