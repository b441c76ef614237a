"""Sequences whose items are made when they are wanted: a million rows that nobody has to hold."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar, overload

Item = TypeVar("Item")


class Lazy(Sequence[Item], Generic[Item]):
    """What `make` gives for each of `places`, made anew each time it is asked for."""

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
    """The `rows` at `places`, in that order; 8 bytes each are kept."""
    return Lazy(rows.__getitem__, array("Q", places))
