"""Chooses the policy to serve: the one that wins the device's objective, of those with support over random routing.

1. A routing policy is supported if its gain over random routing at equal cost is. The gain of a question is that of
   the edge server (right answers and avoided hallucinations); equal cost means as many questions at the edge server.
2. Of the supported policies, the best by the device's objective is chosen, unless it is not shown to meet the objective
   better than a simpler one: then the simplest such policy.
3. A place alone (device or edge server) replaces it if it is shown to meet the objective better.
4. If no policy is supported, the place alone that meets the objective better is chosen.

All tests are paired and draw whole groups of questions, as the folds of the cross-validation do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lilliput.config import ObjectiveConfig, Place
from lilliput.offload.outcomes import CostParts, Outcomes, Policy, expected_value
from lilliput.records import ChoiceReason, ObjectiveWins, PolicyChoice, PolicySupport, ServedPolicy
from lilliput.statistics.compare import holm
from lilliput.statistics.differences import SIGNIFICANCE, Comparison
from lilliput.statistics.grouped import chance_totals, compare_resampled, resample_totals

PLACES: tuple[Place, ...] = ("device", "server")
ROUTING: tuple[ServedPolicy, ...] = ("threshold", "learned_before", "learned_after")  # simplest first
_ROUNDING = 1e-9


_Objective = tuple[np.ndarray, np.ndarray, np.ndarray]  # as `_objective` returns it


@dataclass(frozen=True)
class _Resamples:
    """Column totals of the questions: of all, shape (columns,), and of each resample, shape (resamples, columns)."""

    observed: np.ndarray
    resampled: np.ndarray
    place_of: Mapping[str, int]
    questions: int

    def of(self, name: str) -> np.ndarray:
        """The totals of column `name`, shape (1 + resamples,); the first one is that of the data."""
        place = self.place_of[name]
        return np.concatenate([self.observed[place : place + 1], self.resampled[:, place]])


def choose_policy(
    by_policy: Mapping[str, Policy],
    outcomes: Outcomes,
    parts: CostParts,
    objective: ObjectiveConfig,
    groups: Sequence[str],
    seed: int,
    resamples: int,
) -> PolicyChoice:
    """The policy to serve over the link of `parts`, and what supports it.

    Args:
        by_policy: the decisions of each of PLACES and ROUTING on the questions.
        outcomes: of the questions.
        parts: their costs.
        objective: of the device.
        groups: of the questions; those of a group are drawn together.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    drawn = _resample(by_policy, outcomes, parts, groups, seed, resamples)
    gains = {name: _over_random(name, drawn, by_policy[name], outcomes.gain, groups, seed) for name in ROUTING}
    corrected = holm([gain.p_value for gain in gains.values()])
    policies = {
        name: PolicySupport(over_random=gain.record, corrected_p=p, supported=_is_shown(gain, p))
        for (name, gain), p in zip(gains.items(), corrected, strict=True)
    }
    rank = {name: _objective(name, drawn, objective) for name in (*PLACES, *ROUTING)}
    place = min(PLACES, key=lambda name: tuple(part[0] for part in rank[name]))
    supported: list[ServedPolicy] = [name for name in ROUTING if policies[name].supported]
    served, reason, compared = _select(supported, place, rank)
    return PolicyChoice(served=served, reason=reason, cheaper_place=place, policies=policies, compared=compared)


def _resample(
    by_policy: Mapping[str, Policy],
    outcomes: Outcomes,
    parts: CostParts,
    groups: Sequence[str],
    seed: int,
    resamples: int,
) -> _Resamples:
    """The totals that gains and objectives are computed from."""
    columns = {
        "questions": np.ones(len(groups)),
        "gain": outcomes.gain,
        "answerable": outcomes.answerable.astype(float),
        "judged": outcomes.judged.astype(float),
    }
    for name in (*PLACES, *ROUTING):
        policy = by_policy[name]
        costs = parts.total(embeds=policy.embeds, looks=policy.looks)
        columns |= {
            f"{name}/sent": policy.sent,
            f"{name}/sent_gain": policy.sent * outcomes.gain,
            f"{name}/right": expected_value(policy.sent, **outcomes.right) * outcomes.answerable,
            f"{name}/hallucinated": expected_value(policy.sent, **outcomes.hallucinated) * outcomes.judged,
            f"{name}/latency_s": expected_value(policy.sent, costs.device_s, costs.server_s),
            f"{name}/energy_j": expected_value(policy.sent, costs.device_j, costs.server_j),
        }
    values = np.stack(list(columns.values()), axis=1)
    place_of = {name: place for place, name in enumerate(columns)}
    resampled = resample_totals(values, groups, seed, resamples)
    return _Resamples(values.sum(axis=0), resampled, place_of, len(groups))


