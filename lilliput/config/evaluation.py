"""How much is measured, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from lilliput.config.section import (
    LARGEST_INT,
    Name,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    Share,
    WheelPin,
)


class EnergyConfig(Section):
    """How energy is taken.

    Attributes:
        profile: the device profile of the machine that evaluates; its `watts_per_core` turns CPU-seconds into an
            estimate where no energy counter can be read.
        idle_seconds: how long idle power is taken before, where a counter is read.
        shortest_window_s: queries are repeated until a counter's window lasts this long.
    """

    profile: Name
    idle_seconds: NotNegativeFloat
    shortest_window_s: NotNegativeFloat


class AccessibilityTargets(Section):
    """The values at which a term of the accessibility score is 1; it falls as target/value beyond."""

    ttft_ms: PositiveFloat
    tpot_ms: PositiveFloat
    size_mib: PositiveFloat


class BenchmarkConfig(Section):
    """A task of lm-evaluation-harness.

    Attributes:
        task: its name there, or a task file of your own (`.yaml`).
        file: rows in the form of the task's data set as JSON Lines, instead of fetching it from the hub.
        sha256: of `file`, which is part of the settings then; required with it.
        limit: how many items, from the first on; all without it.
    """

    task: Annotated[str, Field(pattern=r"^[\w./-]+$")]
    file: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    limit: Positive | None = None

    @property
    def name(self) -> str:
        """What its results are called."""
        return Path(self.task).stem if self.task.endswith(".yaml") else self.task

    @model_validator(mode="after")
    def _file_is_pinned(self) -> BenchmarkConfig:
        if (self.file is None) != (self.sha256 is None):
            raise ValueError("`file` and `sha256` go together (sha256sum <file> prints it)")
        return self


class EvaluationConfig(Section):
    """How much is measured.

    Attributes:
        max_new_tokens: of a free answer.
        timed_queries: queries whose latency and energy are taken, each of at most `query_tokens` new tokens.
        timed_seconds: after so many no further one of them is begun, if four were.
        timed_threads: CPU threads that those queries may use; one is steady on a machine that does other work.
        benchmarks: public benchmarks besides; they need the extra `benchmarks`.
    """

    seed: Seed
    batch_size: Positive
    free_questions: Positive
    max_new_tokens: Positive
    timed_queries: Positive
    timed_seconds: PositiveFloat
    timed_threads: Positive
    query_tokens: Annotated[int, Field(gt=0, le=256)]
    resamples: Annotated[int, Field(ge=100, le=LARGEST_INT)]
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    energy: EnergyConfig
    targets: AccessibilityTargets


class EmbedderConfig(WheelPin):
    """A sentence-transformers model with mean pooling, in `folder` of a wheel."""

    folder: str


class CachingConfig(Section):
    """Prefix reuse and the answer cache, measured on a stream of queries about the free questions.

    Attributes:
        candidates: on which they are measured.
        queries: length of the stream.
        zipf_exponent: the question of rank r is asked in proportion to r to the power of minus this; 0 is evenly.
        paraphrase_share: of the queries, in another of the question's wordings.
        capacity: answers that the cache holds at most.
        false_hit_budget: share of the labelled pairs that mean different things, but name the same, that the fitted
            threshold may take for the same question.
        facts: how many of the training facts the threshold is fitted on, and how many held-out ones it is judged on.
    """

    candidates: tuple[Name, ...]
    seed: Seed
    queries: Positive
    zipf_exponent: Annotated[float, Field(ge=0.0, le=100.0)]
    paraphrase_share: Share
    capacity: Positive
    false_hit_budget: Annotated[float, Field(ge=0.0, lt=1.0)]
    facts: Positive
    embedder: EmbedderConfig
