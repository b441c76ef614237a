"""Turns answers into function calls: reads them, checks them, and keeps a stream from sending half of one.

llama.cpp's server returns calls as text. Other servers return `tool_calls`. Both are checked against the request.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lilliput.config import Place
from lilliput.data.conversations import ToolCall
from lilliput.llama_server.completions import (
    CALLED,
    COMPLETE,
    Chunks,
    calls_of,
    delta_of,
    finish_of,
    join_chunks,
    text_of,
    with_calls,
)
from lilliput.serve.schema_limits import deeper_than_limit
from lilliput.serve.tools import CallRules
from lilliput.tool_calls import MARKERS, Answer, begins_call, invalid_call, read_answer

# Mistral's chat template accepts only ids of nine letters and digits.
_ID_LETTERS, _ID_LENGTH = string.ascii_letters + string.digits, 9


@dataclass(frozen=True)
class Reading:
    """An answer with its calls checked.

    Attributes:
        text: the text before the calls; the whole answer if it has no valid calls.
        calls: valid calls.
        problem: why the calls of the answer are invalid, or why it must have one; None if all is well.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    problem: str | None = None


class InvalidCall(Exception):
    """An answer has an invalid call, or lacks the required one. Nothing of it has been sent.

    Attributes:
        place: where the answer comes from.
        body: the completion, with the answer as text.
    """

    def __init__(self, problem: str, place: Place, body: dict[str, Any]) -> None:
        super().__init__(problem)
        self.place: Place = place
        self.body = body


def read_completion(body: Mapping[str, Any], rules: CallRules, place: Place) -> dict[str, Any]:
    """The completion `body` with its calls as `tool_calls`.

    Raises:
        InvalidCall: a call is invalid or malformed, or a required one is missing.
    """
    reading = _read(text_of(body), calls_of(body), rules)
    if reading.calls:
        return with_calls(body, reading.text, [_as_openai(call) for call in reading.calls], CALLED)
    whole = with_calls(body, reading.text, (), _text_finish(body))
    if reading.problem:
        raise InvalidCall(reading.problem, place, whole)
    return whole


async def read_chunks(
    chunks: Chunks, rules: CallRules, place: Place, count_invalid: Callable[[Place], None] = lambda _: None
) -> Chunks:
    """Yields text at once, and calls when the answer is complete.

    Args:
        chunks: a backend's answer.
        rules: the calls that the request permits.
        place: where the answer comes from.
        count_invalid: called with `place` for an invalid call behind text that has been yielded; the call is then text.

    Raises:
        InvalidCall: as `read_completion`, if no chunk has been yielded yet.
    """
    filtered, received, logprobs, sent = _TextFilter(hold=rules.required), [], [], ""
    async with aclosing(chunks):
        async for chunk in chunks:
            received.append(chunk)
            if not chunk["choices"]:
                continue
            logprobs += (chunk["choices"][0]["logprobs"] or {}).get("content") or []
            if ready := filtered.feed(delta_of(chunk)):
                yield _delta(chunk, {"content": ready} | ({} if sent else {"role": "assistant"}), logprobs)
                sent, logprobs = sent + ready, []
    body = join_chunks(received)
    reading = _read(text_of(body), calls_of(body), rules)
    if reading.problem and not sent:
        raise InvalidCall(reading.problem, place, _as_text(body, reading, logprobs))
    if reading.problem:
        count_invalid(place)
    for chunk in _ending(received, reading, logprobs, sent):
        yield chunk


def _ending(
    received: Sequence[Mapping[str, Any]], reading: Reading, logprobs: list[dict[str, Any]], sent: str
) -> list[dict[str, Any]]:
    """The chunks after the text `sent`: the rest of the text, the calls, the finish reason and the usage."""
    rest, calls = reading.text[len(sent) :], [_as_openai(call) for call in reading.calls]
    first = received[0]
    delta: dict[str, Any] = {} if sent else {"role": "assistant", "content": None if calls and not rest else rest}
    if sent and rest:
        delta["content"] = rest
    if calls:
        delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
    last = next(chunk for chunk in received if finish_of(chunk))
    reason = CALLED if calls else _text_finish(last)
    chunks = [_delta(first, delta, logprobs)] if delta else []
    end = _delta(first, {}, [] if delta else logprobs, reason)
    return [*chunks, end, *(dict(chunk) for chunk in received if not chunk["choices"])]


