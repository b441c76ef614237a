"""What every strategy gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Result:
    """A compressed model in memory and what is worth telling about it.

    Attributes:
        facts: for the manifest and the registry; JSON values.
        history: curves by name, each of (step or layer, value).
        save: writes the checkpoint where `save_model` does not fit (packed codes, an adapter kept apart).
        checks: measurements that differ between machines, for the record of costs; JSON values.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    save: Callable[[Path], None] | None = None
    checks: dict[str, Any] = field(default_factory=dict)
