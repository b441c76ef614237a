"""The metrics of a candidate's run in MLflow. MLflow's UI groups charts into sections by the name before the last `/`.

The four metrics have no section, so they come first. Values that do not help to compare runs are not logged: numbers of
questions, settings, and intervals on devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.artifacts import Manifest

SUMMARY = (  # the first columns in tables and charts of candidates
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


def candidate_metrics(manifest: Manifest, record: Mapping[str, Any], cost: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of the checkpoint, the facts of its strategy, and the cost of making it."""
    numbers = _flatten({key: record.get(key) for key in (*ESTIMATES, *PLAIN, "ttft_ms", "tpot_ms")})
    numbers |= {
        f"interval/{key}_{end}": record[key][end]
        for key in ESTIMATES
        for end in ("low", "high")
        if (record.get(key) or {}).get(end) is not None
    }
    numbers |= {f"fits/{device}": float(fits) for device, fits in record["fits"].items()}
    for task, metrics in record.get("benchmarks", {}).items():
        numbers |= _flatten(
            {key: part for key, part in metrics.items() if isinstance(part, Mapping)}, f"benchmark/{task}/"
        )
    facts = {key: value for key, value in manifest.facts.items() if key not in manifest.config}
    numbers |= {f"{manifest.strategy}/{key}": float(v) for key, v in facts.items() if isinstance(v, float | int)}
    return numbers | {f"cost/{key}": cost[key] for key in COSTS}


def curve_metrics(manifest: Manifest, curves: Curves) -> dict[str, Sequence[tuple[int, float]]]:
    """Returns the curves that a strategy recorded by step or by layer."""
    return {f"{manifest.strategy}/{name}": curve for name, curve in curves.items()}


def device_metrics(target: str, record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a compiled model on each device."""
    numbers: dict[str, float] = {}
    for device, run in record["devices"].items():
        numbers |= _flatten({key: run.get(key) for key in ON_DEVICE}, f"{target}/{device}/")
    return numbers


def caching_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of prefix reuse and the answer cache."""
    return _flatten(record, "caching/")


def offloading_metrics(device: str, record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of each offloading policy over the configured link."""
    numbers: dict[str, float] = {}
    for policy, figures in record["links"][record["link"]].items():
        numbers |= _flatten({key: figures[key] for key in OFFLOADING}, f"offload/{device}/{policy}/")
    return numbers


def _flatten(tree: Any, name: str = "") -> dict[str, float]:
    """Returns the numbers in a record by path: the value of an estimate, the percentiles of latencies."""
    if isinstance(tree, Mapping):
        if "value" in tree:
            return _flatten(tree["value"], name)
        if "p50" in tree:
            return {f"{name}_{part}": float(tree[part]) for part in ("p50", "p90") if tree.get(part) is not None}
        branches = [
            _flatten(part, f"{name}{'' if not name or name[-1] == '/' else '/'}{key}") for key, part in tree.items()
        ]
        return {path: value for branch in branches for path, value in branch.items()}
    return {name: float(tree)} if isinstance(tree, int | float) else {}
