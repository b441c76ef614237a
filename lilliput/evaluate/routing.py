"""Who should answer: the learned router fitted, and all policies judged, on questions that both ends answered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from lilliput.config import LinkConfig, Params, ServingConfig
from lilliput.errors import ConfigError
from lilliput.evaluate import intervals
from lilliput.serve.embedder import Embedder
from lilliput.serve.learned import (
    ALWAYS,
    NEVER,
    TARGETS,
    Fitted,
    Learned,
    Look,
    Point,
    Table,
    pick,
    question_features,
    token_features,
)
from lilliput.serve.links import Request, battery_percent, latency_s, radio_j
from lilliput.serve.router import confidence
from lilliput.serve.simulate import ByQuestion

LOOKS: tuple[Look, ...] = ("before", "after")
STRENGTH = 0.1  # scikit-learn's C
EMBEDDING_SCALE = 0.2  # hundreds of dimensions: standardised, each of them would count like any other feature
STEPS = 40
ESTIMATE = {"source": "declared", "measured": False}


@dataclass(frozen=True)
class Outcomes:
    """What both ends made of each question; arrays of shape (questions,).

    Attributes:
        answerable: whether anyone can know.
        right: by place, 1.0 for a right answer.
        hallucinated: by place, 1.0 for an answer that asserts what is not so.
    """

    answerable: np.ndarray
    right: dict[str, np.ndarray]
    hallucinated: dict[str, np.ndarray]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Outcomes:
        """From the rows of `ask_both`."""
        found = {
            key: {place: np.array([float(bool(row[place][key])) for row in rows]) for place in ("device", "server")}
            for key in ("right", "hallucinated")
        }
        return cls(np.array([bool(row["answerable"]) for row in rows]), found["right"], found["hallucinated"])

    @property
    def gain(self) -> np.ndarray:
        """What the server is worth for each question, in hindsight: right answers won and hallucinations spared."""
        return self.right_gain + self.hallucination_gain

    @property
    def right_gain(self) -> np.ndarray:
        """Right answers won by the server."""
        return self.right["server"] - self.right["device"]

    @property
    def hallucination_gain(self) -> np.ndarray:
        """Hallucinations spared by the server."""
        return self.hallucinated["device"] - self.hallucinated["server"]


@dataclass(frozen=True)
class Costs:
    """What each question costs if the device answers it, and if the server does; arrays of shape (questions,)."""

    device_s: np.ndarray
    server_s: np.ndarray
    device_j: np.ndarray
    server_j: np.ndarray


def costs(
    rows: Sequence[Mapping[str, Any]],
    link: LinkConfig,
    watts_per_core: float,
    embeds: np.ndarray | float = 0.0,
    looks: np.ndarray | float = 0.0,
) -> Costs:
    """Seconds until the answer and joules of the device, by who answers; each request alone, with its whole tail.

    Args:
        rows: of `ask_both`.
        link: to the edge server.
        watts_per_core: what the device's busy core draws.
        embeds: 1.0 where the question is embedded first, else 0.0.
        looks: 1.0 where the device answers first, and the server then besides.
    """
    own_s = np.array([row["device"]["seconds"] for row in rows])
    own_j = np.array([row["device"]["cpu_s"] for row in rows]) * watts_per_core
    requests = [request_of(row) for row in rows]
    remote_s = np.array([latency_s(request, link) for request in requests])
    remote_j = np.array([radio_j(request, link) for request in requests])
    first_s = np.array([row["embed_s"] for row in rows]) * embeds
    first_j = np.array([row["embed_cpu_s"] for row in rows]) * watts_per_core * embeds
    return Costs(
        device_s=first_s + own_s,
        server_s=first_s + own_s * looks + remote_s,
        device_j=first_j + own_j,
        server_j=first_j + own_j * looks + remote_j,
    )


def request_of(row: Mapping[str, Any]) -> Request:
    """The request that the server answered."""
    server = row["server"]
    return Request(server["up_bytes"], server["down_bytes"], server["seconds"])


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
        int(fold): fit(known[folds != fold], _part(outcomes, folds != fold), dimensions) for fold in np.unique(folds)
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
        latency_s=float(_mixed(sent, spent.device_s, spent.server_s).mean()),
        energy_j=float(_mixed(sent, spent.device_j, spent.server_j).mean()),
        accuracy=_accuracy(sent, outcomes),
        hallucination=float(_mixed(sent, **outcomes.hallucinated).mean()),
    )


def _accuracy(sent: np.ndarray, outcomes: Outcomes) -> float:
    """Of what can be answered; 0.0 where nothing can."""
    right = _mixed(sent, **outcomes.right)[outcomes.answerable]
    return float(right.mean()) if len(right) else 0.0


def _mixed(sent: np.ndarray, device: np.ndarray, server: np.ndarray) -> np.ndarray:
    """The expected value for each question if it goes to the server with probability `sent`."""
    return (1.0 - sent) * device + sent * server


def _part(outcomes: Outcomes, chosen: np.ndarray) -> Outcomes:
    right, hallucinated = (
        {place: values[chosen] for place, values in by_place.items()}
        for by_place in (outcomes.right, outcomes.hallucinated)
    )
    return Outcomes(outcomes.answerable[chosen], right, hallucinated)


@dataclass(frozen=True)
class Policy:
    """A policy's decisions on the questions asked.

    Attributes:
        sent: to the server, 0.0 or 1.0 for each question; between them, with that probability.
        score: what it ranks questions by, most worth the server first; None if it ranks none.
        embeds: 1.0 where it embeds the question, for each or for all.
        looks: 1.0 where it looks at the device's answer.
    """

    sent: np.ndarray
    score: np.ndarray | None = None
    embeds: np.ndarray | float = 0.0
    looks: np.ndarray | float = 0.0


def policies(
    rows: Sequence[Mapping[str, Any]],
    worth: Mapping[Look, np.ndarray],
    folds: np.ndarray,
    link: LinkConfig,
    watts_per_core: float,
    serving: ServingConfig,
) -> dict[str, Policy]:
    """Every policy over `link`, with a full battery.

    The learned ones choose their point for each fold by the figures of the other folds. `random` sends as many as
    `learned_before`; `oracle` sends what the server answers better, and nothing else.
    """
    outcomes = Outcomes.of(rows)
    none = np.zeros(len(rows))
    sure = _sure(rows)
    found = {
        "device": Policy(none),
        "server": Policy(none + 1.0),
        "threshold": Policy((sure < serving.least_confidence).astype(float), -sure, looks=1.0),
    }
    at_once = costs(rows, link, watts_per_core)
    for look in LOOKS:
        spent = costs(rows, link, watts_per_core, embeds=1.0, looks=float(look == "after"))
        thresholds = np.zeros(len(rows))
        for fold in np.unique(folds):
            others = folds != fold
            table = tabulate(
                worth[look][others], _costs_of(spent, others), _costs_of(at_once, others), _part(outcomes, others)
            )
            point, _ = pick(table, serving.objective, serving.objective.energy_budget_j)
            thresholds[~others] = point.threshold
        sent = (worth[look] > thresholds).astype(float)
        embeds = (~np.isin(thresholds, (NEVER, ALWAYS))).astype(float)
        found[f"learned_{look}"] = Policy(sent, worth[look], embeds, embeds * (look == "after"))
    found["random"] = Policy(none + found["learned_before"].sent.mean())
    found["oracle"] = Policy((outcomes.gain > 0.0).astype(float), outcomes.gain)
    return found


def _sure(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The score of the policy `threshold` for each question; 0 where the device said nothing."""
    return np.array([confidence(row["device"]["logprobs"]) or 0.0 for row in rows])


