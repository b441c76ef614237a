"""Which candidate is best for a device, and why the others are not: a pure function of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from lilliput.config import PromotionConfig
from lilliput.evaluate.compare import Comparison

Record = Mapping[str, Any]

# Where each objective is read from a record, and whether more of it is better.
OBJECTIVES = {
    "accuracy": ("accuracy_choice", True),
    "hallucination": ("hallucination_rate", False),
    "energy": ("energy_per_query_j", False),
    "size": ("size_bytes", False),
}


class Decision(BaseModel):
    """The champion of a device, or None, and a reason for every candidate."""

    model_config = ConfigDict(frozen=True)

    device: str
    champion: str | None
    reason: str
    refused: dict[str, str]


def decide(
    device: str,
    rules: PromotionConfig,
    records: Mapping[str, Record],
    against_base: Mapping[str, Mapping[str, Comparison]],
    impossible: Mapping[str, str] | None = None,
) -> Decision:
    """The champion among `records` for `device`.

    A candidate is out if it does not fit, or if the interval of its paired difference from the base reaches beyond
    what the rules allow. Of those left, only the Pareto front on accuracy, hallucination, energy and size counts; on
    it the device's preference decides, and the smaller model where that leaves two equal.

    Args:
        device: its name in params.yaml.
        rules: what it prefers and how much worse than the base a candidate may be.
        records: evaluation records by candidate.
        against_base: paired differences from the base by candidate and metric.
        impossible: candidates that the device cannot run, and why: not compiled for it, say.
    """
    refused = dict(impossible or {})
    for name, record in records.items():
        if name in refused:
            continue
        if reason := _refusal(device, rules, record, against_base.get(name, {})):
            refused[name] = reason
    eligible = {name: record for name, record in records.items() if name not in refused}
    if rules.prefer == "energy":
        refused |= _estimates_beside_measurements(eligible)
        eligible = {name: record for name, record in eligible.items() if name not in refused}
    for name, record in eligible.items():
        if better := next((other for other in eligible if _dominates(eligible[other], record)), None):
            refused[name] = f"dominated by {better}, which is at least as good on every metric and better on one"
    front = [name for name in eligible if name not in refused]
    if not front:
        return Decision(device=device, champion=None, reason="no candidate is eligible", refused=refused)
    champion = min(front, key=lambda name: (*_preference(rules.prefer, records[name]), name))
    for name in front:
        if name != champion:
            refused[name] = f"on the Pareto front, but {device} prefers {rules.prefer}, where {champion} is ahead"
    reason = (
        f"fits, keeps within the allowed distance of the base, and has the best {rules.prefer} "
        f"({_show(rules.prefer, records[champion])}) of {len(front)} on the Pareto front"
    )
    return Decision(device=device, champion=champion, reason=reason, refused=refused)


def objective(name: str, record: Record) -> float | None:
    """The value of objective `name` in `record`; None where it was unavailable."""
    value = record.get(OBJECTIVES[name][0])
    return value.get("value") if isinstance(value, Mapping) else value


def pareto_front(records: Mapping[str, Record]) -> list[str]:
    """Those of `records` that no other one dominates: as good on every objective and better on one."""
    return [name for name, record in records.items() if not any(_dominates(r, record) for r in records.values())]


def _refusal(device: str, rules: PromotionConfig, record: Record, differences: Mapping[str, Comparison]) -> str | None:
    if not record["fits"][device]:
        return record.get("does_not_fit") or f"does not fit the storage and memory of {device}"
    if objective(rules.prefer, record) is None:
        return f"its {rules.prefer} is unavailable, and an unavailable metric never wins"
    accuracy = differences.get("accuracy_choice")
    if accuracy and accuracy.difference.low < -rules.max_accuracy_drop:
        return (
            f"choice accuracy may lie {-accuracy.difference.low:.3f} below the base's (paired interval); "
            f"{rules.max_accuracy_drop:.3f} is allowed"
        )
    hallucination = differences.get("hallucination_rate")
    if hallucination and hallucination.difference.high > rules.max_hallucination_rise:
        return (
            f"hallucination rate may lie {hallucination.difference.high:.3f} above the base's (paired interval); "
            f"{rules.max_hallucination_rise:.3f} is allowed"
        )
    return None


def _estimates_beside_measurements(records: Mapping[str, Record]) -> dict[str, str]:
    """Those whose energy is estimated while another's is measured: the two are not compared, and measured wins."""
    measured = {name for name, record in records.items() if record["energy_per_query_j"].get("measured")}
    reason = "its energy is an estimate, others' is measured, and the two are not compared"
    return {name: reason for name in records if measured and name not in measured}


def _dominates(a: Record, b: Record) -> bool:
    """Whether `a` is at least as good as `b` on every objective and better on one; unavailable never beats."""
    better = False
    for name, (key, more_is_better) in OBJECTIVES.items():
        left, right = objective(name, a), objective(name, b)
        if name == "energy" and _source(a, key) != _source(b, key):
            continue  # energies from different meters are not compared
        if left is None and right is None:
            continue
        if left is None or (right is not None and (left < right if more_is_better else left > right)):
            return False
        better = better or right is None or left != right
    return better


def _source(record: Record, key: str) -> Any:
    value = record.get(key)
    return value.get("source") if isinstance(value, Mapping) else None


def _preference(prefer: str, record: Record) -> tuple[float, float]:
    value = objective(prefer, record)
    assert value is not None, "refused before"
    return (-value if OBJECTIVES[prefer][1] else value, record["size_bytes"])


def _show(name: str, record: Record) -> str:
    value = objective(name, record)
    estimated = "" if (record.get("energy_per_query_j") or {}).get("measured") else "an estimated "
    return {"energy": f"{estimated}{value:.2f} J a query", "size": f"{(value or 0) / 2**20:.0f} MiB"}.get(
        name, f"{value:.3f}"
    )
