"""The joint with DVC: the graph of stages, which of them are stale, and the record of what was made from what.

All DVC calls of a run are made by the flow's own process, one at a time. The flow holds DVC's lock throughout
(`no_dvc_in`), so that `dvc` commands beside it are refused before they change anything.
Stages are asked themselves: each of `Repo`'s methods would read dvc.yaml, dvc.lock and the whole graph anew, so that
asking about all stages would take the square of their number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import networkx
from dvc.dvcfile import load_file
from dvc.exceptions import ConfirmRemoveError, DvcException
from dvc.fs import LocalFileSystem
from dvc.lock import LockError, LockNoop
from dvc.repo import Repo
from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError, rwlock
from dvc.stage.cache import RunCacheNotFoundError
from dvc.stage.serialize import to_lockfile
from dvc.utils import dict_sha256
from dvc.utils.serialize import dumps_yaml, load_yaml
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_data.hashfile.tree import Tree
from dvc_objects.errors import ObjectFormatError

from lilliput.artifacts import describe_full_disk, disk_is_full, written_aside
from lilliput.errors import BusyError, ConfigError, StageError

logging.getLogger("dvc").setLevel(logging.WARNING)  # what DVC would tell is told by the flow
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml: its name (`compress@lora`), command and one-line description, what it needs and writes."""

    name: str
    command: str
    description: str
    needs: tuple[str, ...] = ()  # stages, directly
    outputs: tuple[str, ...] = ()  # paths in the folder of dvc.yaml

    @property
    def candidate(self) -> str | None:
        """The candidate it works on; None for stages that are there once."""
        return self.name.partition("@")[2] or None

    @property
    def title(self) -> str:
        """What a person reads in the Prefect UI: `pocket: gptq on distilled`."""
        return f"{self.candidate}: {self.description}" if self.candidate else f"{self.name}: {self.description}"


