"""The champions that changed and of whom nobody was told yet: one line each, until a flow tells Prefect.

On disk, because the stage `promote` knows no Prefect, and because a killed flow must not keep the news to itself.
"""

from __future__ import annotations

import json
from pathlib import Path

from lilliput.promote import Decision
from lilliput.redaction import redacted
from tasks import layout


def note(device: str, decision: Decision, version: str | None, before: str | None) -> None:
    """Writes down that another model reigns on `device`; in a workspace, where nobody is served from, nothing.

    Args:
        device: whose champion it is.
        decision: names the champion, and why it is.
        version: of the champion in the registry; None if there is none any more.
        before: who was champion, by name.
    """
    if layout.is_workspace(Path.cwd()):
        return
    told = {"device": device, "champion": decision.champion, "version": version, "before": before}
    layout.MLRUNS.mkdir(exist_ok=True)
    with layout.CHANGES.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(told | {"reason": redacted(decision.reason)}) + "\n")


def read(folder: Path) -> list[dict[str, str | None]]:
    """What was noted in `folder`, the oldest first."""
    path = folder / layout.CHANGES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def forget(folder: Path) -> None:
    """Removes what was noted, once it is told."""
    (folder / layout.CHANGES).unlink(missing_ok=True)
