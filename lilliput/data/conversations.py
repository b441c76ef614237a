"""Conversations: rows of chat data in the form of OpenAI's API, with what a right last turn must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from lilliput.data.questions import Text

Role = Literal["system", "user", "assistant", "tool"]


class Part(BaseModel):
    """A part of a row: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ToolCall(Part):
    """One call of a function.

    Attributes:
        name: of the function.
        arguments: by parameter; a text with JSON is accepted, as OpenAI's API sends it.
        id: to which the tool's result refers.
    """

    name: Text
    arguments: dict[str, Any] = Field(default_factory=dict)
    id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_flat(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and isinstance(raw.get("function"), Mapping):
            raw = {"id": raw.get("id"), **raw["function"]}
        if isinstance(raw, Mapping) and isinstance(raw.get("arguments"), str):
            try:
                arguments = json.loads(raw["arguments"] or "{}")
            except ValueError:
                raise ValueError(f"the arguments {raw['arguments'][:100]!r} are not JSON; correct them") from None
            raw = {**raw, "arguments": arguments}
        return raw

    def as_openai(self) -> dict[str, Any]:
        """Returns the call as chat templates expect it, with the arguments as an object."""
        call = {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if self.id is None else {"id": self.id, **call}


class Message(Part):
    """One turn. An assistant's turn has text, calls or both; a tool's turn is the result of a call."""

    role: Role
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The content; empty if there is none."""
        return self.content or ""

    def as_openai(self) -> dict[str, Any]:
        """Returns the turn as chat templates expect it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            turn["tool_calls"] = [call.as_openai() for call in self.tool_calls]
        others = {"tool_call_id": self.tool_call_id, "name": self.name}
        return turn | {key: value for key, value in others.items() if value is not None}


class ExpectedText(Part):
    """The answer is `text` or one of `aliases`, by the judge of questions (docs/metrics.md)."""

    kind: Literal["text"] = "text"
    text: Text
    aliases: tuple[Text, ...] = ()


class ExpectedParts(Part):
    """The answer contains all texts of `contains`, whatever their case and spacing."""

    kind: Literal["contains"] = "contains"
    contains: Annotated[tuple[Text, ...], Field(min_length=1)]


class ExpectedNumber(Part):
    """The answer's last number is `number`, within the absolute `tolerance`."""

    kind: Literal["number"] = "number"
    number: FiniteFloat
    tolerance: Annotated[FiniteFloat, Field(ge=0.0)] = 0.0


class ExpectedJson(Part):
    """The answer is a JSON value that is valid under `schema` and has the values of `fields`, if given."""

    kind: Literal["json"] = "json"
    fields: dict[str, Any] = Field(default_factory=dict)
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    @model_validator(mode="after")
    def _schema_is_valid(self) -> ExpectedJson:
        import jsonschema_rs

        try:
            jsonschema_rs.validator_for(self.json_schema, offline=True)
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise ValueError(f"`schema` is not a valid JSON schema ({reason}); correct it") from None
        return self


class ExpectedCall(Part):
    """One call, by the rules of the Berkeley Function-Calling Leaderboard (BFCL).

    Attributes:
        name: of the function.
        arguments: the accepted values of each parameter; a parameter with an accepted "" may be left out.
    """

    name: Text
    arguments: dict[str, list[Any]] = Field(default_factory=dict)


class ExpectedCalls(Part):
    """The answer calls these functions; none if the list is empty, because no function serves the request."""

    kind: Literal["tool_calls"] = "tool_calls"
    tool_calls: tuple[ExpectedCall, ...]
    ordered: bool = False


class ExpectedAbstention(Part):
    """The answer declines, or asks for what is missing; a call or an assertion is a hallucination."""

    kind: Literal["abstain"] = "abstain"
    abstain: Literal[True] = True


class ExpectedReference(Part):
    """The answer resembles `reference`: token F1 and ROUGE-L, and the reference's log-likelihood."""

    kind: Literal["reference"] = "reference"
    reference: Text


Expectation = (
    ExpectedText
    | ExpectedParts
    | ExpectedNumber
    | ExpectedJson
    | ExpectedCalls
    | ExpectedAbstention
    | ExpectedReference
)


class Conversation(Part):
    """One row of chat data. Its last assistant turn is what evaluation asks for.

    Attributes:
        id: unique within a file; the part before the first `/` is the relation, by which samples are stratified.
        messages: at least a user's turn; the last one may be an assistant's turn, the reference answer.
        tools: the functions that may be called, as OpenAI's API describes them.
        expect: what a right answer is; None to derive it from the reference answer.
        group: rows of one group are on one side of the split.
        split: `train` or `test` to assign the group by hand.
    """

    id: Text
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    tools: tuple[dict[str, Any], ...] = ()
    expect: Expectation | None = None
    group: Text
    split: Literal["train", "test"] | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the reference answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def reference(self) -> Message | None:
        """The last turn, if it is the assistant's."""
        return self.messages[-1] if self.messages[-1].role == "assistant" else None

    @property
    def expectation(self) -> Expectation:
        """`expect`, or what the reference answer implies: its calls, or its text as a reference."""
        if self.expect is not None:
            return self.expect
        reference = self.reference
        assert reference is not None, "checked when the row was read"
        if reference.tool_calls:
            calls = (
                ExpectedCall(name=call.name, arguments={name: [value] for name, value in call.arguments.items()})
                for call in reference.tool_calls
            )
            return ExpectedCalls(tool_calls=tuple(calls))
        return ExpectedReference(reference=reference.text)

    @property
    def relation(self) -> str:
        """The part of the id before the first `/`; the kind of expectation if there is none."""
        before, slash, _ = self.id.partition("/")
        return before if slash else self.expectation.kind

    @property
    def answerable(self) -> bool:
        """Whether something other than an abstention is right."""
        return self.expectation.kind != "abstain"

    @property
    def user_text(self) -> str:
        """The user's last turn in the prompt."""
        return next((turn.text for turn in reversed(self.prompt) if turn.role == "user"), "")

    @property
    def answer_text(self) -> str:
        """The reference answer: its text, then its calls as JSON; empty if there is none."""
        turn = self.reference
        calls = (
            [json.dumps({"name": call.name, "arguments": call.arguments}) for call in turn.tool_calls] if turn else []
        )
        return "\n".join(part for part in (turn.text if turn else "", *calls) if part)

    @model_validator(mode="after")
    def _can_be_judged(self) -> Conversation:
        if self.expect is None and (self.reference is None or not (self.reference.text or self.reference.tool_calls)):
            raise ValueError("a row needs an assistant's last turn with text or calls, or `expect`; add one of them")
        return self
