"""Accessibility: latency, memory, size and the number of devices that a model fits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lilliput.config import AccessibilityTargets, DeviceConfig
from lilliput.evaluate.energy import EnergyMeter
from lilliput.records import Estimate, Quantiles
from lilliput.runtime.protocol import Ids, Runtime
from lilliput.statistics.intervals import statistic

MIB = 2**20
WARM_UP_TOKENS = 8
FEWEST_QUERIES = 4  # with fewer, an interval means nothing


@dataclass(frozen=True)
class TimedQuery:
    """Figures of one query, run alone.

    Attributes:
        ttft_ms: time to first token, median of the repetitions.
        tpot_ms: time per further token, median of the repetitions; None for an answer of one token.
        tokens: of the answer.
        wall_s: of one repetition.
        energy_j: of one repetition; None if unavailable.
    """

    ttft_ms: float
    tpot_ms: float | None
    tokens: int
    wall_s: float
    energy_j: float | None


def time_queries(
    runtime: Runtime, prompts: Sequence[Ids], max_tokens: int, meter: EnergyMeter, budget_tokens: int
) -> list[TimedQuery]:
    """Answers the prompts one by one and times them, after an untimed warm-up.

    Once the answers have `budget_tokens` tokens together, it starts no further query after FEWEST_QUERIES: a model with
    long answers is timed on fewer. Unlike a budget of seconds, this one does not depend on the machine's speed.
    """
    for _ in runtime.stream(prompts[0], WARM_UP_TOKENS):
        pass
    timed: list[TimedQuery] = []
    for prompt in prompts:
        if len(timed) >= FEWEST_QUERIES and sum(query.tokens for query in timed) >= budget_tokens:
            break
        timed.append(_time_query(runtime, prompt, max_tokens, meter))
    return timed


def _time_query(runtime: Runtime, prompt: Ids, max_tokens: int, meter: EnergyMeter) -> TimedQuery:
    runs: list[list[float]] = []
    with meter.window() as reading:
        window_started = time.perf_counter()
        while not runs or time.perf_counter() - window_started < meter.shortest_window_s:
            started = time.perf_counter()
            runs.append([time.perf_counter() - started for _ in runtime.stream(prompt, max_tokens)])
    arrivals = np.median(runs, axis=0)  # greedy, so all repetitions have the same number of tokens
    tpot_ms = 1e3 * float(arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else None
    energy_j = None if reading.energy_j is None else reading.energy_j / len(runs)
    return TimedQuery(1e3 * float(arrivals[0]), tpot_ms, len(arrivals), reading.wall_s / len(runs), energy_j)


def quantiles(values: Sequence[float]) -> Quantiles:
    """Returns p50, p90 and the number of values."""
    if not values:
        return Quantiles(p50=None, p90=None, n=0)
    p50, p90 = np.quantile(values, [0.5, 0.9])
    return Quantiles(p50=float(p50), p90=float(p90), n=len(values))


def kv_cache_bytes(config: Any, context_tokens: int, bytes_per_value: int = 2) -> int:
    """Returns the KV cache size for `context_tokens`: 2 · layers · KV heads · head size · tokens · bytes per value."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_size * context_tokens * bytes_per_value


def fits(size_bytes: int, config: Any, device: DeviceConfig) -> bool:
    """Returns whether the file fits the storage budget, and weights, KV cache and runtime fit the memory budget.

    Assumes that weights need as much memory as their file, which holds for runtimes that map it.
    """
    ram_bytes = size_bytes + kv_cache_bytes(config, device.context_tokens) + device.runtime_overhead_mib * MIB
    return size_bytes <= device.storage_budget_mib * MIB and ram_bytes <= device.ram_budget_mib * MIB


def score(
    queries: Sequence[TimedQuery],
    size_bytes: int,
    share_of_devices: float,
    targets: AccessibilityTargets,
    seed: int,
    resamples: int,
) -> Estimate | None:
    """Returns the mean of four terms in [0, 1]: TTFT, TPOT, size (each min(1, target / value)) and devices served.

    The interval is a bootstrap over the queries. Answers of one token have no TPOT; if all are such, the term is
    omitted.
    """
    fixed = [min(1.0, targets.size_mib * MIB / size_bytes), share_of_devices]
    rows = np.array([[query.ttft_ms, np.nan if query.tpot_ms is None else query.tpot_ms] for query in queries])

    def combined(draw: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            timed = np.minimum(1.0, np.array([targets.ttft_ms, targets.tpot_ms]) / _median(draw))
        return np.nanmean(np.concatenate([timed, np.broadcast_to(fixed, timed.shape)], axis=-1), axis=-1)

    return statistic(combined, rows, seed, resamples)


def _median(draw: np.ndarray) -> np.ndarray:
    """Returns medians over the second-last axis, ignoring NaN; NaN where all values are NaN."""
    ordered = np.sort(draw, axis=-2)  # NaN sorts last
    counts = (~np.isnan(draw)).sum(axis=-2)
    low = np.take_along_axis(ordered, np.maximum((counts - 1) // 2, 0)[..., None, :], axis=-2)[..., 0, :]
    high = np.take_along_axis(ordered, np.maximum(counts // 2, 0).clip(max=draw.shape[-2] - 1)[..., None, :], axis=-2)
    return np.where(counts > 0, (low + high[..., 0, :]) / 2.0, np.nan)
