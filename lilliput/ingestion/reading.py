"""Reads the raw rows of a source: JSON Lines, Parquet, a folder of them, or a dataset on the hub."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lilliput.config import is_hub
from lilliput.errors import DataError
from lilliput.ingestion.hub import read_hub
from lilliput.ingestion.raw_rows import RawRow, Split, arrow_rows, sides

SUFFIXES = (".jsonl", ".parquet")
_BATCH_ROWS = 256


def read_source(source: str, root: Path) -> Iterator[RawRow]:
    """Yields the rows of `source` in a fixed order, with little memory.

    Args:
        source: as in params.yaml.
        root: folder that a path is relative to.

    Raises:
        DataError: there is no such file, or it is not of a supported type.
        SourceError: the hub's dataset cannot be fetched.
    """
    if is_hub(source):
        yield from read_hub(source)
        return
    path = root / source
    if path.is_dir():
        files = _files(path)
        of_name = sides([file.name for file in files])
        for file in files:
            name = f"{source.rstrip('/')}/{file.relative_to(path)}"
            yield from _read_file(file, name, of_name[file.name])
    elif path.suffix in SUFFIXES:
        yield from _read_file(path, source, None)
    elif path.exists():
        raise DataError(f"{source}: not .jsonl or .parquet; convert it and correct `data.source` in params.yaml")
    else:
        raise DataError(f"{source}: no such file; correct `data.source` in params.yaml")


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder}: no .jsonl or .parquet file in it; correct `data.source` in params.yaml")
    return files


def _read_file(path: Path, name: str, split: Split | None) -> Iterator[RawRow]:
    try:
        yield from (_read_parquet if path.suffix == ".parquet" else _read_jsonl)(path, name, split)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; correct `data.source` in params.yaml") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error}); restore the file") from None


def _read_jsonl(path: Path, name: str, split: Split | None) -> Iterator[RawRow]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield RawRow(f"{name}:{number}", _parse(line), split)


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_reject_constant)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (at byte {error.start} of the line); save the file as UTF-8"
    except RecursionError:
        return "nested too deeply; flatten it"
    except ValueError as error:
        return f"not JSON ({error}); correct it: one JSON object a line"
    return row if isinstance(row, dict) else f"a {type(row).__name__}, not a JSON object; write one object a line"


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _read_parquet(path: Path, name: str, split: Split | None) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from arrow_rows((batch.to_pylist() for batch in file.iter_batches(_BATCH_ROWS)), name, split)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: not a Parquet file that can be read ({error}); restore it") from None
