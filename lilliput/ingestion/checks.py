"""Checks of one conversation: order of roles, calls and results, schemas of functions, length, expectation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError

from lilliput.data.conversations import (
    Conversation,
    ExpectedAbstention,
    ExpectedCalls,
    ExpectedJson,
    ExpectedNumber,
    ExpectedParts,
    ExpectedReference,
    ExpectedText,
)
from lilliput.data.row_file import explain
from lilliput.ingestion.formats import Turn, json_text, json_value
from lilliput.ingestion.outcomes import MistakeError, UnusableError
from lilliput.schema_references import check_references, entries
from lilliput.tool_calls import invalid_call

LONGEST_CHARACTERS = 400_000  # of a row: about 100,000 tokens
_TOO_LONG = f"longer than {LONGEST_CHARACTERS:,} characters"
# Expectations by the key that tells them apart.
_EXPECTATIONS: dict[str, type[BaseModel]] = {
    "text": ExpectedText,
    "contains": ExpectedParts,
    "number": ExpectedNumber,
    "fields": ExpectedJson,
    "schema": ExpectedJson,
    "tool_calls": ExpectedCalls,
    "abstain": ExpectedAbstention,
    "reference": ExpectedReference,
}
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_DRAFTS = frozenset(
    f"{scheme}://json-schema.org/{draft}"
    for scheme in ("http", "https")
    for draft in (
        *(f"draft-0{number}/schema" for number in (4, 6, 7)),
        *(f"draft/{y}/schema" for y in ("2019-09", "2020-12")),
    )
)


def check_turns(turns: Sequence[Turn], *, has_expectation: bool) -> None:
    """Checks the order of roles, then whether all turns say something.

    Gemma's and Mistral's templates reject two turns of one role in a row and system turns that are not the first, so
    these are mistakes for all models.

    Raises:
        MistakeError: a turn is at the wrong place.
        UnusableError: a turn is empty, or there is nothing to learn or to expect.
    """
    before: Turn | None = None
    for number, turn in enumerate(turns):
        if problem := _misplaced(turn, before):
            raise MistakeError(f"messages.{number}: {problem}")
        if turn["role"] == "tool":
            _require_its_call(turns, number)
        before = turn
    _require_content(turns, has_expectation)


def check_length(turns: Sequence[Turn], tools: Sequence[Any]) -> None:
    """Checks that the row is not too long for any model here.

    Raises:
        MistakeError: a call or function has a value that JSON does not have.
        UnusableError: it is too long.
    """
    if sum(len(turn["content"] or "") for turn in turns) > LONGEST_CHARACTERS:
        raise UnusableError(_TOO_LONG)
    calls = [turn["tool_calls"] for turn in turns if "tool_calls" in turn]
    if (calls or tools) and len(json_text([calls, tools], "tools and calls", ascii_only=False)) > LONGEST_CHARACTERS:
        raise UnusableError(_TOO_LONG)


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises MistakeError for functions without a name, with the name of another, or with an invalid schema."""
    if problem := _invalid_tools(json.dumps(tools)) if tools else None:
        raise MistakeError(problem)


def check_calls(row: Conversation) -> None:
    """Raises UnusableError if the row calls a function in a way that its own `tools` forbid."""
    if not row.tools:
        return
    for turn in row.messages:
        for call in turn.tool_calls:
            if invalid_call(call, row.tools):
                raise UnusableError("with a call that its `tools` forbid")


def read_expectation(raw: Any, tools: Sequence[Mapping[str, Any]]) -> BaseModel | None:
    """Returns the expectation that a row states; its keys tell the kind.

    Raises:
        MistakeError: it is of no kind, or a value is wrong.
    """
    raw = json_value(raw, "expect")
    if raw is None:
        return None
    json_text(raw, "expect")
    keys = [key for key in _EXPECTATIONS if isinstance(raw, Mapping) and key in raw]
    if len({_EXPECTATIONS[key] for key in keys}) != 1:
        found = ", ".join(map(repr, raw)) if isinstance(raw, Mapping) else type(raw).__name__
        raise MistakeError(f"expect: has {found or 'no key'}; give exactly one kind: {', '.join(_EXPECTATIONS)}")
    try:
        expected = _EXPECTATIONS[keys[0]].model_validate(raw)
    except ValidationError as error:
        raise MistakeError(f"expect: {explain(error)}") from None
    if isinstance(expected, ExpectedJson) and (problem := _invalid_schema(expected.json_schema)):
        raise MistakeError(f"expect.schema: {problem}")
    if isinstance(expected, ExpectedCalls):
        names = {tool["function"]["name"] for tool in tools}
        if unknown := [call.name for call in expected.tool_calls if call.name not in names]:
            raise MistakeError(f"expect: the function {unknown[0]!r} is not in `tools`; add it or correct its name")
    return expected


