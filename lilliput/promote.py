"""Selects the champion of a device from evaluation records, with a reason for every other candidate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lilliput.config import PromotionConfig
from lilliput.records import Decision, EvaluationRecord
from lilliput.statistics.differences import Comparison

# Field of the record for each objective, except accuracy, which is by choice or of free answers.
_FIELDS = {"hallucination": "hallucination_rate", "energy": "energy_per_query_j", "size": "size_bytes"}
OBJECTIVES = ("accuracy", *_FIELDS)
_LARGER_IS_BETTER = {"accuracy"}


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
    record: EvaluationRecord
    differences: Mapping[str, Mapping[str, Comparison]] = field(default_factory=dict)


def decide(
    device: str,
    rules: PromotionConfig,
    records: Mapping[str, EvaluationRecord],
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
    not_preferred = f"on the Pareto front, but {champion} is ahead in {rules.prefer}, which decides"
    refused |= dict.fromkeys(front[1:], not_preferred)
    challenger = next((name for name in _ranked(rules, admitted) if name != champion), None)
    reason = (
        f"fits, is within the allowed distance of {_titles(champion, base, current)}, and has the best "
        f"{rules.prefer} ({_show(rules.prefer, records[champion])}) of {len(front)} on the Pareto front"
    )
    return Decision(device=device, champion=champion, challenger=challenger, reason=reason, refused=refused)


def _worse_than_current(
    rules: PromotionConfig, records: Mapping[str, EvaluationRecord], current: Reference | None
) -> dict[str, str]:
    """Returns candidates beyond the limits to the current champion; none if the champion was refused or wins."""
    if current is None or current.name not in records or _ranked(rules, records)[0] == current.name:
        return {}
    reasons = {name: _beyond_limits(rules, name, record, current) for name, record in records.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _ranked(rules: PromotionConfig, records: Mapping[str, EvaluationRecord]) -> list[str]:
    """Returns the Pareto front of `records`, ordered by preference."""
    front = _without(records, _dominated(records))
    return sorted(front, key=lambda name: (*_preference(rules.prefer, records[name]), name))


def refused_by_reason(decision: Decision) -> dict[str, list[str]]:
    """Returns the refused candidates by reason; in a reason `<candidate>` replaces the candidate's own name."""
    grouped: dict[str, list[str]] = {}
    for name, reason in decision.refused.items():
        grouped.setdefault(reason.replace(f"{name}-", "<candidate>-"), []).append(name)
    return grouped


def objective(name: str, record: EvaluationRecord) -> float | None:
    """Returns the value of objective `name` in `record`; None if unavailable."""
    return record.number(metric_of(name, record))


def metric_of(name: str, record: EvaluationRecord) -> str:
    """Returns the field of `record` for objective `name`; accuracy is by choice if there are questions with choices."""
    return record.accuracy_metric if name == "accuracy" else _FIELDS[name]


def pareto_front(records: Mapping[str, EvaluationRecord]) -> list[str]:
    """Returns the names of `records` that no other dominates: at least as good on all objectives, better on one."""
    others = records.values()
    return [name for name, record in records.items() if not any(_dominates(r, record, OBJECTIVES) for r in others)]


def _without(records: Mapping[str, EvaluationRecord], names: Collection[str]) -> dict[str, EvaluationRecord]:
    return {name: record for name, record in records.items() if name not in names}


def _titles(champion: str, base: Reference, current: Reference | None) -> str:
    titles = [base.title, *([current.title] if current and current.name != champion else [])]
    return " and of ".join(titles)


def _refusal(device: str, rules: PromotionConfig, name: str, record: EvaluationRecord, base: Reference) -> str | None:
    if not record.fits[device]:
        return record.does_not_fit or f"does not fit the storage and memory of {device}"
    if objective(rules.prefer, record) is None:
        return f"its {rules.prefer} is unavailable, and an unavailable metric never wins"
    return _beyond_limits(rules, name, record, base)


def _beyond_limits(rules: PromotionConfig, name: str, record: EvaluationRecord, reference: Reference) -> str | None:
    """Returns why `record` may be worse than `reference` by more than the limits; None if it is not."""
    if name == reference.name:
        return None
    differences = reference.differences.get(name, {})
    energy = reference.record.energy_per_query_j.value or 0.0
    max_energy_rise_j = None if rules.max_energy_rise is None else rules.max_energy_rise * energy
    accuracy = reference.record.accuracy_metric
    title = "choice accuracy" if accuracy == "accuracy_choice" else "free accuracy"
    limits = {
        accuracy: (rules.max_accuracy_drop, -1.0, title, "below"),
        "hallucination_rate": (rules.max_hallucination_rise, 1.0, "hallucination rate", "above"),
        "energy_per_query_j": (max_energy_rise_j, 1.0, "energy per query (J)", "above"),
    }
    for metric, (allowed, sign, title, direction) in limits.items():
        if allowed is None or reference.record.number(metric) is None:
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


def _less_accessible(allowed: float | None, record: EvaluationRecord, reference: Reference) -> str | None:
    """Compares both intervals at their worst, because the score has no values per question to pair."""
    own, highest = record.accessibility, reference.record.accessibility.high
    if allowed is None or highest is None:
        return None
    if own.low is None:
        return "its accessibility is unavailable, and an unavailable metric never wins"
    drop = highest - own.low
    if drop <= allowed:
        return None
    return (
        f"accessibility may lie {drop:.3f} below that of {reference.title} (both intervals at their worst); "
        f"{allowed:.3f} is allowed"
    )


def _estimated_energies(records: Mapping[str, EvaluationRecord]) -> dict[str, str]:
    """Returns candidates with estimated energy if another's is measured: the two are not comparable."""
    measured = {name for name, record in records.items() if record.energy_per_query_j.measured}
    reason = "its energy is estimated, that of others is measured, and the two are not compared"
    return {name: reason for name in records if measured and name not in measured}


def _dominated(records: Mapping[str, EvaluationRecord]) -> dict[str, str]:
    """Returns the dominated candidates; the reason names the candidate that dominates."""
    meters = {
        record.energy_per_query_j.source for record in records.values() if objective("energy", record) is not None
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


def _dominates(a: EvaluationRecord, b: EvaluationRecord, objectives: Collection[str]) -> bool:
    """Returns whether `a` is at least as good as `b` on every objective and better on one; unavailable is worst."""
    ranks = [(_rank(name, a), _rank(name, b)) for name in objectives]
    return all(left <= right for left, right in ranks) and any(left < right for left, right in ranks)


def _rank(name: str, record: EvaluationRecord) -> float:
    """Returns a rank: smaller is better; infinite if the objective is unavailable."""
    value = objective(name, record)
    if value is None:
        return float("inf")
    return -value if name in _LARGER_IS_BETTER else value


def _preference(prefer: str, record: EvaluationRecord) -> tuple[float, float]:
    return _rank(prefer, record), record.size_bytes


def _show(name: str, record: EvaluationRecord) -> str:
    value = objective(name, record)
    estimated = "" if record.energy_per_query_j.measured else "an estimated "
    return {"energy": f"{estimated}{value:.2f} J a query", "size": f"{(value or 0) / 2**20:.0f} MiB"}.get(
        name, f"{value:.3f}"
    )
