"""Policies of a device and its edge server."""

from __future__ import annotations

from typing import Literal

from lilliput.records.costs import Cost
from lilliput.records.figures import Difference, Energy, Figure, Record, Source


class EstimatedLatency(Record):
    """Latency over a declared link."""

    p50: float
    p90: float
    mean: float
    n: int
    source: Source
    measured: bool


class PolicyFigures(Record):
    """Quality and cost of a policy over one link; `over_random` has paired differences by metric."""

    offloaded: float
    accuracy: Figure
    hallucination_rate: Figure
    latency_ms: EstimatedLatency
    energy_per_query_j: Energy
    battery_percent_per_query: Energy
    over_random: dict[str, Figure]


class CurvePoint(Record):
    """Quality at one offloaded share."""

    offloaded: float
    accuracy: float
    hallucination_rate: float


ServedPolicy = Literal["device", "server", "threshold", "learned_before", "learned_after"]
ChoiceReason = Literal["supported", "simpler", "place", "unsupported"]


class PolicySupport(Record):
    """How well a routing policy is supported over one link.

    Attributes:
        over_random: paired gain per question (right answers less hallucinations) over sending as many questions to the
            edge server at random.
        corrected_p: of this gain, by Holm's method over all policies of the link.
        supported: whether the gain is positive and `corrected_p` significant.
    """

    over_random: Difference
    corrected_p: float
    supported: bool


class ObjectiveWins(Record):
    """How often a policy meets the device's objective better than another one, in paired resamples.

    Attributes:
        better: the policy.
        than: the other policy.
        share: of the resamples.
        p: two-sided; corrected by Holm's method where several policies were compared.
    """

    better: ServedPolicy
    than: ServedPolicy
    share: float
    p: float


class PolicyChoice(Record):
    """The policy to serve over one link.

    Attributes:
        served: the policy.
        reason: `supported`: best by objective among the policies that are supported over random routing; `simpler`:
            the best one is not shown to be better than this simpler one; `place`: this place is shown to meet the
            objective better than the supported policies; `unsupported`: no policy is supported, so the cheaper place.
        cheaper_place: the device or the edge server alone, whichever the objective prefers.
        policies: every routing policy, simplest first.
        compared: comparisons by objective that decided.
    """

    served: ServedPolicy
    reason: ChoiceReason
    cheaper_place: Literal["device", "server"]
    policies: dict[str, PolicySupport]
    compared: list[ObjectiveWins]


Policies = dict[str, PolicyFigures]
Curves = dict[str, list[CurvePoint]]  # offload/<device>/curves.json, by ranking
Areas = dict[str, dict[str, Figure]]  # how well a ranking orders the questions, by ranking and metric


class PolicyResults(Record):
    """Every policy over every link; `areas_over_threshold` are paired differences from the areas of `threshold`.

    `choices` has the policy to serve over each link; None in a record of an older version.
    """

    links: dict[str, Policies]
    areas: Areas
    areas_over_threshold: Areas
    choices: dict[str, PolicyChoice] | None = None


class _Offloading(Record):
    device: str
    candidate: str
    edge: str
    pair: tuple[str, str]
    questions: int
    too_long_for_embedder: int
    link: str


class OffloadRecord(PolicyResults, _Offloading, Cost):
    """offload/<device>.json: the policies of a device and its edge server; `pair` is from offload/model_pair.py."""

    @property
    def policies(self) -> Policies:
        """The figures over the configured link."""
        return self.links[self.link]
