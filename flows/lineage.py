"""The joint with DVC: the graph of stages, which of them are stale, and the record of what was made from what.

All DVC calls of a run are made by the flow's own process, one at a time: two at once fail on DVC's lock.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.cache import RunCacheNotFoundError

from lilliput.errors import ConfigError

logging.getLogger("dvc").setLevel(logging.WARNING)  # what DVC would tell is told by the flow


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml: its name (`compress@lora`), its command and its one-line description."""

    name: str
    command: str
    description: str

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
        try:
            self._repo = Repo(str(folder))
            self._graph = self._repo.index.graph  # an edge leads from a stage to one it needs
        except DvcException as error:
            raise ConfigError(f"{folder}/dvc.yaml: {error}") from None

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
        return [Stage(s.name, s.cmd, s.desc or "") for s in order if s in wanted]

    def upstream(self, name: str) -> set[str]:
        """The names of all stages `name` needs, directly or not."""
        return {node.name for node in networkx.descendants(self._graph, self._node(name))}

    def changes(self, name: str) -> list[str]:
        """What DVC finds changed in stage `name` since it last ran: `params.yaml: strategies.gptq modified`, say.

        Empty: nothing, so what lies there is what the stage would make.
        """
        address = self._node(name).addressing
        found = self._repo.status(targets=[address]).get(address, [])
        return [text for entry in found for text in _describe(entry)]

    def unchanged(self) -> bool:
        """Whether DVC finds every stage as it left it; one question for all of them."""
        return not self._repo.status()

    def restore(self, name: str) -> bool:
        """Brings back what stage `name` made from these very inputs before, if DVC's run cache still holds it."""
        with self._repo.lock:
            try:
                self._repo.stage_cache.restore(self._node(name))
            except RunCacheNotFoundError:
                return False
        return True

    def commit(self, name: str) -> None:
        """Records what stage `name` just read and wrote: outputs into the cache, hashes into dvc.lock."""
        self._repo.commit(self._node(name).addressing, force=True)

    def _node(self, name: str) -> Any:
        return next(node for node in self._graph if node.name == name)

    def _needed_for(self, candidates: Sequence[str]) -> set:
        targets = {f"evaluate@{candidate}" for candidate in candidates}
        nodes = [node for node in self._graph if node.name in targets]
        needed = set(nodes).union(*(networkx.descendants(self._graph, node) for node in nodes))
        return needed | {node for node in self._graph if node.name == "register"}


def _describe(entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [str(entry)]
    texts = []
    for kind, paths in entry.items():
        for path, state in paths.items() if isinstance(paths, dict) else [("", paths)]:
            details = ", ".join(f"{key} {value}" for key, value in state.items()) if isinstance(state, dict) else state
            texts.append(f"{path}: {details}" if path else f"{kind}: {details}")
    return texts
