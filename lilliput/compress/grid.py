"""The grid of AutoGPTQ's format: each group of weights has a scale and a zero point; weight = scale · (code − zero)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STORED = torch.float16  # dtype of scales in the file
_TRIED = 80  # ranges that the search for a scale tries: 100 % of the group's range, 99 %, … 21 %


@dataclass(frozen=True)
class Grid:
    """How weights become codes.

    Attributes:
        bits: per code.
        group_size: weights of a row that share a scale and a zero.
        symmetric: whether every zero is in the middle of the codes.
        scale_search: power of the rounding error that a search for each scale minimises; 0: no search, the scale fits
            the extremes.
        scale_dtype: scales are rounded to it before any code is chosen, so that codes fit the stored scales.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_search: float = 0.0
    scale_dtype: torch.dtype = STORED

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def fit(self, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scales and zeros, float (rows,), for the weights `group`, float (group size, rows).

        Raises:
            OverflowError: a scale does not fit into `scale_dtype`.
        """
        low, high = group.amin(0).clamp(max=0), group.amax(0).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = torch.where(low < 0, -high, low)
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scales, zeros = self._between(low, high)
        if self.scale_search:
            scales, zeros = self._search(group, low, high, scales, zeros)
        return scales, zeros

    def _between(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scales and zeros of the grids from `low` to `high`."""
        stored = ((high - low) / self.largest).to(self.scale_dtype).to(low.dtype)
        if torch.isinf(stored).any():
            raise OverflowError(f"a scale of {((high - low) / self.largest).max().item():.4g} does not fit")
        scales = stored.clamp(min=2.0**-24)  # the smallest positive float16
        if self.symmetric:
            return scales, torch.full_like(scales, (self.largest + 1) / 2)
        return scales, (-low / scales).round().clamp(0, self.largest)

    def _search(
        self, group: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scales and zeros of the shrunken range with the least Σ |rounding error| ** scale_search."""
        least = torch.full_like(scales, torch.inf)
        for step in range(_TRIED):
            share = 1 - step / 100
            for trial in self._candidates(share * low, share * high):
                error = (self.rounded(group, *trial) - group).abs_().pow_(self.scale_search).sum(0)
                better = error < least
                least = torch.where(better, error, least)
                scales, zeros = (torch.where(better, new, old) for new, old in zip(trial, (scales, zeros), strict=True))
        return scales, zeros

    def _candidates(self, low: torch.Tensor, high: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns the grid from `low` to `high`, and with four asymmetric codes that with the other nearest zero."""
        scales, zeros = self._between(low, high)
        if self.symmetric or self.bits != 2:
            return [(scales, zeros)]
        exact = -low / scales
        other = torch.where(zeros == exact.floor(), exact.ceil(), exact.floor()).clamp(0, self.largest)
        return [(scales, zeros), (scales, other)]

    def rounded(self, group: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Returns the weights `group` (group size, rows) rounded to nearest on the grid of `scales` and `zeros`."""
        return (group / scales).round_().clamp_(-zeros, self.largest - zeros).mul_(scales)


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight: W[o, i] = scales[o, g] · (codes[o, i] − zeros[o, g]) with g = groups[i].

    `lilliput.codes.Codes` is what compilers read back from a file, with groups in runs only.

    Attributes:
        codes: uint8 (outputs, inputs).
        scales: float32 (outputs, groups), values that `Grid.scale_dtype` represents.
        zeros: uint8 (outputs, groups).
        groups: int64 (inputs,).
        bits: per code.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor
    bits: int

    def weight(self) -> torch.Tensor:
        """Returns the weights, float32 (outputs, inputs)."""
        centred = self.codes.float() - self.zeros.float()[:, self.groups]
        return centred.mul_(self.scales[:, self.groups])

    def rows(self, counts: list[int]) -> list[QuantisedWeight]:
        """Returns the codes of layers that were stacked, `counts` rows each."""
        parts = (part.split(counts) for part in (self.codes, self.scales, self.zeros))
        layers = zip(*parts, strict=True)
        return [QuantisedWeight(codes, scales, zeros, self.groups, self.bits) for codes, scales, zeros in layers]


def to_nearest(weight: torch.Tensor, grid: Grid) -> QuantisedWeight:
    """Returns the codes of `weight`, float (outputs, inputs), rounded to nearest.

    Raises:
        OverflowError: a scale does not fit into the grid's dtype.
    """
    outputs, inputs = weight.shape
    groups = weight.reshape(-1, grid.group_size).T
    scales, zeros = grid.fit(groups)
    codes = (groups / scales).round_().clamp_(-zeros, grid.largest - zeros).add_(zeros)
    parts = (codes.T.reshape(weight.shape).to(torch.uint8), scales.reshape(outputs, -1))
    index = torch.arange(inputs, device=weight.device) // grid.group_size
    return QuantisedWeight(*parts, zeros.reshape(outputs, -1).to(torch.uint8), index, grid.bits)


def rounded(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns `weight`, float (outputs, inputs), rounded to nearest on `grid`."""
    groups = weight.reshape(-1, grid.group_size).T
    return grid.rounded(groups, *grid.fit(groups)).T.reshape(weight.shape)
