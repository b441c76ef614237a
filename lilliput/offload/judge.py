"""Evaluates every routing policy on questions that both device and edge server answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lilliput.config import Look, Params, ServingConfig
from lilliput.offload.choice import choose_policy
from lilliput.offload.fit import (
    LOOKS,
    STEPS,
    cross_fit,
    features,
    fit,
    folds_of,
    held_out_worth,
    scored_costs,
    tabulate,
)
from lilliput.offload.fitted_router import RouterFit
from lilliput.offload.learned import ALWAYS, NEVER, OperatingTable, select_point
from lilliput.offload.links import battery_percent
from lilliput.offload.outcomes import CostParts, Outcomes, Policy, expected_value
from lilliput.offload.policy import confidence
from lilliput.records import (
    CurvePoint,
    Curves,
    Energy,
    EstimatedLatency,
    Figure,
    Policies,
    PolicyChoice,
    PolicyFigures,
    PolicyResults,
)
from lilliput.statistics import intervals

DECLARED = {"source": "declared", "measured": False}


@dataclass(frozen=True)
class Judgement:
    """The figures of every policy, the curves of every ranking, and the router by look."""

    results: PolicyResults
    curves: Curves
    looks: dict[Look, RouterFit]


def policies(
    outcomes: Outcomes,
    parts: CostParts,
    confidences: np.ndarray,
    worth: Mapping[Look, np.ndarray],
    folds: np.ndarray,
    serving: ServingConfig,
) -> dict[str, Policy]:
    """Every policy over the link of `parts`, with a full battery.

    The learned policies select the operating point of each fold by the figures of the other folds. `random` offloads
    the same share as `learned_before`; `oracle` offloads exactly the questions that the server answers better.
    """
    none = np.zeros(len(confidences))
    by_name = {
        "device": Policy(none),
        "server": Policy(none + 1.0),
        "threshold": Policy((confidences < serving.least_confidence).astype(float), -confidences, looks=1.0),
    }
    fixed = parts.total()
    for look in LOOKS:
        scored = scored_costs(parts, look)
        thresholds = np.zeros(len(confidences))
        for fold in np.unique(folds):
            others = folds != fold
            table = tabulate(worth[look][others], scored.select(others), fixed.select(others), outcomes.select(others))
            point, _ = select_point(table, serving.objective, serving.objective.energy_budget_j)
            thresholds[~others] = point.threshold
        sent = (worth[look] > thresholds).astype(float)
        embeds = (~np.isin(thresholds, (NEVER, ALWAYS))).astype(float)
        by_name[f"learned_{look}"] = Policy(sent, worth[look], embeds, embeds * (look == "after"))
    by_name["random"] = Policy(none + by_name["learned_before"].sent.mean())
    by_name["oracle"] = Policy((outcomes.gain > 0.0).astype(float), outcomes.gain)
    return by_name


def device_confidence(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The confidence of the device in each answer, shape (questions,); 0 for an empty answer."""
    return np.array([confidence(row["device"]["logprobs"]) or 0.0 for row in rows])


def figures(policy: Policy, outcomes: Outcomes, parts: CostParts, params: Params, device: str) -> PolicyFigures:
    """Quality and cost of `policy` over the link of `parts`. Seconds, joules and battery percentages are estimates.

    `over_random` is the paired difference from offloading the same share of questions at random.
    """
    config, serving = params.evaluation, params.serving[device]
    costs = parts.total(embeds=policy.embeds, looks=policy.looks)
    deterministic = bool(np.isin(policy.sent, (0.0, 1.0)).all())

    def mean(values: np.ndarray) -> intervals.Estimate | None:
        return intervals.mean(values, config.seed, config.resamples)

    def share(values: np.ndarray) -> Figure:
        counts = deterministic and np.isin(values, (0.0, 1.0)).all()  # not scores of rows with only a reference
        return Figure.of(intervals.rate([bool(value) for value in values]) if counts else mean(values))

    energy = mean(expected_value(policy.sent, costs.device_j, costs.server_j))
    percent = energy and replace(
        energy, **{key: battery_percent(vars(energy)[key], serving.battery_wh) for key in ("value", "low", "high")}
    )
    more = policy.sent - policy.sent.mean()
    counted = {"accuracy": outcomes.answerable, "hallucination_rate": outcomes.judged}
    gains = {"accuracy": outcomes.right_gain, "hallucination_rate": -outcomes.hallucination_gain}
    return PolicyFigures(
        offloaded=float(policy.sent.mean()),
        accuracy=share(expected_value(policy.sent, **outcomes.right)[outcomes.answerable]),
        hallucination_rate=share(expected_value(policy.sent, **outcomes.hallucinated)[outcomes.judged]),
        latency_ms=_latency(1e3 * costs.device_s, 1e3 * costs.server_s, policy.sent),
        energy_per_query_j=Energy.of(energy, **DECLARED),
        battery_percent_per_query=Energy.of(percent, **DECLARED),
        over_random={metric: Figure.of(mean((more * gain)[counted[metric]])) for metric, gain in gains.items()},
    )


def _latency(device: np.ndarray, server: np.ndarray, sent: np.ndarray) -> EstimatedLatency:
    values, weights = np.concatenate([device, server]), np.concatenate([1.0 - sent, sent])
    middle, late = np.quantile(values, [0.5, 0.9], weights=weights, method="inverted_cdf")
    return EstimatedLatency(
        p50=float(middle),
        p90=float(late),
        mean=float((values * weights).sum() / len(sent)),
        n=len(sent),
        source="declared",
        measured=False,
    )


