"""The address of MLflow's store: chooses it, checks that MLflow 3.17 can use it, and creates the embedded store.

Problems are reported before MLflow opens the address, because it would retry a file that cannot be opened for 100 s.
"""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from lilliput.artifacts import writing_file
from lilliput.errors import ConfigError
from lilliput.redaction import has_credentials, redacted
from tasks import layout

DATABASE = layout.MLRUNS / "mlflow.db"
VARIABLE = "MLFLOW_TRACKING_URI"
_SERVERS = ("http", "https")
_DATABASES = ("postgresql", "mysql", "mssql")
_SQLITE = "sqlite:///"
_SQLITE_HEADER = b"SQLite format 3\0"
_TIMEOUT_S = 120.0
_REMEDY = f"unset {VARIABLE} to use {DATABASE}, or name a tracking server (http://…) or a database (sqlite:///…)"


def tracking_uri() -> str:
    """Returns the address of the store: MLFLOW_TRACKING_URI, or the embedded one, which a workspace always uses.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI contains a user or a password, which MLflow would repeat in errors and records,
            or names a store without a model registry.
    """
    address = os.environ.get(VARIABLE) or embedded_uri()
    if layout.is_workspace(Path.cwd()) or address == embedded_uri():
        return embedded_uri()
    if has_credentials(address):
        raise ConfigError(
            f"{VARIABLE}: {redacted(address)} holds a user or a password; take them out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a database: its own password file)"
        )
    _require_supported(address)
    database = sqlite_file(address)
    return f"{_SQLITE}{database}" if database else address


def embedded_uri(database: Path = DATABASE) -> str:
    """Returns the address of a SQLite store, by default the embedded one."""
    return f"{_SQLITE}{database.absolute()}"


def sqlite_file(address: str) -> Path | None:
    """Returns the absolute path of the SQLite file that `address` names; None for other stores."""
    return Path(address.removeprefix(_SQLITE)).absolute() if address.startswith(_SQLITE) else None


def prepare(address: str) -> None:
    """Creates the SQLite store at `address`, or checks that the existing file is usable.

    Processes that start at the same time wait for each other. The store is created under another name and renamed,
    because MLflow cannot open one whose creation was interrupted.

    Raises:
        ConfigError: the file is not a database, or cannot be written.
    """
    database = sqlite_file(address)
    if database is None:
        return
    _require_writable(database)
    if database.exists():
        return
    lock = database.with_name(f".{database.name}.lock")
    try:
        with FileLock(lock, timeout=_TIMEOUT_S):
            if not database.exists():
                _create(database)
    except Timeout:
        raise ConfigError(
            f"{database}: another process has been creating this store for {_TIMEOUT_S:g} s; wait for it and try again"
        ) from None


def _create(database: Path) -> None:
    for left in database.parent.glob(f".{database.name}.partial*"):  # left by a killed run, including its journal
        left.unlink()
    with writing_file(database) as partial:
        MlflowClient(embedded_uri(partial)).search_experiments(max_results=1)


def _require_supported(address: str) -> None:
    scheme = address.partition("://")[0].partition("+")[0] if "://" in address else ""
    if address.startswith(_SQLITE) or scheme in _SERVERS:
        return
    if scheme in _DATABASES:
        return _require_driver(address)
    if scheme in ("", "file") and not address.startswith(("databricks", "uc:")):
        raise ConfigError(
            f"{VARIABLE}: {address} is a folder of files, which MLflow 3.17 no longer accepts as a store; {_REMEDY}. "
            "`mlflow migrate-filestore --help` explains how to bring the runs of such a folder into a database"
        )
    raise ConfigError(f"{VARIABLE}: {redacted(address)} is not a store that Lilliput can use; {_REMEDY}")


def _require_driver(address: str) -> None:
    try:
        make_url(address).get_dialect().import_dbapi()
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigError(
            f"{VARIABLE}: {redacted(address)} needs a database driver that is not installed ({error}); "
            "`pip install --requirement requirements-team.lock` installs the driver of postgresql+psycopg2://…"
        ) from None
    except ArgumentError as error:
        raise ConfigError(f"{VARIABLE}: {redacted(address)} is not a database address: {error}") from None


def _require_writable(database: Path) -> None:
    """Raises ConfigError if SQLite could not write to `database`, which may not exist yet."""
    folder = database.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be created for MLflow's store ({error.strerror}); {_REMEDY}") from None
    for path, what in ((folder, "the folder of MLflow's store"), (database, "MLflow's store")):
        if path.exists() and not os.access(path, os.W_OK, effective_ids=True):
            raise ConfigError(f"{path}: {what} cannot be written by this user; change its permissions, or {_REMEDY}")
    if database.is_dir():
        raise ConfigError(f"{database}: a folder, where MLflow's store should be a file; {_REMEDY}")
    if database.exists() and database.stat().st_size:
        with database.open("rb") as stream:
            if stream.read(len(_SQLITE_HEADER)) != _SQLITE_HEADER:
                raise ConfigError(f"{database}: not an SQLite database; move the file away, or {_REMEDY}")
