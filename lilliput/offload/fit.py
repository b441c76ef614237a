"""Fits the learned router: logistic regressions, cross-fitting by entity, and tables of operating points."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from lilliput.config import Look, Params
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ConfigError
from lilliput.offload.learned import (
    ALWAYS,
    NEVER,
    TARGETS,
    LearnedRouter,
    OperatingPoint,
    OperatingTable,
    WorthModel,
    question_features,
    token_features,
)
from lilliput.offload.outcomes import CostParts, Outcomes, QuestionCosts, expected_value
from lilliput.offload.policy import Conditions, Router, RoutingDecision

LOOKS: tuple[Look, ...] = ("before", "after")
STRENGTH = 0.1  # scikit-learn's C
ITERATIONS = 1000
EMBEDDING_SCALE = 0.2  # standardised, each of its hundreds of dimensions would weigh as much as any other feature
STEPS = 40


def features(rows: Sequence[Mapping[str, Any]], vectors: np.ndarray, look: Look) -> np.ndarray:
    """The features for routing `before` or `after` generation, shape (questions, features)."""
    values = question_features([row["question"] for row in rows], vectors)
    return values if look == "before" else np.hstack([values, token_features([r["device"]["logprobs"] for r in rows])])


def fit(x: np.ndarray, outcomes: Outcomes, dimensions: int) -> WorthModel:
    """Logistic regressions with an L2 penalty, one for each of TARGETS; without weights for a constant target.

    Args:
        x: features, shape (questions, features).
        outcomes: of the same questions.
        dimensions: length of the embedding, which comes first in the features.

    Raises:
        Warning: scikit-learn warned, for example that a fit did not converge (ConvergenceWarning).
    """
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    scale[:dimensions] = EMBEDDING_SCALE
    standardised = (x - mean) / scale
    weights, bias = np.zeros((len(TARGETS), x.shape[1])), np.zeros(len(TARGETS))
    for number, target in enumerate(TARGETS):
        place, kind = target.split("_")
        counted = outcomes.judged if kind == "hallucinated" else np.ones(len(x), dtype=bool)
        values = getattr(outcomes, kind)[place][counted]
        if (values == 1.0).all() or (values == 0.0).all():
            bias[number] = np.log((values.sum() + 0.5) / ((1.0 - values).sum() + 0.5))
            continue
        # A score between 0 and 1 counts as both outcomes, weighted by its share of each.
        pairs, happened = np.repeat(standardised[counted], 2, axis=0), np.tile([True, False], len(values))
        shares = np.stack([values, 1.0 - values], axis=1).ravel()
        kept = shares > 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = LogisticRegression(C=STRENGTH, max_iter=ITERATIONS).fit(pairs[kept], happened[kept], shares[kept])
        weights[number], bias[number] = model.coef_[0], model.intercept_[0]
    return WorthModel(mean, scale, weights, bias)


def folds_of(rows: Sequence[Mapping[str, Any]], folds: int, seed: int) -> np.ndarray:
    """The fold of each question, shape (questions,). All questions about one entity are in one fold.

    Raises:
        ConfigError: there are fewer entities than folds.
    """
    groups = [row["group"] for row in rows]
    if len(set(groups)) < folds:
        raise ConfigError(
            f"offload.folds: {folds} folds need at least as many entities; the questions have {len(set(groups))}"
        )
    folds_by_row = np.zeros(len(rows), dtype=int)
    split = GroupKFold(folds, shuffle=True, random_state=seed).split(np.zeros((len(rows), 1)), groups=groups)
    for number, (_, held_out) in enumerate(split):
        folds_by_row[held_out] = number
    return folds_by_row


def cross_fit(x: np.ndarray, outcomes: Outcomes, folds: np.ndarray, dimensions: int) -> dict[int, WorthModel]:
    """For each fold, a fit on all other folds."""
    return {int(fold): fit(x[folds != fold], outcomes.select(folds != fold), dimensions) for fold in np.unique(folds)}


def held_out_worth(x: np.ndarray, fitted: Mapping[int, WorthModel], folds: np.ndarray) -> np.ndarray:
    """The worth of each question, shape (questions,), by the fit without its entity."""
    worth = np.zeros(len(x))
    for fold, of_fold in fitted.items():
        worth[folds == fold] = of_fold.worth(x[folds == fold])
    return worth


def tabulate(
    worth: np.ndarray, scored_costs: QuestionCosts, fixed_costs: QuestionCosts, outcomes: Outcomes
) -> OperatingTable:
    """Operating points from never to always, at equal steps of the offloaded share.

    Args:
        worth: worth of the server for each question.
        scored_costs: costs with the computation of the worth.
        fixed_costs: costs without it: at the first and the last point.
        outcomes: of the same questions.
    """
    ranked = np.sort(worth)[::-1]
    counts = {round(step * len(ranked) / STEPS) for step in range(1, STEPS)} - {0, len(ranked)}
    thresholds = {float(ranked[count - 1] + ranked[count]) / 2.0 for count in counts}
    points = [_point(NEVER, worth, fixed_costs, outcomes)]
    points += [_point(threshold, worth, scored_costs, outcomes) for threshold in sorted(thresholds, reverse=True)]
    points.append(_point(ALWAYS, worth, fixed_costs, outcomes))
    return OperatingTable(tuple(points), points[-1].accuracy, points[-1].hallucination)


def _point(threshold: float, worth: np.ndarray, costs: QuestionCosts, outcomes: Outcomes) -> OperatingPoint:
    sent = (worth > threshold).astype(float)
    return OperatingPoint(
        threshold=threshold,
        offloaded=float(sent.mean()),
        latency_s=float(expected_value(sent, costs.device_s, costs.server_s).mean()),
        energy_j=float(expected_value(sent, costs.device_j, costs.server_j).mean()),
        accuracy=outcomes.accuracy(sent),
        hallucination=outcomes.hallucination_rate(sent),
    )


def scored_costs(parts: CostParts, look: Look) -> QuestionCosts:
    """The cost of each question with a router that scores it `before` or `after` generation."""
    return parts.total(embeds=1.0, looks=float(look == "after"))


def held_out_router(
    rows: Sequence[Mapping[str, Any]], embedder: Embedder, params: Params, device: str, look: Look
) -> PerQuestionRouter:
    """For each question, a learned router whose fit and operating points exclude its entity."""
    serving, watts = params.serving[device], params.devices[device].watts_per_core
    outcomes = Outcomes.from_rows(rows)
    folds = folds_of(rows, serving.offload.folds, serving.offload.seed)
    texts = [row["question"] for row in rows]
    vectors = embedder.embed(texts)
    x = features(rows, vectors, look)
    fitted = cross_fit(x, outcomes, folds, vectors.shape[1])
    worth = held_out_worth(x, fitted, folds)
    precomputed = PrecomputedEmbedder(embedder.sha256, dict(zip(texts, vectors, strict=True)))
    costs = {name: CostParts.from_rows(rows, link, watts) for name, link in params.links.items()}
    routers = {}
    for fold, of_fold in fitted.items():
        others = folds != fold
        tables = {
            name: tabulate(
                worth[others],
                scored_costs(parts, look).select(others),
                parts.total().select(others),
                outcomes.select(others),
            )
            for name, parts in costs.items()
        }
        routers[fold] = LearnedRouter(of_fold, tables, look, serving.objective, serving.saver_percent, precomputed)
    return PerQuestionRouter({text: routers[int(fold)] for text, fold in zip(texts, folds, strict=True)})


class PerQuestionRouter:
    """Routes each question with its own router, for example one that was fitted without the question's entity."""

    def __init__(self, routers: Mapping[str, Router]) -> None:
        self._routers = routers

    def route_question(
        self, question: str, conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision | None:
        """The decision of the question's router before generation."""
        return self._routers[question].route_question(question, conditions, others)

    def route_answer(
        self, question: str, token_logprobs: Sequence[float], conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision:
        """The decision of the question's router after the device's answer."""
        return self._routers[question].route_answer(question, token_logprobs, conditions, others)

    def rule(self, question: str, conditions: Conditions) -> str:
        """The rule of the question's router."""
        return self._routers[question].rule(question, conditions)


class PrecomputedEmbedder:
    """An embedder with precomputed vectors of certain texts."""

    def __init__(self, sha256: str, vectors: Mapping[str, np.ndarray]) -> None:
        self.sha256, self._vectors = sha256, vectors

    def fits(self, text: str) -> bool:
        """Whether `text` has a vector."""
        return text in self._vectors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 of shape (texts, dimensions)."""
        return np.stack([self._vectors[text] for text in texts])