class Lineage:
    """The pipeline of the DVC repository in `folder`, which has to be the working directory: DVC looks there."""

    def __init__(self, folder: Path) -> None:
        _require_whole(folder / "dvc.lock")
        try:
            self._repo = Repo(str(folder))
            self._repo.fs = _WholeFiles()
            self._repo.lock = LockNoop()  # a flow holds the real one; `--plan` only reads
            self._repo.lock.lock()
            self._graph = self._repo.index.graph  # an edge leads from a stage to one it needs
            self._recorded = {node.name: node for node in self._graph}
            self._runs_are_whole = False
        except DvcException as error:
            raise ConfigError(_remedied(error, folder)) from None

    @cached_property
    def _pipeline(self) -> Any:
        """What dvc.yaml and dvc.lock say, parsed when the first stage is read anew."""
        return load_file(self._repo, str(Path(self._repo.root_dir) / "dvc.yaml")).stages

    def close(self) -> None:
        """Lets go of DVC's files."""
        self._repo.close()

    def stages(self, only: Sequence[str] = ()) -> list[Stage]:
        """The stages in the order they can run.

        Args:
            only: candidates to stop at: what they need, their evaluation, and `register`. Empty for everything.
        """
        declared = {stage: number for number, stage in enumerate(self._repo.index.stages)}
        order = networkx.lexicographical_topological_sort(self._graph.reverse(), key=declared.__getitem__)
        wanted = self._needed_for(only) if only else set(self._graph)
        return [Stage(s.name, s.cmd, s.desc or "", self._needs(s), _outputs(s)) for s in order if s in wanted]

    def upstream(self, name: str) -> set[str]:
        """The names of all stages `name` needs, directly or not."""
        return {node.name for node in networkx.descendants(self._graph, self._node(name))}

    def changes(self, name: str) -> list[str]:
        """What DVC finds changed in stage `name` since it last ran: `params.yaml: strategies.gptq modified`, say.

        Empty: nothing, so what lies there is what the stage would make.
        """
        stage = self._recorded[name]
        status = type(stage).status.__wrapped__  # without DVC's lists of readers, which a flow beside `--plan` may need
        found = status(stage, check_updates=True).get(stage.addressing, [])
        return [text for entry in found for text in _describe(entry)]

    def inputs(self, name: str) -> dict[str, Any]:
        """What stage `name` would read now: by dependency (file, folder or settings), DVC's hash of it."""
        return {str(dep): dep.get_hash() for dep in self._recorded[name].deps if dep.exists}

    def unchanged(self) -> bool:
        """Whether DVC finds every stage as it left it."""
        return not any(self.changes(name) for name in self._recorded)

    def restore(self, name: str) -> bool:
        """Brings back what stage `name` made from these very inputs before, if DVC's run cache still holds it.

        Every byte of it is checked: DVC itself trusts whatever is read-only in its cache. What is damaged is removed
        and, where a remote has it, fetched anew. Without one of its inputs a stage cannot be restored: when it is run,
        its own message says what is missing.
        """
        if not all(dependency.exists for dependency in self._recorded[name].deps):
            return False
        with self._distrusted_cache() as damaged:
            if not self._runs_are_whole:  # looked at once: the others are of this very run
                self._drop_damaged_runs()
                self._runs_are_whole = True
            if self._restored(name):
                return True
            return bool(damaged) and self._restored(name, fetch=True)

    def commit(self, name: str, inputs: Mapping[str, Any] | None = None) -> None:
        """Records what stage `name` just read and wrote: outputs into the cache, hashes into dvc.lock.

        Args:
            name: of the stage.
            inputs: what it was to read when it began (`inputs`).

        Raises:
            StageError: there is no room for it, or its inputs changed while it was at work.
        """
        if inputs is not None and (changed := _differing(inputs, self.inputs(name))):
            raise StageError(
                f"{name}: {', '.join(changed)} changed while it was at work, so what it made is not recorded; "
                "the same command makes it again"
            )
        stage = self._read_anew(name)
        try:
            with self._distrusted_cache():
                stage.save()
                # DVC puts nothing over what its cache has by that name, and links what the stage wrote to it.
                for oid in (oid for out in stage.outs for oid in _oids(out.get_obj())):
                    with suppress(FileNotFoundError, ObjectFormatError):
                        self._repo.cache.local.check(oid)
                stage.commit()
                recorded = self._record(stage)
        except (DvcException, OSError) as error:
            if not disk_is_full(error):
                raise
            raise StageError(f"{name} is done but cannot be recorded: {describe_full_disk(error)}") from None
        self._pipeline.lockfile_data.update(recorded)
        stage.cmd_changed = False
        self._recorded[name] = stage

    def _record(self, stage: Any) -> dict[str, Any]:
        """Writes `stage` to dvc.lock; a map of what was written, by its name."""
        lock, recorded = Path(self._repo.root_dir) / "dvc.lock", to_lockfile(stage)
        kept = lock.read_text(encoding="utf-8") if lock.exists() else ""
        if _STAGES.search(kept):
            with written_aside(lock) as partial:
                partial.write_text(_put(recorded, kept), encoding="utf-8")
        else:  # none stands there yet
            stage.dvcfile.dump_stages([stage], update_pipeline=False)
        return recorded

    def _restored(self, name: str, fetch: bool = False) -> bool:
        try:
            self._repo.stage_cache.restore(self._read_anew(name), pull=fetch)
        except ConfirmRemoveError:  # what lies there is of a run that was never recorded; the stage would overwrite it
            self._node(name).remove_outs(force=True)
            self._repo.stage_cache.restore(self._read_anew(name), pull=fetch)
        except RunCacheNotFoundError:
            return False
        except DvcException as error:
            if not fetch:
                raise
            _log.warning("%s cannot be fetched anew and is made again: %s", name, error)
            return False
        return True

    def _read_anew(self, name: str) -> Any:
        """Stage `name` as dvc.lock has it: one that failed to be restored goes for one recorded with today's inputs."""
        return self._pipeline[name]

    @contextmanager
    def _distrusted_cache(self) -> Iterator[list[str]]:
        """Has DVC hash what is in its cache before it uses it, and drop what is damaged; yields what was dropped."""
        cache, known, damaged = self._repo.cache.local, set[str](), list[str]()
        cache.check = partial(_check, cache, known, damaged)
        try:
            yield damaged
        finally:
            del cache.check

    def _drop_damaged_runs(self) -> None:
        """Removes what is not what it was from DVC's record of runs, each named by its own hash."""
        for path in [*Path(self._repo.stage_cache.cache_dir).glob("??/*/*")]:
            try:
                whole = dict_sha256(load_yaml(str(path)), exclude=["size", "nfiles"]) == path.name
            except (DvcException, TypeError, ValueError, AttributeError):
                whole = False
            if not whole and len(path.name) == len(hashlib.sha256().hexdigest()):
                _log.warning("%s: damaged, and removed; what it told of is made again", path)
                path.unlink()
                with suppress(OSError):  # others may be there; DVC stumbles over an empty folder
                    path.parent.rmdir()

    def _node(self, name: str) -> Any:
        return next(node for node in self._graph if node.name == name)

    def _needs(self, node: Any) -> tuple[str, ...]:
        return tuple(sorted(needed.name for needed in self._graph.successors(node)))

    def _needed_for(self, candidates: Sequence[str]) -> set:
        targets = {f"evaluate@{candidate}" for candidate in candidates}
        nodes = [node for node in self._graph if node.name in targets]
        needed = set(nodes).union(*(networkx.descendants(self._graph, node) for node in nodes))
        return needed | {node for node in self._graph if node.name == "register"}


