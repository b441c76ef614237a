"""Settings of the gateway: device, edge server, link, routing policy and battery."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lilliput.config.section import (
    LARGEST_INT,
    LinkName,
    Name,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    Share,
    Url,
)
from lilliput.redaction import has_credentials

EDGE_KEY = "LILLIPUT_EDGE_KEY"  # environment variable with the key of a remote edge server
Place = Literal["device", "server"]  # where a question is answered
Look = Literal["before", "after"]  # when the learned router decides: before generation or after the device's answer


class LinkConfig(Section):
    """A declared radio link from the device to the edge server; figures computed from it are estimates.

    Attributes:
        round_trip_ms: time to the first possible byte of an answer.
        loss: share of packets that are sent again.
        up_j_per_byte: the device radio's energy to send a byte, in addition to `active_watts`.
        down_j_per_byte: energy to receive a byte, likewise.
        active_watts: the radio's power during a request, including the wait.
        tail_s: time that the radio stays awake after the last byte.
        tail_watts: its power during the tail.
    """

    up_mbit_per_s: PositiveFloat
    down_mbit_per_s: PositiveFloat
    round_trip_ms: NotNegativeFloat
    loss: Annotated[float, Field(ge=0.0, lt=1.0)]
    up_j_per_byte: NotNegativeFloat
    down_j_per_byte: NotNegativeFloat
    active_watts: NotNegativeFloat
    tail_s: NotNegativeFloat = 0.0
    tail_watts: NotNegativeFloat = 0.0


class EdgeConfig(Section):
    """The edge server: a candidate that llama.cpp serves on loopback, or a remote server.

    Attributes:
        candidate: served in its compiled form for llama.cpp; must be listed under `compile`.
        threads: CPU threads of that server.
        slots: number of concurrent requests.
        url: of an OpenAI-compatible server instead, without `/v1`, user, password and query; its key is read from
            LILLIPUT_EDGE_KEY.
        model: its name on that server.
        timeout_s: time limit; after it the device answers the request.
    """

    candidate: Name | None = None
    threads: Positive = 1
    slots: Positive = 1
    url: Url | None = None
    model: str | None = None
    timeout_s: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _holds_no_secret(self) -> EdgeConfig:
        # git, MLflow and the report store params.yaml.
        if self.url is not None and has_credentials(self.url):
            raise ValueError("`url` contains a user or a password; remove them and put the key into LILLIPUT_EDGE_KEY")
        return self

    @model_validator(mode="after")
    def _one_of_two(self) -> EdgeConfig:
        if (self.candidate is None) == (self.url is None):
            raise ValueError("name either a `candidate` to serve here or the `url` of a server")
        if (self.url is None) != (self.model is None):
            raise ValueError("`url` and `model` go together")
        return self


class ObjectiveConfig(Section):
    """Constraints of the learned router, which minimises latency (after arXiv 2602.13628).

    Attributes:
        energy_budget_j: the device's average energy per query, including radio and waiting.
        max_accuracy_drop: of accuracy, relative to the edge server alone.
        max_hallucination_rise: of the hallucination rate, relative to the edge server alone.
    """

    energy_budget_j: PositiveFloat
    max_accuracy_drop: Share
    max_hallucination_rise: Share


class OffloadConfig(Section):
    """Comparison of device and edge server, and fitting of the routers.

    Attributes:
        questions: number of held-out questions that both answer, including unanswerable ones.
        max_new_tokens: of an answer.
        folds: of the cross-validation of learned routers; folds are disjoint by entity.
    """

    seed: Seed
    questions: Annotated[int, Field(ge=20, le=LARGEST_INT)]
    max_new_tokens: Positive
    folds: Annotated[int, Field(ge=2, le=LARGEST_INT)]


class AnswerCacheConfig(Section):
    """The gateway's semantic answer cache; its threshold is fitted with the budget of `caching`."""

    capacity: NotNegative


class ServingConfig(Section):
    """Serving of a device's champion.

    Attributes:
        policy: `device` or `server`: always that one; `threshold`: by the probabilities of the device's tokens;
            `learned`: by a router fitted on held-out questions.
        look: `before`: `learned` routes by the question, before generation; `after`: also by the device's answer
            (cascade).
        least_confidence: minimum geometric mean of the token probabilities for `threshold`.
        link: default link to the edge server; a request may name another.
        battery_wh: capacity of the device's battery.
        saver_percent: battery level below which the energy budget shrinks in proportion to the level.
    """

    edge: EdgeConfig
    policy: Literal["device", "server", "threshold", "learned"]
    look: Look = "before"
    least_confidence: Share
    link: LinkName
    battery_wh: PositiveFloat
    saver_percent: Annotated[float, Field(ge=0.0, le=100.0)]
    objective: ObjectiveConfig
    offload: OffloadConfig
    cache: AnswerCacheConfig
