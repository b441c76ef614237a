"""Splits control tokens in users' text so that they cannot start or end a turn.

A chat template puts texts and control tokens into one string, and a tokeniser reads every control token in that string
as one: `<|im_end|>` in a question would end the user's turn. An invisible word joiner splits such texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

WORD_JOINER = "\u2060"
_LIKE_CONTROL = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")


class ControlTokens:
    """The control tokens of a model.

    Args:
        texts: texts of the tokens.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        ordered = sorted({text for text in texts if len(text) > 1}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def split(self, text: str) -> str:
        """Returns `text` with a word joiner after the first character of each control token."""
        if self._pattern is None:
            return text
        while self._pattern.search(text):  # again, because control tokens may overlap
            text = self._pattern.sub(lambda match: match[0][0] + WORD_JOINER + match[0][1:], text)
        return text

    def split_in(self, value: Any) -> Any:
        """Returns the JSON value with `split` applied to all its texts, also to keys."""
        if isinstance(value, str):
            return self.split(value)
        if isinstance(value, dict):
            return {self.split(key): self.split_in(entry) for key, entry in value.items()}
        return [self.split_in(entry) for entry in value] if isinstance(value, list | tuple) else value


def looks_like_control(text: str) -> bool:
    """Whether an added token of unknown kind looks like a control token (others are often runs of spaces)."""
    return _LIKE_CONTROL.fullmatch(text) is not None
