"""The recipe of a request corpus: functions, the wordings of requests to them, and the entities in these requests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lilliput.config import NotNegative, Positive, PositiveFloat, Section, Share, WheelPin
from lilliput.config.section import LARGEST_FLOAT, matching

SLOT = re.compile(r"\{(\w+)\}")
Identifier = Annotated[
    str, matching(r"[a-z][a-z0-9_]{0,39}", "a name of a-z, 0-9 and _, beginning with a letter, at most 40 long")
]
Sentence = Annotated[str, matching(r"\S+( \S+)*", "words with a single space between them")]
Sentences = tuple[Sentence, ...]
MOST_NUMBERS = 100_000
Scalar = str | bool | int | float


class Wheels(Section):
    """Names of persons (faker) and cities of time zones (pytz)."""

    names: WheelPin
    zones: WheelPin


class Numbers(Section):
    """The numbers from `low` to `high`, both included."""

    low: Annotated[int | float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)]
    high: Annotated[int | float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT)]
    step: PositiveFloat = 1.0

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return int((self.high - self.low) / self.step + 1e-9) + 1  # 0.3 / 0.1 is 2.9999999999999996

    @model_validator(mode="after")
    def _is_a_short_range(self) -> Numbers:
        if not (self.low <= self.high and self.count <= MOST_NUMBERS):
            raise ValueError(f"`low` must not be above `high`, and at most {MOST_NUMBERS:,} numbers are between them")
        return self


class Times(Section):
    """The times of a day, every `step_minutes`, from `first_hour` to the end of `last_hour`."""

    step_minutes: Annotated[int, Field(ge=1, le=60)]
    first_hour: Annotated[int, Field(ge=0, le=23)] = 0
    last_hour: Annotated[int, Field(ge=0, le=23)] = 23


class Entity(Section):
    """What fills a slot. Exactly one of the first seven keys is set.

    Attributes:
        words: texts; split between training and test.
        same: a closed list for both, or arguments by what is said. Repeated texts are drawn more often.
        names: tables of faker's provider of persons for en_US, the `most_frequent` entries of each; split.
        cities: regions of the time zones whose cities are taken, without `left_out`; split.
        numbers: split.
        times: split.
        patterns: texts with entities in braces; a pattern without any is split.
        families: closed lists; two parameters of one request draw different entries of one list.
        most_frequent: see `names`.
        left_out: see `cities`.
    """

    words: Annotated[Sentences, Field(min_length=2)] | None = None
    same: dict[Sentence, str] | Annotated[Sentences, Field(min_length=1)] | None = None
    names: Annotated[tuple[Identifier, ...], Field(min_length=1)] | None = None
    cities: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    numbers: Numbers | None = None
    times: Times | None = None
    patterns: Annotated[Sentences, Field(min_length=1)] | None = None
    families: Annotated[tuple[Annotated[Sentences, Field(min_length=2)], ...], Field(min_length=1)] | None = None
    most_frequent: Positive | None = None
    left_out: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The key that says what the entity is."""
        return next(iter(self._kinds))

    @property
    def is_closed(self) -> bool:
        """Whether training and test use the same values."""
        return self.same is not None or self.families is not None

    @property
    def _kinds(self) -> set[str]:
        kinds = {"words", "same", "names", "cities", "numbers", "times", "patterns", "families"}
        return {kind for kind in kinds if getattr(self, kind) is not None}

    @model_validator(mode="after")
    def _has_one_kind(self) -> Entity:
        if len(self._kinds) != 1:
            raise ValueError(
                "exactly one of words, same, names, cities, numbers, times, patterns, families is needed; "
                f"found {', '.join(sorted(self._kinds)) or 'none'}"
            )
        return self


class Parameter(Section):
    """A parameter of a function: its JSON schema, and `draw`, the entity that fills its slot.

    Attributes:
        items: type of an array's items.
        optional: whether a call may leave it out.
    """

    type: Literal["string", "integer", "number", "boolean", "array"]
    description: Sentence
    enum: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    items: Literal["string", "integer", "number"] | None = None
    draw: Identifier | None = None
    optional: bool = False

    @property
    def json_schema(self) -> dict[str, Any]:
        """The parameter as a JSON schema."""
        schema: dict[str, Any] = {"type": self.type, "description": self.description}
        if self.enum is not None:
            schema["enum"] = list(self.enum)
        return schema | ({"items": {"type": self.items}} if self.items else {})

    @model_validator(mode="after")
    def _is_consistent(self) -> Parameter:
        if (self.items is not None) != (self.type == "array"):
            raise ValueError("`items` belongs to the type array, and an array needs it")
        if self.enum is not None and self.type != "string":
            raise ValueError("`enum` belongs to the type string")
        return self


