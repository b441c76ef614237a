"""Where a run does its work: the project itself, or for other parameters a workspace of its own beside it.

A workspace is a copy of the code with its own params.yaml, its own DVC repository and its own results, so that a
rehearsal never touches the models of the real run. DVC's cache is the project's: what one of them made from the same
inputs, the others restore. `dvc repro` works in a workspace as it does in the project.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dvc.repo import Repo

from flows.engine.lineage import no_dvc_in
from lilliput.errors import ConfigError, DataError
from lilliput.params import load_params
from tasks.process.folder_lock import folder_lock

PROJECT = Path(__file__).resolve().parents[2]
_CODE = ("lilliput", "tasks", "corpora")
_DVC_CONFIG = """\
[core]
    analytics = false
    no_scm = true
[cache]
    dir = ../../../.dvc/cache
    type = "reflink,hardlink,copy"
"""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds `folder` for one flow: other runs and `dvc` commands are refused there and change nothing.

    Raises:
        BusyError: another run or a `dvc` command is at work there.
    """
    with folder_lock(folder), no_dvc_in(folder):
        yield


def open_workspace(params_file: Path, kind: str = "") -> Path:
    """The folder to work in for `params_file`, checked and ready.

    The project's own params.yaml means the project; any other file a workspace under `workspaces/`, named after it.
    Work of a certain `kind` has a workspace of its own for each file.

    Raises:
        ConfigError: the parameters are refused, or a run is at work in the workspace (BusyError).
        DataError: the question file they name is not there.
    """
    params = load_params(params_file)
    source = Path(params.data.source)
    home = PROJECT if (PROJECT / source).exists() else params_file.parent
    if not (home / source).exists():
        raise DataError(f"{params_file}: data.source: no such file: {source}; paths are relative to the project")
    if params_file.resolve() == PROJECT / "params.yaml" and not kind:
        return PROJECT
    if not params_file.stem.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{params_file}: its name names a workspace; use letters, digits, - and _")
    folder = PROJECT / "workspaces" / ".".join(filter(None, [params_file.stem, kind]))
    return make_workspace(folder, params_file, home / source, source)


def make_workspace(folder: Path, params_file: Path, data_source: Path, data_name: Path) -> Path:
    """Brings the code and the parameters in `folder` up to date; models and results there stay as they are.

    Raises:
        BusyError: a run is at work there, and its code and parameters must not change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        _copy_into(folder, params_file, data_source, data_name)
    return folder


def _copy_into(folder: Path, params_file: Path, data_source: Path, data_name: Path) -> None:
    for name in _CODE:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(PROJECT / name, folder / name)
    shutil.copyfile(params_file, folder / "params.yaml")
    (folder / "offload").mkdir(exist_ok=True)  # the report depends on it, also where nothing is served
    (folder / data_name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data_source, folder / data_name)
    if not (folder / ".dvc").exists():
        Repo.init(str(folder), no_scm=True).close()
        (folder / ".dvc" / "config").write_text(_DVC_CONFIG, encoding="utf-8")
