"""What a compiled model answers, on its own and on devices."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lilliput.records.evaluation import Quality
from lilliput.records.figures import Energy, Figure, Quantiles, Record, Uncertain

_MayBeNan = Annotated[float, Field(allow_inf_nan=True)]  # compared with the limits before the record is written


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
