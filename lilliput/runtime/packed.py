"""Packs prompts and continuations into one sequence without padding, in which common beginnings occur once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lilliput.chat.template import shared_prefix_length
from lilliput.runtime.protocol import Ids

if TYPE_CHECKING:  # llama.cpp needs no mask
    import torch


@dataclass
class Pack:
    """Prompts with their continuations as a tree of tokens, in one sequence.

    A causal model's output for a token depends only on the tokens before it. So texts with a common beginning share its
    nodes, and a node attends to itself and its ancestors. The last token of a continuation is omitted, since nothing is
    predicted from it.

    Attributes:
        shared: length of the prefix that all prompts share; it is not in the pack, and all tokens attend to it.
        ids: tokens (length,).
        positions: position of each token in its own text, including the shared prefix.
        parents: index of the token before each token, smaller than its own; -1 after the shared prefix.
        places: index of the token from which each scored token is predicted.
        targets: the scored tokens.
        owners: number of the continuation of each scored token, within the pack.
        continuations: number of continuations.
    """

    shared: int = 0
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    continuations: int = 0
    _nodes: dict[tuple[int, int], int] = field(default_factory=dict)  # by parent and token

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
        last = self._path(prompt[self.shared :], self.shared, -1)[-1]
        for ids in continuations:
            self.places += [last, *self._path(ids[:-1], len(prompt), last)][: len(ids)]
            self.targets += ids
            self.owners += [self.continuations] * len(ids)
            self.continuations += 1

    def _path(self, ids: Ids, position: int, parent: int) -> list[int]:
        """Returns the nodes of `ids`, which follow the node `parent`; adds those that do not exist."""
        path = []
        for offset, token in enumerate(ids):
            node = self._nodes.setdefault((parent, token), len(self.ids))
            if node == len(self.ids):
                self.ids.append(token)
                self.positions.append(position + offset)
                self.parents.append(parent)
            path.append(node)
            parent = node
        return path

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns the attention mask, (1, 1, length, shared + length): 0 where a token may attend, else the minimum."""
        import torch

        seen = torch.eye(len(self.ids), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        seen = torch.cat([seen.new_ones(len(seen), self.shared), seen], dim=1)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[None, None].to(device)


def shared_length(prompts: Sequence[Ids]) -> int:
    """Returns the length of the prefix that all prompts share, excluding the last token of each."""
    return shared_prefix_length([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else 0


def group_into_packs(
    prompts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], shared: int, tokens: int
) -> list[list[int]]:
    """Groups all prompts, by number, into packs of at most `tokens` tokens; a longer prompt is alone.

    Prompts with a common beginning are neighbours. Short packs cost less: attention covers all pairs of tokens in a
    pack, and the mask discards most of them.
    """
    groups: list[list[int]] = []
    room = 0
    for row in sorted(range(len(prompts)), key=lambda row: list(prompts[row])):
        length = len(prompts[row]) - shared + sum(len(ids) - 1 for ids in continuations[row])
        known = shared_prefix_length([prompts[groups[-1][-1]], prompts[row]]) - shared if groups else 0
        if not groups or length - known > room:
            groups.append([])
            room, known = tokens, 0
        groups[-1].append(row)
        room -= length - known
    return groups
