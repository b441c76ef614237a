"""Champion changes that no flow has reported to Prefect yet: one JSON line each.

The outbox is a file, because the stage `promote` does not use Prefect and a killed flow must not lose a change.
"""

from __future__ import annotations

import json
from pathlib import Path

from lilliput.data.jsonl import read_rows
from lilliput.promote import Decision
from lilliput.redaction import redacted
from tasks import layout


def add(device: str, decision: Decision, version: str | None, before: str | None) -> None:
    """Adds a change of champion. Does nothing in a workspace, from which no device is served.

    Args:
        device: the device of the champion.
        decision: names the champion and the reason.
        version: the champion's version in the registry; None if there is no champion now.
        before: the name of the previous champion.
    """
    if layout.is_workspace(Path.cwd()):
        return
    change = {"device": device, "champion": decision.champion, "version": version, "before": before}
    layout.MLRUNS.mkdir(exist_ok=True)
    with layout.OUTBOX.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(change | {"reason": redacted(decision.reason)}) + "\n")


def read(folder: Path) -> list[dict[str, str | None]]:
    """Returns the changes in the outbox of `folder`, the oldest first."""
    path = folder / layout.OUTBOX
    return read_rows(path) if path.exists() else []


def clear(folder: Path) -> None:
    """Empties the outbox of `folder`."""
    (folder / layout.OUTBOX).unlink(missing_ok=True)
