"""Runs families through the columns and keeps the outcome of each cell."""

from __future__ import annotations

import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lilliput.config import Params
from lilliput.errors import LilliputError
from tests.contexts import capitals
from tests.matrix.cells import COLUMNS, Row
from tests.matrix.families import FAMILIES, Family

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Cell:
    """The outcome of one column for one family.

    Attributes:
        outcome: `works`; `rejected` with a message for the user; `fault`: neither; `unreached`: the family was rejected
            at `load`.
        message: of the rejection or fault.
        notes: warnings that the user sees.
    """

    outcome: Literal["works", "rejected", "fault", "unreached"]
    message: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def run_family(
    family: Family, params: Params, columns: Iterable[str] = tuple(COLUMNS)
) -> Iterator[tuple[str, Cell]]:
    """Yields the outcome of each of `columns` for `family`; `load` is always the first."""
    with tempfile.TemporaryDirectory() as scratch:
        row = Row(family, Path(scratch), params, capitals())
        first = _run(row, "load")
        yield "load", first
        for column in columns:
            if column != "load":
                yield column, _run(row, column) if first.outcome == "works" else Cell("unreached")


def _run(row: Row, column: str) -> Cell:
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            COLUMNS[column](row)
            outcome, message = "works", ""
        except LilliputError as error:
            outcome, message = "rejected", str(error)
        except Exception as error:
            outcome, message = "fault", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    notes = [str(warning.message) for warning in caught if "lilliput" in warning.filename]
    seconds = round(time.perf_counter() - started, 1)
    return Cell(outcome, _without_paths(message, row), tuple(_without_paths(note, row) for note in notes), seconds)


def _without_paths(text: str, row: Row) -> str:
    return text.replace(f"{row.scratch}/", "").replace(str(row.scratch), "")


def save(family: Family, cells: dict[str, Cell]) -> None:
    """Writes the outcome of a family, beside those of other columns."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{family.slug}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    new = {column: {key: value for key, value in asdict(cell).items() if value and key != "seconds"} for column, cell in cells.items()}
    merged = {column: (kept | new)[column] for column in COLUMNS if column in kept | new}
    file.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")


def read() -> dict[str, dict[str, Cell]]:
    """Returns the kept outcomes by family and column."""
    found = {}
    for family in FAMILIES:
        file = RESULTS / f"{family.slug}.json"
        if file.is_file():
            found[family.name] = {column: Cell(**cell) for column, cell in json.loads(file.read_text()).items()}
    return found
