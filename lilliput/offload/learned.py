"""The policy `learned`: predicts which questions are worth the edge server, from results on held-out questions.

Four logistic regressions predict whether device and server are right, and whether they hallucinate. The worth of
sending a question to the server is:

    worth = P(server right) − P(device right) + P(device hallucinates) − P(server hallucinates)

A question with a worth above a threshold goes to the server. For each link, a table of operating points has the cost
and the quality of each threshold. `select_point` selects a point for each request, by link and battery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import PlainSerializer, PlainValidator

from lilliput.cache.distinguishing_words import distinguishing_words
from lilliput.config import Look, ObjectiveConfig
from lilliput.embedding.embedder import Embedder
from lilliput.offload.conversation_text import routed_text
from lilliput.offload.policy import Conditions, RoutingDecision

TARGETS = ("device_right", "server_right", "device_hallucinated", "server_hallucinated")
NEVER, ALWAYS = 2.0, -2.0  # thresholds: a worth lies strictly between them
_UNLIKELY_NATS = -20.0  # log-likelihood that replaces the tokens of an empty answer


def question_features(questions: Sequence[str], vectors: np.ndarray) -> np.ndarray:
    """Features before generation: the embedding, then counts of characters, words, distinguishing words and digits.

    Args:
        questions: the texts.
        vectors: their unit vectors, shape (questions, dimensions).

    Returns:
        Shape (questions, dimensions + 4).
    """
    counts = [
        [len(text), len(text.split()), len(distinguishing_words(text).split()), sum(map(str.isdigit, text))]
        for text in questions
    ]
    return np.hstack([vectors, np.array(counts, dtype=float)])


def token_features(answers: Sequence[Sequence[float]]) -> np.ndarray:
    """Features after generation: mean, minimum, first and sum of the tokens' log-likelihoods (nats), and their number.

    Returns:
        Shape (answers, 5).
    """
    logprobs = [np.array(answer or [_UNLIKELY_NATS]) for answer in answers]
    return np.array([[x.mean(), x.min(), x[0], x.sum(), len(x)] for x in logprobs])


def _array(values: object) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, OverflowError) as error:  # pydantic reports ValueError only
        raise ValueError(f"is not an array of numbers ({error})") from None
    if not np.isfinite(array).all():  # null becomes NaN, with which no question would go to the server
        raise ValueError("has a value that is not a finite number")
    return array


# An array of floats, as lists in a record.
Array = Annotated[np.ndarray, PlainValidator(_array), PlainSerializer(np.ndarray.tolist)]


@dataclass(frozen=True)
class WorthModel:
    """Four logistic regressions on standardised features.

    Attributes:
        mean: of each feature on the training questions, shape (features,).
        scale: divisor of each feature, shape (features,).
        weights: shape (targets, features), in the order of TARGETS.
        bias: shape (targets,).
    """

    mean: Array
    scale: Array
    weights: Array
    bias: Array

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Probability of each of TARGETS for each row of `features`, shape (rows, targets)."""
        logits = (features - self.mean) / self.scale @ self.weights.T + self.bias
        return 1.0 / (1.0 + np.exp(-logits))

    def worth(self, features: np.ndarray) -> np.ndarray:
        """Worth of the server for each row of `features`, between −2 and 2, shape (rows,)."""
        device_right, server_right, device_wrong, server_wrong = self.probabilities(features).T
        return server_right - device_right + device_wrong - server_wrong


@dataclass(frozen=True)
class OperatingPoint:
    """An operating point: cost and quality of a threshold, measured on held-out questions.

    Attributes:
        threshold: questions with a larger worth go to the server.
        offloaded: share of these questions.
        latency_s: mean, from question to answer.
        energy_j: mean of the device: computation, radio and waiting.
        accuracy: share of right answers among answerable questions.
        hallucination: share of hallucinations among all answers.
    """

    threshold: float
    offloaded: float
    latency_s: float
    energy_j: float
    accuracy: float
    hallucination: float


@dataclass(frozen=True)
class OperatingTable:
    """The operating points over one link, and the quality of the edge server alone on the same questions."""

    points: tuple[OperatingPoint, ...]
    server_accuracy: float
    server_hallucination: float


def budget_j(objective: ObjectiveConfig, battery_percent: float, saver_percent: float) -> float:
    """The energy budget of a query; below `saver_percent` of battery, reduced in proportion to the charge."""
    share = min(1.0, battery_percent / saver_percent) if saver_percent else 1.0
    return objective.energy_budget_j * share


