"""Typed results of every stage. On disk they are JSON with the same keys; docs/metrics.md describes the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Source = Literal["nvml_counter", "rapl", "soc", "battery", "estimate_tdp", "declared", "unavailable"]
Verdict = Literal["yes", "not shown", "cannot tell"]
_MayBeNan = Annotated[float, Field(allow_inf_nan=True)]  # compared with the limits before the record is written


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


class Agreement(Record):
    """Agreement of next-token predictions with the checkpoint's; `clear` positions are no near tie there."""

    positions: int
    same_argmax: Figure
    same_argmax_clear: Figure
    mean_difference_nats: _MayBeNan
    mean_absolute_difference_nats: _MayBeNan


class ChoiceAgreement(Record):
    """Agreement of the answers to choice questions with the checkpoint's; only the number if there are none."""

    questions: int
    same_choices: Figure | None = None
    accuracy_difference: Figure | None = None
    accuracy_differs: bool = False


class _Compiled(Record):
    candidate: str
    target: str


class ParityRecord(ChoiceAgreement, Agreement, _Compiled):
    """parity.json of a compiled model: the comparison with its checkpoint; `limits` are the settings `parity`."""

    runtime: dict[str, str]
    limits: dict[str, int | float]


class Divergence(Record):
    """How far a compiled model's next-token distributions are from those of the candidate `reference`.

    Attributes:
        tokens: number of predicted tokens.
        kl_mean_nats: KL divergence from the reference; `kl_p99_nats` and `kl_p999_nats` are percentiles 99 and 99.9.
        same_top: share of tokens for which both have the same likeliest one.
        rms_delta_p: root mean square of the difference in probability of the text's token.
    """

    reference: str
    tokens: int
    kl_mean_nats: Uncertain
    kl_median_nats: Uncertain
    kl_p99_nats: Uncertain
    kl_p999_nats: Uncertain
    same_top: Uncertain
    rms_delta_p: Uncertain


class DeviceRun(Record):
    """A run with the threads and the memory of a device; without measurements if it did not fit the memory."""

    fits: bool
    does_not_fit: str | None
    threads: int
    context_tokens: int
    peak_rss_bytes: int
    empty_rss_bytes: int | None = None
    load_s: float | None = None
    ttft_ms: Quantiles | None = None
    tpot_ms: Quantiles | None = None
    rate_tokens_per_s: float | None = None
    energy_per_query_j: Energy | None = None
    energy_per_token_j: Energy | None = None
    runtime: dict[str, str] | None = None


class DeviceRecord(_Compiled):
    """metrics/devices/<name>.json: what a compiled model answers, and its runs by device.

    Attributes:
        sha256: of the compiled model.
        emulated: what of a device is emulated, and what is not.
        quality: of its answers, through its own runtime; None in a record of an older version.
        benchmarks: by task, a figure per metric, `seconds` and `items_per_s`.
        from_checkpoint: divergence from the checkpoint that was compiled; None without answers to compare, or in a
            record of an older version.
        from_float_parent: divergence from the nearest ancestor with float weights, which may be the checkpoint itself.
    """

    sha256: str
    size_bytes: int
    emulated: str
    devices: dict[str, DeviceRun]
    quality: Quality | None = None
    from_checkpoint: Divergence | None = None
    from_float_parent: Divergence | None = None
    benchmarks: dict[str, dict[str, Figure | float]] = Field(default_factory=dict)
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


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


PairRates = dict[str, dict[str, Figure]]  # hit rates by split and kind of pair


class StreamFigures(Record):
    """Hit rates and savings on a stream; maps are by variant (plain, prefix, cache) or step (prefix, cache, both)."""

    queries: int
    distinct_questions: int
    distinct_wordings: int
    hit_rate: Figure
    exact_hit_rate: Figure
    semantic_hit_rate: Figure
    wrong_hit_rate: Figure
    wrong_share_of_semantic_hits: Figure
    changed_answers: dict[str, int]
    hallucination_rate: dict[str, Figure]
    energy_per_query_j: dict[str, Energy]
    ttft_ms: dict[str, Quantiles]
    saved_j_per_query: dict[str, Energy]
    differences: dict[str, dict[str, Difference]]


class _CachedModel(Record):
    candidate: str
    sha256: str
    size_bytes: int
    cache_bytes: int
    embedder_sha256: str
    threshold: float
    pairs: PairRates


class CachingRecord(StreamFigures, _CachedModel):
    """metrics/caching/<candidate>.json: prefix reuse and the answer cache."""

    runtime: str
    peak_rss_bytes: int
    seconds: float
    cpu_seconds: float


class CacheThreshold(Record):
    """offload/<device>/cache.json: the similarity threshold of the answer cache for a pair of models."""

    pair: tuple[str, str]
    embedder_sha256: str
    threshold: float
    pairs: PairRates


class Registration(Record):
    """The model version of a candidate and its run in MLflow."""

    version: str
    run_id: str


class Decision(Record):
    """The champion of a device, or None, and a reason for every candidate.

    Attributes:
        challenger: the best other candidate; it may have been refused only for its distance to the current champion.
    """

    device: str
    champion: str | None
    challenger: str | None = None
    reason: str
    refused: dict[str, str]

    def refused_by_reason(self) -> dict[str, list[str]]:
        """Returns the refused candidates by reason; in a reason `<candidate>` replaces the candidate's own name."""
        grouped: dict[str, list[str]] = {}
        for name, reason in self.refused.items():
            grouped.setdefault(reason.replace(f"{name}-", "<candidate>-"), []).append(name)
        return grouped


class CompiledChampion(Record):
    """Name and sha256 of the champion's compiled model."""

    name: str
    sha256: str


class Promotion(Decision):
    """An entry of promotion.json; `compiled` is None without a compiled model for the device."""

    compiled: CompiledChampion | None


Registry = dict[str, Registration]  # registry.json, by candidate
Promotions = dict[str, Promotion]  # promotion.json, by device


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
