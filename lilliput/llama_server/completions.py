"""Chat completions of OpenAI's API: reads a backend's responses and builds the responses to clients."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

Chunks = AsyncGenerator[dict[str, Any], None]
FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")
COMPLETE, CALLED = "stop", "tool_calls"
# Request fields for the log-probabilities of an answer's tokens, and nothing more: by default llama.cpp sends 20
# alternatives per token, and for `top_logprobs: 0` it sends no log-probabilities at all.
TOKEN_LOGPROBS = {"logprobs": True, "top_logprobs": 1}


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer, by the tokenizer of its model."""

    prompt_tokens: int
    completion_tokens: int

    def as_dict(self) -> dict[str, int]:
        """As the API's object `usage`."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def usage_of(body: Mapping[str, Any]) -> Usage | None:
    """Token counts of a completion or chunk; None if it has none.

    Raises:
        KeyError, TypeError, ValueError: the counts are not numbers.
    """
    usage = body.get("usage")
    return Usage(int(usage["prompt_tokens"]), int(usage["completion_tokens"])) if usage else None


def text_of(body: Mapping[str, Any]) -> str:
    """Text of a chat completion; empty if it has only calls.

    Raises:
        KeyError, IndexError, TypeError, ValueError: `body` is not a chat completion with text or calls.
    """
    message = body["choices"][0]["message"]
    if message.get("content") is None and message.get("tool_calls"):
        return ""
    text = message["content"]
    if not isinstance(text, str):
        raise ValueError("no text in the answer")
    return text


def calls_of(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Calls in a completion, or the pieces of calls in a chunk; empty if it has none."""
    choices = part["choices"]
    holder = (choices[0].get("message") or choices[0].get("delta") or {}) if choices else {}
    return list(holder.get("tool_calls") or ())


def delta_of(chunk: Mapping[str, Any]) -> str:
    """Text that a chunk of a stream adds to the answer.

    Raises:
        KeyError, TypeError, AttributeError: `chunk` is not a chunk of a chat completion.
    """
    choices = chunk["choices"]
    return (choices[0].get("delta") or {}).get("content") or "" if choices else ""


def finish_of(part: Mapping[str, Any]) -> str | None:
    """Finish reason of a completion or chunk; None for a chunk before the end.

    Raises:
        ValueError: the reason is not one of the API's.
    """
    choices = part["choices"]
    reason = choices[0].get("finish_reason") if choices else None
    if reason is not None and reason not in FINISH_REASONS:
        raise ValueError("an unknown finish reason")
    return reason


def logprobs_of(body: Mapping[str, Any]) -> list[float]:
    """Log-likelihoods (nats) of the answer's tokens; empty if the backend sent none."""
    logprobs = (body["choices"][0].get("logprobs") or {}).get("content") or []
    return [float(token["logprob"]) for token in logprobs]


def new_completion(text: str, model: str, usage: Usage | None) -> dict[str, Any]:
    """A new chat completion with the given text."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": COMPLETE,
            }
        ],
        "usage": usage.as_dict() if usage else None,
    }


def with_calls(
    body: Mapping[str, Any], text: str, calls: Sequence[Mapping[str, Any]], finish: str | None = None
) -> dict[str, Any]:
    """A completion with another text, calls and finish reason (unchanged if None). Without text, content is null."""
    [choice] = body["choices"]
    message = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = list(calls)
    return {**body, "choices": [choice | {"message": message, "finish_reason": finish or choice["finish_reason"]}]}


def normalize_completion(body: Mapping[str, Any], *, may_call: bool = False) -> dict[str, Any]:
    """A backend's completion, reduced to the API's fields.

    Args:
        body: the backend's response.
        may_call: whether the request permits calls.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError: `body` is not a chat completion with text, or it
            has calls that the request does not permit.
    """
    plain, reason = new_completion(text_of(body), _model(body), usage_of(body)), finish_of(body)
    if reason is None:
        raise ValueError("no finish reason")
    choice = plain["choices"][0] | {"logprobs": _logprobs(body["choices"][0]), "finish_reason": reason}
    normal = plain | _identity(body, plain) | {"choices": [choice]}
    calls = _permitted_calls(body, may_call)
    return with_calls(normal, text_of(body), [_call(call) for call in calls]) if calls else normal


async def normalize_chunks(raw: Chunks, *, may_call: bool = False) -> Chunks:
    """Yields a backend's chunks, reduced to the API's fields. The last one has the usage, if the backend sent it.

    Args:
        raw: the backend's chunks.
        may_call: whether the request permits calls.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError: `raw` is not a stream of a chat completion.
    """
    usage, reason, identity = None, None, new_completion("", "", None)
    async with aclosing(raw):
        async for part in raw:
            usage, reason = usage_of(part) or usage, finish_of(part) or reason
            identity = {"model": _model(part)} | _identity(part, identity)
            if part["choices"]:
                calls = _permitted_calls(part, may_call)
                yield _chunk(identity, [_chunk_choice(part, calls)])
    if reason is None:
        raise ValueError("no finish reason")
    if usage:
        yield _chunk(identity, []) | {"usage": usage.as_dict()}


def with_logprobs(part: Mapping[str, Any], top: int | None) -> dict[str, Any]:
    """A completion or chunk with at most `top` alternatives per token; without log-probabilities if None."""

    def limited(choice: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = None if top is None else choice["logprobs"]
        if not logprobs:
            return {**choice, "logprobs": None}
        tokens = [token | {"top_logprobs": token["top_logprobs"][:top]} for token in logprobs["content"]]
        return {**choice, "logprobs": {"content": tokens, "refusal": None}}

    return {**part, "choices": [limited(choice) for choice in part["choices"]]}


def completion_chunks(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Splits a completion into three chunks: text and calls, finish reason, and usage if known."""
    choice = body["choices"][0]
    delta = {"role": "assistant", "content": choice["message"]["content"]}
    if calls := calls_of(body):
        delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
    start = {"index": 0, "delta": delta, "logprobs": choice["logprobs"], "finish_reason": None}
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
    chunks = [_chunk(body, [part]) for part in (start, end)]
    return [*chunks, _chunk(body, []) | {"usage": body["usage"]}] if body["usage"] else chunks


