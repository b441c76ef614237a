"""Rows of a corpus: questions and conversations."""

from __future__ import annotations

from lilliput.data.conversations import Conversation, Message
from lilliput.data.questions import Question

Row = Question | Conversation


def has_answer(row: Row) -> bool:
    """Whether `row` has an answer that can be learnt; a conversation may only state what is expected."""
    return isinstance(row, Question) or row.reference is not None


def prompt_turns(row: Row | str, system_prompt: str) -> tuple[Message, ...]:
    """Returns the turns before the answer to a row or to a user's text, see `with_system_prompt`."""
    if isinstance(row, Conversation):
        return with_system_prompt(row.prompt, system_prompt)
    text = row if isinstance(row, str) else row.question
    return with_system_prompt((Message(role="user", content=text),), system_prompt)


def with_system_prompt(turns: tuple[Message, ...], system_prompt: str) -> tuple[Message, ...]:
    """Returns `turns` after a system turn, unless they begin with one or `system_prompt` is empty."""
    if not system_prompt or turns[0].role == "system":
        return turns
    return (Message(role="system", content=system_prompt), *turns)
