"""Scoring without padding: prompts and continuations lie in one sequence, where each sees its own past and no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lilliput.runtime.protocol import Ids


@dataclass
class Pack:
    """Prompts, each followed by its continuations, as one sequence.

    A continuation's last token is left out, since nothing is predicted from it.

    Attributes:
        shared: how many tokens all prompts begin with; they are not in here, and everybody sees them.
        ids: tokens (length,).
        positions: of each token in its own text, `shared` included.
        segments: which prompt or continuation each token belongs to.
        parents: the segment each token follows; a prompt's is itself.
        places: of the token from which each scored token is predicted.
        targets: the scored tokens.
        owners: the continuation each scored token belongs to, counted through the pack.
        continuations: how many there are.
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
        """Prompts `rows`, each with what may follow it."""
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
        """What is added to attention scores, of shape (1, 1, length, shared + length): 0 where a token may look."""
        segments = torch.tensor(self.segments, device=device)
        parents = torch.tensor(self.parents, device=device)[:, None]
        seen = ((segments == segments[:, None]) | (segments == parents)).tril()
        seen = torch.cat([seen.new_ones(len(seen), self.shared), seen], dim=1)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[
            None, None
        ]


def packed_rows(
    prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], shared: int, tokens: int
) -> list[list[int]]:
    """All prompts in order, by number, as packs of at most `tokens` tokens each; a longer prompt has one to itself.

    Short packs cost less: every token is held against every other of its pack, and most of that is masked away.
    """
    rows: list[list[int]] = []
    room = 0
    for row, (prompt, own) in enumerate(zip(prompts, continuations, strict=True)):
        length = len(prompt) - shared + sum(len(ids) - 1 for ids in own)
        if not rows or length > room:
            rows.append([])
            room = tokens
        rows[-1].append(row)
        room -= length
    return rows
