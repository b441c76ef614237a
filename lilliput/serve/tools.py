"""Functions in chat requests: their definitions, which of them must be called, and turns with calls and results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from lilliput.config.section import matching
from lilliput.errors import message_of
from lilliput.schema_references import check_references
from lilliput.serve.schema_limits import MOST_DEPTH, check_schema, deeper_than_limit
from lilliput.tool_calls import argument_validator

MOST_TOOLS = 64
FunctionName = Annotated[
    str, matching(r"[A-Za-z0-9_.-]{1,64}", "a name of letters, digits, _, . and -, at most 64 long")
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Function(_Part):
    """A function that the model may call. `parameters` is a JSON schema of an object."""

    name: FunctionName
    description: Annotated[str, Field(max_length=32_768)] | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("parameters")
    @classmethod
    def _is_a_small_schema_of_an_object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters is None:
            return None
        check_schema(parameters)
        check_references(parameters)
        if parameters.get("type", "object") != "object":
            raise ValueError("type: arguments are an object; use `object`")
        try:
            argument_validator(parameters)
        except ValueError as error:
            raise ValueError(f"not a valid JSON schema: {str(error).partition(chr(10))[0][:200]}") from None
        return parameters


class _Tool(_Part):
    type: Literal["function"]
    function: Function


def _check_tool(raw: dict[str, Any]) -> dict[str, Any]:
    if deeper_than_limit(raw, MOST_DEPTH + 2):
        raise ValueError(f"function.parameters: the schema is nested deeper than {MOST_DEPTH}; flatten it")
    try:
        _Tool.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {message_of(first)}") from None
    return raw


# A tool; only functions are supported. It stays as it was sent: in training, templates also saw the order of its keys.
Tool = Annotated[dict[str, Any], AfterValidator(_check_tool)]


class FunctionChoice(_Part):
    """The name of the function that must be called."""

    name: FunctionName


class NamedFunction(_Part):
    """A `tool_choice` that requires a call of one function."""

    type: Literal["function"]
    function: FunctionChoice


ToolChoice = Literal["none", "auto", "required"] | NamedFunction


class CalledFunction(_Part):
    """The function of a call in an assistant's turn; its arguments are a text with a JSON object."""

    name: FunctionName
    arguments: Annotated[str, Field(max_length=32_768)]

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, text: str) -> str:
        try:
            arguments = json.loads(text or "{}")
            if not isinstance(arguments, dict) or deeper_than_limit(arguments):
                raise ValueError("not a JSON object, or nested too deep")
            normalized = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            normalized.encode()  # the router's tokenizer fails on a lone surrogate
            return normalized
        except (JSONDecodeError, RecursionError, UnicodeEncodeError):
            raise ValueError("not JSON; send the arguments as a text with a JSON object") from None


class Call(_Part):
    """A call in an assistant's turn."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_openai(self, neutralize: Callable[[str], str]) -> dict[str, Any]:
        """The call for a backend, with `neutralize` applied to every text in its arguments."""
        arguments = json.dumps(replace_texts(json.loads(self.function.arguments), neutralize), ensure_ascii=False)
        return {
            "id": neutralize(self.id),
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }


class Turn(Protocol):
    """A turn, as far as the order of calls and results concerns it."""

    @property
    def role(self) -> str:
        """Who speaks."""
        ...

    @property
    def tool_calls(self) -> Sequence[Call] | None:
        """The calls of an assistant's turn."""
        ...

    @property
    def tool_call_id(self) -> str | None:
        """The call that a tool's turn answers."""
        ...


def check_tool_turns(turns: Sequence[Turn]) -> None:
    """Checks that each result follows its call, and that each call has its result before the next turn.

    Raises:
        ValueError: it does not, or a turn has two calls of one id.
    """
    waiting: set[str] = set()
    for number, turn in enumerate(turns):
        if turn.role == "tool":
            if turn.tool_call_id not in waiting:
                raise ValueError(
                    f"messages: turn {number} is the result of a call that the turn before it does not have; "
                    "send the assistant's turn with its `tool_calls` first, and one result for each `tool_call_id`"
                )
            waiting.remove(turn.tool_call_id)
            continue
        _require_no_waiting(waiting, f"before turn {number}")
        ids = [call.id for call in turn.tool_calls or ()]
        waiting = set(ids)
        if len(waiting) < len(ids):
            raise ValueError(f"messages: turn {number} has two calls with the same id; each needs its own")
    _require_no_waiting(waiting, "at the end")


def _require_no_waiting(waiting: set[str], where: str) -> None:
    if waiting:
        raise ValueError(f"messages: a call has no result {where}; add a turn of `tool` with its `tool_call_id`")


@dataclass(frozen=True)
class CallRules:
    """The calls that a request permits.

    Attributes:
        tools: the functions, as in OpenAI's API.
        required: whether the answer must be a call.
        name: of the only function that may be called; None for all.
        parallel: whether the answer may have several calls.
    """

    tools: tuple[dict[str, Any], ...]
    required: bool = False
    name: str | None = None
    parallel: bool = True

    def forced_format(self) -> dict[str, Any]:
        """A `response_format` that makes llama.cpp write one valid call as JSON.

        llama.cpp ignores `tool_choice` and rejects a grammar beside `tools`, but accepts this.
        """
        functions = [tool["function"] for tool in self.tools if self.name in (None, tool["function"]["name"])]
        definitions = {f"f{n}": _with_references_below(f"f{n}", function) for n, function in enumerate(functions)}
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/f{n}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for n, function in enumerate(functions)
        ]
        return {
            "type": "json_schema",
            "json_schema": {"name": "call", "schema": {"anyOf": calls, "$defs": definitions}},
        }


def _with_references_below(name: str, function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the arguments, with references that are right where it is inserted: under `#/$defs/<name>`."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        return {
            key: f"#/$defs/{name}{inner[1:]}" if key == "$ref" and isinstance(inner, str) else moved(inner)
            for key, inner in value.items()
        }

    return {"additionalProperties": False, **moved(function.get("parameters") or {}), "type": "object"}


def replace_texts(value: Any, replace: Callable[[str], str]) -> Any:
    """`value` of JSON with `replace` applied to all its texts, keys included."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, list):
        return [replace_texts(inner, replace) for inner in value]
    if isinstance(value, dict):
        return {replace(key): replace_texts(inner, replace) for key, inner in value.items()}
    return value
