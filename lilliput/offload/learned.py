"""The policy `learned`: what was right and wrong on held-out questions says which questions are worth the server.

Four logistic regressions tell how likely the device and the server are to be right, and to hallucinate. What sending a
question on is worth is the difference:

    worth = P(server right) − P(device right) + P(device hallucinates) − P(server hallucinates)

A question whose worth is above a threshold goes to the server. For each link a table of operating points says what each
threshold costs and brings; which point holds is decided anew for each request, by link and battery (`pick`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lilliput.cache.distinguishing_words import names_in
from lilliput.config import ObjectiveConfig
from lilliput.embedding.embedder import Embedder
from lilliput.offload.policy import Conditions, Decision

Look = Literal["before", "after"]
TARGETS = ("device_right", "server_right", "device_hallucinated", "server_hallucinated")
NEVER, ALWAYS = 2.0, -2.0  # thresholds: a worth lies strictly between them
_UNLIKELY_NATS = -20.0  # what stands for the tokens of an empty answer


def question_features(questions: Sequence[str], vectors: np.ndarray) -> np.ndarray:
    """What can be told before an answer: the embedding, then counts of characters, words, names and digits.

    Args:
        questions: their wording.
        vectors: their unit vectors, of shape (questions, dimensions).

    Returns:
        Of shape (questions, dimensions + 4).
    """
    counts = [
        [len(text), len(text.split()), len(names_in(text).split()), sum(map(str.isdigit, text))] for text in questions
    ]
    return np.hstack([vectors, np.array(counts, dtype=float)])


def token_features(answers: Sequence[Sequence[float]]) -> np.ndarray:
    """What the device's tokens tell: mean, least, first and sum of their log-likelihoods (nats), and their number.

    Returns:
        Of shape (answers, 5).
    """
    told = [np.array(answer or [_UNLIKELY_NATS]) for answer in answers]
    return np.array([[x.mean(), x.min(), x[0], x.sum(), len(x)] for x in told])


@dataclass(frozen=True)
class Fitted:
    """Four logistic regressions on standardised features.

    Attributes:
        mean: of each feature on the questions it was fitted on, of shape (features,).
        scale: what it is divided by, of shape (features,).
        weights: of each of TARGETS, of shape (targets, features).
        bias: of shape (targets,).
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Of each of TARGETS for each row of `features`, of shape (rows, targets)."""
        logits = (features - self.mean) / self.scale @ self.weights.T + self.bias
        return 1.0 / (1.0 + np.exp(-logits))

    def worth(self, features: np.ndarray) -> np.ndarray:
        """What the server is worth for each row of `features`, between −2 and 2, of shape (rows,)."""
        device_right, server_right, device_wrong, server_wrong = self.probabilities(features).T
        return server_right - device_right + device_wrong - server_wrong

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return {name: getattr(self, name).tolist() for name in ("mean", "scale", "weights", "bias")}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fitted:
        """From what `as_dict` gave."""
        return cls(**{name: np.array(record[name]) for name in ("mean", "scale", "weights", "bias")})


@dataclass(frozen=True)
class Point:
    """An operating point: what a threshold costs and brings a question, as found on questions not fitted on.

    Attributes:
        threshold: of worth, above which a question goes to the server.
        offloaded: share of the questions that do.
        latency_s: mean, from question to answer.
        energy_j: mean, of the device: computing, radio and waiting.
        accuracy: share of right answers to what can be answered.
        hallucination: share of all answers that assert what is not so.
    """

    threshold: float
    offloaded: float
    latency_s: float
    energy_j: float
    accuracy: float
    hallucination: float


@dataclass(frozen=True)
class Table:
    """The operating points over one link, and how good the edge server alone is on the same questions."""

    points: tuple[Point, ...]
    server_accuracy: float
    server_hallucination: float


def budget_j(objective: ObjectiveConfig, battery_percent: float, saver_percent: float) -> float:
    """What a query may cost the device: less in proportion to what the battery holds below `saver_percent`."""
    share = min(1.0, battery_percent / saver_percent) if saver_percent else 1.0
    return objective.energy_budget_j * share


def pick(table: Table, objective: ObjectiveConfig, energy_budget_j: float) -> tuple[Point, str]:
    """The point of least latency within the energy budget, the accuracy floor and the hallucination ceiling, and why.

    Where there is none, quality yields first: of the points within the budget, the one that misses floor and ceiling by
    least. Where none is within the budget, the one of least energy.
    """
    floor = table.server_accuracy - objective.max_accuracy_drop
    ceiling = table.server_hallucination + objective.max_hallucination_rise

    def missed(point: Point) -> float:
        return max(0.0, floor - point.accuracy) + max(0.0, point.hallucination - ceiling)

    within = [point for point in table.points if point.energy_j <= energy_budget_j]
    if not within:
        return min(table.points, key=lambda point: (point.energy_j, point.latency_s)), (
            f"over the energy budget of {energy_budget_j:.3g} J whoever answers"
        )
    best = min(within, key=lambda point: (missed(point), point.latency_s))
    if missed(best) > 0.0:
        return best, f"{missed(best):.3f} short of the quality aimed at, within {energy_budget_j:.3g} J"
    return best, f"within {energy_budget_j:.3g} J"


class Learned:
    """Implements `Router`: sends on what is worth more than the threshold that link and battery call for.

    Args:
        fitted: what tells the worth.
        tables: operating points by link.
        look: whether it decides before the device answers, or after.
        objective: what points are picked by.
        saver_percent: of battery below which the energy budget shrinks.
        embedder: the one it was fitted with.
    """

    def __init__(
        self,
        fitted: Fitted,
        tables: Mapping[str, Table],
        look: Look,
        objective: ObjectiveConfig,
        saver_percent: float,
        embedder: Embedder,
    ) -> None:
        self._fitted, self._tables, self._look = fitted, tables, look
        self._objective, self._saver_percent, self._embedder = objective, saver_percent, embedder

    def before(self, question: str, conditions: Conditions) -> Decision | None:
        """The decision on the question alone; None if the device's answer is to be looked at first.

        Where the point is to send nothing, or everything, neither question nor answer is looked at. Otherwise a
        question longer than the embedder reads goes to the server.
        """
        known = self._at_once(conditions) or self._unread(question)
        if known or self._look == "after":
            return known
        return self._decide(self._features(question), conditions)

    def after(self, question: str, token_logprobs: Sequence[float], conditions: Conditions) -> Decision:
        """The decision by question and tokens; by the question alone if that is how it looks."""
        if decision := self._at_once(conditions) or self._unread(question):
            return decision
        features = self._features(question)
        if self._look == "after":
            features = np.hstack([features, token_features([token_logprobs])])
        return self._decide(features, conditions)

    def rule(self, question: str, conditions: Conditions) -> str:
        """The place, where link and battery alone decide; otherwise the threshold that they call for."""
        del question
        at_once = self._at_once(conditions)
        return at_once.place if at_once else f"worth {self._look} {self._point(conditions)[0].threshold!r}"

    def _at_once(self, conditions: Conditions) -> Decision | None:
        if conditions.link not in self._tables:
            return Decision("device", None, f"nothing is known of the link {conditions.link}")
        point, why = self._point(conditions)
        if point.threshold == NEVER:
            return Decision("device", None, f"the device always ({conditions.link}, {why})")
        if point.threshold == ALWAYS:
            return Decision("server", None, f"the server always ({conditions.link}, {why})")
        return None

    def _unread(self, question: str) -> Decision | None:
        """The larger model, for a question longer than the embedder reads: nothing is known of such questions."""
        if self._embedder.fits(question):
            return None
        return Decision("server", None, "the question is longer than the router reads")

    def _point(self, conditions: Conditions) -> tuple[Point, str]:
        limit_j = budget_j(self._objective, conditions.battery_percent, self._saver_percent)
        return pick(self._tables[conditions.link], self._objective, limit_j)

    def _features(self, question: str) -> np.ndarray:
        return question_features([question], self._embedder.embed([question]))

    def _decide(self, features: np.ndarray, conditions: Conditions) -> Decision:
        point, why = self._point(conditions)
        worth = float(self._fitted.worth(features)[0])
        server = worth > point.threshold
        told = f"worth {worth:+.3f} {'>' if server else '<='} {point.threshold:+.3f} ({conditions.link}, {why})"
        return Decision("server" if server else "device", worth, told)
