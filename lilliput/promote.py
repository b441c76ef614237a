"""Which candidate is best for a device, and why the others are not: a pure function of what was measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from lilliput.config import PromotionConfig
from lilliput.statistics.differences import Comparison

Record = Mapping[str, Any]

# Where each objective is read from a record, and whether more of it is better.
OBJECTIVES = {
    "accuracy": ("accuracy_choice", True),
    "hallucination": ("hallucination_rate", False),
    "energy": ("energy_per_query_j", False),
    "size": ("size_bytes", False),
}


@dataclass(frozen=True)
class Reference:
    """Whom candidates are held against: the base, or the champion so far.

    Attributes:
        name: among the records; the base may be missing there.
        title: what reasons call it: `the base`.
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
        challenger: the best of the rest: on the Pareto front, or kept from it by the champion so far alone.
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
    reigning: Reference | None = None,
) -> Decision:
    """The champion among `records` for `device`.

    A candidate is out if it does not fit, or if the interval of its difference from the base, or from the champion so
    far, reaches beyond what the rules allow. Of those left, only the Pareto front on accuracy, hallucination, energy
    and size counts; on it the device's preference decides, and the smaller model where that leaves two equal. The
    champion so far is held against the base as any other is, so that it goes when the rules no longer let it in.

    Args:
        device: its name in params.yaml.
        rules: what it prefers and how much worse than base and champion a candidate may be.
        records: evaluation records by candidate, of the form that the device runs.
        base: what every candidate but itself is held against.
        impossible: candidates that the device cannot have, and why: not compiled for it, say.
        reigning: the champion so far; None where there is none that candidates can be compared with.
    """
    refused = dict(impossible or {})
    for name, record in records.items():
        if name not in refused and (reason := _refusal(device, rules, name, record, base)):
            refused[name] = reason
    if rules.prefer == "energy":
        refused |= _estimates_beside_measurements(_without(records, refused))
    contenders = _without(records, refused)
    outdone = _outdone(rules, contenders, reigning)
    eligible = _without(contenders, outdone)
    refused |= outdone | _dominated(eligible)
    front = _ranked(rules, eligible)
    if not front:
        return Decision(device=device, champion=None, reason="no candidate is eligible", refused=refused)
    champion = front[0]
    ahead = f"on the Pareto front, but {device} prefers {rules.prefer}, where {champion} is ahead"
    refused |= dict.fromkeys(front[1:], ahead)
    challenger = next((name for name in _ranked(rules, contenders) if name != champion), None)
    reason = (
        f"fits, keeps within the allowed distance of {_titles(champion, base, reigning)}, and has the best "
        f"{rules.prefer} ({_show(rules.prefer, records[champion])}) of {len(front)} on the Pareto front"
    )
    return Decision(device=device, champion=champion, challenger=challenger, reason=reason, refused=refused)


def _outdone(rules: PromotionConfig, records: Mapping[str, Record], reigning: Reference | None) -> dict[str, str]:
    """Who is too far behind the champion so far; nobody where that one is out itself, or wins in any case."""
    if reigning is None or reigning.name not in records or _ranked(rules, records)[0] == reigning.name:
        return {}
    worse = {name: _worse(rules, name, record, reigning) for name, record in records.items()}
    return {name: reason for name, reason in worse.items() if reason}


def _ranked(rules: PromotionConfig, records: Mapping[str, Record]) -> list[str]:
    """The Pareto front of `records`, the preferred first."""
    front = _without(records, _dominated(records))
    return sorted(front, key=lambda name: (*_preference(rules.prefer, records[name]), name))


def objective(name: str, record: Record) -> float | None:
    """The value of objective `name` in `record`; None where it was unavailable."""
    return _value(record, OBJECTIVES[name][0])


def _value(record: Record, key: str) -> float | None:
    value = record.get(key)
    return value.get("value") if isinstance(value, Mapping) else value


def pareto_front(records: Mapping[str, Record]) -> list[str]:
    """Those of `records` that no other one dominates: as good on every objective and better on one."""
    found = records.values()
    return [name for name, record in records.items() if not any(_dominates(r, record, OBJECTIVES) for r in found)]


def _without(records: Mapping[str, Record], names: Collection[str]) -> dict[str, Record]:
    return {name: record for name, record in records.items() if name not in names}


