"""Where a result comes from: the git commit and DVC's hashes, as tags."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ruamel.yaml import YAML

CODE = ("lilliput", "tasks", "flows", "params.yaml", "dvc.yaml")


def git_commit() -> str | None:
    """The commit checked out here, with `-dirty` where the code differs from it; None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    return (commit + ("-dirty" if _git("status", "--porcelain", "--", *CODE) else "")) if commit else None


def dvc_hashes(candidate: str) -> dict[str, str]:
    """DVC's md5 of the models and data that `compress@<candidate>` read and wrote; empty before its first commit."""
    lock = Path("dvc.lock")
    if not lock.exists():
        return {}
    stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8")).get("stages", {})
    stage = stages.get(f"compress@{candidate}", {})
    entries = [*stage.get("deps", []), *stage.get("outs", [])]
    wanted = [entry for entry in entries if "md5" in entry and entry["path"].startswith(("models", "data"))]
    return {entry["path"]: str(entry["md5"]) for entry in wanted}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
