"""Control tokens in users' text, split so that they cannot begin or end a turn.

A chat template puts texts and control tokens into one string, and whoever tokenises it reads every control token in it
as one: `<|im_end|>` in a question would end the user's turn. A word joiner, which is invisible, splits such texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WORD_JOINER = "\u2060"
_LIKE_CONTROL = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")


class ControlTokens:
    """The control tokens of a model.

    Args:
        texts: of the tokens.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        found = sorted({text for text in texts if len(text) > 1}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, found))) if found else None

    def split(self, text: str) -> str:
        """`text`, with a word joiner after the first character of each control token."""
        if self._pattern is None:
            return text
        while self._pattern.search(text):  # again, for what overlapped
            text = self._pattern.sub(lambda match: match[0][0] + WORD_JOINER + match[0][1:], text)
        return text


def looks_like_control(text: str) -> bool:
    """Whether an added token of no stated kind is written as control tokens are; others are often runs of spaces."""
    return _LIKE_CONTROL.fullmatch(text) is not None
