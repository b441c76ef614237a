"""Reads calls of functions from a model's answer, in the forms that the chat templates of open models teach.

Supported are JSON in `<tool_call>` tags (Hermes, Qwen, SmolLM3), JSON objects or a list of them (Llama 3, the built-in
template), JSON after `[TOOL_CALLS]` (Mistral), and a Python list of calls (Llama 3.2, BFCL).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lilliput.data.conversations import ToolCall

if TYPE_CHECKING:
    import jsonschema_rs

# Spaces are stripped afterwards: beside `.*?`, each `\s*` multiplies the time by the length of a run of spaces.
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = re.compile(r"\[TOOL_CALLS\](.*)\Z", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?(.*)```\Z", re.DOTALL)
_JSON_START = re.compile(r'\A\[?\s*\{\s*"(?:name|function|type|arguments|parameters)"')
_PYTHON = re.compile(r"\A\[\s*[A-Za-z_][\w.]*\(.*\)\s*\]\Z", re.DOTALL)
# Markers that begin a call anywhere in an answer. The other forms count only at its beginning.
MARKERS = ("<tool_call>", "[TOOL_CALLS]")
# The beginning of a call without a marker, without spaces. A function's name may be cut.
_BEGINNING = re.compile(
    r'(?:```(?:json)?)?(?:\[?\{"(?:name|function|type|arguments|parameters)"|\[[A-Za-z_][\w.]*(?:\(|\Z))'
)
_LONGEST_BEGINNING = len('```json[{"parameters"')


@dataclass(frozen=True)
class Answer:
    """An assistant's answer.

    Attributes:
        text: the text before the calls; the whole answer if there are none, or if they are malformed.
        calls: in their order.
        malformed: whether the answer begins like a call but cannot be read as one.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    malformed: bool = False


def read_answer(text: str) -> Answer:
    """Returns text and calls of the answer `text` of a model that was given functions."""
    text = text.strip()
    if tagged := _TAGGED.findall(text):
        return _answer(text, text[: text.index("<tool_call>")], tagged)
    if match := _MISTRAL.search(text):
        return _answer(text, text[: match.start()], [match[1]])
    body = match[1].strip() if (match := _FENCE.match(text)) else text
    if _JSON_START.match(body):
        return _answer(text, "", [body])
    if _PYTHON.match(body):
        calls = _python_calls(body)
        return Answer("", calls) if calls else Answer(text, malformed=True)
    return Answer(text)


def begins_call(text: str) -> bool | None:
    """Returns whether an answer that begins with `text` is read as a call without a marker; None if more text decides.

    For readers of a stream. An answer for which it returns false may still have a marker.
    """
    packed = "".join(text.split())
    if len(packed) >= _LONGEST_BEGINNING:
        return _BEGINNING.match(packed) is not None
    return None if packed.startswith(("{", "[")) or "```".startswith(packed[:3]) else False


def invalid_call(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns why `call` is invalid for `tools`: an unknown function, or arguments that its schema forbids; else None.

    Parameters that the schema does not list are invalid, unless it allows `additionalProperties` explicitly.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if call.name not in functions:
        return f"the function {call.name!r} is unknown"
    validator = argument_validator(functions[call.name].get("parameters") or {})
    try:
        for error in validator.iter_errors(call.arguments):
            place = ".".join(map(str, error.instance_path))
            return f"{call.name}: {place + ': ' if place else ''}{error.message}"
    except ValueError as error:  # a text that is not Unicode, such as a lone surrogate
        return f"{call.name}: the arguments cannot be checked ({error})"
    return None


def argument_validator(parameters: Mapping[str, Any]) -> jsonschema_rs.Validator:
    """Returns a validator of a function's arguments. It is offline: a schema must not read files or addresses.

    Raises:
        ValueError: `parameters` is not a valid schema.
    """
    import jsonschema_rs

    schema = {"additionalProperties": False, **parameters, "type": "object"}
    try:
        return jsonschema_rs.validator_for(schema, offline=True)
    except jsonschema_rs.ReferencingError as error:
        raise ValueError(str(error)) from None


def _answer(whole: str, before: str, bodies: Sequence[str]) -> Answer:
    calls: list[ToolCall] = []
    for body in bodies:
        read = _json_calls(body.strip())
        if not read:
            return Answer(whole, malformed=True)
        calls += read
    return Answer(before.strip(), tuple(calls))


def _json_calls(body: str) -> list[ToolCall]:
    """Returns the calls in one or several JSON values; none if one of them is not a call."""
    decoder, place, calls = json.JSONDecoder(), 0, []
    while place < len(body):
        try:
            value, place = decoder.raw_decode(body, place)
            calls += [_call(item) for item in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError, RecursionError):
            return []
        while place < len(body) and body[place] in " \t\r\n;,":
            place += 1
    return calls


def _call(raw: Any) -> ToolCall:
    if not isinstance(raw, Mapping):
        raise ValueError("not an object")
    flat = raw["function"] if isinstance(raw.get("function"), Mapping) else raw
    name = flat.get("name") or flat.get("function")
    arguments = flat.get("arguments", flat.get("parameters", {}))
    return _checked(ToolCall.model_validate({"name": name, "arguments": {} if arguments is None else arguments}))


def _checked(call: ToolCall) -> ToolCall:
    """Returns `call` with its arguments as JSON has them: lists instead of tuples, texts as keys.

    Raises:
        TypeError: an argument is a value that JSON lacks, such as a set.
        ValueError: an argument is NaN, infinite, or not Unicode.
    """
    text = json.dumps(call.arguments, allow_nan=False, ensure_ascii=False)
    text.encode()
    return call.model_copy(update={"arguments": json.loads(text)})


def _python_calls(body: str) -> tuple[ToolCall, ...]:
    """Returns the calls of a Python list such as `[f(a=1)]`; none if an argument is not a named literal."""
    try:
        tree = ast.parse(body, mode="eval").body
        assert isinstance(tree, ast.List)
        return tuple(_python_call(node) for node in tree.elts)
    except (SyntaxError, TypeError, ValueError, AssertionError, RecursionError, MemoryError):
        return ()


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("not a call with named arguments")
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return _checked(ToolCall(name=ast.unparse(node.func), arguments=arguments))
