"""The metrics of a candidate's run in MLflow. MLflow's UI groups charts into sections by the name before the last `/`.

The four metrics have no section, so they come first. Values that do not help to compare runs are not logged: numbers of
questions, settings, and intervals on devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.artifacts import Manifest
from lilliput.records import CachingRecord, Cost, DeviceRecord, EvaluationRecord, Figure, OffloadRecord, Record
from lilliput.statistics.compare import QUALITY

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
ON_DEVICE = {"fits", "peak_rss_bytes", "load_s", "rate_tokens_per_s", "ttft_ms", "tpot_ms", "energy_per_query_j"}
OFFLOADING = {"accuracy", "hallucination_rate", "latency_ms", "energy_per_query_j"}

Curves = Mapping[str, Sequence[tuple[int, float]]]


def candidate_metrics(manifest: Manifest, record: EvaluationRecord, cost: Cost) -> dict[str, float]:
    """Returns the metrics of the checkpoint, the facts of its strategy, and the cost of making it."""
    fields = dict(record)
    numbers = _flatten({key: fields[key] for key in (*ESTIMATES, *PLAIN, "ttft_ms", "tpot_ms")})
    numbers |= {
        f"interval/{key}_{end}": bound
        for key in ESTIMATES
        for end in ("low", "high")
        if (bound := getattr(fields[key], end)) is not None
    }
    numbers |= {f"fits/{device}": float(fits) for device, fits in record.fits.items()}
    if record.by_kind.keys() - {"question"}:  # otherwise they repeat the summary
        numbers |= _flatten(record.by_kind, "kind/")
    if record.tool_calls:
        numbers |= _flatten(record.tool_calls, "tool_calls/")
    for task, metrics in record.benchmarks.items():
        numbers |= _flatten(
            {key: part for key, part in metrics.items() if isinstance(part, Figure)}, f"benchmark/{task}/"
        )
    facts = {key: value for key, value in manifest.facts.items() if key not in manifest.config}
    numbers |= {f"{manifest.strategy}/{key}": float(v) for key, v in facts.items() if isinstance(v, float | int)}
    return numbers | {f"cost/{key}": getattr(cost, key) for key in COSTS}


def curve_metrics(manifest: Manifest, curves: Curves) -> dict[str, Sequence[tuple[int, float]]]:
    """Returns the curves that a strategy recorded by step or by layer."""
    return {f"{manifest.strategy}/{name}": curve for name, curve in curves.items()}


def device_metrics(target: str, record: DeviceRecord) -> dict[str, float]:
    """Returns the metrics of a compiled model: of its answers, its divergence, and its run on each device."""
    runs = {device: run.model_dump(include=ON_DEVICE) for device, run in record.devices.items()}
    quality = record.quality.model_dump(include=set(QUALITY)) if record.quality else {}
    found = {"from_checkpoint": record.from_checkpoint, "from_float_parent": record.from_float_parent}
    divergences = {name: of.model_dump(exclude={"reference", "tokens"}) for name, of in found.items() if of}
    return _flatten(runs | quality | divergences, f"{target}/")


def caching_metrics(record: CachingRecord) -> dict[str, float]:
    """Returns the metrics of prefix reuse and the answer cache."""
    return _flatten(record.as_json(), "caching/")


def offloading_metrics(device: str, record: OffloadRecord) -> dict[str, float]:
    """Returns the metrics of each offloading policy over the configured link."""
    policies = {policy: figures.model_dump(include=OFFLOADING) for policy, figures in record.policies.items()}
    return _flatten(policies, f"offload/{device}/")


def _flatten(tree: Any, name: str = "") -> dict[str, float]:
    """Returns the numbers in a record by path: the value of an estimate, the percentiles of latencies."""
    if isinstance(tree, Record):
        tree = dict(tree)
    if isinstance(tree, Mapping):
        if "value" in tree:
            return _flatten(tree["value"], name)
        if "p50" in tree:
            return {f"{name}_{part}": float(tree[part]) for part in ("p50", "p90") if tree[part] is not None}
        branches = [
            _flatten(part, f"{name}{'' if not name or name[-1] == '/' else '/'}{key}") for key, part in tree.items()
        ]
        return {path: value for branch in branches for path, value in branch.items()}
    return {name: float(tree)} if isinstance(tree, int | float) else {}