def _costs_of(spent: Costs, chosen: np.ndarray) -> Costs:
    return Costs(**{name: values[chosen] for name, values in vars(spent).items()})


def figures(
    policy: Policy, rows: Sequence[Mapping[str, Any]], link: LinkConfig, params: Params, device: str
) -> dict[str, Any]:
    """What `policy` brings and costs over `link`; seconds, joules and percent of the battery are estimates.

    `over_random` is the difference from sending as many questions at random, paired by question.
    """
    config, serving = params.evaluation, params.serving[device]
    outcomes = Outcomes.of(rows)
    watts = params.devices[device].watts_per_core
    spent = costs(rows, link, watts, embeds=policy.embeds, looks=policy.looks)
    certain = bool(np.isin(policy.sent, (0.0, 1.0)).all())

    def share(values: np.ndarray) -> dict[str, Any]:
        if certain:
            return intervals.as_dict(intervals.rate([bool(value) for value in values]))
        return intervals.as_dict(intervals.mean(values, config.seed, config.resamples))

    energy_j = _mixed(policy.sent, spent.device_j, spent.server_j)
    energy = intervals.as_dict(intervals.mean(energy_j, config.seed, config.resamples))
    percent = {key: battery_percent(energy[key], serving.battery_wh) for key in ("value", "low", "high")}
    more = policy.sent - policy.sent.mean()
    gains = {"accuracy": outcomes.right_gain[outcomes.answerable], "hallucination_rate": -outcomes.hallucination_gain}
    parts = {"accuracy": outcomes.answerable, "hallucination_rate": np.ones(len(rows), dtype=bool)}
    return {
        "offloaded": float(policy.sent.mean()),
        "accuracy": share(_mixed(policy.sent, **outcomes.right)[outcomes.answerable]),
        "hallucination_rate": share(_mixed(policy.sent, **outcomes.hallucinated)),
        "latency_ms": _quantiles(1e3 * spent.device_s, 1e3 * spent.server_s, policy.sent) | ESTIMATE,
        "energy_per_query_j": energy | ESTIMATE,
        "battery_percent_per_query": percent | {"n": energy["n"]} | ESTIMATE,
        "over_random": {
            metric: intervals.as_dict(intervals.mean(more[parts[metric]] * gain, config.seed, config.resamples))
            for metric, gain in gains.items()
        },
    }


