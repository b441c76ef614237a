"""Who answers: the device, or the edge server. Decided before an answer, or after a first look at the device's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lilliput.config import Place


@dataclass(frozen=True)
class Decision:
    """Where a question goes, by which score, and why."""

    place: Place
    score: float | None
    reason: str


@dataclass(frozen=True)
class Conditions:
    """What a decision may depend on besides the question.

    Attributes:
        link: over which the edge server would be reached, by its name in params.yaml.
        battery_percent: what the device's battery holds yet.
    """

    link: str
    battery_percent: float = 100.0


class Router(Protocol):
    """A policy. One that cannot tell before it has seen the device's answer says None first."""

    def before(self, question: str, conditions: Conditions) -> Decision | None:
        """The decision on the question alone; None to look at the device's answer first."""
        ...

    def after(self, question: str, token_logprobs: Sequence[float], conditions: Conditions) -> Decision:
        """The decision once the device has answered, by the log-likelihoods (nats) of its own tokens."""
        ...

    def rule(self, question: str, conditions: Conditions) -> str:
        """The rule for `question` under `conditions`; where two conditions have one rule, they get one decision."""
        ...


@dataclass(frozen=True)
class Always:
    """The policies `device` and `server`."""

    place: Place

    def before(self, question: str, conditions: Conditions) -> Decision:
        """Always the same."""
        del question, conditions
        return Decision(self.place, None, f"policy {self.place}")

    def after(self, question: str, token_logprobs: Sequence[float], conditions: Conditions) -> Decision:
        """Always the same."""
        del token_logprobs
        return self.before(question, conditions)

    def rule(self, question: str, conditions: Conditions) -> str:
        """Always the same."""
        del question, conditions
        return self.place


@dataclass(frozen=True)
class Threshold:
    """The policy `threshold`: the device's answer stands if it is sure enough of it.

    The score is the geometric mean of its tokens' probabilities, between 0 and 1.
    """

    least: float

    def before(self, question: str, conditions: Conditions) -> None:
        """Looks at the answer first."""
        del question, conditions

    def after(self, question: str, token_logprobs: Sequence[float], conditions: Conditions) -> Decision:
        """The device, if its score reaches the threshold; an empty answer never does."""
        del question, conditions
        score = confidence(token_logprobs)
        if score is not None and score >= self.least:
            return Decision("device", score, f"confidence {score:.3f} ≥ {self.least:g}")
        told = "no tokens" if score is None else f"confidence {score:.3f} < {self.least:g}"
        return Decision("server", score, told)

    def rule(self, question: str, conditions: Conditions) -> str:
        """The threshold, whatever link and battery."""
        del question, conditions
        return f"confidence {self.least!r}"


def confidence(token_logprobs: Sequence[float]) -> float | None:
    """The geometric mean of the tokens' probabilities; None without tokens."""
    return math.exp(sum(token_logprobs) / len(token_logprobs)) if token_logprobs else None
