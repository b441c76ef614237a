"""Rows of a corpus: questions and conversations."""

from __future__ import annotations

from lilliput.data.conversations import Conversation, Message
from lilliput.data.questions import Question

Row = Question | Conversation


def prompt_turns(row: Row, system_prompt: str) -> tuple[Message, ...]:
    """Returns the turns before the answer; `system_prompt` comes first if the row has no system turn."""
    turns = (Message(role="user", content=row.question),) if isinstance(row, Question) else row.prompt
    if not system_prompt or turns[0].role == "system":
        return turns
    return (Message(role="system", content=system_prompt), *turns)
