"""The workspace of a search: its params.yaml holds the base and the chains, and DVC says what of them stands made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from flows.chains.study import Broken, Forecast, Outcome
from flows.engine.lineage import Lineage, Stage
from flows.engine.plan import plan
from lilliput.errors import StageError
from lilliput.params import load_params
from lilliput.search import Chain, Space
from tasks import layout

Outcomes = tuple[dict[str, str], dict[str, str]]
ENDINGS = ("promote", "report")  # after `register`, which belongs to every candidate


class Workshop:
    """Makes and measures chains in `folder`, which has to be the working directory.

    Args:
        folder: a workspace of its own.
        space: of chains.
        run: does the work of stages in order; the state of each that stands made comes back, and why others failed.
    """

    def __init__(self, folder: Path, space: Space, run: Callable[[list[Stage], Lineage], Outcomes]) -> None:
        self._folder, self._space, self._run = folder, space, run
        self._params = YAML(typ="safe", pure=True).load(layout.PARAMS.read_text(encoding="utf-8"))
        self._params["caching"]["candidates"] = []  # a search measures none,
        self._params["compile"] = self._params["serving"] = {}  # and compiles and serves none
        self._base = {name: self._params["candidates"][name] for name in space.params.candidates}
        self._kept: dict[str, Chain] = {}
        self._lineage: Lineage | None = None
        _let_report_read_search()

    def make_reference(self) -> dict[str, Mapping[str, Any]]:
        """The records of the base and of the loaded model it comes from, made if they are not there.

        Raises:
            StageError: they could not be made.
        """
        lineage = self._open([])
        _, failed = self._run(_wanted(lineage, self._space.reference), lineage)
        if failed:
            raise StageError("\n".join(failed.values()))
        return {name: _record(name) for name in self._space.reference}

    def keep(self, chain: Chain) -> None:
        """Counts `chain` among the finished ones."""
        self._kept[self._space.name(chain)] = chain

    def holds(self, chains: Sequence[Chain]) -> bool:
        """Whether DVC finds everything about `chains` as it was recorded."""
        lineage = self._open(chains)
        stages = _wanted(lineage, [self._space.name(chain) for chain in chains]) if chains else []
        return not any(lineage.changes(stage.name) for stage in stages)

    def forecast(self, chain: Chain) -> Forecast:
        """What making and measuring `chain` would take: only what does not stand made yet."""
        lineage = self._open([chain])
        planned = plan(lineage, load_params(layout.PARAMS), self._folder, [self._space.name(chain)])
        due = [item.prediction for item in planned if item.reason and item.stage.candidate]
        known = [prediction.seconds for prediction in due if prediction]
        return Forecast(sum(known), len(due) - len(known))

    def make(self, chain: Chain) -> Outcome:
        """The evaluation record of `chain`, or why there is none."""
        name, lineage = self._space.name(chain), self._open([chain])
        _, failed = self._run(_wanted(lineage, [name]), lineage)
        for stage, reason in failed.items():
            kind, _, candidate = stage.partition("@")
            return Broken(reason, candidate if kind == "compress" else None)
        self.keep(chain)
        return _record(name)

    def publish(self) -> None:
        """Registers what is finished, decides the champions among it and writes the report.

        Raises:
            StageError: that did not go well.
        """
        lineage = self._open([])
        wanted = {stage.name for stage in lineage.stages([*self._space.reference, *self._kept])} | {*ENDINGS}
        stages = [stage for stage in lineage.stages() if stage.name in wanted]
        _, failed = self._run(stages, lineage)
        if failed:
            raise StageError("\n".join(failed.values()))

    def _open(self, chains: Sequence[Chain]) -> Lineage:
        """The graph of the base, of what is finished and of `chains`, from a params.yaml that holds just these."""
        lines = dict(self._base)
        for chain in [*self._kept.values(), *chains]:
            lines |= self._space.candidates(chain)
        if self._lineage is None or lines != self._params["candidates"]:
            if self._lineage is not None:
                self._lineage.close()
            self._params["candidates"] = lines
            with layout.PARAMS.open("w", encoding="utf-8") as stream:
                YAML().dump(self._params, stream)
            self._lineage = Lineage(self._folder)
        return self._lineage


def _wanted(lineage: Lineage, candidates: Sequence[str]) -> list[Stage]:
    """What `candidates` and their records need, without the registration that comes at the end."""
    return [stage for stage in lineage.stages(candidates) if stage.name != "register"]


def _record(candidate: str) -> Mapping[str, Any]:
    return json.loads(layout.metrics(candidate).read_text(encoding="utf-8"))


def _let_report_read_search() -> None:
    """In this workspace the report depends on what the search found; elsewhere there is no such file."""
    yaml, path = YAML(), Path("dvc.yaml")
    graph = yaml.load(path.read_text(encoding="utf-8"))
    graph["stages"]["report"]["deps"].append(str(layout.SEARCH))
    with path.open("w", encoding="utf-8") as stream:
        yaml.dump(graph, stream)