def _quantiles(device: np.ndarray, server: np.ndarray, sent: np.ndarray) -> dict[str, Any]:
    values, weights = np.concatenate([device, server]), np.concatenate([1.0 - sent, sent])
    middle, late = np.quantile(values, [0.5, 0.9], weights=weights, method="inverted_cdf")
    return {
        "p50": float(middle),
        "p90": float(late),
        "mean": float((values * weights).sum() / len(sent)),
        "n": len(sent),
    }


def areas(
    score: np.ndarray, outcomes: Outcomes, seed: int, resamples: int, against: np.ndarray | None = None
) -> dict[str, Any]:
    """How well `score` ranks questions, whatever the threshold: 0 for chance, 1 for the best order in hindsight.

    The area between the curve of accuracy (of hallucinations spared, of both) over the share offloaded and that of
    random offloading, divided by the same area of the oracle. It is akin to RouteLLM's APGR (arXiv 2406.18665).

    Args:
        score: of each question; most worth the server first.
        outcomes: of the same questions.
        seed: of the bootstrap.
        resamples: how many.
        against: another score; the areas are then differences from its areas, paired by question.
    """
    answerable, everything = outcomes.answerable, np.ones(len(score), dtype=bool)
    gains = {
        "accuracy": (outcomes.right_gain, answerable),
        "hallucination_rate": (outcomes.hallucination_gain, everything),
        "both": (outcomes.gain, everything),
    }

    def area(draw: np.ndarray) -> np.ndarray:
        own = _area(draw[..., 0], draw[..., -1])
        return own if against is None else own - _area(draw[..., 1], draw[..., -1])

    columns = [score] if against is None else [score, against]
    return {
        name: intervals.as_dict(intervals.statistic(area, np.stack([*columns, gain], axis=-1)[part], seed, resamples))
        for name, (gain, part) in gains.items()
    }


