"""Selects the champion of a device from evaluation records, with a reason for every other candidate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from lilliput.config import PromotionConfig
from lilliput.statistics.differences import Comparison

Record = Mapping[str, Any]

# Record key of each objective, and whether larger is better.
OBJECTIVES = {
    "accuracy": ("accuracy_choice", True),
    "hallucination": ("hallucination_rate", False),
    "energy": ("energy_per_query_j", False),
    "size": ("size_bytes", False),
}


@dataclass(frozen=True)
class Reference:
    """A candidate that others are compared with: the base, or the current champion.

    Attributes:
        name: its key in the records; the base may be missing there.
        title: its name in reasons, such as `the base`.
        record: its evaluation on the reference runtime.
        differences: paired differences of each candidate from it, by candidate and metric.
    """

    name: str
    title: str
    record: Record
    differences: Mapping[str, Mapping[str, Comparison]] = field(default_factory=dict)


class Decision(BaseModel):
    """The champion of a device, or None, and a reason for every candidate.

    Attributes:
        challenger: the best other candidate; it may have been refused only for its distance to the current champion.
    """

    model_config = ConfigDict(frozen=True)

    device: str
    champion: str | None
    challenger: str | None = None
    reason: str
    refused: dict[str, str]


def decide(
    device: str,
    rules: PromotionConfig,
    records: Mapping[str, Record],
    base: Reference,
    impossible: Mapping[str, str] | None = None,
    current: Reference | None = None,
) -> Decision:
    """Selects the champion among `records` for `device`.

    Refuses a candidate that does not fit, or whose difference from the base or the current champion may exceed the
    rules' limits (bound of the interval). On the Pareto front of the others (accuracy, hallucination, energy, size)
    the device's preference decides, then the smaller size. The current champion must meet the limits to the base too.

    Args:
        device: its name in params.yaml.
        rules: preference and limits.
        records: evaluation records by candidate, of the form that the device runs.
        base: the reference of every candidate but itself.
        impossible: candidates that the device cannot run, with the reason, such as "not compiled for gguf".
        current: the current champion; None if there is none that candidates can be compared with.
    """
    refused = dict(impossible or {})
    for name, record in records.items():
        if name not in refused and (reason := _refusal(device, rules, name, record, base)):
            refused[name] = reason
    if rules.prefer == "energy":
        refused |= _estimated_energies(_without(records, refused))
    admitted = _without(records, refused)
    worse = _worse_than_current(rules, admitted, current)
    eligible = _without(admitted, worse)
    refused |= worse | _dominated(eligible)
    front = _ranked(rules, eligible)
    if not front:
        return Decision(device=device, champion=None, reason="no candidate is eligible", refused=refused)
    champion = front[0]
    not_preferred = f"on the Pareto front, but {device} prefers {rules.prefer}, where {champion} is ahead"
    refused |= dict.fromkeys(front[1:], not_preferred)
    challenger = next((name for name in _ranked(rules, admitted) if name != champion), None)
    reason = (
        f"fits, is within the allowed distance of {_titles(champion, base, current)}, and has the best "
        f"{rules.prefer} ({_show(rules.prefer, records[champion])}) of {len(front)} on the Pareto front"
    )
    return Decision(device=device, champion=champion, challenger=challenger, reason=reason, refused=refused)


def _worse_than_current(
    rules: PromotionConfig, records: Mapping[str, Record], current: Reference | None
) -> dict[str, str]:
    """Returns candidates beyond the limits to the current champion; none if the champion was refused or wins."""
    if current is None or current.name not in records or _ranked(rules, records)[0] == current.name:
        return {}
    reasons = {name: _beyond_limits(rules, name, record, current) for name, record in records.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _ranked(rules: PromotionConfig, records: Mapping[str, Record]) -> list[str]:
    """Returns the Pareto front of `records`, ordered by preference."""
    front = _without(records, _dominated(records))
    return sorted(front, key=lambda name: (*_preference(rules.prefer, records[name]), name))


def objective(name: str, record: Record) -> float | None:
    """Returns the value of objective `name` in `record`; None if unavailable."""
    return metric_value(record, OBJECTIVES[name][0])


def metric_value(record: Record, metric: str) -> float | None:
    """Returns the number of `metric` in `record`; None if unavailable."""
    value = record.get(metric)
    return value.get("value") if isinstance(value, Mapping) else value


def pareto_front(records: Mapping[str, Record]) -> list[str]:
    """Returns the names of `records` that no other dominates: at least as good on all objectives, better on one."""
    others = records.values()
    return [name for name, record in records.items() if not any(_dominates(r, record, OBJECTIVES) for r in others)]


def _without(records: Mapping[str, Record], names: Collection[str]) -> dict[str, Record]:
    return {name: record for name, record in records.items() if name not in names}


def _titles(champion: str, base: Reference, current: Reference | None) -> str:
    titles = [base.title, *([current.title] if current and current.name != champion else [])]
    return " and of ".join(titles)


def _refusal(device: str, rules: PromotionConfig, name: str, record: Record, base: Reference) -> str | None:
    if not record["fits"][device]:
        return record.get("does_not_fit") or f"does not fit the storage and memory of {device}"
    if objective(rules.prefer, record) is None:
        return f"its {rules.prefer} is unavailable, and an unavailable metric never wins"
    return _beyond_limits(rules, name, record, base)


def _beyond_limits(rules: PromotionConfig, name: str, record: Record, reference: Reference) -> str | None:
    """Returns why `record` may be worse than `reference` by more than the limits; None if it is not."""
    if name == reference.name:
        return None
    differences = reference.differences.get(name, {})
    energy = metric_value(reference.record, "energy_per_query_j") or 0.0
    max_energy_rise_j = None if rules.max_energy_rise is None else rules.max_energy_rise * energy
    limits = {
        "accuracy_choice": (rules.max_accuracy_drop, -1.0, "choice accuracy", "below"),
        "hallucination_rate": (rules.max_hallucination_rise, 1.0, "hallucination rate", "above"),
        "energy_per_query_j": (max_energy_rise_j, 1.0, "energy per query (J)", "above"),
    }
    for metric, (allowed, sign, title, direction) in limits.items():
        if allowed is None or metric_value(reference.record, metric) is None:
            continue
        comparison = differences.get(metric)
        if comparison is None:
            return f"its {title} cannot be compared with that of {reference.title}, and an unavailable one never wins"
        worst = sign * (comparison.difference.high if sign > 0 else comparison.difference.low)
        if worst > allowed:
            return (
                f"{title} may lie {worst:.3f} {direction} that of {reference.title} (paired interval); "
                f"{allowed:.3f} is allowed"
            )
    return _less_accessible(rules.max_accessibility_drop, record, reference)


def _less_accessible(allowed: float | None, record: Record, reference: Reference) -> str | None:
    """Compares both intervals at their worst, because the score has no values per question to pair."""
    own_score, reference_score = record.get("accessibility") or {}, reference.record.get("accessibility") or {}
    if allowed is None or reference_score.get("value") is None:
        return None
    if own_score.get("value") is None:
        return "its accessibility is unavailable, and an unavailable metric never wins"
    drop = reference_score["high"] - own_score["low"]
    if drop <= allowed:
        return None
    return (
        f"accessibility may lie {drop:.3f} below that of {reference.title} (both intervals at their worst); "
        f"{allowed:.3f} is allowed"
    )


def _estimated_energies(records: Mapping[str, Record]) -> dict[str, str]:
    """Returns candidates with estimated energy if another's is measured: the two are not comparable."""
    measured = {name for name, record in records.items() if record["energy_per_query_j"].get("measured")}
    reason = "its energy is estimated, that of others is measured, and the two are not compared"
    return {name: reason for name in records if measured and name not in measured}


