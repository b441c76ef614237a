"""The folder in which a params file's runs work: the clone, a project of the user's own, or a workspace."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]  # the clone
SETTINGS = "lilliput.yaml"  # a user writes it; params.yaml beside it is made from it
_PARAMS = "params.yaml"


def settings_file(params_file: Path) -> Path:
    """Returns the file that a user writes: `lilliput.yaml` in place of a params.yaml beside it."""
    own = params_file.parent / SETTINGS
    return own if params_file.name == _PARAMS and own.exists() else params_file


def is_own_project(params_file: Path) -> bool:
    """Whether `params_file` is the settings file of a project outside the clone."""
    return settings_file(params_file).name == SETTINGS


def portable(params_file: Path) -> str:
    """Returns the name of `params_file` for work that changes to the clone: absolute unless the command runs there."""
    file = settings_file(params_file)
    return str(file if Path.cwd() == PROJECT and not is_own_project(file) else file.resolve())


def folder_of(params_file: Path, kind: str = "", project: Path = PROJECT) -> Path:
    """Returns the folder of `params_file`'s results; it need not exist.

    The clone's own params.yaml means the clone if it leaves no setting to a default (DVC reads that file). A
    `lilliput.yaml` means its own folder. Anything else means a workspace, named after the file.

    Args:
        params_file: of a run.
        kind: of work that has a workspace of its own for each file, such as a search.
        project: the clone.
    """
    file = settings_file(params_file).resolve()
    if file.name == SETTINGS and not kind:
        return file.parent
    if file == project / _PARAMS and not kind and _is_complete(file):
        return project
    home = file.parent if file.name == SETTINGS else project
    return home / "workspaces" / ".".join(filter(None, [file.stem, kind]))


def _is_complete(file: Path) -> bool:
    from lilliput.params import complete_settings  # imports pydantic, which other files need not wait for

    return not file.exists() or complete_settings(file) is None