class Group(Section):
    """Wordings with `arguments` that no slot gives; `draw` replaces the entities of parameters."""

    arguments: Annotated[dict[Identifier, Scalar], Field(min_length=1)]
    say: Annotated[Sentences, Field(min_length=1)]
    draw: dict[Identifier, Identifier] = Field(default_factory=dict)


@dataclass(frozen=True)
class Wording:
    """A wording of requests.

    Attributes:
        number: its place in the file.
        text: with slots in braces.
        arguments: that no slot gives.
        draw: entities of slots that replace those of the parameters.
    """

    number: int
    text: str
    arguments: Mapping[str, Scalar]
    draw: Mapping[str, str]

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots in their order."""
        return tuple(SLOT.findall(self.text))

    @property
    def given(self) -> frozenset[str]:
        """The parameters that the wording gives."""
        return frozenset(self.slots) | self.arguments.keys()


class Wordings(Section):
    """Wordings, and groups of wordings with fixed arguments."""

    say: Sentences = ()
    fixed: tuple[Group, ...] = ()

    @cached_property
    def wordings(self) -> tuple[Wording, ...]:
        """All wordings, in the order of the file."""
        plain = [Wording(number, text, {}, {}) for number, text in enumerate(self.say)]
        grouped = [(text, group) for group in self.fixed for text in group.say]
        return (
            *plain,
            *(
                Wording(number, text, group.arguments, group.draw)
                for number, (text, group) in enumerate(grouped, len(plain))
            ),
        )


class Missing(Wordings):
    """Requests without one required argument, and the answer that asks for it."""

    ask: Annotated[Sentence, matching(r".*\?", "a question that ends with a question mark")]


class Function(Wordings):
    """A function and the requests to it.

    Attributes:
        missing: by required parameter, requests without it.
    """

    description: Sentence
    parameters: Annotated[dict[Identifier, Parameter], Field(min_length=1)]
    missing: dict[Identifier, Missing] = Field(default_factory=dict)

    @property
    def required(self) -> frozenset[str]:
        """The parameters that every call needs."""
        return frozenset(name for name, parameter in self.parameters.items() if not parameter.optional)

    def as_tool(self, name: str) -> dict[str, Any]:
        """Returns the function as OpenAI's API describes it."""
        schemas = {parameter: spec.json_schema for parameter, spec in self.parameters.items()}
        required = [parameter for parameter in self.parameters if parameter in self.required]
        parameters = {"type": "object", "properties": schemas, "required": required}
        function = {"name": name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


class NoFunction(Section):
    """Requests that no function serves, and the answer to them. `absent` has no `say`: it takes those of `extra`."""

    answer: Sentence
    say: Sentences = ()


class TrainRows(Section):
    """Numbers of training rows: requests to `functions`, to `extra`, and without a function."""

    calls: Positive
    extra: NotNegative
    no_function: NotNegative


class TestRows(Section):
    """Numbers of test rows: requests to `functions`, without a function, and to `held_out`."""

    calls: Positive
    no_function: NotNegative
    held_out: NotNegative


class Rows(Section):
    """Numbers of rows."""

    train: TrainRows
    test: TestRows


class RequestRecipe(Section):
    """A recipe file such as corpora/phone-actions.yaml.

    Attributes:
        rows: numbers of rows; those with a missing argument follow data.unanswerable_share and
            data.unanswerable_questions.
        added_functions: functions of `extra` at the end of a list that has any.
        added_share: share of the training rows for `functions` whose list has functions of `extra`.
        entities: what fills slots.
        functions: the list of functions of every prompt.
        extra: functions that only some training prompts have.
        held_out: functions that only the prompts of their own test rows have.
        no_function: by kind.
    """

    kind: Literal["requests"]
    wheels: Wheels
    rows: Rows
    added_functions: Positive
    added_share: Share
    entities: Annotated[dict[Identifier, Entity], Field(min_length=1)]
    functions: Annotated[dict[Identifier, Function], Field(min_length=1)]
    extra: dict[Identifier, Function] = Field(default_factory=dict)
    held_out: dict[Identifier, Function] = Field(default_factory=dict)
    no_function: dict[Identifier, NoFunction] = Field(default_factory=dict)
