"""Makes and measures chains in the workspace of a search, whose params.yaml holds the base and the chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ruamel.yaml import YAML

from flows.chains.study import FailedChain, Forecast, Outcome
from flows.engine.lineage import Lineage
from flows.engine.plan import plan
from flows.engine.stage import Stage
from lilliput.errors import StageError
from lilliput.params import load_params
from lilliput.records import EvaluationRecord
from lilliput.search import Chain, Space
from tasks import layout
from tasks.records import read_evaluation

StageResults = tuple[dict[str, str], dict[str, str]]
FINAL_STAGES = ("promote", "report")  # after `register`, which every candidate needs


class ChainRunner:
    """Makes and measures chains in `folder`, which must be the working directory.

    Args:
        folder: the workspace of this search.
        space: of chains.
        run: runs stages in order; returns the states of those up to date, and why others failed (`run_stages`).
    """

    def __init__(self, folder: Path, space: Space, run: Callable[[list[Stage], Lineage], StageResults]) -> None:
        self._folder, self._space, self._run = folder, space, run
        self._params = YAML(typ="safe", pure=True).load(layout.PARAMS.read_text(encoding="utf-8"))
        self._params["caching"]["candidates"] = []  # a search measures no caching,
        self._params["compile"] = self._params["serving"] = {}  # and compiles and serves nothing
        self._base = {name: self._params["candidates"][name] for name in space.params.candidates}
        self._finished: dict[str, Chain] = {}
        self._lineage: Lineage | None = None
        _add_search_to_report()

    def make_reference(self) -> dict[str, EvaluationRecord]:
        """Returns the evaluations of the base and of the loaded model that it comes from; makes them if needed.

        Raises:
            StageError: a stage failed.
        """
        lineage = self._load_graph([])
        _, failed = self._run(_stages_of(lineage, self._space.reference), lineage)
        if failed:
            raise StageError("\n".join(failed.values()))
        return {name: read_evaluation(name) for name in self._space.reference}

    def add_finished(self, chain: Chain) -> None:
        """Adds `chain` to the finished ones."""
        self._finished[self._space.name(chain)] = chain

    def are_current(self, chains: Sequence[Chain]) -> bool:
        """Whether DVC finds no change in any stage of `chains`."""
        lineage = self._load_graph(chains)
        stages = _stages_of(lineage, [self._space.name(chain) for chain in chains]) if chains else []
        return not any(lineage.changes(stage.name) for stage in stages)

    def forecast(self, chain: Chain) -> Forecast:
        """Predicts the time to make and measure `chain`, without the stages that are up to date."""
        lineage = self._load_graph([chain])
        planned = plan(lineage, load_params(layout.PARAMS), self._folder, [self._space.name(chain)])
        due = [item.prediction for item in planned if item.reason and item.stage.candidate]
        known = [prediction.seconds for prediction in due if prediction and not prediction.is_estimate]
        return Forecast(sum(known), len(due) - len(known))

    def make(self, chain: Chain) -> Outcome:
        """Makes and measures `chain`; returns its evaluation record, or why there is none."""
        name, lineage = self._space.name(chain), self._load_graph([chain])
        _, failed = self._run(_stages_of(lineage, [name]), lineage)
        for stage, reason in failed.items():
            kind, _, candidate = stage.partition("@")
            return FailedChain(reason, candidate if kind == "compress" else None)
        self.add_finished(chain)
        return read_evaluation(name)

    def publish(self) -> None:
        """Registers the finished chains, decides the champions among them and writes the report.

        Raises:
            StageError: a stage failed.
        """
        lineage = self._load_graph([])
        wanted = {stage.name for stage in lineage.stages([*self._space.reference, *self._finished])} | {*FINAL_STAGES}
        stages = [stage for stage in lineage.stages() if stage.name in wanted]
        _, failed = self._run(stages, lineage)
        if failed:
            raise StageError("\n".join(failed.values()))

    def _load_graph(self, chains: Sequence[Chain]) -> Lineage:
        """Writes the base, the finished chains and `chains` to params.yaml; returns the graph of just these."""
        lines = dict(self._base)
        for chain in [*self._finished.values(), *chains]:
            lines |= self._space.candidates(chain)
        if self._lineage is None or lines != self._params["candidates"]:
            if self._lineage is not None:
                self._lineage.close()
            self._params["candidates"] = lines
            with layout.PARAMS.open("w", encoding="utf-8") as stream:
                YAML().dump(self._params, stream)
            self._lineage = Lineage(self._folder)
        return self._lineage


def _stages_of(lineage: Lineage, candidates: Sequence[str]) -> list[Stage]:
    """Returns the stages of `candidates` and their evaluations, without the final `register`."""
    return [stage for stage in lineage.stages(candidates) if stage.name != "register"]


def _add_search_to_report() -> None:
    """Makes the report of this workspace depend on the search record, which other folders do not have."""
    yaml, path = YAML(), Path("dvc.yaml")
    graph = yaml.load(path.read_text(encoding="utf-8"))
    graph["stages"]["report"]["deps"].append(str(layout.SEARCH))
    with path.open("w", encoding="utf-8") as stream:
        yaml.dump(graph, stream)
