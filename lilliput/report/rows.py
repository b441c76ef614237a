"""The rows of the report's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lilliput.records import (
    Curves,
    DeviceRecord,
    Difference,
    Divergence,
    EvaluationRecord,
    OffloadRecord,
    ParityRecord,
    Quality,
    SearchRecord,
)


@dataclass(frozen=True)
class Chart:
    """A chart as SVG, and its content in words. `narrow_svg` replaces it on a phone."""

    title: str
    svg: str
    words: str
    narrow_svg: str = ""

    @property
    def has_points(self) -> bool:
        """Whether points have labels of their own."""
        return 'class="point"' in self.svg


@dataclass(frozen=True)
class CandidateRow:
    """A candidate, its evaluation, and the devices it is champion of.

    Attributes:
        strategy: with its own settings, such as `gptq (bits 8)`.
        steps: by reference, the strategies between it and the candidate.
    """

    name: str
    strategy: str
    parent: str
    teacher: str | None
    steps: Mapping[str, str]
    record: EvaluationRecord
    champion_of: Sequence[str]


@dataclass(frozen=True)
class DifferenceRow:
    """The paired difference of a candidate from a reference on one metric."""

    candidate: str
    reference: str
    metric: str
    difference: Difference

    @property
    def title(self) -> str:
        """What is compared."""
        return f"{self.candidate} against {self.reference}"


@dataclass(frozen=True)
class LossRow:
    """A significant loss of a candidate against its base on one kind of row or benchmark.

    Attributes:
        part: the kind of rows, or `benchmark/<task>`.
        difference: paired, with the uncorrected interval.
        corrected_p: by Holm's method, over all parts and metrics of the candidate.
    """

    candidate: str
    reference: str
    part: str
    metric: str
    difference: Difference
    corrected_p: float


@dataclass(frozen=True)
class CompiledRow:
    """A compiled model on its devices.

    Attributes:
        types: number of its tensors by type.
        checkpoint: quality of its checkpoint's answers.
        differences: of its answers from its checkpoint's, paired, by metric.
    """

    record: DeviceRecord
    parity: ParityRecord
    types: str
    checkpoint: Quality
    differences: Mapping[str, Difference]

    @property
    def divergences(self) -> Mapping[str, Divergence]:
        """Divergence by kind of reference; empty in a record of an older version."""
        found = {"float parent": self.record.from_float_parent, "checkpoint": self.record.from_checkpoint}
        return {kind: divergence for kind, divergence in found.items() if divergence}


@dataclass(frozen=True)
class OffloadingRow:
    """The policies of a device, their curves, and charts of both."""

    record: OffloadRecord
    curves: Curves
    charts: Sequence[Chart]


@dataclass(frozen=True)
class SearchRow:
    """A search, and the chart of its front."""

    record: SearchRecord
    chart: Chart
