"""The gateway before a device and its edge server: who answers, over which link, at which cost to the battery."""

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
)
from lilliput.redaction import has_credentials

EDGE_KEY = "LILLIPUT_EDGE_KEY"  # the environment variable with the key of an edge server elsewhere
Place = Literal["device", "server"]  # where a question is answered


class LinkConfig(Section):
    """A radio link from the device to the edge server; declared, and what is reckoned with it is an estimate.

    Attributes:
        round_trip_ms: until the first byte of an answer could be there.
        loss: share of the packets that have to be sent again.
        up_j_per_byte: what the device's radio draws to send a byte, beyond `active_watts`.
        down_j_per_byte: likewise to receive one.
        active_watts: what the radio draws while a request is under way, waiting included.
        tail_s: how long it stays awake after the last byte.
        tail_watts: what it draws then.
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
    """What answers what the device leaves: a candidate that llama.cpp serves on loopback, or a server elsewhere.

    Attributes:
        candidate: whose compiled form for llama.cpp is served; it has to stand under `compile`.
        threads: CPU threads of that server.
        slots: requests that it answers at once.
        url: of an OpenAI-compatible server instead, without `/v1`, user, password and query; its key is read from
            LILLIPUT_EDGE_KEY.
        model: as that server calls it.
        timeout_s: after which it counts as down for a request, and the device answers.
    """

    candidate: Name | None = None
    threads: Positive = 1
    slots: Positive = 1
    url: Annotated[str, Field(pattern=r"^https?://[^/\s?#]+[^\s?#]*$")] | None = None
    model: str | None = None
    timeout_s: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _holds_no_secret(self) -> EdgeConfig:
        # params.yaml is kept by git, MLflow and the report's readers.
        if self.url is not None and has_credentials(self.url):
            raise ValueError("`url` holds a user or a password; take them out and put the key into LILLIPUT_EDGE_KEY")
        return self

    @model_validator(mode="after")
    def _one_of_two(self) -> EdgeConfig:
        if (self.candidate is None) == (self.url is None):
            raise ValueError("name either a `candidate` to serve here or the `url` of a server")
        if (self.url is None) != (self.model is None):
            raise ValueError("`url` and `model` go together")
        return self


class ObjectiveConfig(Section):
    """What the learned router aims at: the least latency within these (after arXiv 2602.13628).

    Attributes:
        energy_budget_j: that the device may spend on a query on average, radio and waiting included.
        max_accuracy_drop: accuracy may lie this far below that of the edge server alone.
        max_hallucination_rise: hallucination rate may lie this far above it.
    """

    energy_budget_j: PositiveFloat
    max_accuracy_drop: Share
    max_hallucination_rise: Share


class OffloadConfig(Section):
    """How device and edge server are compared, and how the routers are fitted and judged.

    Attributes:
        questions: held-out questions, the unanswerable ones included, that both answer.
        max_new_tokens: of an answer.
        folds: a learned router is judged on questions, by entity, that it was not fitted on: each fold in turn.
    """

    seed: Seed
    questions: Annotated[int, Field(ge=20, le=LARGEST_INT)]
    max_new_tokens: Positive
    folds: Annotated[int, Field(ge=2, le=LARGEST_INT)]


class AnswerCacheConfig(Section):
    """The semantic answer cache of the gateway; its threshold is fitted with the budget of `caching`."""

    capacity: NotNegative


class ServingConfig(Section):
    """How the champion of a device is served.

    Attributes:
        policy: `device` or `server` always; `threshold` by the probabilities of the device's own tokens; `learned` by
            what was right and wrong on held-out questions.
        look: whether `learned` decides `before` the device answers, by the question, or `after`, by its tokens too.
        least_confidence: of `threshold`: geometric mean of the token probabilities.
        link: over which the edge server is reached, unless a request says otherwise.
        battery_wh: what the device's battery holds, full.
        saver_percent: of battery below which the energy budget shrinks in proportion to what is left.
    """

    edge: EdgeConfig
    policy: Literal["device", "server", "threshold", "learned"]
    look: Literal["before", "after"] = "before"
    least_confidence: Share
    link: LinkName
    battery_wh: PositiveFloat
    saver_percent: Annotated[float, Field(ge=0.0, le=100.0)]
    objective: ObjectiveConfig
    offload: OffloadConfig
    cache: AnswerCacheConfig
