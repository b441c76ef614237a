"""Rows as they were read, with their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_SIDE = re.compile(r"(train|test)(?=[-_.]|$)")
Split = Literal["train", "test"]


@dataclass(frozen=True)
class RawRow:
    """A row as it was read.

    Attributes:
        place: file and line, or file and row.
        value: the row; a text if it could not be read: the problem and the remedy.
        split: by the name of the file or of the hub's split.
    """

    place: str
    value: dict[str, Any] | str
    split: Split | None = None


def without_nulls(value: Any) -> Any:
    """Returns `value` without keys that are null: Arrow gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def sides(names: Sequence[str]) -> dict[str, Split | None]:
    """Returns the side of the split for names such as `train`, `train-00000` and `test.jsonl`.

    None for all unless there are both sides: most datasets have only one part, `train`, of which some is held out.
    """
    found = {name: match[1] if (match := _SIDE.match(name)) else None for name in names}
    if not {"train", "test"} <= set(found.values()):
        return dict.fromkeys(names)
    return {name: "train" if side == "train" else "test" if side else None for name, side in found.items()}


def arrow_rows(batches: Iterable[list[dict[str, Any]]], name: str, split: Split | None) -> Iterator[RawRow]:
    """Yields the rows of Arrow batches, without null keys and with their number, from 1."""
    number = 0
    for batch in batches:
        for row in batch:
            number += 1
            yield RawRow(f"{name}: row {number}", without_nulls(row), split)
