"""Formats of chat data: recognises a row's format and converts it to turns and functions as OpenAI's API has them.

| Format | Keys |
|---|---|
| messages | `messages` (or `conversations` with `role` and `content`), `tools` or the older `functions` |
| prompt/completion | `prompt`, `completion`: texts or lists of turns |
| Alpaca | `instruction`, `output`, optionally `input`, `system`, `history` |
| ShareGPT | `conversations` with `from` and `value`, optionally `system`, `tools` as JSON text |
| question | `question` (lilliput.data.questions) |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lilliput.ingestion.outcomes import MistakeError, UnusableError

COMMON = frozenset({"id", "group", "split", "expect", "tools", "functions"})
_ROLES = {"developer": "system", "function": "tool"} | {name: name for name in ("system", "user", "assistant", "tool")}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
_TURN_KEYS = frozenset({"role", "content", "tool_calls", "function_call", "tool_call_id", "name", "from", "value"})

Row = Mapping[str, Any]
Turn = dict[str, Any]


class Format(NamedTuple):
    """One format.

    Attributes:
        name: for messages.
        keys: of a row, besides the common ones.
        turns: converts a row.
    """

    name: str
    keys: frozenset[str]
    turns: Callable[[Row], list[Turn]]


def detect(row: Row) -> Format | None:
    """Returns the format of `row`; None if it is none of the supported ones."""
    if "messages" in row:
        return MESSAGES
    if isinstance(turns := row.get("conversations"), list):
        roles = [turn for turn in turns if isinstance(turn, Mapping)]
        return MESSAGES_AS_CONVERSATIONS if roles and "role" in roles[0] else SHAREGPT
    if "question" in row:
        return QUESTION
    if "prompt" in row and ("completion" in row or row.keys() <= {"prompt", *COMMON}):
        return PROMPT_COMPLETION
    return ALPACA if "instruction" in row else None


def remedy(row: Row) -> str:
    """Returns what is wrong with a row of no supported format."""
    if "chosen" in row and "rejected" in row:
        return "a preference (`chosen`, `rejected`); write the chosen answer as `completion` or as a last turn"
    keys = ", ".join(f"`{_shown(key)}`" for key in list(row)[:8]) or "none"
    return (
        f"no known format (keys: {keys}); write `messages`, `prompt` and `completion`, `instruction` and `output`, "
        "`conversations`, or `question`"
    )


def convert(turns: Sequence[Any]) -> list[Turn]:
    """Returns `turns` with the roles and calls of the present API, without empty keys.

    Raises:
        MistakeError: a part of a turn has the wrong form.
        UnusableError: there is no turn.
    """
    if not turns:
        raise UnusableError("without a turn")
    return [_turn(turn, number) for number, turn in enumerate(turns)]


def tools_of(row: Row) -> list[Any]:
    """Returns the functions of a row in the form of OpenAI's API; `tools` may be JSON text.

    Raises:
        MistakeError: `tools` is not a list of functions.
    """
    tools = json_value(row.get("tools") or row.get("functions") or [], "tools")
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list):
        raise MistakeError(f"tools: a {type(tools).__name__}; write a list of functions")
    converted = []
    for number, tool in enumerate(tools):
        tool = json_value(tool, f"tools.{number}")
        if not isinstance(tool, Mapping):
            raise MistakeError(f"tools.{number}: a {type(tool).__name__}; write an object with `name` and `parameters`")
        function = tool["function"] if isinstance(tool.get("function"), Mapping) else tool
        converted.append({"type": "function", "function": dict(function)})
    return converted


def ignored_keys(row: Row, form: Format) -> set[str]:
    """Returns the keys of `row` and its turns that the format does not have, as they are shown."""
    ignored = {_shown(key) for key, value in row.items() if value is not None and key not in form.keys | COMMON}
    for key in form.keys:
        turns = row.get(key)
        for turn in turns if isinstance(turns, list) else []:
            if isinstance(turn, Mapping):
                names = [name for name, value in turn.items() if value is not None and name not in _TURN_KEYS]
                ignored |= {f"{key}[].{_shown(name)}" for name in names}
    return ignored


def json_value(value: Any, name: str) -> Any:
    """Returns `value`, parsed if it is a text.

    Raises:
        MistakeError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise MistakeError(f"{name}: {value[:100]!r} is not JSON ({error}); correct it") from None


def json_text(value: Any, name: str, *, ascii_only: bool = True) -> str:
    """Returns `value` as JSON.

    Raises:
        MistakeError: JSON has no such value: NaN, an infinite number, or a date or bytes from Parquet.
    """
    try:
        return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MistakeError(f"{name}: JSON has no such value ({error}); write text or a finite number") from None


def _shown(key: str) -> str:
    """Returns `key` for messages, without control characters and halves of surrogate pairs."""
    return repr(key[:100])[1:-1]


