"""Linear layers that hold the codes of AutoGPTQ's format; their weight is computed for each product.

`compress/autogptq_format.py` packs codes in the same way and describes the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch.nn.functional import pad

from lilliput.codes import PARTS
from lilliput.stored_weights import StoredLinear, tensor_of

_WORD = 32


class CodesLinear(StoredLinear):
    """A linear layer with the buffers `qweight`, `qzeros`, `scales` and `g_idx` instead of a weight."""

    @property
    def weight(self) -> torch.Tensor:
        """A new copy of the weight, float32: scale · (code − zero), exactly the number that kernels use."""
        qweight, qzeros, scales, groups = (tensor_of(cast("torch.Tensor", self._buffers[part])) for part in PARTS)
        bits = len(qweight) * _WORD // self.in_features
        zeros = _zeros(qzeros.T, bits)[: self.out_features].float()
        weight = unpack(qweight, bits)[: self.in_features].T.contiguous().float()
        return weight.sub_(zeros[:, groups]).mul_(scales.T.float()[:, groups])

    def as_stored(self) -> torch.Tensor:
        """Returns the weight; codes have no other float form."""
        return self.weight


def hold_codes(linear: torch.nn.Linear, parts: Mapping[str, torch.Tensor]) -> None:
    """Replaces the weight of `linear` by codes, in place, so that hooks and a call in progress stay valid.

    Args:
        linear: its bias stays.
        parts: the buffers of `CodesLinear` by name.
    """
    del linear.weight
    for part in PARTS:
        linear.register_buffer(part, parts[part])
    linear.__class__ = CodesLinear


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns numbers, uint8 (32 · words / bits, columns), from int32 (words, columns), lowest bits first."""
    columns = words.shape[1]
    words = pad(words, (0, 0, 0, -len(words) % bits)).reshape(-1, bits, columns)
    numbers = torch.empty(len(words), _WORD, columns, dtype=torch.uint8, device=words.device)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        number = (words[:, word] >> shift) & ((1 << min(bits, _WORD - shift)) - 1)
        if shift + bits > _WORD:
            number |= words[:, word + 1] << (_WORD - shift)
        numbers[:, place] = number & ((1 << bits) - 1)
    return numbers.reshape(-1, columns)


def _zeros(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the zeros (outputs, groups); the format stores each of them minus one, see `autogptq_format`."""
    if bits == 3:
        return (unpack(words, bits) + 1) & 7
    return unpack(words + sum(1 << shift for shift in range(0, _WORD, bits)), bits)
