"""The folder of a run: the project itself, or for other parameters a workspace beside it.

A workspace is a copy of the code with its own complete params.yaml, DVC repository and results, so that a rehearsal
never touches the models of the real run. It shares the project's DVC cache: each restores what the other made from the
same inputs. `dvc repro` works in both.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from ruamel.yaml import YAML

from flows.engine.folders import PROJECT, folder_of, is_own_project, settings_file
from flows.engine.own_project import write_pipeline
from lilliput.artifacts import write_text
from lilliput.config import Params, is_hub
from lilliput.errors import ConfigError, DataError
from lilliput.params import complete_settings, load_params
from tasks import layout
from tasks.process.folder_lock import folder_lock

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

    `folder_of` says which. A workspace is made or brought up to date.

    Raises:
        ConfigError: the parameters are invalid, or a run uses the workspace (BusyError).
        DataError: an input does not exist.
    """
    params_file = settings_file(params_file)
    inputs = _inputs(load_params(params_file), params_file)
    folder = folder_of(params_file, kind, PROJECT)
    if folder == PROJECT:
        for name in inputs:
            write_pin(PROJECT, name)
        return PROJECT
    if not params_file.stem.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{params_file}: a workspace is named after this file; use letters, digits, - and _")
    for name in inputs:
        _require_inside(name, params_file)
    if is_own_project(params_file) and not kind:
        return make_own_project(folder, params_file, inputs)
    return make_workspace(folder, params_file, inputs)


def make_workspace(folder: Path, params_file: Path, inputs: Mapping[str, Path]) -> Path:
    """Copies code, parameters and inputs into `folder` and returns it; models and results there stay as they are.

    Args:
        folder: of the workspace.
        params_file: becomes its params.yaml, with the defaults that it leaves out: DVC has no others.
        inputs: files and folders by their names in params.yaml; a dataset on the hub becomes a pin.

    Raises:
        BusyError: a run or a `dvc` command uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = exclusive if (folder / ".dvc").exists() else folder_lock  # a new workspace has no DVC to lock
    with lock(folder):
        _copy_into(folder, params_file, inputs)
    return folder


def make_own_project(folder: Path, params_file: Path, inputs: Mapping[str, Path]) -> Path:
    """Writes what a run needs into a project of the user's own and returns it; see `own_project`.

    Args:
        folder: of the project.
        params_file: its `lilliput.yaml`.
        inputs: as for `make_workspace`.

    Raises:
        BusyError: a run or a `dvc` command uses the folder.
    """
    lock = exclusive if (folder / ".dvc").exists() else folder_lock
    with lock(folder):
        write_complete(params_file, folder / layout.PARAMS)
        _copy_inputs(folder, inputs)
        write_pipeline(folder)
    return folder


def write_complete(params_file: Path, target: Path) -> None:
    """Writes the settings of `params_file` to `target`, with all defaults; a complete file is copied as it is."""
    complete = complete_settings(params_file)
    if complete is None:
        shutil.copyfile(params_file, target)
        return
    text = io.StringIO()
    YAML().dump(complete, text)
    note = f"# All settings of {params_file.name}, with their defaults. Edit that file: a run writes this one again.\n"
    write_text(target, note + text.getvalue())


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
        homes = [PROJECT, params_file.parent]
        if is_own_project(params_file):
            homes.reverse()  # its own file comes before one of the clone with the same name
        inputs[name] = next((home / name for home in homes if is_hub(name) or (home / name).exists()), homes[1] / name)
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


def _copy_inputs(folder: Path, inputs: Mapping[str, Path]) -> None:
    for name, place in inputs.items():
        if is_hub(name):
            write_pin(folder, name)
        else:
            _copy_data(place, folder / name)


def _copy_into(folder: Path, params_file: Path, inputs: Mapping[str, Path]) -> None:
    for name in _CODE:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(PROJECT / name, folder / name)
    write_complete(params_file, folder / layout.PARAMS)
    if (PROJECT / layout.HUB_COMMITS).exists():  # a name means the same commit in every workspace
        shutil.copyfile(PROJECT / layout.HUB_COMMITS, folder / layout.HUB_COMMITS)
    (folder / "offload").mkdir(exist_ok=True)  # the report depends on it, even if nothing is served
    _copy_inputs(folder, inputs)
    if not (folder / ".dvc").exists():
        from dvc.repo import Repo

        with redirect_stdout(io.StringIO()):  # DVC's greeting would stand before a plan as JSON
            Repo.init(str(folder), no_scm=True).close()
        (folder / ".dvc" / "config").write_text(_DVC_CONFIG, encoding="utf-8")
