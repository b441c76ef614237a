"""Requests and answers in the words of OpenAI's chat API, as far as a small model on a device goes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What other clients may send along and a model on a device has no use for.
_NOT_HERE = ("tools", "functions", "tool_choice", "function_call", "audio", "modalities", "prediction")
_PLAIN = {"messages", "model", "max_tokens", "max_completion_tokens", "stream", "stream_options", "temperature", "n"}


class TextPart(BaseModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=32_768)]


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=32_768)] | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    @property
    def text(self) -> str:
        """What is said, in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    include_usage: bool = False


class ResponseFormat(BaseModel):
    """A form that the answer has to have; llama.cpp holds the model to it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Chat(BaseModel):
    """A request to /v1/chat/completions. What it does not know is left out on the way to the model.

    Only what is named here is handed on: any other key could lift the limits.
    """

    model_config = ConfigDict(extra="ignore")
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    model: Annotated[str, Field(max_length=256)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(gt=0)] = None
    max_completion_tokens: Annotated[int | None, Field(gt=0)] = None
    temperature: Annotated[float | None, Field(ge=0.0, le=2.0)] = None
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2.0, le=2.0)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2.0, le=2.0)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    stop: Annotated[str, Field(min_length=1, max_length=256)] | Annotated[list[str], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_words_alone(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and (asked := [key for key in _NOT_HERE if raw.get(key)]):
            raise ValueError(f"{', '.join(asked)}: not supported; the answer is text alone")
        return raw

    @property
    def question(self) -> str:
        """The last thing the user said."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    @property
    def cacheable(self) -> bool:
        """Whether the answer follows from one question alone: a single turn, answered greedily, in no special form."""
        return [message.role for message in self.messages] == ["user"] and not self.temperature and not self._special()

    def _special(self) -> bool:
        return bool(self.model_dump(exclude_none=True).keys() - _PLAIN)

    def for_model(self, system_prompt: str, most_tokens: int, model: str | None) -> dict[str, Any]:
        """The request as an end gets it: greedy unless it says otherwise, with at most `most_tokens` new tokens."""
        settings = self.model_dump(
            exclude_none=True,
            exclude={"messages", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n"},
        )
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in self.messages
        ]
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system_prompt})
        wanted = self.max_completion_tokens or self.max_tokens or most_tokens
        named = {"model": model} if model else {}
        return {"temperature": 0.0, **settings, **named, "messages": turns, "max_tokens": min(wanted, most_tokens)}


def completion(text: str, model: str) -> dict[str, Any]:
    """A chat completion that no model was asked for."""
    return {
        "id": f"chatcmpl-{time.time_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def text_of(body: Mapping[str, Any]) -> str:
    """What a chat completion says.

    Raises:
        KeyError, IndexError, TypeError, ValueError: it is none.
    """
    text = body["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("no text in the answer")
    return text


def delta_of(chunk: Mapping[str, Any]) -> str:
    """What a chunk of a stream adds to the answer.

    Raises:
        KeyError, TypeError, AttributeError: it is none.
    """
    choices = chunk["choices"]
    return (choices[0].get("delta") or {}).get("content") or "" if choices else ""


def logprobs_of(body: Mapping[str, Any]) -> list[float]:
    """The log-likelihoods (nats) of the answer's own tokens; none where the end told none."""
    told = (body["choices"][0].get("logprobs") or {}).get("content") or []
    return [float(token["logprob"]) for token in told]


def as_chunks(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A whole completion as the chunks of a stream: one with the text, one that ends it."""
    base = {key: body.get(key) for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    ending = body["choices"][0].get("finish_reason") or "stop"
    pieces: list[tuple[dict[str, str], str | None]] = [
        ({"role": "assistant", "content": text_of(body)}, None),
        ({}, ending),
    ]
    return [base | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in pieces]
