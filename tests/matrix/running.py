"""Runs a family through the columns."""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from lilliput.config import Params
from lilliput.errors import LilliputError
from tests.contexts import capitals
from tests.matrix.cells import COLUMNS, Row
from tests.matrix.families import Family
from tests.matrix.outcomes import Cell


def run_family(family: Family, params: Params, columns: Iterable[str] = tuple(COLUMNS)) -> Iterator[tuple[str, Cell]]:
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