def _turn(turn: Any, number: int) -> Turn:
    name = f"messages.{number}"
    if not isinstance(turn, Mapping):
        raise MistakeError(f"{name}: a {type(turn).__name__}, not an object with `role` and `content`; correct it")
    role = turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise MistakeError(f"{name}: unknown role {role!r}; use system, user, assistant or tool")
    converted: Turn = {"role": _ROLES[role], "content": _content(turn.get("content"), f"{name}.content")}
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if calls := json_value(calls, f"{name}.tool_calls"):
        converted["tool_calls"] = _calls(calls, f"{name}.tool_calls")
    for key in ("tool_call_id", "name"):
        if turn.get(key):
            converted[key] = str(turn[key])
    return converted


def _content(content: Any, name: str) -> str | None:
    """Returns the text of a turn; a list of text parts is joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MistakeError(f"{name}: a {type(content).__name__}; write text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise MistakeError(
                f"{name}: a part of type {kind!r}; only text is supported, so remove the row or the part"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _calls(calls: Any, name: str) -> list[dict[str, Any]]:
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise MistakeError(f"{name}: a {type(calls).__name__}; write a list of calls")
    return [_call(call, f"{name}.{number}") for number, call in enumerate(calls)]


def _call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise MistakeError(f"{name}: a {type(call).__name__}; write an object with `name` and `arguments`")
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise MistakeError(f"{name}: no name of a function; add it")
    arguments = json_value(function.get("arguments") or {}, f"{name}.arguments")
    if not isinstance(arguments, dict):
        raise MistakeError(f"{name}.arguments: a {type(arguments).__name__}; write an object, by parameter")
    converted = {"name": function["name"], "arguments": arguments}
    return converted | ({"id": str(call["id"])} if call.get("id") else {})


def _list(value: Any, name: str) -> list[Any]:
    value = json_value(value, name) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if value is None:
        return []
    if not isinstance(value, list):
        raise MistakeError(f"{name}: a {type(value).__name__}; write a list of turns")
    return value


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MistakeError(f"{name}: a {type(value).__name__}; write text")
    return value


def _from_messages(row: Row) -> list[Turn]:
    return _list(row["messages"], "messages")


def _from_prompt_completion(row: Row) -> list[Turn]:
    turns: list[Turn] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        turns += value if isinstance(value, list) else [{"role": role, "content": _text(value, key)}]
    return turns


def _from_alpaca(row: Row) -> list[Turn]:
    asked = [_text(row.get(key), key) for key in ("instruction", "input")]
    system = _text(row.get("system"), "system")
    turns: list[Turn] = [{"role": "system", "content": system}] if system.strip() else []
    for pair in _list(row.get("history"), "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise MistakeError("history: an item that is not a pair of texts; write [request, answer]")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [
        *turns,
        {"role": "user", "content": "\n\n".join(part for part in asked if part.strip())},
        {"role": "assistant", "content": _text(row.get("output"), "output")},
    ]


def _from_sharegpt(row: Row) -> list[Turn]:
    """Returns the turns; calls that follow each other, or an answer's text, are one turn."""
    system = _text(row.get("system"), "system")
    turns: list[Turn] = [{"role": "system", "content": system}] if system.strip() else []
    for number, said in enumerate(_list(row["conversations"], "conversations")):
        if not isinstance(said, Mapping) or "from" not in said or "value" not in said:
            raise MistakeError(f"conversations.{number}: not an object with `from` and `value`; correct it")
        if (role := _SHAREGPT_ROLES.get(str(said["from"]))) is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise MistakeError(f"conversations.{number}: unknown speaker {said['from']!r}; use one of {known}")
        if role != "call":
            turns.append({"role": role, "content": said["value"]})
            continue
        calls = json_value(said["value"], f"conversations.{number}.value")
        if not turns or turns[-1]["role"] != "assistant":
            turns.append({"role": "assistant", "content": None, "tool_calls": []})
        turns[-1].setdefault("tool_calls", []).extend(calls if isinstance(calls, list) else [calls])
    return turns


def _from_question(row: Row) -> list[Turn]:
    return [{"role": "user", "content": row["question"]}]


MESSAGES = Format("messages", frozenset({"messages"}), _from_messages)
MESSAGES_AS_CONVERSATIONS = Format(
    "messages", frozenset({"conversations"}), lambda row: _list(row["conversations"], "conversations")
)
PROMPT_COMPLETION = Format("prompt/completion", frozenset({"prompt", "completion"}), _from_prompt_completion)
ALPACA = Format("Alpaca", frozenset({"instruction", "input", "output", "system", "history"}), _from_alpaca)
SHAREGPT = Format("ShareGPT", frozenset({"conversations", "system"}), _from_sharegpt)
QUESTION = Format("question", frozenset(), _from_question)
