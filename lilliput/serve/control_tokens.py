"""The control tokens of a compiled model, read from its file.

llama.cpp's server applies the chat template and then reads every control token in the result as one, also those in a
message's content. It has no option against that, and its other endpoints do not give answers of the chat API; so the
gateway splits them.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lilliput.chat.control_tokens import ControlTokens, looks_like_control
from lilliput.errors import ArtifactError

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_NORMAL, _BYTE = 1, 6  # gguf.TokenType: neither is found by its text
_USER_DEFINED = 4  # found by its text, and often harmless: runs of spaces, say
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_control_tokens(path: Path) -> ControlTokens:
    """The control tokens that the GGUF file at `path` declares, with user-defined ones that look like control tokens.

    Raises:
        ArtifactError: it has no vocabulary, or is no GGUF file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            known = _Metadata(content).arrays({TOKENS, TYPES})
        pairs = list(zip(known[TOKENS], known[TYPES], strict=True))
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ArtifactError(
            f"{path}: the vocabulary cannot be read ({type(error).__name__}: {error}); compile the model again"
        ) from None
    return ControlTokens(text for text, kind in pairs if _is_control(text, kind))


def _is_control(text: str, kind: int) -> bool:
    if kind in (_NORMAL, _BYTE):
        return False
    return kind != _USER_DEFINED or looks_like_control(text)


class _Metadata:
    """Arrays of a GGUF file's head; gguf's own reader takes seconds for a vocabulary, this one hundredths."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._place = content, 4
        if content[:4] != b"GGUF":
            raise ValueError("no GGUF file")

    def arrays(self, names: set[str]) -> dict[str, Sequence[Any]]:
        _, _, count = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        found = {}
        for _ in range(count):
            name, value = self._string(), self._value(self._scalar("I"))
            if name in names:
                found[name] = value
            if len(found) == len(names):
                break
        return found

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        of, count = self._scalar("I"), self._scalar("Q")
        if of in (_STRING, _ARRAY):
            return [self._value(of) for _ in range(count)]
        return self._scalars(f"<{count}{_SCALARS[of]}")

    def _string(self) -> str:
        length = self._scalar("Q")
        self._place += length
        return self._content[self._place - length : self._place].decode("utf-8", errors="replace")

    def _scalar(self, kind: str) -> Any:
        return self._scalars(f"<{kind}")[0]

    def _scalars(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._content, self._place)
        self._place += struct.calcsize(form)
        return values
