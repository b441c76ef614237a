"""JSON Lines: one JSON value per line in UTF-8. Only a line feed ends a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lilliput.artifacts import write_text
from lilliput.errors import DataError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads all rows of the file at `path` into memory.

    Raises:
        DataError: a line is not a JSON object; the message has the line number.
        OSError: the file is missing or unreadable.
    """
    return parse_rows(path.read_text(encoding="utf-8"), str(path))


def parse_rows(text: str, source: str) -> list[dict[str, Any]]:
    """Parses the rows in `text`; blank lines are skipped. Errors name `source` and the line.

    Raises:
        DataError: a line is not a JSON object.
    """
    # Not str.splitlines(): it also splits at U+2028 and U+0085, which JSON strings may contain.
    numbered = enumerate(text.split("\n"), 1)
    return [_parse(line, f"{source}:{number}") for number, line in numbered if line.strip()]


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error}); restore the file") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: a {type(row).__name__}, not a JSON object; restore the file")
    return row


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes `rows` to `path`, whole or not at all, with sorted keys and text as it is."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows))


def index_lines(stream: Iterable[bytes], path: Path) -> Iterator[tuple[int, int]]:
    """Yields the line number and the byte offset of each line that is not blank, after a byte order mark.

    Raises:
        DataError: a line is not UTF-8.
    """
    start = 0
    for number, line in enumerate(stream, 1):
        mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
        try:
            if line[mark:].decode("utf-8").strip():
                yield number, start + mark
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 text (at byte {start + mark + error.start}); save it as UTF-8"
            ) from None
        start += len(line)
