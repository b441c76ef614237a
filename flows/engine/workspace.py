"""The folder of a run: the project itself, or for other parameters a workspace beside it.

A workspace is a copy of the code with its own params.yaml, DVC repository and results, so that a rehearsal never
touches the models of the real run. It shares the project's DVC cache: each restores what the other made from the same
inputs. `dvc repro` works in both.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lilliput.config import is_hub
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
def exclusive(folder: Path) -> Iterator[None]:
    """Locks `folder` for one flow: other runs and `dvc` commands are refused there and change nothing.

    Raises:
        BusyError: another run or a `dvc` command uses it.
    """
    from flows.engine.dvc_guard import dvc_locked  # imports DVC

    with folder_lock(folder), dvc_locked(folder):
        yield


def open_workspace(params_file: Path, kind: str = "") -> Path:
    """Checks `params_file` and returns the folder to work in.

    The project's own params.yaml means the project; any other file means a workspace under `workspaces/`, named after
    it. A `kind` of work, such as a search, has its own workspace for each file.

    Raises:
        ConfigError: the parameters are invalid, or a run uses the workspace (BusyError).
        DataError: the question file does not exist.
    """
    params = load_params(params_file)
    source = params.data.source
    home = PROJECT if is_hub(source) or (PROJECT / source).exists() else params_file.parent
    if not is_hub(source) and not (home / source).exists():
        raise DataError(f"{params_file}: data.source: no such file: {source}; paths are relative to the project")
    if params_file.resolve() == PROJECT / "params.yaml" and not kind:
        write_pin(PROJECT, source)
        return PROJECT
    if not params_file.stem.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{params_file}: a workspace is named after this file; use letters, digits, - and _")
    folder = PROJECT / "workspaces" / ".".join(filter(None, [params_file.stem, kind]))
    return make_workspace(folder, params_file, home / source, Path(source))


def make_workspace(folder: Path, params_file: Path, data_source: Path, data_name: Path) -> Path:
    """Copies code and parameters into `folder` and returns it; models and results there stay as they are.

    Raises:
        BusyError: a run or a `dvc` command uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = exclusive if (folder / ".dvc").exists() else folder_lock  # a new workspace has no DVC to lock
    with lock(folder):
        _copy_into(folder, params_file, data_source, data_name)
    return folder


def write_pin(folder: Path, source: str) -> None:
    """Writes a file with the name and content `source` into `folder` if it is a dataset on the hub.

    dvc.yaml depends on `data.source`, and DVC on files: this one changes with the commit.
    """
    pin = folder / source
    if is_hub(source) and not pin.exists():
        pin.parent.mkdir(exist_ok=True)
        pin.write_text(f"{source}\n", encoding="utf-8")


def _copy_data(source: Path, target: Path) -> None:
    if not source.exists() or source.resolve() == target.resolve():  # on the hub, or an absolute path
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _copy_into(folder: Path, params_file: Path, data_source: Path, data_name: Path) -> None:
    for name in _CODE:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(PROJECT / name, folder / name)
    shutil.copyfile(params_file, folder / "params.yaml")
    (folder / "offload").mkdir(exist_ok=True)  # the report depends on it, even if nothing is served
    _copy_data(data_source, folder / data_name)
    write_pin(folder, str(data_name))
    if not (folder / ".dvc").exists():
        from dvc.repo import Repo

        Repo.init(str(folder), no_scm=True).close()
        (folder / ".dvc" / "config").write_text(_DVC_CONFIG, encoding="utf-8")
