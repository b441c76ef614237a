"""All code that relies on DVC's internals, so that a new version of DVC can break only this file.

DVC may change them at any time. `tests/flows/test_dvc_guard.py` checks each assumption by itself, and pyproject.toml
bounds the version of DVC.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import IO, Any

from dvc.dvcfile import load_file
from dvc.exceptions import DvcException
from dvc.fs import LocalFileSystem
from dvc.lock import LockError, LockNoop
from dvc.repo import Repo
from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError, rwlock
from dvc.stage.serialize import to_lockfile
from dvc.utils import dict_sha256
from dvc.utils.serialize import LOADERS, dumps_yaml, load_yaml, parse_yaml
from dvc.utils.serialize._common import _load_data
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_data.hashfile.tree import Tree
from dvc_objects.errors import ObjectFormatError

from lilliput.artifacts import writing_file
from lilliput.errors import BusyError, ConfigError

_log = logging.getLogger(__name__)
_load_yaml_once = partial(_load_data, parser=lru_cache(maxsize=1)(parse_yaml))
_SHA256_DIGITS = 64


def open_repo(folder: Path) -> Repo:
    """Opens the DVC repository in `folder` without taking DVC's lock, and with atomic writes.

    The caller holds the lock with `dvc_locked`, or only reads.
    """
    repo = Repo(str(folder))
    repo.fs = AtomicFileSystem()
    repo.lock = LockNoop()
    repo.lock.lock()
    return repo


class AtomicFileSystem(LocalFileSystem):
    """DVC's file system, with atomic writes of text files: dvc.lock and DVC's list of output locks.

    DVC truncates them first. A kill would leave a dvc.lock without some stages, or an unreadable list.
    """

    def open(self, path: Any, mode: Any = "r", encoding: str | None = None, **kwargs: Any) -> Any:
        """Like `open`; a text file opened for writing appears complete when it is closed."""
        if mode not in ("w", "w+"):
            return super().open(path, mode, encoding=encoding, **kwargs)
        return _atomic_writer(Path(path), encoding)


@contextmanager
def _atomic_writer(path: Path, encoding: str | None) -> Iterator[IO[str]]:
    with writing_file(path) as aside, aside.open("w", encoding=encoding) as stream:
        yield stream


@contextmanager
def dvc_locked(folder: Path) -> Iterator[None]:
    """Holds DVC's lock in `folder`: every other `dvc` command there is refused and changes nothing.

    `dvc repro` releases that lock while a stage runs and locks the stage's outputs instead, so this checks both.
    The operating system releases the lock when its holder ends, even after a kill.

    Raises:
        BusyError: a `dvc` command is running there.
        ConfigError: DVC's list of output locks is damaged.
    """
    with explained_errors(folder):
        repo = Repo(str(folder))
    with closing(repo):
        try:
            repo.lock.lock()
        except LockError:
            raise BusyError(f"{folder}: a `dvc` command is running here; wait until it has ended") from None
        try:
            _require_unlocked_outputs(repo)
            yield
        finally:
            repo.lock.unlock()


def _require_unlocked_outputs(repo: Repo) -> None:
    hardlink = repo.config["core"].get("hardlink_lock", False)
    try:
        with rwlock(repo.tmp_dir, repo.fs, "lilliput", [], [repo.root_dir], hardlink):
            pass
    except (RWLockFileCorruptedError, RWLockFileFormatError) as error:
        raise ConfigError(_explain(error, Path(repo.root_dir))) from None
    except LockError as error:
        raise BusyError(f"{repo.root_dir}: a `dvc` command is running here: {' '.join(str(error).split())}") from None


def status_without_lock(stage: Any) -> list[Any]:
    """Returns what `dvc status` reports about `stage`.

    Skips the decorator that adds this process to DVC's list of readers: a flow beside `--plan` may write there.
    Parses params.yaml once per content; DVC parses it again for each stage (docs/decisions/orchestration.md).
    """
    status = type(stage).status.__wrapped__
    LOADERS[".yaml"] = _load_yaml_once
    try:
        return status(stage, check_updates=True).get(stage.addressing, [])
    finally:
        del LOADERS[".yaml"]


class Pipeline:
    """The stages of dvc.yaml with their records in dvc.lock; both files are parsed once, at the first use.

    Args:
        repo: from `open_repo`.
    """

    def __init__(self, repo: Repo) -> None:
        self._repo = repo

    def load(self, name: str) -> Any:
        """Returns a new object for stage `name`, as dvc.lock records it."""
        return self._loader[name]

    def record(self, stage: Any) -> None:
        """Writes `stage` to dvc.lock."""
        path, entry = Path(self._repo.root_dir) / "dvc.lock", to_lockfile(stage)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if _STAGES.search(text):
            with writing_file(path) as aside:
                aside.write_text(replace_entry(entry, text), encoding="utf-8")
        else:  # no stage is recorded yet
            stage.dvcfile.dump_stages([stage], update_pipeline=False)
        self._loader.lockfile_data.update(entry)
        stage.cmd_changed = False

    @cached_property
    def _loader(self) -> Any:
        return load_file(self._repo, str(Path(self._repo.root_dir) / "dvc.yaml")).stages


_STAGES = re.compile(r"^stages:\n((?: .*\n|\n)+)", re.MULTILINE)


def replace_entry(entry: dict[str, Any], lock: str) -> str:
    """Returns the text of dvc.lock with `entry` in place of the stage's old one, or after all others.

    The bytes are those that DVC would write. DVC parses and writes the whole file for each stage: half a second at 30
    stages, 5 CPU-seconds more than this for a run of 136.

    Args:
        entry: the stage's record by its name.
        lock: the text of dvc.lock, with at least one stage.
    """
    text = dumps_yaml({"stages": entry}).removeprefix("stages:\n")
    name = re.escape(text.partition("\n")[0])
    stages = _STAGES.search(lock)
    assert stages, "checked by Pipeline.record"
    old = re.compile(rf"^{name}\n(?:   .*\n|\n)*", re.MULTILINE).search(lock, *stages.span(1))
    start, end = old.span() if old else (stages.end(),) * 2
    return lock[:start] + text + lock[end:]


@contextmanager
def verified_cache(repo: Repo) -> Iterator[list[str]]:
    """Has DVC hash each cached object before it uses it; damaged objects are removed.

    DVC itself trusts every read-only file in its cache.

    Yields:
        The md5 names of the objects that were removed so far.
    """
    cache, verified, damaged = repo.cache.local, set[str](), list[str]()
    cache.check = partial(_check, cache, verified, damaged)
    try:
        yield damaged
    finally:
        del cache.check


def verify_outputs(repo: Repo, stage: Any) -> None:
    """Removes damaged objects that `stage.commit` would otherwise link to; needs `verified_cache`.

    DVC does not overwrite an object that its cache already has.
    """
    for oid in (oid for out in stage.outs for oid in object_names(out.get_obj())):
        with suppress(FileNotFoundError, ObjectFormatError):
            repo.cache.local.check(oid)


def object_names(obj: Any) -> Iterator[str]:
    """Yields the names of the cached objects of one output: for a folder those of its files, then that of its list."""
    entries: Any = obj if isinstance(obj, Tree) else ()
    yield from (entry.value for _, _, entry in entries)
    if obj is not None:
        yield str(obj.oid)


def _check(
    cache: LocalHashFileDB, verified: set[str], damaged: list[str], oid: str, check_hash: bool = True, _info: Any = None
) -> Any:
    """Replaces `LocalHashFileDB.check`, which reads no byte of a read-only file.

    Raises:
        ObjectFormatError: the object did not match its name and was removed.
    """
    path = Path(cache.oid_to_path(oid))
    if oid not in verified and path.exists():
        with path.open("rb") as stream:
            md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != oid.removesuffix(".dir"):
            _log.warning(
                "%s: damaged in DVC's cache (its md5 is %s), and removed; it is fetched or made again", path, md5
            )
            damaged.append(oid)
            path.unlink()
            _remove_folder_lists(oid, Path(cache.path))
            raise ObjectFormatError(f"{path} is damaged")
    verified.add(oid)
    return LocalHashFileDB.check(cache, oid, check_hash, _info)


def _remove_folder_lists(oid: str, cache: Path) -> None:
    """Removes the lists of folders that contain `oid`: where a list exists, DVC assumes that all its files exist."""
    for path in cache.glob("??/*.dir"):
        with suppress(ValueError):
            if any(entry["md5"] == oid for entry in json.loads(path.read_bytes())):
                path.unlink()


def remove_damaged_runs(repo: Repo) -> None:
    """Removes records of the run cache that do not match their name, which is their hash."""
    for path in [*Path(repo.stage_cache.cache_dir).glob("??/*/*")]:
        try:
            intact = dict_sha256(load_yaml(str(path)), exclude=["size", "nfiles"]) == path.name
        except (DvcException, TypeError, ValueError, AttributeError):
            intact = False
        if not intact and len(path.name) == _SHA256_DIGITS:
            _log.warning("%s: damaged, and removed; its outputs are made again", path)
            path.unlink()
            with suppress(OSError):  # not empty; DVC fails at an empty folder
                path.parent.rmdir()


_REMEDY = "or delete it: what was made from the same inputs is restored from DVC's cache, the rest is made again"


@contextmanager
def explained_errors(folder: Path) -> Iterator[None]:
    """Turns DVC's errors about the files in `folder` into ConfigError with a remedy."""
    try:
        yield
    except DvcException as error:
        raise ConfigError(_explain(error, folder)) from None


def require_complete_lockfile(lock: Path) -> None:
    """Checks dvc.lock, which may not exist.

    Raises:
        ConfigError: it holds both sides of a merge, or ends in the middle of a line.
    """
    content = lock.read_bytes() if lock.exists() else b""
    if b"\n<<<<<<< " in b"\n" + content:
        raise ConfigError(
            f"{lock}: holds both sides of a git merge; take one with `git checkout --ours dvc.lock`, {_REMEDY}"
        )
    if content and not content.endswith(b"\n"):
        raise ConfigError(
            f"{lock}: damaged (it ends in the middle of a line); bring the committed one back with "
            f"`git checkout dvc.lock`, {_REMEDY}"
        )


def _explain(error: DvcException, folder: Path) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, RWLockFileCorruptedError | RWLockFileFormatError):
        return (
            f"{folder}: {message}; a killed `dvc` left it so: delete {folder / '.dvc/tmp/rwlock'} while no other runs"
        )
    if "dvc.lock" in message:
        return (
            f"{folder / 'dvc.lock'}: damaged ({message}); bring the committed one back with `git checkout dvc.lock`, "
            f"{_REMEDY}"
        )
    return f"{folder}/dvc.yaml: {message}"
