"""Settings of the gateway: device, edge server, link, routing policy and battery."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

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


# Declared, not measured; docs/configuration.md has the sources.
LINKS = {
    "wifi": LinkConfig(
        up_mbit_per_s=50.0,
        down_mbit_per_s=100.0,
        round_trip_ms=10.0,
        loss=0.001,
        up_j_per_byte=2.3e-6,
        down_j_per_byte=1.1e-6,
        active_watts=0.13,
        tail_s=0.24,
        tail_watts=0.12,
    ),
    "5g": LinkConfig(
        up_mbit_per_s=50.0,
        down_mbit_per_s=300.0,
        round_trip_ms=25.0,
        loss=0.002,
        up_j_per_byte=1.0e-6,
        down_j_per_byte=2.0e-7,
        active_watts=1.5,
        tail_s=1.0,
        tail_watts=0.6,
    ),
    "4g": LinkConfig(
        up_mbit_per_s=6.0,
        down_mbit_per_s=13.0,
        round_trip_ms=70.0,
        loss=0.005,
        up_j_per_byte=3.5e-6,
        down_j_per_byte=4.2e-7,
        active_watts=1.29,
        tail_s=11.6,
        tail_watts=1.06,
    ),
    "poor": LinkConfig(
        up_mbit_per_s=0.3,
        down_mbit_per_s=0.6,
        round_trip_ms=400.0,
        loss=0.05,
        up_j_per_byte=7.0e-6,
        down_j_per_byte=9.8e-7,
        active_watts=0.82,
        tail_s=8.1,
        tail_watts=0.8,
    ),
}


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

    rare: ClassVar[frozenset[str]] = frozenset({"candidate", "threads", "slots", "url", "model", "timeout_s"})

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

    energy_budget_j: PositiveFloat = 0.2
    max_accuracy_drop: Share = 0.02
    max_hallucination_rise: Share = 0.02


class OffloadConfig(Section):
    """Comparison of device and edge server, and fitting of the routers.

    Attributes:
        questions: number of held-out questions that both answer, including unanswerable ones.
        max_new_tokens: of an answer.
        folds: of the cross-validation of learned routers; folds are disjoint by entity.
    """

    seed: Seed = 6
    questions: Annotated[int, Field(ge=20, le=LARGEST_INT)] = 300
    max_new_tokens: Positive = 24
    folds: Annotated[int, Field(ge=2, le=LARGEST_INT)] = 5


class AnswerCacheConfig(Section):
    """The gateway's semantic answer cache; its threshold is fitted with the budget of `caching`."""

    capacity: NotNegative = 10000


class ServingConfig(Section):
    """Serving of a device's champion.

    Attributes:
        policy: `best`: over each link the policy that the stage `offload` found best, if it is shown to beat random
            routing; `device` or `server`: always that one; `threshold`: by the probabilities of the device's tokens;
            `learned`: by a router fitted on held-out questions.
        look: `before`: `learned` routes by the question, before generation; `after`: also by the device's answer
            (cascade).
        least_confidence: minimum geometric mean of the token probabilities for `threshold`.
        link: default link to the edge server; a request may name another.
        battery_wh: capacity of the device's battery.
        saver_percent: battery level below which the energy budget shrinks in proportion to the level.
    """

    edge: EdgeConfig
    policy: Literal["best", "device", "server", "threshold", "learned"] = "best"
    look: Look = "after"
    least_confidence: Share = 0.7
    link: LinkName = "wifi"
    battery_wh: PositiveFloat = 15.0
    saver_percent: Annotated[float, Field(ge=0.0, le=100.0)] = 20.0
    objective: ObjectiveConfig = ObjectiveConfig()
    offload: OffloadConfig = OffloadConfig()
    cache: AnswerCacheConfig = AnswerCacheConfig()