def _over_random(
    name: str, drawn: _Resamples, policy: Policy, gain: np.ndarray, groups: Sequence[str], seed: int
) -> Comparison:
    """The mean gain of `name` per question, minus that of sending as many questions at random."""
    questions = drawn.of("questions")
    gained = (drawn.of(f"{name}/sent_gain") - drawn.of(f"{name}/sent") * drawn.of("gain") / questions) / questions
    gained[np.abs(gained) < _ROUNDING] = 0.0  # where all or no questions are sent
    unrelated = chance_totals(policy.sent - policy.sent.mean(), gain, groups, seed, len(drawn.resampled)) / len(groups)
    unrelated[np.abs(unrelated) < _ROUNDING] = 0.0
    return compare_resampled(float(gained[0]), gained[1:], drawn.questions, len(set(groups)), unrelated)


def _is_shown(gain: Comparison, corrected_p: float) -> bool:
    return gain.real and corrected_p < SIGNIFICANCE and gain.difference.value > 0.0


def _objective(name: str, drawn: _Resamples, objective: ObjectiveConfig) -> _Objective:
    """What `select_point` minimises, in this order: energy over the budget, missed quality, latency.

    Each has shape (1 + resamples,). Energy is 0 within the budget; missed quality is 0 beyond it.
    """
    questions = drawn.of("questions")

    def share(of: str, total: str) -> np.ndarray:
        return np.divide(drawn.of(of), drawn.of(total), out=np.zeros(len(questions)), where=drawn.of(total) > 0.0)

    energy_j = drawn.of(f"{name}/energy_j") / questions
    floor = share("server/right", "answerable") - objective.max_accuracy_drop
    ceiling = share("server/hallucinated", "judged") + objective.max_hallucination_rise
    missed = np.maximum(0.0, floor - share(f"{name}/right", "answerable"))
    missed += np.maximum(0.0, share(f"{name}/hallucinated", "judged") - ceiling)
    over = np.where(energy_j <= objective.energy_budget_j, 0.0, energy_j)
    return over, np.where(over > 0.0, 0.0, missed), drawn.of(f"{name}/latency_s") / questions


def _select(
    supported: Sequence[ServedPolicy], place: Place, rank: Mapping[str, _Objective]
) -> tuple[ServedPolicy, ChoiceReason, list[ObjectiveWins]]:
    """The policy to serve, why, and the comparisons that decided."""
    if not supported:
        return place, "unsupported", []
    best: ServedPolicy = min(supported, key=lambda name: tuple(part[0] for part in rank[name]))
    against = [_wins(best, simpler, rank) for simpler in supported[: supported.index(best)]]
    corrected = holm([wins.p for wins in against])
    compared = [wins.model_copy(update={"p": p}) for wins, p in zip(against, corrected, strict=True)]
    equal: list[ServedPolicy] = [wins.than for wins in compared if wins.p >= SIGNIFICANCE]
    served = equal[0] if equal else best
    alone = _wins(place, served, rank)
    if alone.p < SIGNIFICANCE:
        return place, "place", [*compared, alone]
    return served, "simpler" if equal else "supported", [*compared, alone]


def _wins(better: ServedPolicy, than: ServedPolicy, rank: Mapping[str, _Objective]) -> ObjectiveWins:
    """How often `better` meets the objective better than `than`. A draw counts against it."""
    wins = np.zeros(len(rank[better][0]), dtype=bool)
    decided = wins.copy()
    for first, second in zip(rank[better], rank[than], strict=True):
        wins |= ~decided & (first < second)
        decided |= first != second
    won, count = int(wins[1:].sum()), len(wins) - 1
    p = min(1.0, 2.0 * (1 + count - won) / (count + 1))
    return ObjectiveWins(better=better, than=than, share=won / count, p=p)
