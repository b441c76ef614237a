"""Compares the tokenizer that transformers reads from a GGUF file with llama.cpp's, and repairs a known difference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from lilliput.chat.template import conversation, encode_text, render
from lilliput.errors import SourceError
from lilliput.gguf_source.header import USE_SAFETENSORS, Header

_SENTENCES = (
    "Answer briefly. The river rises in 1912, 12345 m high;  two spaces\n\nand I don't know.",
    "Zürich's Ω 東京 🙂 ~",
)
_SPACE = "▁"
_MAX_CONTROL = 8  # tokens that sentences are tried after
_SHOWN = 6  # tokens in a message


def probe_texts(tokenizer: PreTrainedTokenizerBase, new_ids: Collection[int]) -> list[str]:
    """Returns texts to encode: sentences after control tokens, as in prompts, and a prompt.

    Sentences alone are tried only where there is no control token: a space before the first text of all depends on the
    engine, and prompts begin with a control token.

    Args:
        tokenizer: the source's.
        new_ids: tokens that the file does not have, because they were added for a chosen chat template.
    """
    added = cast("Any", tokenizer).added_tokens_decoder
    control = [token.content for number, token in added.items() if token.special and number not in new_ids]
    sentences = [f"{token}{text}" for token in control[:_MAX_CONTROL] or [""] for text in _SENTENCES]
    prompt = [] if new_ids else [render(tokenizer, conversation(_SENTENCES[1], _SENTENCES[0]))]
    return [*sentences, *prompt]


def require_same_encodings(
    header: Header, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], expected: Sequence[Sequence[int]]
) -> None:
    """Compares the encodings of `texts` with llama.cpp's; repairs the tokenizer in place where a known cause remains.

    Args:
        header: of the GGUF file.
        tokenizer: as transformers reads it.
        texts: from `probe_texts`.
        expected: llama.cpp's ids of each text.

    Raises:
        SourceError: an encoding differs.
    """
    if _difference(tokenizer, texts, expected):
        _put_spaces_after_control_tokens(tokenizer)
    if difference := _difference(tokenizer, texts, expected):
        text, place, actual, wanted = difference
        names = cast("Any", tokenizer).convert_ids_to_tokens
        raise SourceError(
            f"{header.file}: the tokenizer that transformers reads from this file encodes {text!r} differently from "
            f"llama.cpp from token {place} on: {_shown(names, actual, place)}, where llama.cpp has "
            f"{_shown(names, wanted, place)}. The model would be trained and evaluated with wrong tokens; "
            f"{USE_SAFETENSORS}"
        )


def _put_spaces_after_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Changes a vocabulary in SentencePiece's form to put a space before the text after each control token.

    llama.cpp and SentencePiece do so. transformers' reader of GGUF files puts it before the first text only.
    """
    backend = cast("Any", tokenizer).backend_tokenizer
    spaces = backend.pre_tokenizer
    if isinstance(spaces, pre_tokenizers.Metaspace) and spaces.prepend_scheme == "first" and not spaces.split:
        own = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([*own, normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        backend.pre_tokenizer = None


def _difference(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], expected: Sequence[Sequence[int]]
) -> tuple[str, int, list[int], list[int]] | None:
    """Returns the first text with another encoding, the place of the first other token, and both encodings."""
    for text, wanted in zip(texts, expected, strict=True):
        actual = encode_text(tokenizer, text)
        if actual != list(wanted):
            pairs = zip(actual, wanted, strict=False)
            place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(actual), len(wanted)))
            return text, place, actual, list(wanted)
    return None


def _shown(names: Any, ids: Sequence[int], place: int) -> str:
    return " ".join(map(repr, names(ids[place : place + _SHOWN]))) or "nothing"
