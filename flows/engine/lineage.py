"""The graph of stages, which of them are stale, and the inputs of each result. All of it comes from DVC.

Only the flow's own process calls DVC, one call at a time, and holds DVC's lock during the flow (`dvc_locked`).
Stages are queried directly: each method of `Repo` would parse dvc.yaml, dvc.lock and the whole graph again, so that a
query of all stages would take quadratic time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx
from dvc.exceptions import ConfirmRemoveError, DvcException
from dvc.stage.cache import RunCacheNotFoundError

from flows.engine.dvc_guard import (
    Pipeline,
    explained_errors,
    open_repo,
    remove_damaged_runs,
    require_complete_lockfile,
    status_without_lock,
    verified_cache,
    verify_outputs,
)
from flows.engine.stage import Stage
from lilliput.artifacts import describe_full_disk, disk_is_full
from lilliput.errors import StageError

logging.getLogger("dvc").setLevel(logging.WARNING)  # the flow logs progress itself
for _bars in ("dvc.progress", "dvc_data.callbacks"):  # DVC shows bars on a terminal unless these levels forbid it
    logging.getLogger(_bars).setLevel(logging.CRITICAL)
_log = logging.getLogger(__name__)


class Lineage:
    """The pipeline of the DVC repository in `folder`, which must be the working directory: DVC looks there.

    Raises:
        ConfigError: dvc.yaml or dvc.lock is damaged.
    """

    def __init__(self, folder: Path) -> None:
        require_complete_lockfile(folder / "dvc.lock")
        with explained_errors(folder):
            self._repo = open_repo(folder)
            self._graph = self._repo.index.graph  # an edge leads from a stage to one that it needs
        self._pipeline = Pipeline(self._repo)
        self._recorded = {node.name: node for node in self._graph}
        self._run_cache_is_verified = False

    def close(self) -> None:
        """Closes DVC's files."""
        self._repo.close()

    def stages(self, only: Sequence[str] = ()) -> list[Stage]:
        """Returns the stages in an order in which they can run.

        Args:
            only: candidates: returns the stages that they need, their evaluations and `register`. Empty for all.
        """
        declared = {stage: number for number, stage in enumerate(self._repo.index.stages)}
        order = networkx.lexicographical_topological_sort(self._graph.reverse(), key=declared.__getitem__)
        wanted = self._needed_for(only) if only else set(self._graph)
        return [Stage(s.name, s.cmd, s.desc or "", self._needs(s), _outputs(s)) for s in order if s in wanted]

    def upstream(self, name: str) -> set[str]:
        """Returns the names of all stages that `name` needs, directly or not."""
        return {node.name for node in networkx.descendants(self._graph, self._node(name))}

    def _node(self, name: str) -> Any:
        return next(node for node in self._graph if node.name == name)

    def _needs(self, node: Any) -> tuple[str, ...]:
        return tuple(sorted(needed.name for needed in self._graph.successors(node)))

    def _needed_for(self, candidates: Sequence[str]) -> set:
        targets = {f"evaluate@{candidate}" for candidate in candidates}
        nodes = [node for node in self._graph if node.name in targets]
        needed = set(nodes).union(*(networkx.descendants(self._graph, node) for node in nodes))
        return needed | {node for node in self._graph if node.name == "register"}

    def changes(self, name: str) -> list[str]:
        """Lists what changed since stage `name` was recorded, such as `params.yaml: strategies.gptq modified`.

        An empty list means that its outputs are what it would make now.
        """
        return [text for entry in status_without_lock(self._recorded[name]) for text in _describe(entry)]

    def is_recorded(self, name: str) -> bool:
        """Whether stage `name` is in dvc.lock: it was made before, here or where that file comes from."""
        return any(dep.hash_info for dep in self._recorded[name].deps)

    def inputs(self, name: str) -> dict[str, Any]:
        """Returns DVC's hash of each present dependency of stage `name`: a file, a folder or settings."""
        return {str(dep): dep.get_hash() for dep in self._recorded[name].deps if dep.exists}

    def restore(self, name: str) -> bool:
        """Restores the outputs of stage `name` if DVC's run cache has them for the present inputs.

        Every byte is verified. Damaged objects are removed and, if a remote has them, fetched again. Without one of its
        inputs a stage is not restored: its own message says what is missing when it runs.
        """
        if not all(dependency.exists for dependency in self._recorded[name].deps):
            return False
        with verified_cache(self._repo) as damaged:
            if not self._run_cache_is_verified:  # once: later records are of this process
                remove_damaged_runs(self._repo)
                self._run_cache_is_verified = True
            if self._restore(name):
                return True
            return bool(damaged) and self._restore(name, fetch=True)

    def _restore(self, name: str, fetch: bool = False) -> bool:
        # From a newly loaded stage: DVC changes it, and a failed attempt would count as recorded.
        try:
            self._repo.stage_cache.restore(self._pipeline.load(name), pull=fetch)
        except ConfirmRemoveError:  # outputs of a run that was never recorded; the stage would overwrite them
            self._node(name).remove_outs(force=True)
            self._repo.stage_cache.restore(self._pipeline.load(name), pull=fetch)
        except RunCacheNotFoundError:
            return False
        except DvcException as error:
            if not fetch:
                raise
            _log.warning("%s cannot be fetched again and is made again: %s", name, error)
            return False
        return True

    def commit(self, name: str, inputs: Mapping[str, Any]) -> None:
        """Records the outputs of stage `name`: puts them into the cache and all hashes into dvc.lock.

        Args:
            name: of the stage.
            inputs: from `inputs`, before the stage was run or restored.

        Raises:
            StageError: the disk is full, or the inputs changed during the stage.
        """
        if changed := _differences(inputs, self.inputs(name)):
            raise StageError(
                f"{name}: {', '.join(changed)} changed during the stage, so its outputs are not recorded; run the "
                "same command again"
            )
        stage = self._pipeline.load(name)
        try:
            with verified_cache(self._repo):
                stage.save()
                verify_outputs(self._repo, stage)
                stage.commit()
                self._pipeline.record(stage)
        except (DvcException, OSError) as error:
            if not disk_is_full(error):
                raise
            raise StageError(f"{name} is done but cannot be recorded: {describe_full_disk(error)}") from None
        self._recorded[name] = stage


def _outputs(node: Any) -> tuple[str, ...]:
    return tuple(out.def_path for out in node.outs)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names the inputs that differ: `params.yaml (strategies.gptq)`, or a path."""
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = (getattr(inputs.get(name), "value", None) for inputs in (before, now))
        if old != new:
            keys = [key for key in old if old[key] != new.get(key)] if isinstance(old, dict) and new else []
            changed.append(f"{name} ({', '.join(keys)})" if keys else name)
    return changed


def _describe(entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [str(entry)]
    texts = []
    for kind, paths in entry.items():
        for path, state in paths.items() if isinstance(paths, dict) else [("", paths)]:
            details = ", ".join(f"{key} {value}" for key, value in state.items()) if isinstance(state, dict) else state
            texts.append(f"{path}: {details}" if path else f"{kind}: {details}")
    return texts
