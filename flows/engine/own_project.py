"""A project of the user's own, outside the clone: what a run writes there before it asks DVC.

The user writes `lilliput.yaml` and the data. Everything else is derived: the complete `params.yaml`, and a `dvc.yaml`
whose stages depend on digests of the installed code instead of a copy (docs/decisions/orchestration.md).
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.engine.folders import PROJECT
from lilliput.artifacts import write_text
from tasks.process.code_digests import DIGESTS, PACKAGES, digests, key_of

_TEMPLATES = Path("chat_templates")
_RESULTS = """\
# What Lilliput makes here. DVC keeps the large results, git keeps metrics/, costs/ and dvc.lock.
/models/
/data/
/synthetic/
/answers/
/compiled/
/bundles/
/offload/*/
/report/
/logged/
/logs/
/mlruns/
/deployments/
/simulations/
/workspaces/
/dvc_plots/
/hub:*/
/.cache/
/.flow-*.alive
/.democratize.*
"""
_DVC_CONFIG = """\
[core]
    analytics = false
    autostage = false
{no_scm}[cache]
    type = "reflink,hardlink,copy"
"""


def write_pipeline(folder: Path) -> None:
    """Writes what DVC and git need into `folder`: pipeline, digests of the code, ignored files. Keeps all else."""
    (folder / "offload").mkdir(exist_ok=True)  # the report depends on it, even if nothing is served
    (folder / _TEMPLATES).mkdir(exist_ok=True)
    if not any((folder / _TEMPLATES).iterdir()):  # DVC warns about empty folders
        shutil.copyfile(PROJECT / _TEMPLATES / "README.md", folder / _TEMPLATES / "README.md")
    _write_changed(folder / DIGESTS, _yaml(digests()), "The installed code; stages depend on these digests.")
    pipeline = YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text(encoding="utf-8"))
    _write_changed(folder / "dvc.yaml", _yaml(without_code(pipeline)), "The pipeline of the installed Lilliput.")
    if not (folder / ".dvcignore").exists():
        shutil.copyfile(PROJECT / ".dvcignore", folder / ".dvcignore")
    if not (folder / ".gitignore").exists():
        write_text(folder / ".gitignore", _RESULTS)
    if not (folder / ".dvc").exists():
        _initialise_dvc(folder)


def without_code(pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the pipeline with keys of the digests in place of files of the code."""
    stages = {name: _without_code(stage) for name, stage in pipeline["stages"].items()}
    return {**pipeline, "stages": stages}


def _without_code(stage: Mapping[str, Any]) -> dict[str, Any]:
    if "do" in stage:
        return {**stage, "do": _without_code(stage["do"])}
    code = [dep for dep in stage["deps"] if dep.split("/")[0] in PACKAGES]
    other = [dep for dep in stage["deps"] if dep not in code]
    keys = {str(DIGESTS): [key_of(dep) for dep in code]}
    return {**stage, "params": [*stage.get("params", []), keys], "deps": other}


def use_installed_code() -> None:
    """Lets the processes of stages import this code: their working directory has no copy of it."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(PROJECT)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT), *others])


def in_git(folder: Path) -> bool:
    """Whether `folder` is in a working tree of git."""
    if shutil.which("git") is None:
        return False
    command = ["git", "rev-parse", "--is-inside-work-tree"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() == "true"


def _initialise_dvc(folder: Path) -> None:
    from dvc.repo import Repo

    versioned = in_git(folder)
    with redirect_stdout(io.StringIO()):  # DVC's greeting would stand before a plan as JSON
        Repo.init(str(folder), no_scm=not versioned, subdir=versioned and not (folder / ".git").exists()).close()
    no_scm = "" if versioned else "    no_scm = true\n"
    (folder / ".dvc" / "config").write_text(_DVC_CONFIG.format(no_scm=no_scm), encoding="utf-8")


def _yaml(content: object) -> str:
    text, yaml = io.StringIO(), YAML()
    yaml.width = 4096
    yaml.dump(content, text)
    return text.getvalue()


def _write_changed(path: Path, text: str, purpose: str) -> None:
    """Writes `text` unless `path` holds it already: a run compares the file before and after."""
    content = f"# {purpose} Written by each run: changes here are lost.\n{text}"
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
