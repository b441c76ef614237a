"""Rows as they were read, with their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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


def split_of_name(name: str) -> Split | None:
    """Returns `train` or `test` for names such as `train`, `train-00000` and `test.jsonl`; otherwise None."""
    match = _SIDE.match(name)
    if match is None:
        return None
    return "train" if match[1] == "train" else "test"


def arrow_rows(batches: Iterable[list[dict[str, Any]]], name: str, split: Split | None) -> Iterator[RawRow]:
    """Yields the rows of Arrow batches, without null keys and with their number, from 1."""
    number = 0
    for batch in batches:
        for row in batch:
            number += 1
            yield RawRow(f"{name}: row {number}", without_nulls(row), split)