class _TextFilter:
    """Passes on the text of an answer, without surrounding spaces, up to what may be a call.

    Args:
        hold: passes on nothing.
    """

    def __init__(self, *, hold: bool) -> None:
        self._held, self._begun, self._pending = hold, False, ""

    def feed(self, piece: str) -> str:
        """Adds a piece of the answer, and returns the text that can be sent."""
        if self._held:
            return ""
        self._pending += piece
        if not self._begun:
            self._pending = self._pending.lstrip()
            begins = begins_call(self._pending)
            self._held, self._begun = bool(begins), begins is False
            if not self._begun:
                return ""
        ready = self._pending[: self._call_start()].rstrip()
        self._pending = self._pending[len(ready) :]
        return ready

    def _call_start(self) -> int:
        """Where a call may begin in the pending text; its length if nowhere."""
        found = [self._pending.find(marker) for marker in MARKERS if marker in self._pending]
        if found:
            self._held = True
            return min(found)
        beginnings = (
            length
            for marker in MARKERS
            for length in range(len(marker) - 1, 0, -1)
            if self._pending.endswith(marker[:length])
        )
        return len(self._pending) - max(beginnings, default=0)


def _read(text: str, native: Sequence[Mapping[str, Any]], rules: CallRules) -> Reading:
    """Reads an answer with the text `text` and the calls `native`, and checks its calls."""
    whole = "\n".join(filter(None, [text.strip(), *(json.dumps(call["function"]) for call in native)]))
    answer = _native_answer(text, native) if native else read_answer(text)
    if answer.malformed:
        return Reading(whole, problem="a call cannot be read")
    calls = answer.calls if rules.parallel else answer.calls[:1]
    if rules.required and not calls:
        return Reading(whole, problem="the answer has no call, which `tool_choice` requires")
    problem = next(filter(None, (_problem(call, rules) for call in calls)), None)
    return Reading(whole, problem=problem) if problem else Reading(answer.text, calls)


def _native_answer(text: str, native: Sequence[Mapping[str, Any]]) -> Answer:
    try:
        return Answer(text.strip(), tuple(ToolCall.model_validate(call["function"]) for call in native))
    except (ValidationError, RecursionError):
        return Answer(text, malformed=True)


def _problem(call: ToolCall, rules: CallRules) -> str | None:
    if rules.name not in (None, call.name):
        return f"the call is of {call.name!r}, but `tool_choice` requires {rules.name!r}"
    if deeper_than_limit(call.arguments):
        return f"{call.name}: the arguments are nested too deep"
    try:
        _arguments(call).encode()
    except ValueError:
        return f"{call.name}: the arguments have a number or a text that JSON does not allow"
    return invalid_call(call, rules.tools)


def _as_openai(call: ToolCall) -> dict[str, Any]:
    new_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))
    return {"id": new_id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}


def _arguments(call: ToolCall) -> str:
    """The arguments as a text with JSON.

    Raises:
        ValueError: they are not JSON, as NaN.
    """
    return json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)


def _text_finish(part: Mapping[str, Any]) -> str | None:
    """The finish reason of an answer that is text: a backend may have counted its calls."""
    reason = finish_of(part)
    return COMPLETE if reason == CALLED else reason


def _as_text(body: Mapping[str, Any], reading: Reading, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    whole = with_calls(body, reading.text, (), _text_finish(body))
    if logprobs:
        whole["choices"][0]["logprobs"] = {"content": logprobs, "refusal": None}
    return whole


def _delta(
    like: Mapping[str, Any], delta: dict[str, Any], logprobs: list[dict[str, Any]], finish: str | None = None
) -> dict[str, Any]:
    """A chunk of the same answer as `like`."""
    choice = {
        "index": 0,
        "delta": delta,
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        "finish_reason": finish,
    }
    return {**like, "choices": [choice]}
