"""Outcomes and costs of questions that both device and edge server answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lilliput.config import LinkConfig
from lilliput.offload.links import Request, latency_s, radio_j


@dataclass(frozen=True)
class Outcomes:
    """The outcome of each question on device and server; arrays of shape (questions,).

    Attributes:
        answerable: whether the question has an answer.
        judged: whether hallucinations are defined: not for rows with only a reference.
        right: by place, 1.0 for a right answer; the score (token F1) for rows with only a reference.
        hallucinated: by place, 1.0 for a hallucination.
    """

    answerable: np.ndarray
    judged: np.ndarray
    right: dict[str, np.ndarray]
    hallucinated: dict[str, np.ndarray]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Outcomes:
        """From the rows of `ask_both`."""
        right, hallucinated = (
            {place: np.array([value(row[place]) for row in rows]) for place in ("device", "server")}
            for value in (quality, lambda answer: float(bool(answer["hallucinated"])))
        )
        answerable = np.array([bool(row["answerable"]) for row in rows])
        judged = np.array([row["device"]["hallucinated"] is not None for row in rows])
        return cls(answerable, judged, right, hallucinated)

    @property
    def gain(self) -> np.ndarray:
        """The server's gain for each question, in hindsight: more right answers and fewer hallucinations."""
        return self.right_gain + self.hallucination_gain

    @property
    def right_gain(self) -> np.ndarray:
        """Additional right answers of the server."""
        return self.right["server"] - self.right["device"]

    @property
    def hallucination_gain(self) -> np.ndarray:
        """Hallucinations that the server avoids."""
        return self.hallucinated["device"] - self.hallucinated["server"]

    def select(self, mask: np.ndarray) -> Outcomes:
        """The outcomes of the questions where `mask`, a boolean array of shape (questions,), is true."""
        right, hallucinated = (
            {place: values[mask] for place, values in by_place.items()} for by_place in (self.right, self.hallucinated)
        )
        return Outcomes(self.answerable[mask], self.judged[mask], right, hallucinated)

    def accuracy(self, sent: np.ndarray) -> float:
        """Mean of `right` over the answerable questions, each sent with probability `sent`; 0.0 without any."""
        return _mean(expected_value(sent, **self.right)[self.answerable])

    def hallucination_rate(self, sent: np.ndarray) -> float:
        """Share of hallucinations among the judged questions, each sent with probability `sent`; 0.0 without any."""
        return _mean(expected_value(sent, **self.hallucinated)[self.judged])


def quality(answer: Mapping[str, Any]) -> float:
    """1.0 for a right answer, otherwise 0.0; where right and wrong are undefined, the score, if there is one."""
    right = answer["right"]
    return float((answer.get("score") or 0.0) if right is None else right)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


@dataclass(frozen=True)
class Policy:
    """A policy's decisions on the recorded questions.

    Attributes:
        sent: probability that each question goes to the server; 0.0 or 1.0 for a deterministic policy.
        score: ranks questions, largest first to the server; None for a policy without a ranking.
        embeds: 1.0 where it embeds the question, else 0.0; one value for all questions, or one for each.
        looks: 1.0 where it needs the device's answer first, else 0.0; one value for all questions, or one for each.
    """

    sent: np.ndarray
    score: np.ndarray | None = None
    embeds: np.ndarray | float = 0.0
    looks: np.ndarray | float = 0.0


@dataclass(frozen=True)
class QuestionCosts:
    """Seconds and joules of each question on device and server; arrays of shape (questions,)."""

    device_s: np.ndarray
    server_s: np.ndarray
    device_j: np.ndarray
    server_j: np.ndarray

    def select(self, mask: np.ndarray) -> QuestionCosts:
        """The costs of the questions where `mask`, a boolean array of shape (questions,), is true."""
        return QuestionCosts(**{name: values[mask] for name, values in vars(self).items()})


@dataclass(frozen=True)
class CostParts:
    """Seconds and joules of each step of a question over one link; arrays of shape (questions,).

    Attributes:
        embed_s: of embedding the question on the device; `embed_j` likewise.
        device_s: of the device's answer; `device_j` likewise.
        remote_s: of the request to the server, isolated and with a complete tail; `remote_j` likewise.
    """

    embed_s: np.ndarray
    embed_j: np.ndarray
    device_s: np.ndarray
    device_j: np.ndarray
    remote_s: np.ndarray
    remote_j: np.ndarray

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], link: LinkConfig, watts_per_core: float) -> CostParts:
        """From the rows of `ask_both`.

        Args:
            rows: the rows.
            link: to the edge server.
            watts_per_core: power of a busy core of the device.
        """
        requests = [request_of(row) for row in rows]
        return cls(
            embed_s=np.array([row["embed_s"] for row in rows]),
            embed_j=np.array([row["embed_cpu_s"] for row in rows]) * watts_per_core,
            device_s=np.array([row["device"]["seconds"] for row in rows]),
            device_j=np.array([row["device"]["cpu_s"] for row in rows]) * watts_per_core,
            remote_s=np.array([latency_s(request, link) for request in requests]),
            remote_j=np.array([radio_j(request, link) for request in requests]),
        )

    def total(self, embeds: np.ndarray | float = 0.0, looks: np.ndarray | float = 0.0) -> QuestionCosts:
        """Seconds until the answer and joules of the device, by place.

        Args:
            embeds: 1.0 where the question is embedded first, else 0.0.
            looks: 1.0 where the device answers before the server (cascade), else 0.0.
        """
        first_s, first_j = self.embed_s * embeds, self.embed_j * embeds
        return QuestionCosts(
            device_s=first_s + self.device_s,
            server_s=first_s + self.device_s * looks + self.remote_s,
            device_j=first_j + self.device_j,
            server_j=first_j + self.device_j * looks + self.remote_j,
        )


def request_of(row: Mapping[str, Any]) -> Request:
    """The recorded request to the server."""
    server = row["server"]
    return Request(server["up_bytes"], server["down_bytes"], server["seconds"])


def expected_value(sent: np.ndarray, device: np.ndarray, server: np.ndarray) -> np.ndarray:
    """The expected value for each question that goes to the server with probability `sent`."""
    return (1.0 - sent) * device + sent * server
