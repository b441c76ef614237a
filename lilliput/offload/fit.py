"""Fits the learned router: regressions by question, folds by entity, and the table of operating points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from lilliput.config import LinkConfig, Params
from lilliput.embedding.embedder import Embedder
from lilliput.errors import ConfigError
from lilliput.offload.learned import (
    ALWAYS,
    NEVER,
    TARGETS,
    Fitted,
    Learned,
    Look,
    Point,
    Table,
    question_features,
    token_features,
)
from lilliput.offload.outcomes import Costs, Outcomes, costs, mixed
from lilliput.offload.simulate import ByQuestion

LOOKS: tuple[Look, ...] = ("before", "after")
STRENGTH = 0.1  # scikit-learn's C
EMBEDDING_SCALE = 0.2  # hundreds of dimensions: standardised, each of them would count like any other feature
STEPS = 40


def features(rows: Sequence[Mapping[str, Any]], vectors: np.ndarray, look: Look) -> np.ndarray:
    """What a router that looks `before` or `after` knows of each question, of shape (questions, features)."""
    known = question_features([row["question"] for row in rows], vectors)
    return known if look == "before" else np.hstack([known, token_features([r["device"]["logprobs"] for r in rows])])


def fit(known: np.ndarray, outcomes: Outcomes, dimensions: int) -> Fitted:
    """Logistic regressions with an L2 penalty, one for each of TARGETS; what never or always happened has no weights.

    Args:
        known: of shape (questions, features).
        outcomes: of the same questions.
        dimensions: how many of the features, the first ones, are the embedding.
    """
    found = {
        f"{place}_{kind}": getattr(outcomes, kind)[place]
        for place in ("device", "server")
        for kind in ("right", "hallucinated")
    }
    mean, scale = known.mean(axis=0), known.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    scale[:dimensions] = EMBEDDING_SCALE
    weights, bias = np.zeros((len(TARGETS), known.shape[1])), np.zeros(len(TARGETS))
    for number, name in enumerate(TARGETS):
        happened = found[name] > 0.0
        if happened.all() or not happened.any():
            bias[number] = np.log((happened.sum() + 0.5) / ((~happened).sum() + 0.5))
            continue
        model = LogisticRegression(C=STRENGTH, max_iter=1000).fit((known - mean) / scale, happened)
        weights[number], bias[number] = model.coef_[0], model.intercept_[0]
    return Fitted(mean, scale, weights, bias)


def folds_of(rows: Sequence[Mapping[str, Any]], folds: int, seed: int) -> np.ndarray:
    """The fold of each question, of shape (questions,): all about one entity are in the same.

    Raises:
        ConfigError: there are fewer entities than folds.
    """
    groups = [row["group"] for row in rows]
    if len(set(groups)) < folds:
        raise ConfigError(f"offload.folds: {folds} folds need as many entities; {len(set(groups))} are asked about")
    numbers = np.zeros(len(rows), dtype=int)
    split = GroupKFold(folds, shuffle=True, random_state=seed).split(np.zeros((len(rows), 1)), groups=groups)
    for number, (_, held_out) in enumerate(split):
        numbers[held_out] = number
    return numbers


def cross_fit(known: np.ndarray, outcomes: Outcomes, folds: np.ndarray, dimensions: int) -> dict[int, Fitted]:
    """For each fold a fit on all the others."""
    return {
        int(fold): fit(known[folds != fold], outcomes.where(folds != fold), dimensions) for fold in np.unique(folds)
    }


def held_out_worth(known: np.ndarray, fitted: Mapping[int, Fitted], folds: np.ndarray) -> np.ndarray:
    """The worth of each question by the fit that has not seen its entity."""
    worth = np.zeros(len(known))
    for fold, of_fold in fitted.items():
        worth[folds == fold] = of_fold.worth(known[folds == fold])
    return worth


def tabulate(worth: np.ndarray, spent: Costs, at_once: Costs, outcomes: Outcomes) -> Table:
    """Operating points from never to always, at equal steps of the share that is offloaded.

    Args:
        worth: of the server for each question.
        spent: what each costs where the router has to look.
        at_once: what each costs where it need not: at the first and the last point.
        outcomes: of the same questions.
    """
    ranked = np.sort(worth)[::-1]
    counts = {round(step * len(ranked) / STEPS) for step in range(1, STEPS)} - {0, len(ranked)}
    between = {float(ranked[count - 1] + ranked[count]) / 2.0 for count in counts}
    points = [_point(NEVER, worth, at_once, outcomes)]
    points += [_point(threshold, worth, spent, outcomes) for threshold in sorted(between, reverse=True)]
    points.append(_point(ALWAYS, worth, at_once, outcomes))
    return Table(tuple(points), points[-1].accuracy, points[-1].hallucination)


def _point(threshold: float, worth: np.ndarray, spent: Costs, outcomes: Outcomes) -> Point:
    sent = (worth > threshold).astype(float)
    return Point(
        threshold=threshold,
        offloaded=float(sent.mean()),
        latency_s=float(mixed(sent, spent.device_s, spent.server_s).mean()),
        energy_j=float(mixed(sent, spent.device_j, spent.server_j).mean()),
        accuracy=outcomes.accuracy(sent),
        hallucination=float(mixed(sent, **outcomes.hallucinated).mean()),
    )


def link_costs(rows: Sequence[Mapping[str, Any]], link: LinkConfig, watts_per_core: float, look: Look) -> Costs:
    """What each question costs over `link` where a router that looks `before` or `after` decides."""
    return costs(rows, link, watts_per_core, embeds=1.0, looks=float(look == "after"))


def held_out_router(
    rows: Sequence[Mapping[str, Any]], embedder: Embedder, params: Params, device: str, look: Look
) -> ByQuestion:
    """A learned router for each question that was fitted without its entity, and that picks its points without it."""
    serving, watts = params.serving[device], params.devices[device].watts_per_core
    outcomes = Outcomes.of(rows)
    folds = folds_of(rows, serving.offload.folds, serving.offload.seed)
    texts = [row["question"] for row in rows]
    vectors = embedder.embed(texts)
    known = features(rows, vectors, look)
    fitted = cross_fit(known, outcomes, folds, vectors.shape[1])
    worth = held_out_worth(known, fitted, folds)
    remembered = Remembered(embedder.sha256, dict(zip(texts, vectors, strict=True)))
    routers = {}
    for fold, of_fold in fitted.items():
        others = folds != fold
        tables = {
            name: tabulate(
                worth[others],
                link_costs(rows, link, watts, look).where(others),
                costs(rows, link, watts).where(others),
                outcomes.where(others),
            )
            for name, link in params.links.items()
        }
        routers[fold] = Learned(of_fold, tables, look, serving.objective, serving.saver_percent, remembered)
    return ByQuestion({text: routers[int(fold)] for text, fold in zip(texts, folds, strict=True)})


class Remembered:
    """An embedder that knows the vectors of certain texts."""

    def __init__(self, sha256: str, vectors: Mapping[str, np.ndarray]) -> None:
        self.sha256, self._vectors = sha256, vectors

    def fits(self, text: str) -> bool:
        """Whether it knows the vector of `text`."""
        return text in self._vectors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Their unit vectors, float32 of shape (texts, dimensions)."""
        return np.stack([self._vectors[text] for text in texts])