def join_chunks(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins the chunks of `normalize_chunks` to one completion."""
    first, text = chunks[0], "".join(map(delta_of, chunks))
    body = new_completion(text, first["model"], usage_of(chunks[-1]))
    reason = next(reason for chunk in chunks if (reason := finish_of(chunk)))
    return with_calls(body, text, join_calls(chunks), reason) | _identity(first, body)


def join_calls(chunks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Joins the pieces of calls in `chunks`, by their index.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: a piece is not one of OpenAI's API.
    """
    calls: dict[int, dict[str, Any]] = {}
    for piece in (piece for chunk in chunks for piece in calls_of(chunk)):
        call = calls.setdefault(int(piece.get("index") or 0), {"id": "", "name": [], "arguments": []})
        function = piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        call["name"].append(function.get("name") or "")
        call["arguments"].append(function.get("arguments") or "")
    return [
        _call({"id": call["id"], "function": {name: "".join(call[name]) for name in ("name", "arguments")}})
        for _, call in sorted(calls.items())
    ]


def _call(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A call, reduced to the API's fields."""
    name, arguments = raw["function"]["name"], raw["function"].get("arguments") or ""
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise ValueError("a call without a name or without a text of arguments")
    return {
        "id": str(raw.get("id") or ""),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _permitted_calls(part: Mapping[str, Any], may_call: bool) -> list[dict[str, Any]]:
    calls = calls_of(part)
    if calls and not may_call:
        raise ValueError("a call, which the request does not permit")
    return calls


def _model(part: Mapping[str, Any]) -> str:
    return str(part.get("model") or "")


def _identity(part: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """`id` and `created` of `part`; those of `default` where they are missing or of another type."""
    kinds = {"id": str, "created": int}
    return {name: part[name] if isinstance(part.get(name), kind) else default[name] for name, kind in kinds.items()}


def _chunk(whole: Mapping[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    head = {name: whole[name] for name in ("id", "created", "model")}
    return head | {"object": "chat.completion.chunk", "choices": choices}


def _chunk_choice(part: Mapping[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    choice = part["choices"][0]
    delta = choice.get("delta") or {}
    kept = {name: delta[name] for name in ("role", "content") if name in delta}
    return {
        "index": 0,
        "delta": kept | ({"tool_calls": calls} if calls else {}),
        "logprobs": _logprobs(choice),
        "finish_reason": finish_of(part),
    }


def _logprobs(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    tokens = (choice.get("logprobs") or {}).get("content") or []
    alternatives = [[_token(other) for other in token.get("top_logprobs") or []] for token in tokens]
    normalized = [_token(token) | {"top_logprobs": top} for token, top in zip(tokens, alternatives, strict=True)]
    return {"content": normalized, "refusal": None} if normalized else None


def _token(token: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": str(token["token"]), "logprob": float(token["logprob"]), "bytes": token.get("bytes")}
