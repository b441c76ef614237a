"""JSON Lines files whose rows are read and validated on access, so that a million rows need little memory."""

from __future__ import annotations

import json
import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast, overload

from pydantic import BaseModel, ValidationError

from lilliput.data.jsonl import index_lines
from lilliput.data.lazy import Lazy
from lilliput.errors import DataError, message_of

RowType = TypeVar("RowType", bound=BaseModel)
_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True)  # json.dumps would create an encoder per row
# Chat templates show functions and their parameters in the order of the row.
_JSON_IN_ORDER = json.JSONEncoder(ensure_ascii=False)


class RowFile(Sequence[RowType], Generic[RowType]):
    """The rows of a JSON Lines file, each validated as `kind` on access.

    Keeps 16 bytes per row, where the objects would take 1.5 KiB.

    Args:
        path: of the file; named in errors.
        kind: the class of the rows.
        stream: reads this open file instead; it may be closed and removed afterwards.

    Raises:
        DataError: the file is missing or empty; on access, the line is not a valid row.
    """

    def __init__(self, path: Path, kind: type[RowType], stream: IO[bytes] | None = None) -> None:
        self._path, self._kind, self._starts, self._numbers = path, kind, array("Q"), array("Q")
        try:
            if stream:
                self._index(stream)
            else:
                with path.open("rb") as opened:
                    self._index(opened)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; correct `data.source` in params.yaml") from None
        except OSError as error:
            message = f"{path}: cannot be read ({error.strerror}); correct `data.source` in params.yaml"
            raise DataError(message) from None
        weakref.finalize(self, os.close, self._file)
        if not self._starts:
            raise DataError(f"{path}: empty question set; give at least one question a line (docs/data.md)")

    def _index(self, stream: IO[bytes]) -> None:
        for number, start in index_lines(stream, self._path):
            self._starts.append(start)
            self._numbers.append(number)
        self._size = stream.tell()
        self._file = os.dup(stream.fileno())

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> RowType: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[RowType]: ...
    def __getitem__(self, place: int | slice) -> RowType | Sequence[RowType]:
        if isinstance(place, slice):
            return Lazy(self.__getitem__, range(*place.indices(len(self))))
        start = self._starts[place]
        end = self._starts[place + 1] if -1 != place < len(self) - 1 else self._size
        line, _, _ = os.pread(self._file, end - start, start).partition(b"\n")
        try:
            return self._kind.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{self.where(place)}: {explain(error)}; see docs/data.md for the format") from None

    def each_once(self) -> Iterator[RowType]:
        """Yields all rows and checks that ids are unique.

        Raises:
            DataError: a line is not a valid row, or an id is not unique; with file and line.
        """
        seen: set[str] = set()
        for place, row in enumerate(self):
            identity = cast("Any", row).id
            if identity in seen:
                raise DataError(f"{self.where(place)}: the id {identity!r} occurs twice; make ids unique")
            seen.add(identity)
            yield row

    def where(self, place: int) -> str:
        """Returns file and line of a row."""
        return f"{self._path}:{self._numbers[place]}"


def first_row(path: Path) -> Mapping[str, Any] | None:
    """Returns the first row of a JSON Lines file; None if there is none, or if it is not a JSON object.

    Raises:
        DataError: the file is missing or unreadable.
    """
    try:
        with path.open("rb") as stream:
            line = next((line for line in stream if line.strip()), b"")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct `data.source` in params.yaml") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); correct `data.source` in params.yaml") from None
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def line_of(row: BaseModel, *, in_order: bool = False) -> str:
    """Returns the JSON line of `row`, with sorted keys, or `in_order` to keep the order of keys."""
    encoder = _JSON_IN_ORDER if in_order else _JSON
    return encoder.encode(row.model_dump(mode="json", exclude_none=True)) + "\n"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes `lines`; the same lines give the same bytes."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(lines)


def explain(error: ValidationError) -> str:
    """Returns key, problem and remedy of the first problem in `error`."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "missing":
            return f"the key `{key}` is missing; add it"
        case "extra_forbidden":
            return f"unknown key `{key}`; remove it or correct its name"
    message = message_of(problem)
    return f"`{key}`: {message}" if key else message
