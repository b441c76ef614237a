"""Requests to OpenAI's chat API, limited to the fields that a small model on a device can serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lilliput.chat.control_tokens import ControlTokens
from lilliput.offload.conversation_text import turn_text
from lilliput.serve.schema_limits import check_schema
from lilliput.serve.tools import (
    MOST_TOOLS,
    Call,
    CallRules,
    NamedFunction,
    Tool,
    ToolChoice,
    check_tool_turns,
    replace_texts,
)

# Fields that ask for more than text and calls; `functions` and `function_call` are the predecessors of `tools`.
_UNSUPPORTED = ("functions", "function_call", "audio", "modalities", "prediction")
# Values of these fields that ask for nothing more.
_TEXT_ONLY = {"function_call": ("none", "auto"), "modalities": (["text"],)}
_PLAIN = {"messages", "model", "max_tokens", "max_completion_tokens", "stream", "stream_options", "temperature", "n"}
# Values without effect on a greedy answer.
_DEFAULTS = {
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logprobs": False,
    "response_format": {"type": "text"},
}
# Fields that `Chat.for_model` derives or leaves out.
_NOT_SETTINGS = {
    "messages",
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
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
    """One turn of a chat. Only an assistant's turn may lack content, contain refusals or call functions."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=64)] | None = None
    refusal: Text | None = None
    tool_calls: Annotated[list[Call], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text_and_calls_only(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and (given := [k for k in ("function_call", "audio") if raw.get(k)]):
            raise ValueError(f"{', '.join(given)}: not supported; a turn has text and `tool_calls` only")
        return raw

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        parts = self.content if isinstance(self.content, list) else []
        if self.role != "assistant" and (self.content is None or any(part.type == "refusal" for part in parts)):
            raise ValueError(f"content: a {self.role} turn needs text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: a {self.role} turn has none; only an assistant's turn has")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("tool_call_id: is missing; a tool turn names the call that it answers")
        return self

    @property
    def text(self) -> str:
        """The complete text of the turn; for an assistant's turn without content, its refusal."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""

    def for_model(self, neutralize: Callable[[str], str]) -> dict[str, Any]:
        """The turn for a backend, with `neutralize` applied to all texts."""
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": neutralize(self.text)}
        if self.tool_calls:
            turn["tool_calls"] = [call.as_openai(neutralize) for call in self.tool_calls]
        if self.role == "tool" and self.tool_call_id:
            turn["tool_call_id"] = neutralize(self.tool_call_id)
        return turn


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
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_text_and_calls_only(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and (fields := _unsupported_fields(raw)):
            raise ValueError(f"{', '.join(fields)}: not supported; the answer is text or calls of `tools`")
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

    @model_validator(mode="after")
    def _has_calls_in_order(self) -> Chat:
        check_tool_turns(self.messages)
        return self

    @model_validator(mode="after")
    def _has_tools_for_its_choice(self) -> Chat:
        names = [tool["function"]["name"] for tool in self.tools or ()]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tools: two functions are named {doubled!r}; each needs its own name")
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedFunction) else None
        if (self.tool_choice == "required" and not names) or (wanted is not None and wanted not in names):
            raise ValueError(f"tool_choice: the request has no tool {wanted or ''}".rstrip() + "; add it to `tools`")
        json_wanted = self.response_format is not None and self.response_format.type != "text"
        if self.call_rules and json_wanted:
            raise ValueError("response_format, tools: a JSON answer and a call look alike; send one of the two")
        return self

    @cached_property
    def question(self) -> str:
        """The user's last message."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    @cached_property
    def other_turns(self) -> tuple[str, ...]:
        """The texts of all turns but the question and the system's, in their order; calls as JSON."""
        last = max((n for n, message in enumerate(self.messages) if message.role == "user"), default=-1)
        turns = [turn for n, turn in enumerate(self.messages) if n != last and turn.role not in ("system", "developer")]
        calls = [[(call.function.name, call.function.arguments) for call in turn.tool_calls or ()] for turn in turns]
        return tuple(filter(None, map(turn_text, (turn.text for turn in turns), calls)))

    @cached_property
    def call_rules(self) -> CallRules | None:
        """The calls that the answer may have; None if it may have none."""
        if not self.tools or self.tool_choice == "none":
            return None
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedFunction) else None
        required = name is not None or self.tool_choice == "required"
        return CallRules(tuple(self.tools), required, name, self.parallel_tool_calls is not False)

    @cached_property
    def needs_functions(self) -> bool:
        """Whether the model's chat template must know functions: for tools, calls or results."""
        return self.call_rules is not None or any(turn.role == "tool" for turn in self.messages)

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
        unused = set() if self.tools else {"tools", "tool_choice", "parallel_tool_calls"}
        fields = self.model_dump(exclude_none=True, exclude={"messages", *unused})
        return any(name not in _PLAIN and _DEFAULTS.get(name) != value for name, value in fields.items())

    def most_tokens(self, limit: int) -> int:
        """Largest number of new tokens: the request's own limit, at most `limit`."""
        return min(self.max_completion_tokens or self.max_tokens or limit, limit)

    def for_model(
        self,
        system_prompt: str,
        limit: int,
        model: str | None,
        control_tokens: ControlTokens | None = None,
        *,
        calls_as_text: bool = False,
    ) -> dict[str, Any]:
        """The request to a backend: greedy unless the client sets a temperature, with at most `limit` new tokens.

        Args:
            system_prompt: added if the request has none; nothing is added if it is empty.
            limit: largest number of new tokens.
            model: the backend's model name; None to send none.
            control_tokens: split in all turns and tools of the request, so that a text cannot forge a turn.
            calls_as_text: whether the backend is llama.cpp, which writes calls into the text.
        """
        neutralize = control_tokens.split if control_tokens else str
        settings = self.model_dump(exclude_none=True, exclude=_NOT_SETTINGS)
        if self.seed is not None:
            settings["seed"] = self.seed % (LARGEST_SEED + 1)
        turns = [message.for_model(neutralize) for message in self.messages]
        if system_prompt and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system_prompt})
        model_field = {"model": model} if model else {}
        request = {"temperature": 0.0, **settings, **model_field, "messages": turns}
        return request | {"max_tokens": self.most_tokens(limit)} | self._call_fields(neutralize, calls_as_text)

    def _call_fields(self, neutralize: Callable[[str], str], calls_as_text: bool) -> dict[str, Any]:
        rules = self.call_rules
        if rules is None:
            return {}
        tools = {"tools": replace_texts(list(rules.tools), neutralize)}
        if calls_as_text:
            # llama.cpp shows the tools to the model whatever the choice; with `none` it adds no grammar of its own.
            forced = {"response_format": rules.forced_format()} if rules.required else {}
            return tools | {"tool_choice": "none"} | forced
        fields = self.model_dump(exclude_none=True, include={"tool_choice", "parallel_tool_calls"})
        return tools | fields


def _unsupported_fields(raw: Mapping[str, Any]) -> list[str]:
    """Fields of a request that ask for more than text and calls. Functions count only if they may be called."""
    unused = ("functions",) if "none" in (raw.get("tool_choice"), raw.get("function_call")) else ()
    return [
        name
        for name in _UNSUPPORTED
        if raw.get(name) and name not in unused and raw[name] not in _TEXT_ONLY.get(name, ())
    ]