def areas(
    score: np.ndarray, outcomes: Outcomes, seed: int, resamples: int, against: np.ndarray | None = None
) -> dict[str, Figure]:
    """How well `score` ranks questions, over all thresholds: 0 for a random order, 1 for the best order in hindsight.

    The area between the curve of accuracy (of avoided hallucinations, of both) over the offloaded share and that of
    random offloading, divided by the oracle's area. Similar to RouteLLM's APGR (arXiv 2406.18665).

    Args:
        score: of each question; the largest goes to the server first.
        outcomes: of the same questions.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        against: another score; the areas are then paired differences from its areas.
    """
    gains = {
        "accuracy": (outcomes.right_gain, outcomes.answerable),
        "hallucination_rate": (outcomes.hallucination_gain, outcomes.judged),
        "both": (outcomes.gain, np.ones(len(score), dtype=bool)),
    }

    def area(draw: np.ndarray) -> np.ndarray:
        score_area = _area(draw[..., 0], draw[..., -1])
        return score_area if against is None else score_area - _area(draw[..., 1], draw[..., -1])

    columns = [score] if against is None else [score, against]
    return {
        name: Figure.of(intervals.statistic(area, np.stack([*columns, gain], axis=-1)[part], seed, resamples))
        for name, (gain, part) in gains.items()
    }


def _area(score: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Normalized area, shape (…,), for score and gain of shape (…, n); 0 where no order gains anything."""
    order = np.argsort(-score, axis=-1, kind="stable")
    won = np.cumsum(np.take_along_axis(gain, order, axis=-1), axis=-1)
    best = np.cumsum(-np.sort(-gain, axis=-1), axis=-1)
    chance = won[..., -1:] * np.arange(1, gain.shape[-1] + 1) / gain.shape[-1]
    over, most = (won - chance).mean(axis=-1), (best - chance).mean(axis=-1)
    return np.divide(over, most, out=np.zeros_like(over), where=most > 0.0)


def curve(score: np.ndarray, outcomes: Outcomes) -> list[CurvePoint]:
    """Accuracy and hallucination rate at equal steps of the offloaded share, in the order of `score`."""
    order = np.argsort(-score, kind="stable")
    points = []
    for step in range(STEPS + 1):
        sent = np.zeros(len(score))
        sent[order[: round(step * len(score) / STEPS)]] = 1.0
        points.append(
            CurvePoint(
                offloaded=float(sent.mean()),
                accuracy=outcomes.accuracy(sent),
                hallucination_rate=outcomes.hallucination_rate(sent),
            )
        )
    return points


def judge_policies(rows: Sequence[Mapping[str, Any]], vectors: np.ndarray, params: Params, device: str) -> Judgement:
    """The figures of every policy and the policy to serve, over every link, and the router, fitted on all questions.

    The figures of the learned router come from fits without the question's entity and from thresholds of the other
    folds. The operating points in the router's record come from all folds.

    Args:
        rows: of `ask_both`.
        vectors: the unit vectors of the questions, of shape (questions, dimensions).
        params: all of params.yaml.
        device: a name under `serving`.

    Raises:
        ConfigError: there are more folds than entities.
        Warning: a fit did not converge.
    """
    serving, watts = params.serving[device], params.devices[device].watts_per_core
    outcomes = Outcomes.from_rows(rows)
    folds = folds_of(rows, serving.offload.folds, serving.offload.seed)
    feature_rows = {look: features(rows, vectors, look) for look in LOOKS}
    held_out = {look: cross_fit(feature_rows[look], outcomes, folds, vectors.shape[1]) for look in LOOKS}
    fitted = {look: fit(feature_rows[look], outcomes, vectors.shape[1]) for look in LOOKS}
    worth: dict[Look, np.ndarray] = {look: held_out_worth(feature_rows[look], held_out[look], folds) for look in LOOKS}
    confidences = device_confidence(rows)
    scores = {"threshold": -confidences} | {f"learned_{look}": worth[look] for look in LOOKS}
    config = params.evaluation
    links: dict[str, Policies] = {}
    choices: dict[str, PolicyChoice] = {}
    groups = [row["group"] for row in rows]
    tables: dict[Look, dict[str, OperatingTable]] = {look: {} for look in LOOKS}
    for name, link in params.links.items():
        parts = CostParts.from_rows(rows, link, watts)
        by_policy = policies(outcomes, parts, confidences, worth, folds, serving)
        links[name] = {
            policy: figures(decisions, outcomes, parts, params, device) for policy, decisions in by_policy.items()
        }
        choices[name] = choose_policy(
            by_policy, outcomes, parts, serving.objective, groups, config.seed, config.resamples
        )
        for look in LOOKS:
            tables[look][name] = tabulate(worth[look], scored_costs(parts, look), parts.total(), outcomes)
    results = PolicyResults(
        links=links,
        areas={name: areas(score, outcomes, config.seed, config.resamples) for name, score in scores.items()},
        areas_over_threshold={
            name: areas(score, outcomes, config.seed, config.resamples, against=scores["threshold"])
            for name, score in scores.items()
            if name != "threshold"
        },
        choices=choices,
    )
    curves = {name: curve(score, outcomes) for name, score in (scores | {"oracle": outcomes.gain}).items()}
    return Judgement(results, curves, {look: RouterFit(fitted=fitted[look], links=tables[look]) for look in LOOKS})
