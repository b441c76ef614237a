"""Requests to OpenAI's chat API, limited to the fields that a small model on a device can serve."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lilliput.chat.control_tokens import ControlTokens
from lilliput.serve.schema_limits import check_schema

# Fields that ask for more than text.
_UNSUPPORTED = ("tools", "functions", "tool_choice", "function_call", "audio", "modalities", "prediction")
# Values of these fields that ask for text only. Without tools, `auto` means `none`.
_TEXT_ONLY = {"tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],)}
_PLAIN = {"messages", "model", "max_tokens", "max_completion_tokens", "stream", "stream_options", "temperature", "n"}
# Values without effect on a greedy answer.
_DEFAULTS = {
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logprobs": False,
    "response_format": {"type": "text"},
}
LARGEST_SEED = 2**32 - 2  # llama.cpp draws a seed for the next value


class TextPart(BaseModel):
    """A part of a message's text."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=32_768)]


class RefusalPart(BaseModel):
    """A part of an assistant's turn that refuses to answer."""

    type: Literal["refusal"]
    refusal: Annotated[str, Field(max_length=32_768)]

    @property
    def text(self) -> str:
        """The refusal."""
        return self.refusal


Text = Annotated[str, Field(max_length=32_768)]
Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn of a chat. Only an assistant's turn may lack content or contain refusals."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)] | None = None
    refusal: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text_only(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and (given := [k for k in ("tool_calls", "function_call", "audio") if raw.get(k)]):
            raise ValueError(f"{', '.join(given)}: not supported; a turn is text only")
        return raw

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        parts = self.content if isinstance(self.content, list) else []
        if self.role != "assistant" and (self.content is None or any(part.type == "refusal" for part in parts)):
            raise ValueError(f"content: a {self.role} turn needs text")
        return self

    @property
    def text(self) -> str:
        """The complete text of the turn; for an assistant's turn without content, its refusal."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


class ResponseFormat(BaseModel):
    """The required format of the answer; llama.cpp enforces it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_a_small_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema: is missing")
        if self.json_schema is not None:
            check_schema(self.json_schema)
        return self


class Chat(BaseModel):
    """A request to /v1/chat/completions.

    Only these fields are passed to the model: an unknown field could bypass the limits.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    messages: Annotated[list[Message], Field(min_length=1, max_length=64)]
    model: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(gt=0)] = None
    max_completion_tokens: Annotated[int | None, Field(gt=0)] = None
    temperature: Annotated[float | None, Field(ge=0.0, le=2.0)] = None
    top_p: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2.0, le=2.0)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2.0, le=2.0)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[str, Field(max_length=256)] | Annotated[list[str], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_text_only(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and (fields := _unsupported_fields(raw)):
            raise ValueError(f"{', '.join(fields)}: not supported; the answer is text only")
        return raw

    @field_validator("stop")
    @classmethod
    def _drop_empty_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        """Removes empty texts, which stop nothing; None if no other text is left."""
        return ([text for text in stop if text] if isinstance(stop, list) else stop) or None

    @model_validator(mode="after")
    def _has_logprobs_for_top_logprobs(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    @cached_property
    def question(self) -> str:
        """The user's last message."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    @cached_property
    def cacheable(self) -> bool:
        """Whether the answer depends only on one question: a single turn, greedy decoding, no special options."""
        return (
            [message.role for message in self.messages] == ["user"]
            and not self.temperature
            and not self._has_special_options()
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _has_special_options(self) -> bool:
        fields = self.model_dump(exclude_none=True, exclude={"messages"})
        return any(name not in _PLAIN and _DEFAULTS.get(name) != value for name, value in fields.items())

    def most_tokens(self, limit: int) -> int:
        """Largest number of new tokens: the request's own limit, at most `limit`."""
        return min(self.max_completion_tokens or self.max_tokens or limit, limit)

    def for_model(
        self, system_prompt: str, limit: int, model: str | None, control_tokens: ControlTokens | None = None
    ) -> dict[str, Any]:
        """The request to a backend: greedy unless the client sets a temperature, with at most `limit` new tokens.

        Args:
            system_prompt: added if the request has none.
            limit: largest number of new tokens.
            model: the backend's model name; None to send none.
            control_tokens: split in all turns of the request, so that a text cannot forge a turn.
        """
        neutralize = control_tokens.split if control_tokens else str
        settings = self.model_dump(
            exclude_none=True,
            exclude={"messages", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n"},
        )
        if self.seed is not None:
            settings["seed"] = self.seed % (LARGEST_SEED + 1)
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": neutralize(message.text)}
            for message in self.messages
        ]
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system_prompt})
        model_field = {"model": model} if model else {}
        return {"temperature": 0.0, **settings, **model_field, "messages": turns, "max_tokens": self.most_tokens(limit)}


def _unsupported_fields(raw: Mapping[str, Any]) -> list[str]:
    """Fields of a request that ask for more than text. Tools count only if they may be called."""
    unused = ("tools", "functions") if "none" in (raw.get("tool_choice"), raw.get("function_call")) else ()
    return [
        name
        for name in _UNSUPPORTED
        if raw.get(name) and name not in unused and raw[name] not in _TEXT_ONLY.get(name, ())
    ]
