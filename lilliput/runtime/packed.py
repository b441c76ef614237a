"""Packs prompts and continuations into one sequence without padding; the mask separates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lilliput.runtime.protocol import Ids


@dataclass
class Pack:
    """Prompts, each followed by its continuations, as one sequence.

    The last token of a continuation is omitted, since nothing is predicted from it.

    Attributes:
        shared: length of the prefix that all prompts share; it is not in the pack, and all tokens attend to it.
        ids: tokens (length,).
        positions: position of each token in its own text, including the shared prefix.
        segments: number of the prompt or continuation of each token.
        parents: segment that each token's segment follows; a prompt's parent is itself.
        places: index of the token from which each scored token is predicted.
        targets: the scored tokens.
        owners: number of the continuation of each scored token, within the pack.
        continuations: number of continuations.
    """

    shared: int = 0
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    continuations: int = 0

    @classmethod
    def of(
        cls, rows: Sequence[int], prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], shared: int
    ) -> Pack:
        """Returns the pack of the prompts with numbers `rows` and their continuations."""
        pack = cls(shared)
        for row in rows:
            pack._add(prompts[row], continuations[row])
        return pack

    def _add(self, prompt: Ids, continuations: Sequence[Ids]) -> None:
        parent = self._segment(prompt[self.shared :], self.shared)
        last = len(self.ids) - 1
        for ids in continuations:
            first = len(self.ids)
            self._segment(ids[:-1], len(prompt), parent)
            self.places += [last, *range(first, len(self.ids))][: len(ids)]
            self.targets += ids
            self.owners += [self.continuations] * len(ids)
            self.continuations += 1

    def _segment(self, ids: Ids, position: int, parent: int | None = None) -> int:
        number = self.segments[-1] + 1 if self.segments else 0
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.segments += [number] * len(ids)
        self.parents += [number if parent is None else parent] * len(ids)
        return number

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns the attention mask, (1, 1, length, shared + length): 0 where a token may attend, else the minimum."""
        segments = torch.tensor(self.segments, device=device)
        parents = torch.tensor(self.parents, device=device)[:, None]
        seen = ((segments == segments[:, None]) | (segments == parents)).tril()
        seen = torch.cat([seen.new_ones(len(seen), self.shared), seen], dim=1)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[
            None, None
        ]


def group_into_packs(
    prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], shared: int, tokens: int
) -> list[list[int]]:
    """Groups all prompts, by number and in order, into packs of at most `tokens` tokens; a longer prompt is alone.

    Short packs cost less: attention covers all pairs of tokens in a pack, and the mask discards most of them.
    """
    rows: list[list[int]] = []
    room = 0
    for row, (prompt, choices) in enumerate(zip(prompts, continuations, strict=True)):
        length = len(prompt) - shared + sum(len(ids) - 1 for ids in choices)
        if not rows or length > room:
            rows.append([])
            room = tokens
        rows[-1].append(row)
        room -= length
    return rows
