"""Vocabularies in SentencePiece's form: reads `tokenizer.json` for llama.cpp, whose converter wants `tokenizer.model`.

Plain transformers stores `tokenizer.json` only, so checkpoints written here have no `tokenizer.model`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer

from lilliput.chat.template import encode_text

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"


@dataclass(frozen=True)
class Pieces:
    """The tokens of a vocabulary by id.

    Attributes:
        texts: with `▁` for spaces.
        scores: higher ones are merged first.
        kinds: control token, byte, user-defined, normal.
        space_first: whether a space is put before a text, which in a prompt follows a control token.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[gguf.TokenType]
    space_first: bool

    def write(self, writer: gguf.GGUFWriter, rows: int) -> None:
        """Writes the vocabulary for llama.cpp.

        Args:
            writer: of the GGUF file.
            rows: of the embedding table; those without a token are written as unused. Tokens without a row are left
                out.
        """
        unused = [f"[PAD{number}]" for number in range(len(self.texts), rows)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*self.texts[:rows], *unused])
        writer.add_token_scores([*self.scores[:rows], *(min(self.scores) for _ in unused)])
        writer.add_token_types([*self.kinds[:rows], *(gguf.TokenType.UNUSED for _ in unused)])
        writer.add_add_space_prefix(self.space_first)


def read_pieces(directory: Path) -> Pieces | None:
    """Returns the vocabulary of the checkpoint in `directory`; None if it has another form.

    llama.cpp merges pieces by the score of the merged piece, so scores follow the order of the merges.
    """
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"model": {}}
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {number: text for text, number in model["vocab"].items()} | {n: t["content"] for n, t in added.items()}
    texts = [by_id.get(number, f"[PAD{number}]") for number in range(max(by_id) + 1)]
    ranks = _ranks(model["merges"])
    scores = [-float(ranks.get(text, len(ranks))) for text in texts]
    kinds = [_kind(text, added.get(number), number in by_id) for number, text in enumerate(texts)]
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
    control = next((token["content"] for token in added.values() if token["special"]), "")
    after_control = tokenizer.convert_ids_to_tokens(encode_text(tokenizer, f"{control}a"))[1 if control else 0]
    return Pieces(texts, scores, kinds, after_control.startswith(_SPACE))


def _ranks(merges: Sequence[str | Sequence[str]]) -> dict[str, int]:
    """Returns the place of the first merge that makes each piece."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return ranks


def _kind(text: str, added: dict[str, Any] | None, known: bool) -> gguf.TokenType:
    if not known:
        return gguf.TokenType.UNUSED
    if added:
        return gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if _BYTE.fullmatch(text) else gguf.TokenType.NORMAL
