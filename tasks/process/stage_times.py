"""When a stage ran: noted beside the digest of its record, so that a restored record has the times of its making."""

from __future__ import annotations

from pathlib import Path

from lilliput.artifacts import file_sha256, find_record, write_json
from lilliput.records import StageTimes
from tasks import layout


def note_times(kind: str, name: str, started_s: float, ended_s: float) -> None:
    """Notes when the stage `kind@name` wrote its record; nothing for stages without one."""
    record = layout.RECORDS.get(kind)
    if record and (path := record(name)).exists():
        write_json(layout.times(file_sha256(path)), StageTimes(started_s=started_s, ended_s=ended_s))


def times_of(record: Path) -> StageTimes | None:
    """Returns when the stage ran that wrote `record`; None if it ran elsewhere."""
    return find_record(StageTimes, layout.times(file_sha256(record))) if record.exists() else None
