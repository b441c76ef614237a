"""Sequences that create their items on access, so that a million rows need little memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar, overload

Item = TypeVar("Item")


class Lazy(Sequence[Item], Generic[Item]):
    """The items `make(place)` for each of `places`, created again on each access."""

    def __init__(self, make: Callable[[int], Item], places: Sequence[int]) -> None:
        self._make, self._places = make, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> Lazy[Item]: ...
    def __getitem__(self, place: int | slice) -> Item | Lazy[Item]:
        if isinstance(place, slice):
            return Lazy(self._make, self._places[place])
        return self._make(self._places[place])


def pick(rows: Sequence[Item], places: Iterable[int]) -> Lazy[Item]:
    """Returns a view of `rows` at `places`, in that order; it keeps 8 bytes per row."""
    return Lazy(rows.__getitem__, array("Q", places))