def _area(score: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Of shape (…,) for score and gain of shape (…, n); 0 where nothing is to be gained by any order."""
    order = np.argsort(-score, axis=-1, kind="stable")
    won = np.cumsum(np.take_along_axis(gain, order, axis=-1), axis=-1)
    best = np.cumsum(-np.sort(-gain, axis=-1), axis=-1)
    chance = won[..., -1:] * np.arange(1, gain.shape[-1] + 1) / gain.shape[-1]
    over, most = (won - chance).mean(axis=-1), (best - chance).mean(axis=-1)
    return np.divide(over, most, out=np.zeros_like(over), where=most > 0.0)


def curve(score: np.ndarray, outcomes: Outcomes) -> list[dict[str, float]]:
    """Accuracy and hallucination rate at equal steps of the share offloaded, most worth the server first."""
    order = np.argsort(-score, kind="stable")
    points = []
    for step in range(STEPS + 1):
        sent = np.zeros(len(score))
        sent[order[: round(step * len(score) / STEPS)]] = 1.0
        hallucinated = float(_mixed(sent, **outcomes.hallucinated).mean())
        points.append(
            {
                "offloaded": float(sent.mean()),
                "accuracy": _accuracy(sent, outcomes),
                "hallucination_rate": hallucinated,
            }
        )
    return points


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
                _costs_of(costs(rows, link, watts, embeds=1.0, looks=float(look == "after")), others),
                _costs_of(costs(rows, link, watts), others),
                _part(outcomes, others),
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


def judge(
    rows: Sequence[Mapping[str, Any]], vectors: np.ndarray, params: Params, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every policy reaches over every link, and the router: both looks, fitted on all questions.

    All figures of the learned router are of fits that have not seen the entity asked about, and of thresholds chosen on
    the other folds. The operating points that go with the router are of all folds together.

    Args:
        rows: of `ask_both`.
        vectors: the unit vectors of the questions, of shape (questions, dimensions).
        params: all of params.yaml.
        device: a name under `serving`.

    Raises:
        ConfigError: there are more folds than entities.
    """
    serving, watts = params.serving[device], params.devices[device].watts_per_core
    outcomes = Outcomes.of(rows)
    folds = folds_of(rows, serving.offload.folds, serving.offload.seed)
    known = {look: features(rows, vectors, look) for look in LOOKS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fit that does not converge is no fit
        held_out = {look: cross_fit(known[look], outcomes, folds, vectors.shape[1]) for look in LOOKS}
        fitted = {look: fit(known[look], outcomes, vectors.shape[1]) for look in LOOKS}
    worth: dict[Look, np.ndarray] = {look: held_out_worth(known[look], held_out[look], folds) for look in LOOKS}
    scores = {"threshold": -_sure(rows)} | {f"learned_{look}": worth[look] for look in LOOKS}
    config = params.evaluation
    found: dict[str, Any] = {
        "links": {},
        "curves": {name: curve(score, outcomes) for name, score in (scores | {"oracle": outcomes.gain}).items()},
        "areas": {name: areas(score, outcomes, config.seed, config.resamples) for name, score in scores.items()},
        "areas_over_threshold": {
            name: areas(score, outcomes, config.seed, config.resamples, against=scores["threshold"])
            for name, score in scores.items()
            if name != "threshold"
        },
    }
    looks: dict[str, Any] = {look: {"fitted": fitted[look].as_dict(), "links": {}} for look in LOOKS}
    for name, link in params.links.items():
        of_link = policies(rows, worth, folds, link, watts, serving)
        found["links"][name] = {policy: figures(of, rows, link, params, device) for policy, of in of_link.items()}
        at_once = costs(rows, link, watts)
        for look in LOOKS:
            spent = costs(rows, link, watts, embeds=1.0, looks=float(look == "after"))
            looks[look]["links"][name] = asdict(tabulate(worth[look], spent, at_once, outcomes))
    return found, {"looks": looks}
