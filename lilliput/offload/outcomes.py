"""Outcomes and costs of questions that device and edge server both answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lilliput.config import LinkConfig
from lilliput.offload.links import Request, latency_s, radio_j


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

    def where(self, chosen: np.ndarray) -> Outcomes:
        """The outcomes of the questions for which `chosen`, a boolean array of shape (questions,), is true."""
        right, hallucinated = (
            {place: values[chosen] for place, values in by_place.items()}
            for by_place in (self.right, self.hallucinated)
        )
        return Outcomes(self.answerable[chosen], right, hallucinated)

    def accuracy(self, sent: np.ndarray) -> float:
        """Share of right answers among answerable questions, each sent with probability `sent`; 0.0 without any."""
        right = mixed(sent, **self.right)[self.answerable]
        return float(right.mean()) if len(right) else 0.0


@dataclass(frozen=True)
class Costs:
    """What each question costs if the device answers it, and if the server does; arrays of shape (questions,)."""

    device_s: np.ndarray
    server_s: np.ndarray
    device_j: np.ndarray
    server_j: np.ndarray

    def where(self, chosen: np.ndarray) -> Costs:
        """The costs of the questions for which `chosen`, a boolean array of shape (questions,), is true."""
        return Costs(**{name: values[chosen] for name, values in vars(self).items()})


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


def mixed(sent: np.ndarray, device: np.ndarray, server: np.ndarray) -> np.ndarray:
    """The expected value of each question that goes to the server with probability `sent`."""
    return (1.0 - sent) * device + sent * server