def _misplaced(turn: Turn, before: Turn | None) -> str | None:
    """Returns why `turn` cannot follow `before`; None if it can."""
    role, previous = turn["role"], before["role"] if before else None
    if turn.get("tool_calls") and role != "assistant":
        return f"a {role} turn with calls; only the assistant calls functions"
    match role:
        case "system" if previous is not None:
            return "a system turn that is not the first turn; move it to the beginning or join it with the first"
        case "user" if previous == "user":
            return "two user turns in a row; join them"
        case "assistant" if previous == "assistant":
            return "two assistant turns in a row; join them"
        case "assistant" if previous not in ("user", "tool"):
            return "the assistant speaks first; begin with a user turn"
        case "tool" if previous not in ("assistant", "tool"):
            return "a tool result without a call; put the assistant's turn with `tool_calls` before it"
    return None


def _require_its_call(turns: Sequence[Turn], number: int) -> None:
    """Raises MistakeError for a tool result to which no call of the last assistant turn belongs."""
    asking = number - 1
    while turns[asking]["role"] == "tool":
        asking -= 1
    calls = turns[asking].get("tool_calls") or []
    name = f"messages.{number}"
    if number - asking > len(calls):
        raise MistakeError(f"{name}: a tool result without a call; add the call to messages.{asking}.tool_calls")
    identity, known = turns[number].get("tool_call_id"), [call["id"] for call in calls if "id" in call]
    if identity and known and identity not in known:
        raise MistakeError(f"{name}: `tool_call_id` {identity!r} is of no call in messages.{asking}; correct it")


def _require_content(turns: Sequence[Turn], has_expectation: bool) -> None:
    if not any(turn["role"] == "user" for turn in turns):
        raise UnusableError("without a user turn")
    last = turns[-1]
    if not has_expectation and (last["role"] != "assistant" or not _says_something(last)):
        raise UnusableError("without an answer")
    for turn in turns:
        if turn["role"] in ("user", "assistant") and not _says_something(turn):
            raise UnusableError(f"with an empty {turn['role']} turn")


def _says_something(turn: Turn) -> bool:
    return bool(turn.get("tool_calls") or (turn["content"] or "").strip())


@lru_cache(maxsize=4096)
def _invalid_tools(text: str) -> str | None:
    names: set[str] = set()
    for number, tool in enumerate(json.loads(text)):
        function = tool["function"]
        name = function.get("name")
        if not isinstance(name, str) or not name.strip():
            return f"tools.{number}: no name; add it"
        if name in names:
            return f"tools.{number}: a second function {name!r}; give functions different names"
        names.add(name)
        parameters = function.get("parameters")
        if parameters is None:
            continue
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            return f"tools.{number} ({name}): `parameters` is not the schema of an object; write type: object"
        if problem := _invalid_schema(parameters):
            return f"tools.{number} ({name}): {problem}"
    return None


def _invalid_schema(schema: dict[str, Any]) -> str | None:
    """Returns why `schema` is not JSON Schema by itself, or takes long to apply.

    References to other documents would be downloaded. For the others the gateway's rules apply.
    """
    import jsonschema_rs

    draft = schema.get("$schema")
    if draft is not None and (not isinstance(draft, str) or draft.removesuffix("#") not in _DRAFTS):
        return f"`$schema` {draft!r} is unknown; remove it"
    references = [value for key, value in entries(schema) if key in _REFERENCES and isinstance(value, str)]
    if outside := [name for name in references if not name.startswith("#")]:
        return f"a reference to another document, {outside[0]!r}; copy the definition into the schema"
    try:
        jsonschema_rs.meta.validate(schema)
        jsonschema_rs.validator_for(schema)
    except jsonschema_rs.ValidationError as error:
        place = ".".join(map(str, error.instance_path))
        return f"invalid schema: {place or 'top level'}: {error.message[:200]}; correct it"
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        return f"invalid schema: {str(error)[:200]}; correct it"
    try:
        if references:
            check_references(schema)
    except ValueError as error:
        return str(error)
    return None