def _titles(champion: str, base: Reference, reigning: Reference | None) -> str:
    others = [base.title, *([reigning.title] if reigning and reigning.name != champion else [])]
    return " and of ".join(others)


def _refusal(device: str, rules: PromotionConfig, name: str, record: Record, base: Reference) -> str | None:
    if not record["fits"][device]:
        return record.get("does_not_fit") or f"does not fit the storage and memory of {device}"
    if objective(rules.prefer, record) is None:
        return f"its {rules.prefer} is unavailable, and an unavailable metric never wins"
    return _worse(rules, name, record, base)


def _worse(rules: PromotionConfig, name: str, record: Record, reference: Reference) -> str | None:
    """By how much more than allowed `record` may be worse than `reference`; None if it is not."""
    if name == reference.name:
        return None
    differences = reference.differences.get(name, {})
    energy = _value(reference.record, "energy_per_query_j") or 0.0
    limits = {
        "accuracy_choice": (rules.max_accuracy_drop, -1.0, "choice accuracy", "below"),
        "hallucination_rate": (rules.max_hallucination_rise, 1.0, "hallucination rate", "above"),
        "energy_per_query_j": (_times(rules.max_energy_rise, energy), 1.0, "energy per query (J)", "above"),
    }
    for metric, (allowed, sign, title, direction) in limits.items():
        if allowed is None or _value(reference.record, metric) is None:
            continue
        compared = differences.get(metric)
        if compared is None:
            return f"its {title} cannot be compared with that of {reference.title}, and an unavailable one never wins"
        worst = sign * (compared.difference.high if sign > 0 else compared.difference.low)
        if worst > allowed:
            return (
                f"{title} may lie {worst:.3f} {direction} that of {reference.title} (paired interval); "
                f"{allowed:.3f} is allowed"
            )
    return _less_accessible(rules.max_accessibility_drop, record, reference)


def _times(share: float | None, value: float) -> float | None:
    return None if share is None else share * value


def _less_accessible(allowed: float | None, record: Record, reference: Reference) -> str | None:
    """The score has no value for each question, so that both intervals are taken at their worst."""
    theirs, own = reference.record.get("accessibility") or {}, record.get("accessibility") or {}
    if allowed is None or theirs.get("value") is None:
        return None
    if own.get("value") is None:
        return "its accessibility is unavailable, and an unavailable metric never wins"
    drop = theirs["high"] - own["low"]
    if drop <= allowed:
        return None
    return (
        f"accessibility may lie {drop:.3f} below that of {reference.title} (both intervals at their worst); "
        f"{allowed:.3f} is allowed"
    )


def _estimates_beside_measurements(records: Mapping[str, Record]) -> dict[str, str]:
    """Those whose energy is estimated while another's is measured: the two are not compared, and measured wins."""
    measured = {name for name, record in records.items() if record["energy_per_query_j"].get("measured")}
    reason = "its energy is an estimate, others' is measured, and the two are not compared"
    return {name: reason for name in records if measured and name not in measured}


def _dominated(records: Mapping[str, Record]) -> dict[str, str]:
    """Those that another is at least as good as on every objective and better than on one, and by whom."""
    meters = {
        (record.get("energy_per_query_j") or {}).get("source")
        for record in records.values()
        if objective("energy", record) is not None
    }
    # Energies from different meters are not compared; by none of them, or domination would run in circles.
    counted = [name for name in OBJECTIVES if name != "energy" or len(meters) <= 1]
    better = {
        name: next((other for other in records if _dominates(records[other], record, counted)), None)
        for name, record in records.items()
    }
    return {
        name: f"dominated by {other}, which is at least as good on every metric and better on one"
        for name, other in better.items()
        if other
    }


def _dominates(a: Record, b: Record, objectives: Collection[str]) -> bool:
    """Whether `a` is at least as good as `b` on every objective and better on one; unavailable is the worst."""
    ranks = [(_rank(name, a), _rank(name, b)) for name in objectives]
    return all(left <= right for left, right in ranks) and any(left < right for left, right in ranks)


def _rank(name: str, record: Record) -> float:
    """Smaller is better; infinite where the objective is unavailable."""
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
