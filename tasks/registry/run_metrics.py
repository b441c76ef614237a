"""The numbers of a candidate's run in MLflow, whose UI makes a section of charts of all names before the last `/`.

The four metrics stand first, without a section. What says nothing when runs are compared stays in the records: how
many were asked, settings, and on devices the intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.artifacts import Manifest

SUMMARY = (  # what tables and charts of candidates begin with
    "accuracy_choice",
    "accuracy_free",
    "hallucination_rate",
    "abstention_rate",
    "energy_per_query_j",
    "accessibility",
)
ESTIMATES = (*SUMMARY, "selective_accuracy", "energy_per_token_j", "energy_per_right_answer_j")
PLAIN = ("size_bytes", "parameters", "rate_tokens_per_s", "peak_rss_bytes", "load_s")
COSTS = ("seconds", "cpu_seconds", "peak_rss_bytes")
ON_DEVICE = ("fits", "peak_rss_bytes", "load_s", "rate_tokens_per_s", "ttft_ms", "tpot_ms", "energy_per_query_j")
OFFLOADING = ("accuracy", "hallucination_rate", "latency_ms", "energy_per_query_j")

Curves = Mapping[str, Sequence[tuple[int, float]]]


def of_candidate(manifest: Manifest, record: Mapping[str, Any], cost: Mapping[str, Any]) -> dict[str, float]:
    """What was measured of the checkpoint, what its strategy found on the way, and what making it cost."""
    numbers = _leaves({key: record.get(key) for key in (*ESTIMATES, *PLAIN, "ttft_ms", "tpot_ms")})
    numbers |= {
        f"interval/{key}_{end}": record[key][end]
        for key in ESTIMATES
        for end in ("low", "high")
        if (record.get(key) or {}).get(end) is not None
    }
    numbers |= {f"fits/{device}": float(fits) for device, fits in record["fits"].items()}
    for task, metrics in record.get("benchmarks", {}).items():
        numbers |= _leaves(
            {key: part for key, part in metrics.items() if isinstance(part, Mapping)}, f"benchmark/{task}/"
        )
    found = {key: value for key, value in manifest.facts.items() if key not in manifest.config}
    numbers |= {f"{manifest.strategy}/{key}": float(v) for key, v in found.items() if isinstance(v, float | int)}
    return numbers | {f"cost/{key}": cost[key] for key in COSTS}


def of_curves(manifest: Manifest, curves: Curves) -> dict[str, Sequence[tuple[int, float]]]:
    """What a strategy recorded step by step or layer by layer."""
    return {f"{manifest.strategy}/{name}": curve for name, curve in curves.items()}


def on_devices(target: str, record: Mapping[str, Any]) -> dict[str, float]:
    """What each device made of a compiled model."""
    numbers: dict[str, float] = {}
    for device, run in record["devices"].items():
        numbers |= _leaves({key: run.get(key) for key in ON_DEVICE}, f"{target}/{device}/")
    return numbers


def of_caching(record: Mapping[str, Any]) -> dict[str, float]:
    """What prefix reuse and the answer cache do to a candidate."""
    return _leaves(record, "caching/")


def of_offloading(device: str, record: Mapping[str, Any]) -> dict[str, float]:
    """What each policy reaches over the configured link."""
    numbers: dict[str, float] = {}
    for policy, figures in record["links"][record["link"]].items():
        numbers |= _leaves({key: figures[key] for key in OFFLOADING}, f"offload/{device}/{policy}/")
    return numbers


def _leaves(tree: Any, name: str = "") -> dict[str, float]:
    """The numbers in a record by their path: an estimate by its value, latencies by their percentiles."""
    if isinstance(tree, Mapping):
        if "value" in tree:
            return _leaves(tree["value"], name)
        if "p50" in tree:
            return {f"{name}_{part}": float(tree[part]) for part in ("p50", "p90") if tree.get(part) is not None}
        branches = [
            _leaves(part, f"{name}{'' if not name or name[-1] == '/' else '/'}{key}") for key, part in tree.items()
        ]
        return {path: value for branch in branches for path, value in branch.items()}
    return {name: float(tree)} if isinstance(tree, int | float) else {}
