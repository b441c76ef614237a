"""The output of a strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lilliput.training.history import History


@dataclass(frozen=True)
class Result:
    """A compressed model in memory and its records.

    Attributes:
        facts: for the manifest and the registry; JSON values.
        history: curves by name, each of (step or layer, value).
        save: writes the checkpoint where `save_model` does not fit (packed codes, a separate adapter).
        checks: measurements that differ between machines, for the cost record; JSON values.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=dict)
    save: Callable[[Path], None] | None = None
    checks: dict[str, Any] = field(default_factory=dict)