def _dominated(records: Mapping[str, Record]) -> dict[str, str]:
    """Returns the dominated candidates; the reason names the candidate that dominates."""
    meters = {
        (record.get("energy_per_query_j") or {}).get("source")
        for record in records.values()
        if objective("energy", record) is not None
    }
    # Without energy if sources differ: comparing it only within a source would make domination cyclic.
    objectives = [name for name in OBJECTIVES if name != "energy" or len(meters) <= 1]
    dominators = {
        name: next((other for other in records if _dominates(records[other], record, objectives)), None)
        for name, record in records.items()
    }
    return {
        name: f"dominated by {other}, which is at least as good on every metric and better on one"
        for name, other in dominators.items()
        if other
    }


def _dominates(a: Record, b: Record, objectives: Collection[str]) -> bool:
    """Returns whether `a` is at least as good as `b` on every objective and better on one; unavailable is worst."""
    ranks = [(_rank(name, a), _rank(name, b)) for name in objectives]
    return all(left <= right for left, right in ranks) and any(left < right for left, right in ranks)


def _rank(name: str, record: Record) -> float:
    """Returns a rank: smaller is better; infinite if the objective is unavailable."""
    value = objective(name, record)
    if value is None:
        return float("inf")
    return -value if OBJECTIVES[name][1] else value


def _preference(prefer: str, record: Record) -> tuple[float, float]:
    return _rank(prefer, record), record["size_bytes"]


def _show(name: str, record: Record) -> str:
    value = objective(name, record)
    estimated = "" if (record.get("energy_per_query_j") or {}).get("measured") else "an estimated "
    return {"energy": f"{estimated}{value:.2f} J a query", "size": f"{(value or 0) / 2**20:.0f} MiB"}.get(
        name, f"{value:.3f}"
    )