@contextmanager
def no_dvc_in(folder: Path) -> Iterator[None]:
    """Holds DVC's lock in `folder`: until the end every `dvc` command there is refused and changes nothing.

    `dvc repro` lets go of that lock while a stage works and holds the stage's outputs instead, so these are looked at
    as well. The lock is the system's: it is free as soon as its holder is gone, however it ended.

    Raises:
        BusyError: a `dvc` command is at work there.
        ConfigError: DVC's list of who holds which outputs is damaged; the message says what to do.
    """
    try:
        repo = Repo(str(folder))
    except DvcException as error:
        raise ConfigError(_remedied(error, folder)) from None
    with closing(repo):
        try:
            repo.lock.lock()
        except LockError:
            raise BusyError(f"{folder}: a `dvc` command is at work here; wait until it has ended") from None
        try:
            _require_no_outputs_held(repo)
            yield
        finally:
            repo.lock.unlock()


def _require_no_outputs_held(repo: Repo) -> None:
    hardlink = repo.config["core"].get("hardlink_lock", False)
    try:
        with rwlock(repo.tmp_dir, repo.fs, "lilliput", [], [repo.root_dir], hardlink):
            pass
    except (RWLockFileCorruptedError, RWLockFileFormatError) as error:
        raise ConfigError(_remedied(error, Path(repo.root_dir))) from None
    except LockError as error:
        raise BusyError(f"{repo.root_dir}: a `dvc` command is at work here: {' '.join(str(error).split())}") from None


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of inputs that are not what they were: `params.yaml (strategies.gptq)`, or a path."""
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = (getattr(inputs.get(name), "value", None) for inputs in (before, now))
        if old != new:
            keys = [key for key in old if old[key] != new.get(key)] if isinstance(old, dict) and new else []
            changed.append(f"{name} ({', '.join(keys)})" if keys else name)
    return changed


def _outputs(node: Any) -> tuple[str, ...]:
    return tuple(out.def_path for out in node.outs)


class _WholeFiles(LocalFileSystem):
    """DVC's file system, with dvc.lock and DVC's list of locks written aside and renamed.

    DVC empties them first, and a kill then leaves a dvc.lock in which stages are missing, or a list that nothing reads.
    """

    def open(self, path: Any, mode: Any = "r", encoding: str | None = None, **kwargs: Any) -> Any:
        """As `open`; a text file that is to be written appears when it is closed, whole."""
        if mode not in ("w", "w+"):
            return super().open(path, mode, encoding=encoding, **kwargs)
        return _renamed_when_closed(Path(path), encoding)


@contextmanager
def _renamed_when_closed(path: Path, encoding: str | None) -> Iterator[IO[str]]:
    with written_aside(path) as partial, partial.open("w", encoding=encoding) as stream:
        yield stream


_STAGES = re.compile(r"^stages:\n((?: .*\n|\n)+)", re.MULTILINE)


def _put(stage: dict[str, Any], lock: str) -> str:
    """The text of dvc.lock with `stage`, a map by its name, in its place or after all others, as DVC would write it.

    DVC parses and writes all of it anew for each stage that was made: half a second where there are thirty, and the
    square of the stages for all of them.
    """
    own = dumps_yaml({"stages": stage}).removeprefix("stages:\n")
    name = re.escape(own.partition("\n")[0])
    deeper = r"\n(?:   .*\n|\n)*"
    stages = _STAGES.search(lock)
    assert stages, "held by _record"
    place = re.compile(f"^{name}{deeper}", re.MULTILINE).search(lock, *stages.span(1))
    start, end = place.span() if place else (stages.end(),) * 2
    return lock[:start] + own + lock[end:]


def _check(
    cache: LocalHashFileDB, known: set[str], damaged: list[str], oid: str, check_hash: bool = True, _info: Any = None
) -> Any:
    """In place of `LocalHashFileDB.check`, which looks at no byte of a file that is read-only.

    Raises:
        ObjectFormatError: it is not what its name says, and is gone.
    """
    path = Path(cache.oid_to_path(oid))
    if oid not in known and path.exists():
        with path.open("rb") as stream:
            whole = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if whole != oid.removesuffix(".dir"):
            _log.warning(
                "%s: damaged in DVC's cache (its md5 is %s), and removed; it is fetched or made again", path, whole
            )
            damaged.append(oid)
            path.unlink()
            _drop_folders_of(oid, Path(cache.path))
            raise ObjectFormatError(f"{path} is damaged")
    known.add(oid)
    return LocalHashFileDB.check(cache, oid, check_hash, _info)


def _oids(obj: Any) -> Iterator[str]:
    """The names of what DVC's cache needs for an output: of a folder the files in it and their list."""
    entries: Any = obj if isinstance(obj, Tree) else ()
    yield from (entry.value for _, _, entry in entries)
    if obj is not None:
        yield str(obj.oid)


