"""Packs texts with a common beginning into few rows, so that a model runs the beginning once per row.

A row holds the beginning, then what follows it in several texts. Positions continue from the beginning, and the
attention mask separates the texts, so that each token sees its own text alone, as if it were run by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from lilliput.chat.template import shared_prefix_length
from lilliput.decoders import attention_reach

ROW_TOKENS = 256  # without the beginning: attention covers all pairs of a row, so longer rows cost more
_PADDING = -1


@dataclass(frozen=True)
class Packed:
    """Rows of one batch.

    Attributes:
        ids: int64 (rows, length).
        positions: int64 (rows, length), of each token in its own text.
        texts: int64 (rows, length): 1 + the number of the token's text, 0 in the common beginning, −1 in padding.
        counts: float32 (rows, length), texts that the token stands for: all in the first row's beginning, which the
            other rows repeat; elsewhere 1, in padding and repetitions 0.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    texts: torch.Tensor
    counts: torch.Tensor

    def inputs(self, place: torch.device) -> dict[str, Any]:
        """Returns the arguments of a model's forward call on the device `place`, in float32 and without a cache."""
        ids, texts = self.ids.to(place), self.texts.to(place)
        padded = texts == _PADDING
        if ((texts == texts[:, :1]) | padded).all():  # one text a row: the model's own mask suits all kinds of layers
            return {"input_ids": ids, "attention_mask": (~padded).long(), "use_cache": False}
        seen = ((texts[:, :, None] == texts[:, None, :]) | (texts[:, None, :] == 0)).tril()
        mask = torch.zeros(seen.shape, device=place).masked_fill_(~seen, torch.finfo(torch.float32).min)
        positions = self.positions.to(place)
        return {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": positions, "use_cache": False}


def pack_texts(
    texts: Sequence[Sequence[int]], config: PretrainedConfig, *, row_tokens: int = ROW_TOKENS, batch_tokens: int
) -> list[Packed]:
    """Returns batches of rows that hold all `texts` in order.

    A model whose layers see more or less than all earlier tokens (a short window, a recurrent state) gets one text a
    row.

    Args:
        texts: token ids; none is empty.
        config: of the model.
        row_tokens: of a row, without the beginning; a longer text is alone in its row.
        batch_tokens: of a batch, padding included; a longer row is alone in its batch.
    """
    packable = attention_reach(config) >= max(map(len, texts))
    # Nothing that follows the beginning is empty, so that each text has a token of its own.
    shared = shared_prefix_length([text[:-1] for text in texts]) if packable and len(texts) > 1 else 0
    rows = _rows([len(text) - shared for text in texts], row_tokens if packable else 0)
    longest = shared + max(sum(len(texts[text]) - shared for text in row) for row in rows)
    at_once = max(1, batch_tokens // longest)
    return [
        _packed(texts, rows[start : start + at_once], shared, first=not start) for start in range(0, len(rows), at_once)
    ]


def _rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Groups texts of `lengths`, by number and in order, into rows of at most `row_tokens` tokens."""
    rows: list[list[int]] = []
    room = -1
    for text, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(text)
        room -= length
    return rows


def _packed(texts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], shared: int, *, first: bool) -> Packed:
    """Returns one batch; `first`: it has the row whose beginning counts."""
    ids, positions, owners, counts = [], [], [], []
    for row in rows:
        begin = list(texts[row[0]][:shared])
        ends = [(text, list(texts[text][shared:])) for text in row]
        ids.append(begin + [token for _, end in ends for token in end])
        positions.append([*range(shared), *(shared + place for _, end in ends for place in range(len(end)))])
        owners.append([0] * shared + [1 + text for text, end in ends for _ in end])
        counts.append([float(len(texts)) if first and not counts else 0.0] * shared + [1.0] * (len(ids[-1]) - shared))
    parts = ((ids, 0), (positions, 0), (owners, _PADDING), (counts, 0.0))
    return Packed(*(_padded(rows, value) for rows, value in parts))


def _padded(rows: Sequence[Sequence[float]], value: float) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
