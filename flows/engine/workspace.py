"""The folder of a run: the project itself, or for other parameters a workspace beside it.

A workspace is a copy of the code with its own params.yaml, DVC repository and results, so that a rehearsal never
touches the models of the real run. It shares the project's DVC cache: each restores what the other made from the same
inputs. `dvc repro` works in both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lilliput.config import Params, is_hub
from lilliput.errors import ConfigError, DataError
from lilliput.params import load_params
from tasks import layout
from tasks.process.folder_lock import folder_lock

PROJECT = Path(__file__).resolve().parents[2]
_CODE = ("lilliput", "tasks", "corpora", "chat_templates")
_DVC_CONFIG = """\
[core]
    analytics = false
    no_scm = true
[cache]
    dir = ../../../.dvc/cache
    type = "reflink,hardlink,copy"
[plots]
    html_template = ../../../.dvc/plots.html
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
        DataError: an input does not exist.
    """
    inputs = _inputs(load_params(params_file), params_file)
    if params_file.resolve() == PROJECT / "params.yaml" and not kind:
        for name in inputs:
            write_pin(PROJECT, name)
        return PROJECT
    if not params_file.stem.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{params_file}: a workspace is named after this file; use letters, digits, - and _")
    folder = PROJECT / "workspaces" / ".".join(filter(None, [params_file.stem, kind]))
    for name in inputs:
        _require_inside(name, params_file)
    return make_workspace(folder, params_file, inputs)


def make_workspace(folder: Path, params_file: Path, inputs: Mapping[str, Path]) -> Path:
    """Copies code, parameters and inputs into `folder` and returns it; models and results there stay as they are.

    Args:
        folder: of the workspace.
        params_file: becomes its params.yaml.
        inputs: files and folders by their names in params.yaml; a dataset on the hub becomes a pin.

    Raises:
        BusyError: a run or a `dvc` command uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = exclusive if (folder / ".dvc").exists() else folder_lock  # a new workspace has no DVC to lock
    with lock(folder):
        _copy_into(folder, params_file, inputs)
    return folder


def write_pin(folder: Path, source: str) -> None:
    """Writes a file with the name and content `source` into `folder` if it is a dataset on the hub.

    dvc.yaml depends on `data.source` and `prompts`, and DVC on files: this one changes with the commit.
    """
    pin = folder / source
    if is_hub(source) and not pin.exists():
        pin.parent.mkdir(exist_ok=True)
        pin.write_text(f"{source}\n", encoding="utf-8")


def is_synthetic(name: str, params: Params) -> bool:
    """Whether the stage `synthesise` makes the input `name`."""
    return any(Path(name).is_relative_to(layout.synthetic(teacher)) for teacher in params.synthesise)


def _inputs(params: Params, params_file: Path) -> dict[str, Path]:
    """Returns the inputs that no stage makes: their places by their names in params.yaml."""
    keys = {f"synthesise.{teacher}.prompts": config.prompts for teacher, config in params.synthesise.items()}
    inputs: dict[str, Path] = {}
    for key, name in ({"data.source": params.data.source} | keys).items():
        if is_synthetic(name, params):
            continue
        home = PROJECT if is_hub(name) or (PROJECT / name).exists() else params_file.parent
        inputs[name] = home / name
        if not is_hub(name) and not inputs[name].exists():
            raise DataError(f"{params_file}: {key}: no such file: {name}; paths are relative to the project")
    return inputs


def _require_inside(name: str, params_file: Path) -> None:
    """Rejects `../chats`: a workspace has its copy under the same name, which would replace something else there."""
    if Path(os.path.normpath(name)).parts[:1] in ((), (os.pardir,)):
        raise ConfigError(f"{params_file}: {name} is outside of the project; write its absolute path")


def _copy_data(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():  # an absolute path
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _copy_into(folder: Path, params_file: Path, inputs: Mapping[str, Path]) -> None:
    for name in _CODE:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(PROJECT / name, folder / name)
    shutil.copyfile(params_file, folder / "params.yaml")
    if (PROJECT / layout.HUB_COMMITS).exists():  # a name means the same commit in every workspace
        shutil.copyfile(PROJECT / layout.HUB_COMMITS, folder / layout.HUB_COMMITS)
    (folder / "offload").mkdir(exist_ok=True)  # the report depends on it, even if nothing is served
    for name, place in inputs.items():
        if is_hub(name):
            write_pin(folder, name)
        else:
            _copy_data(place, folder / name)
    if not (folder / ".dvc").exists():
        from dvc.repo import Repo

        Repo.init(str(folder), no_scm=True).close()
        (folder / ".dvc" / "config").write_text(_DVC_CONFIG, encoding="utf-8")