def _drop_folders_of(oid: str, cache: Path) -> None:
    """Removes the lists of folders that hold `oid`: where such a list is, DVC takes for granted all that it names."""
    for listed in cache.glob("??/*.dir"):
        with suppress(ValueError):
            if any(entry["md5"] == oid for entry in json.loads(listed.read_bytes())):
                listed.unlink()


_OTHERWISE = "or delete it: what was made from the same inputs is restored from DVC's cache, the rest is made again"


def _require_whole(lock: Path) -> None:
    """Raises ConfigError where dvc.lock holds both sides of a merge, or ends in the middle of a line."""
    content = lock.read_bytes() if lock.exists() else b""
    if b"\n<<<<<<< " in b"\n" + content:
        raise ConfigError(
            f"{lock}: holds both sides of a git merge; take one with `git checkout --ours dvc.lock`, {_OTHERWISE}"
        )
    if content and not content.endswith(b"\n"):
        raise ConfigError(
            f"{lock}: damaged (it ends in the middle of a line); bring the committed one back with "
            f"`git checkout dvc.lock`, {_OTHERWISE}"
        )


def _remedied(error: DvcException, folder: Path) -> str:
    """What DVC says is wrong in `folder`, and what to do."""
    told = " ".join(str(error).split())
    if isinstance(error, RWLockFileCorruptedError | RWLockFileFormatError):
        return f"{folder}: {told}; a killed `dvc` left it so: delete {folder / '.dvc/tmp/rwlock'} while no other runs"
    if "dvc.lock" in told:
        return (
            f"{folder / 'dvc.lock'}: damaged ({told}); bring the committed one back with `git checkout dvc.lock`, "
            f"{_OTHERWISE}"
        )
    return f"{folder}/dvc.yaml: {told}"


def _describe(entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [str(entry)]
    texts = []
    for kind, paths in entry.items():
        for path, state in paths.items() if isinstance(paths, dict) else [("", paths)]:
            details = ", ".join(f"{key} {value}" for key, value in state.items()) if isinstance(state, dict) else state
            texts.append(f"{path}: {details}" if path else f"{kind}: {details}")
    return texts
