"""Routing policies: device or edge server, decided before generation or after the device's answer (cascade)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lilliput.config import Place


@dataclass(frozen=True)
class RoutingDecision:
    """The chosen place, the score behind the choice, and the reason as text."""

    place: Place
    score: float | None
    reason: str


@dataclass(frozen=True)
class Conditions:
    """The state of the device, on which a decision may depend.

    Attributes:
        link: the present link to the edge server, by its name in params.yaml.
        battery_percent: charge of the device's battery.
    """

    link: str
    battery_percent: float = 100.0


class Router(Protocol):
    """A routing policy. `others` are the other turns of a conversation, apart from the user's last one, in order."""

    def route_question(
        self, question: str, conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision | None:
        """The decision before generation; None if it needs the device's answer (cascade)."""
        ...

    def route_answer(
        self, question: str, token_logprobs: Sequence[float], conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision:
        """The decision after the device's answer, by the log-likelihoods (nats) of its tokens."""
        ...

    def rule(self, question: str, conditions: Conditions) -> str:
        """A text that identifies the decision rule under `conditions`. Equal rules decide equally on a question."""
        ...


@dataclass(frozen=True)
class FixedRouter:
    """The policies `device` and `server`.

    Attributes:
        place: the fixed place.
        reason: of each decision.
    """

    place: Place
    reason: str = ""

    def route_question(self, question: str, conditions: Conditions, others: Sequence[str] = ()) -> RoutingDecision:
        """The fixed place."""
        del question, conditions, others
        return RoutingDecision(self.place, None, self.reason or f"policy {self.place}")

    def route_answer(
        self, question: str, token_logprobs: Sequence[float], conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision:
        """The fixed place."""
        del token_logprobs, others
        return self.route_question(question, conditions)

    def rule(self, question: str, conditions: Conditions) -> str:
        """The fixed place."""
        del question, conditions
        return self.place


@dataclass(frozen=True)
class ThresholdRouter:
    """The policy `threshold`: a cascade that keeps the device's answer if its confidence reaches `least`.

    Confidence is the geometric mean of the token probabilities, between 0 and 1.
    """

    least: float

    def route_question(self, question: str, conditions: Conditions, others: Sequence[str] = ()) -> None:
        """None: this policy needs the device's answer."""
        del question, conditions, others

    def route_answer(
        self, question: str, token_logprobs: Sequence[float], conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision:
        """The device if its confidence reaches the threshold. An empty answer has no confidence."""
        del question, conditions, others
        score = confidence(token_logprobs)
        if score is not None and score >= self.least:
            return RoutingDecision("device", score, f"confidence {score:.3f} ≥ {self.least:g}")
        reason = "no tokens" if score is None else f"confidence {score:.3f} < {self.least:g}"
        return RoutingDecision("server", score, reason)

    def rule(self, question: str, conditions: Conditions) -> str:
        """The threshold; link and battery do not matter."""
        del question, conditions
        return f"confidence {self.least!r}"


@dataclass(frozen=True)
class LinkRouter:
    """A router for each link, by name; the device answers over other links, for which nothing was measured."""

    routers: Mapping[str, Router]

    def route_question(
        self, question: str, conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision | None:
        """The decision of the link's router before generation."""
        return self._router(conditions).route_question(question, conditions, others)

    def route_answer(
        self, question: str, token_logprobs: Sequence[float], conditions: Conditions, others: Sequence[str] = ()
    ) -> RoutingDecision:
        """The decision of the link's router after the device's answer."""
        return self._router(conditions).route_answer(question, token_logprobs, conditions, others)

    def rule(self, question: str, conditions: Conditions) -> str:
        """The rule of the link's router."""
        return self._router(conditions).rule(question, conditions)

    def _router(self, conditions: Conditions) -> Router:
        unmeasured = FixedRouter("device", f"no measurements for the link {conditions.link}")
        return self.routers.get(conditions.link, unmeasured)


def confidence(token_logprobs: Sequence[float]) -> float | None:
    """The geometric mean of the token probabilities; None without tokens."""
    return math.exp(sum(token_logprobs) / len(token_logprobs)) if token_logprobs else None
