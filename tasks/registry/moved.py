"""Updates the paths in MLflow's SQLite store after its folder was moved or copied.

MLflow stores absolute paths of artefacts in each experiment, run and model version, even if it was given relative ones.
Without an update it would continue to read and write in the old folder.
"""

from __future__ import annotations

import io
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML

from lilliput.artifacts import write_text
from lilliput.errors import RegistryError
from tasks import layout

ARTIFACTS = "artifacts"
_MODEL = "artifacts/model/MLmodel"
_TIMEOUT_S = 60.0
_PATH_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_TAGS = ("tags", "model_version_tags")
# Tags that earlier versions of Lilliput set to absolute folders; now they are relative to the project.
_FOLDER_TAGS = "(key = 'lilliput.artifact' OR key LIKE 'lilliput.compiled.%')"


def update_paths(database: Path = layout.MLRUNS / "mlflow.db") -> None:
    """Rewrites paths in `database` that lead to another folder than its own, and prints one line about it.

    Does nothing if there is no store. Never reads or writes the old folder.

    Raises:
        RegistryError: the store was moved and cannot be written.
    """
    if not database.exists():
        return
    database = database.absolute()
    with closing(sqlite3.connect(database, timeout=_TIMEOUT_S)) as connection:
        try:
            old_folders = _former_folders(connection, database.parent)
        except sqlite3.Error:
            return  # not MLflow's, or in use: MLflow reports the error when it opens the file
        if not old_folders:
            return
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                count = sum(_rewrite(connection, folder, database.parent) for folder in old_folders)
            for folder in old_folders:
                _rewrite_models(database.parent, folder)
        except (sqlite3.Error, OSError) as error:
            raise RegistryError(
                f"{database}: MLflow's store was moved here from {old_folders[0]}, and its paths cannot be updated "
                f"({error}); make {database.parent} writable and end other programs that use the store, then run the "
                "same command again"
            ) from None
    places = ", ".join(str(folder) for folder in old_folders)
    print(f"MLflow's store was moved from {places} to {database.parent}: {count} paths updated", file=sys.stderr)


def _former_folders(connection: sqlite3.Connection, folder: Path) -> list[Path]:
    """Returns the former folders of this store, by the locations of its experiments."""
    folders: dict[Path, None] = {}
    for number, location in connection.execute("SELECT experiment_id, artifact_location FROM experiments"):
        path = local_path(location)
        if path is None or path.parent == folder or path.name not in (ARTIFACTS, str(number)):
            continue
        # Skips locations that a user chose: the old folder has the store folder's name, or its artefacts are here now.
        if path.parent.name == layout.MLRUNS.name == folder.name or (folder / path.name).is_dir():
            folders[path.parent] = None
    return list(folders)


def local_path(location: str | None) -> Path | None:
    """Returns the folder of an artefact location; None if it is not a local one."""
    parts = urlsplit(location or "")
    path = Path(unquote(parts.path) if parts.scheme == "file" else parts.path)
    return path if parts.scheme in ("", "file") and path.is_absolute() else None


def _rewrite(connection: sqlite3.Connection, old: Path, new: Path) -> int:
    """Replaces the folder `old` by `new` at the beginning of every path; returns the number of changed paths."""
    count = 0
    for before, after in ((old.as_uri(), new.as_uri()), (str(old), str(new))):
        for table, column in _PATH_COLUMNS:
            count += connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (after, len(before) + 1, len(before) + 1, f"{before}/"),
            ).rowcount
    project = f"{old.parent.as_uri()}/"
    for table in _TAGS:
        connection.execute(
            f"UPDATE {table} SET value = substr(value, ?) WHERE substr(value, 1, ?) = ? AND {_FOLDER_TAGS}",
            (len(project) + 1, len(project), project),
        )
    return count


def _rewrite_models(folder: Path, old: Path) -> None:
    """Replaces the project's path in the MLmodel files that earlier versions of Lilliput wrote."""
    yaml = YAML()
    for path in (*folder.glob(f"{ARTIFACTS}/*/{_MODEL}"), *folder.glob(f"[0-9]*/*/{_MODEL}")):
        content = yaml.load(path.read_text(encoding="utf-8"))
        flavor = content["flavors"]["python_function"]
        code, config = Path(flavor.get("model_code_path", "")), flavor.get("config", {})
        if config.get("project") != str(old.parent) and not code.is_absolute():
            continue
        flavor["model_code_path"] = code.name  # MLflow reads only the file name
        if "project" in config:
            config["project"] = str(folder.parent)
        text = io.StringIO()
        yaml.dump(content, text)
        write_text(path, text.getvalue())  # replaces the file, so that a copy with hard links stays unchanged


if __name__ == "__main__":
    update_paths()
