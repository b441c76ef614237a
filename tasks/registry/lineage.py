"""The origin of a result: the git commit and DVC's hashes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ruamel.yaml import YAML

CODE = ("lilliput", "tasks", "flows", "params.yaml", "dvc.yaml")


def git_commit() -> str | None:
    """Returns the checked-out commit, with `-dirty` if the code differs from it; None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    return (commit + ("-dirty" if _git("status", "--porcelain", "--", *CODE) else "")) if commit else None


def dvc_hashes(candidate: str) -> dict[str, str]:
    """Returns DVC's md5, by path, of the models and data that `candidate` was made from and of its own models.

    Empty until DVC has recorded these stages.
    """
    lock = Path("dvc.lock")
    if not lock.exists():
        return {}
    stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8")).get("stages", {})
    own_stages = [stages.get(f"{kind}@{candidate}", {}) for kind in ("compress", "evaluate")]
    entries = [entry for stage in own_stages for entry in [*stage.get("deps", []), *stage.get("outs", [])]]
    wanted = [entry for entry in entries if "md5" in entry and entry["path"].startswith(("models", "data"))]
    wanted += [
        out
        for stage in stages.values()
        for out in stage.get("outs", [])
        if out["path"].startswith(f"compiled/{candidate}/")
    ]
    return {entry["path"]: str(entry["md5"]) for entry in wanted}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
