"""Requests to OpenAI's chat API, as far as a small model on a device can serve them."""

from __future__ import annotations

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

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _special(self) -> bool:
        return bool(self.model_dump(exclude_none=True).keys() - _PLAIN)

    def most_tokens(self, limit: int) -> int:
        """New tokens that the answer may have: what the request asks for, and no more than `limit`."""
        return min(self.max_completion_tokens or self.max_tokens or limit, limit)

    def for_model(self, system_prompt: str, limit: int, model: str | None) -> dict[str, Any]:
        """The request as an end gets it: greedy unless it says otherwise, with at most `limit` new tokens."""
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
        named = {"model": model} if model else {}
        return {"temperature": 0.0, **settings, **named, "messages": turns, "max_tokens": self.most_tokens(limit)}
