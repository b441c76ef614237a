"""Writes a source's rows in their normalised form to a temporary file, and derives missing groups."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lilliput.data.conversations import Conversation
from lilliput.data.lazy import Lazy
from lilliput.data.questions import Question, normalise
from lilliput.data.row_file import RowFile
from lilliput.data.rows import Row, wording
from lilliput.ingestion.intake import NO_GROUP, Intake
from lilliput.ingestion.near_duplicates import StoredTexts, cluster
from lilliput.ingestion.outcomes import Report

LARGEST_GROUP = "rows in the largest derived group"
_BUFFER_BYTES = 1 << 20
_TRAIN, _TEST = 1, 2  # bits: sides that rows are assigned to by hand


@dataclass(frozen=True)
class Staged:
    """The rows of a source in a temporary file that is removed with this object, and what became of the others."""

    rows: Sequence[Row]
    report: Report


def stage(source: str, root: Path, *, prompts: bool = False) -> Staged:
    """Reads `source` once, row by row, and returns its rows with ids and groups.

    Args:
        source: as in params.yaml.
        root: folder that a path is relative to, and for temporary files, which have no name there.
        prompts: rows need no answer; theirs is replaced by a placeholder.

    Raises:
        DataError: the source has mistakes or no usable row.
        SourceError: the hub's dataset cannot be fetched.
    """
    intake = Intake(source, root, prompts=prompts)
    with (
        tempfile.TemporaryFile(dir=root, buffering=_BUFFER_BYTES) as lines,
        tempfile.TemporaryFile(dir=root, buffering=_BUFFER_BYTES) as stream,
    ):
        texts, splits, derived = StoredTexts(stream), bytearray(), bytearray()
        for row, line in intake.lines():
            lines.write(line)
            derived.append(row.group == NO_GROUP)
            splits.append({None: 0, "train": _TRAIN, "test": _TEST}[row.split])
            texts.append(group_text(row))
        lines.seek(0)
        path = root / source
        if intake.report.format == "question":
            return Staged(RowFile(path, Question, lines), intake.report)
        rows = RowFile(path, Conversation, lines)
        if not any(derived):
            return Staged(rows, intake.report)
        return Staged(_with_groups(rows, texts, splits, derived, intake.report), intake.report)


def group_text(row: Row) -> str:
    """Returns the text by which rows without a group are grouped; rows of equal wording have equal texts."""
    plain = wording(row)
    return normalise(plain) or plain


def _with_groups(
    rows: RowFile[Conversation], texts: StoredTexts, splits: bytearray, derived: bytearray, report: Report
) -> Sequence[Conversation]:
    """Returns the rows with derived groups: near-duplicates share one, on each side of a split by hand."""
    clusters, digests = cluster(texts)
    names, sides, sizes = array("Q", digests), bytearray(len(rows)), array("Q", bytes(8 * len(rows)))
    given: dict[int, int] = {}  # first row with a group of its own, by cluster
    for place, number in enumerate(clusters):
        names[number] = min(names[number], digests[place])
        sides[number] |= splits[place]
        sizes[number] += 1
        if not derived[place]:
            given.setdefault(number, place)
    _note(report, clusters, splits, sides, sizes)

    def row_at(place: int) -> Conversation:
        row, number = rows[place], clusters[place]
        if not derived[place]:
            return row
        twin = rows[given[number]] if number in given else None
        if twin and row.split in (None, twin.split):
            return row.model_copy(update={"group": twin.group})
        side = f"-{row.split or 'train'}" if sides[number] == _TRAIN | _TEST else ""
        return row.model_copy(update={"group": f"{names[number]:016x}{side}"})

    return Lazy(row_at, range(len(rows)))


def _note(report: Report, clusters: array[int], splits: bytearray, sides: bytearray, sizes: array[int]) -> None:
    report.notes[LARGEST_GROUP] = max(sizes)
    report.notes["rows with a near-duplicate"] = sum(size for size in sizes if size > 1)
    pairs = zip(clusters, splits, strict=True)
    if leaked := sum(1 for number, split in pairs if split == _TEST and sides[number] == _TRAIN | _TEST):
        report.notes["test rows with a near-duplicate in training, by the source's own split"] = leaked
