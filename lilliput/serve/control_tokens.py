"""Reads the control tokens of a compiled model from its file.

llama.cpp's server applies the chat template, then parses control tokens in the whole prompt, also those in a message's
content. It has no option to prevent this, and its other endpoints do not speak the chat API. So the gateway splits
control tokens in messages.
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
_NORMAL, _BYTE = 1, 6  # gguf.TokenType: neither is parsed from text
_USER_DEFINED = 4  # parsed from text, and often harmless, as runs of spaces
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_control_tokens(path: Path) -> ControlTokens:
    """The control tokens in the GGUF file at `path`, and the user-defined tokens that look like control tokens.

    Raises:
        ArtifactError: the file has no vocabulary, or is not a GGUF file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            arrays = _Metadata(content).arrays({TOKENS, TYPES})
        pairs = list(zip(arrays[TOKENS], arrays[TYPES], strict=True))
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
    """Reads arrays in a GGUF header; the gguf package takes seconds for a vocabulary, this class hundredths."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._offset = content, 4
        if content[:4] != b"GGUF":
            raise ValueError("not a GGUF file")

    def arrays(self, names: set[str]) -> dict[str, Sequence[Any]]:
        _, _, count = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        arrays = {}
        for _ in range(count):
            name, value = self._string(), self._value(self._scalar("I"))
            if name in names:
                arrays[name] = value
            if len(arrays) == len(names):
                break
        return arrays

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        element, count = self._scalar("I"), self._scalar("Q")
        if element in (_STRING, _ARRAY):
            return [self._value(element) for _ in range(count)]
        return self._scalars(f"<{count}{_SCALARS[element]}")

    def _string(self) -> str:
        length = self._scalar("Q")
        self._offset += length
        return self._content[self._offset - length : self._offset].decode("utf-8", errors="replace")

    def _scalar(self, kind: str) -> Any:
        return self._scalars(f"<{kind}")[0]

    def _scalars(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._content, self._offset)
        self._offset += struct.calcsize(form)
        return values