def select_point(
    table: OperatingTable, objective: ObjectiveConfig, energy_budget_j: float
) -> tuple[OperatingPoint, str]:
    """The point of least latency within energy budget, accuracy floor and hallucination ceiling, and the reason.

    Without such a point, quality yields before energy: selects, within the budget, the point that misses floor and
    ceiling by least. If no point is within the budget, selects the one of least energy.
    """
    floor = table.server_accuracy - objective.max_accuracy_drop
    ceiling = table.server_hallucination + objective.max_hallucination_rise

    def missed(point: OperatingPoint) -> float:
        return max(0.0, floor - point.accuracy) + max(0.0, point.hallucination - ceiling)

    within = [point for point in table.points if point.energy_j <= energy_budget_j]
    if not within:
        return min(table.points, key=lambda point: (point.energy_j, point.latency_s)), (
            f"every choice exceeds the energy budget of {energy_budget_j:.3g} J"
        )
    best = min(within, key=lambda point: (missed(point), point.latency_s))
    if missed(best) > 0.0:
        return best, f"{missed(best):.3f} short of the target quality, within {energy_budget_j:.3g} J"
    return best, f"within {energy_budget_j:.3g} J"


class LearnedRouter:
    """Implements `Router`: offloads questions whose worth exceeds the threshold for the present link and battery.

    Args:
        fitted: predicts the worth.
        tables: operating points by link.
        look: whether it decides before or after the device's answer.
        objective: selects the operating point.
        saver_percent: battery charge below which the energy budget shrinks.
        embedder: the embedder of the fit.
    """

    def __init__(
        self,
        fitted: WorthModel,
        tables: Mapping[str, OperatingTable],
        look: Look,
        objective: ObjectiveConfig,
        saver_percent: float,
        embedder: Embedder,
    ) -> None:
        self._fitted, self._tables, self._look = fitted, tables, look
        self._objective, self._saver_percent, self._embedder = objective, saver_percent, embedder

    def route_question(
        self, question: str, conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision | None:
        """The decision before generation; None if it needs the device's answer (`look` is `after`).

        An operating point of never or always needs neither question nor answer. Otherwise a question longer than the
        embedder's input goes to the server. Of the other turns, the newest ones are read that fit as well.
        """
        decision = self._fixed_decision(conditions) or self._too_long(question)
        if decision or self._look == "after":
            return decision
        return self._decide(self._features(self._with_others(question, others)), conditions)

    def route_answer(
        self, question: str, token_logprobs: Sequence[float], conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision:
        """The decision by question and tokens; by the question alone if `look` is `before`."""
        if decision := self._fixed_decision(conditions) or self._too_long(question):
            return decision
        features = self._features(self._with_others(question, others))
        if self._look == "after":
            features = np.hstack([features, token_features([token_logprobs])])
        return self._decide(features, conditions)

    def rule(self, question: str, conditions: Conditions) -> str:
        """The place if link and battery alone decide; otherwise the threshold."""
        del question
        decision = self._fixed_decision(conditions)
        return decision.place if decision else f"worth {self._look} {self._point(conditions)[0].threshold!r}"

    def _fixed_decision(self, conditions: Conditions) -> RoutingDecision | None:
        if conditions.link not in self._tables:
            return RoutingDecision("device", None, f"no measurements for the link {conditions.link}")
        point, why = self._point(conditions)
        if point.threshold == NEVER:
            return RoutingDecision("device", None, f"the device always ({conditions.link}, {why})")
        if point.threshold == ALWAYS:
            return RoutingDecision("server", None, f"the server always ({conditions.link}, {why})")
        return None

    def _too_long(self, question: str) -> RoutingDecision | None:
        """The server for a question longer than the embedder's input, which has no worth."""
        if self._embedder.fits(question):
            return None
        return RoutingDecision("server", None, "the question is longer than the router's input")

    def _with_others(self, question: str, others: Sequence[str]) -> str:
        return routed_text(question, others, self._embedder.fits)

    def _point(self, conditions: Conditions) -> tuple[OperatingPoint, str]:
        limit_j = budget_j(self._objective, conditions.battery_percent, self._saver_percent)
        return select_point(self._tables[conditions.link], self._objective, limit_j)

    def _features(self, question: str) -> np.ndarray:
        return question_features([question], self._embedder.embed([question]))

    def _decide(self, features: np.ndarray, conditions: Conditions) -> RoutingDecision:
        point, why = self._point(conditions)
        worth = float(self._fitted.worth(features)[0])
        server = worth > point.threshold
        reason = f"worth {worth:+.3f} {'>' if server else '<='} {point.threshold:+.3f} ({conditions.link}, {why})"
        return RoutingDecision("server" if server else "device", worth, reason)
