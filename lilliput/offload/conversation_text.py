"""The text of a conversation that a learned router reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from lilliput.data.questions import Question
from lilliput.data.rows import Row


def turn_text(text: str, calls: Iterable[tuple[str, str]] = ()) -> str:
    """Returns a turn's text with its calls, each a function's name and its arguments as JSON."""
    return "\n".join([text, *(f"{name} {arguments}" for name, arguments in calls)]).strip()


def routed_text(question: str, others: Sequence[str], fits: Callable[[str], bool]) -> str:
    """Returns the question after as many of the newest other turns as fit.

    Args:
        question: the user's last turn; always whole.
        others: the other turns but the system's, in their order.
        fits: whether a text is within the embedder's input length.
    """
    text = question
    for turn in reversed(others):
        # Turns go before what is already there, so that the question ends the text.
        if not fits(longer := f"{turn}\n{text}"):
            break
        text = longer
    return text


def split_turns(row: Row) -> tuple[str, tuple[str, ...]]:
    """Returns the question of a row and its other turns, as the gateway passes them to the router."""
    if isinstance(row, Question):
        return row.question, ()
    last = max((n for n, turn in enumerate(row.prompt) if turn.role == "user"), default=-1)
    others = (
        turn_text(turn.text, ((call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in turn.tool_calls))
        for n, turn in enumerate(row.prompt)
        if n != last and turn.role != "system"
    )
    return row.user_text, tuple(filter(None, others))
