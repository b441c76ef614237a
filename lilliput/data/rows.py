"""Rows of a corpus: questions and conversations."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from lilliput.data.conversations import Conversation, Message
from lilliput.data.questions import Question
from lilliput.data.row_file import RowFile, first_row, line_of

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


def open_rows(path: Path) -> RowFile[Question] | RowFile[Conversation]:
    """Opens a file of normalised rows, whose first row tells the kind of all.

    Raises:
        DataError: the file is missing or empty; on access, the line is not a valid row.
    """
    first = first_row(path) or {}
    return RowFile(path, Conversation) if "messages" in first else RowFile(path, Question)


def normalised_line(row: Row) -> str:
    """Returns the JSON line of `row` in the files of a corpus."""
    return line_of(row, in_order=isinstance(row, Conversation))


def request_text(row: Row) -> str:
    """Returns what the user says before the answer: the question, or all turns of the user."""
    if isinstance(row, Question):
        return row.question
    return "\n".join(turn.text for turn in row.prompt if turn.role == "user")


def wording(row: Row) -> str:
    """Returns the request without case, spacing and final mark. `normalise` would make 3 + 4 and 3 − 4 equal."""
    return " ".join(unicodedata.normalize("NFKC", request_text(row)).casefold().split()).rstrip(" ?.!")
